"""What the Gram matrices of task vectors say of them; the reports of `slerp` and of merges."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TaskVectors:
    """Task vectors delta_m = theta_m - theta_init of M policies, per segment.

    Attributes:
        segments: S names.
        gram: [S, M, M] fp64, <delta_i, delta_j>.
        coefficients: [S, M] fp64, the weight of each in the merge, before eta.
    """

    segments: list[str]
    gram: Tensor
    coefficients: Tensor

    @property
    def norms(self) -> Tensor:
        """[S, M] lengths of the task vectors."""
        return self.gram.diagonal(dim1=1, dim2=2).sqrt()

    @property
    def merged_norms(self) -> Tensor:
        """[S] lengths of the merged task vector at eta = 1."""
        c = self.coefficients
        return torch.einsum("si,sij,sj->s", c, self.gram, c).clamp(min=0).sqrt()

    def _angles(self) -> Tensor:
        """[S, M, M] in radians; NaN where one of the pair is zero."""
        norms = self.norms
        return (self.gram / (norms[:, :, None] * norms[:, None, :])).clamp(-1, 1).acos()
