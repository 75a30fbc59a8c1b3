"""WARP (Weight Averaged Rewarded Policies, arXiv 2406.16768) with fused ops for RLHF."""

from typing import TYPE_CHECKING, Any

from warp_fast.anchor import EMAAnchor
from warp_fast.ema import ema_update_
from warp_fast.flat import FlatParameters
from warp_fast.loss import (
    WarpLoss,
    linear_token_logprobs,
    linear_warp_loss,
    token_logprobs,
    warp_loss,
)
from warp_fast.slerp import SlerpReport, gram, lerp, slerp, slerp_coefficients

if TYPE_CHECKING:
    from warp_fast.merge import merge_checkpoints

__version__ = "0.1.0"

__all__ = [
    "EMAAnchor",
    "FlatParameters",
    "SlerpReport",
    "WarpLoss",
    "ema_update_",
    "gram",
    "lerp",
    "linear_token_logprobs",
    "linear_warp_loss",
    "merge_checkpoints",
    "slerp",
    "slerp_coefficients",
    "token_logprobs",
    "warp_loss",
]


def __getattr__(name: str) -> Any:
    """Load what most programs do not need when it is first asked for."""
    if name == "merge_checkpoints":
        from warp_fast.merge import merge_checkpoints

        return merge_checkpoints
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
