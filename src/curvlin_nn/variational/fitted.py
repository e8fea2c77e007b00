"""What a variational fit of the linearised network leaves."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from jaxtyping import Float
from torch import Tensor

from curvlin import Isotropic, Woodbury
from curvlin.precision.base import PrecisionOperator
from curvlin_nn.capture import Recorder
from curvlin_nn.fingerprint import Fingerprint
from curvlin_nn.variational.bound import Sparse
from curvlin_nn.variational.dual import Dual
from curvlin_nn.variational.inducing import InducingPoints
from curvlin_nn.variational.training import TrainingHistory


@dataclass(frozen=True)
class Fitted:
    """A posterior around a model.

    Attributes:
        sparse: its precision, as it is trained.
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

    @property
    def dual(self) -> Dual:
        """What the inducing points take from the prior."""
        return self.sparse.dual

    @property
    def sigma_noise(self) -> Float[Tensor, "*E"]:
        """The noise scale."""
        return self.sparse.sigma_noise

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Of one sample's outputs, at the input that the recorder saw last."""
        return self.recorder.output_shape or (1,)

    @cached_property
    def precision(self) -> PrecisionOperator:
        """Of the weights, factored, in the dtype of the model."""
        q = self.sparse
        delta = q.prior_precision.to(q.rows.dtype)
        core = (q.root @ q.root.mT).to(q.rows.dtype)
        return Woodbury(Isotropic(delta, q.rows.size), q.rows, core=core).factor()
