"""Merging of checkpoint directories, streamed: headers checked first, memory bounded."""

from warp_fast.merge.checkpoint import CheckpointError
from warp_fast.merge.merge import merge_checkpoints
from warp_fast.merge.mergekit import read_mergekit
from warp_fast.merge.report import MergeReport

__all__ = ["CheckpointError", "MergeReport", "merge_checkpoints", "read_mergekit"]
