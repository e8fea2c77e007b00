"""What a variational fit of the linearised network leaves."""

from __future__ import annotations

from dataclasses import dataclass

from curvlin_nn.capture import Recorder
from curvlin_nn.fingerprint import Fingerprint
from curvlin_nn.variational.bound import Sparse
from curvlin_nn.variational.inducing import InducingPoints
from curvlin_nn.variational.training import TrainingHistory


@dataclass(frozen=True)
class Fitted:
    """A posterior around a model.

    Attributes:
        sparse: its precision.
        points: where its rows are taken.
        recorder: of the model.
        fingerprint: of the model as it was.
        history: how it went.
        n_data: the number of training samples.
    """

    sparse: Sparse
    points: InducingPoints
    recorder: Recorder
    fingerprint: Fingerprint
    history: TrainingHistory
    n_data: int
