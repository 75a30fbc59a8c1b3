"""WARP on a causal LM: Algorithm 1 of arXiv 2406.16768 from prompts to a KL-reward front."""

from warp_fast.rl.config import WarpConfig
from warp_fast.rl.warp import warp

__all__ = ["WarpConfig", "warp"]
