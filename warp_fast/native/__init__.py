"""Launchers of warp_fast._C, one file per op: tensors in, addresses and dtype codes out."""
