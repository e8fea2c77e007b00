"""What the fit of an `FMGP` leaves."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from curvlin_nn.fingerprint import Fingerprint
from curvlin_nn.variational.fixed_mean_gp import FixedMeanGP, SparseCovariance
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
