"""WARP (Weight Averaged Rewarded Policies, arXiv 2406.16768) with fused ops for RLHF."""

from warp_fast.anchor import EMAAnchor
from warp_fast.ema import ema_update_
from warp_fast.flat import FlatParameters
from warp_fast.slerp import SlerpReport, gram, lerp, slerp, slerp_coefficients

__version__ = "0.1.0"

__all__ = [
    "EMAAnchor",
    "FlatParameters",
    "SlerpReport",
    "ema_update_",
    "gram",
    "lerp",
    "slerp",
    "slerp_coefficients",
]
