"""What the fit of an `FMGP` leaves."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from curvlin_nn.fingerprint import Fingerprint
from curvlin_nn.variational.dual import Dual
from curvlin_nn.variational.fixed_mean_gp import FixedMeanGP, SparseCovariance
from curvlin_nn.variational.inducing import InducingPoints
from curvlin_nn.variational.training import TrainingHistory


@dataclass(frozen=True)
class FixedMeanFitted:
    """A network's output with a covariance around it.

    Attributes:
        gp: the numbers that were learned.
        covariance: as they make it.
        output_shape: of one sample's outputs.
        sample_shape: of one input.
        fingerprint: of the model.
        history: of the training.
        n_data: the number of samples.
    """

    gp: FixedMeanGP
    covariance: SparseCovariance
    output_shape: tuple[int, ...]
    sample_shape: torch.Size
    fingerprint: Fingerprint
    history: TrainingHistory
    n_data: int

    @property
    def n_inputs(self) -> int:
        """The numbers of one sample."""
        return self.sample_shape.numel()

    @property
    def dual(self) -> Dual:
        """What the inducing variables take from the prior."""
        return self.covariance.dual

    @property
    def points(self) -> InducingPoints:
        """The inducing inputs, and the output that each stands for."""
        Z = self.gp.points.detach()[:, : self.n_inputs]
        return InducingPoints(Z.reshape(-1, *self.sample_shape), self.gp.outputs)

    @property
    def sigma_noise(self) -> Float[Tensor, "*E"]:
        """The noise scale."""
        return self.gp.sigma_noise.detach()
