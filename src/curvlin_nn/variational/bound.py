"""What VaLLA is trained on: the expected likelihood of a batch, and the divergence from the prior.

Everything is a kernel between a batch and the inducing points; nothing of size P is formed. The trained numbers have
the scale of one, whatever the network's: ``L = sqrt(delta / s) D (I + T)`` with s the mean diagonal of ``kappa_Z`` at
the start, D diagonal and positive, T strictly lower triangular. In these coordinates H does not depend on delta, which
scales the covariance and nothing else. At first ``A = (N / M) lambda I``, with lambda the mean curvature of the
likelihood in an output: each inducing point stands for N / M samples.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from curvlin import FeatureOperator, Isotropic
from curvlin_nn.capture import Recorder, Recording
from curvlin_nn.errors import DataError, OutputError
from curvlin_nn.feature_maps.jacobian import rows_of_outputs
from curvlin_nn.likelihoods import Likelihood
from curvlin_nn.variational.dual import Dual
from curvlin_nn.variational.expected_likelihood import couples_outputs, log_expected_likelihood
from curvlin_nn.variational.inducing import InducingPoints

HYPERPARAMETER_RATE = 10.0
"""How much faster the logarithms of delta and sigma are learned: they begin decades away, where the others do not."""


@dataclass(frozen=True)
class Sparse:
    """``P = delta I + J_Z^T L L^T J_Z``, and the noise around the outputs; differentiable in everything.

    Attributes:
        rows: J_Z, ``(M, 1, P)``.
        root: L, float64.
        prior_precision: delta, float64.
        sigma_noise: float64.
    """

    rows: FeatureOperator
    root: Float[Tensor, "M M"]
    prior_precision: Float[Tensor, ""]
    sigma_noise: Float[Tensor, "*E"]

    @cached_property
    def _exact_rows(self) -> FeatureOperator:
        """In float64, where rounding grows with the condition of what is solved for."""
        return self.rows.to(torch.float64)

    @cached_property
    def dual(self) -> Dual:
        """The same by the kernel ``kappa / delta``."""
        kernel = self._exact_rows.gram().flatten(2).flatten(0, 1)
        return Dual(kernel / self.prior_precision, self.root)

    def expected_likelihood(
        self, recorder: Recorder, likelihood: Likelihood, x: Any, targets: Tensor, where: str
    ) -> Float[Tensor, " N"]:
        """``log E p(y_n | f_n)`` of each sample of a batch.

        Raises:
            DataError: if the targets do not fit.
            OutputError: if the outputs do not, or are not finite.
        """
        recording = recorder(x, where)
        outputs, Phi = recording.outputs, rows_of_outputs(recording)
        targets = likelihood.check(outputs, targets, where)
        coupled = couples_outputs(likelihood)
        # Noise may be far below the prior's variance; what a link takes are variances beside one, within the range.
        exact = coupled or torch.finfo(Phi.dtype).bits < 32
        Phi, rows = (Phi.to(torch.float64), self._exact_rows) if exact else (Phi, self.rows)
        prior = Isotropic(torch.ones((), dtype=Phi.dtype, device=Phi.device), Phi.size)
        E = self.dual.explained(Phi.gram(rows).squeeze(-1).double() / self.prior_precision)
        if coupled:
            spread = prior.inv_congruence(Phi) / self.prior_precision - E @ E.mT
        else:
            variances = prior.inv_congruence_diagonal(Phi).double() / self.prior_precision
            spread = (variances - E.square().sum(-1)).clamp(min=0)
        return log_expected_likelihood(likelihood, outputs.double(), spread, targets, self.sigma_noise)


def mean_curvature(
    likelihood: Likelihood, recording: Recording, targets: Tensor, sigma_noise: Float[Tensor, "*E"]
) -> Float[Tensor, ""]:
    """The mean diagonal entry of Lambda over the outputs of a batch, float64.

    Raises:
        DataError: if the targets do not fit.
        OutputError: if the outputs do not.
    """
    targets = likelihood.check(recording.outputs, targets, "batch 0")
    terms = likelihood.terms(recording.outputs).double()
    return (likelihood.curvature_diagonal(terms, targets) / sigma_noise.to(terms).square()).mean()


class Variables:
    """The numbers that are trained, as they are now.

    Args:
        recorder: of the model.
        points: where the inducing points are.
        prior_precision: delta.
        sigma_noise: of the outputs.
        curvature: the multiple of the identity that A is at first.
    """

    def __init__(
        self,
        recorder: Recorder,
        points: InducingPoints,
        prior_precision: Float[Tensor, ""],
        sigma_noise: Float[Tensor, "*E"],
        curvature: Float[Tensor, ""],
    ) -> None:
        self._recorder, self._points = recorder, points
        try:
            self._rows = points.rows(recorder)
        except RuntimeError as error:
            if type(error) is not RuntimeError:  # ours say more
                raise
            raise DataError(
                f"the model does not take the inducing points: {str(error).partition(chr(10))[0]}; give inputs like "
                "those of the data"
            ) from error
        kernel = self._rows.to(torch.float64).gram().flatten(2).flatten(0, 1)
        device = kernel.device
        self._scale = float(kernel.diagonal().mean())
        if not self._scale > 0:
            raise OutputError(
                "the Jacobian at the inducing points is zero, expected outputs that depend on the parameters there"
            )
        M = len(points)
        self.log_precision = prior_precision.detach().double().to(device).log()
        self.log_noise = sigma_noise.detach().double().to(device).log()
        at_first = curvature.detach().double().to(device).clamp(min=torch.finfo(torch.float64).tiny)
        self.log_diagonal = ((at_first * self._scale).log() - self.log_precision).repeat(M) / 2
        self.below = torch.zeros(M, M, dtype=torch.float64, device=device)
        self.inputs = points.inputs

    def groups(
        self, lr: float, *, prior_precision: bool, noise: bool, inducing: bool
    ) -> list[dict[str, Any]]:
        """What an optimiser gets, with gradients from now on, and learning rates."""
        if inducing:
            # As all that is trained: in half precision steps are lost, and the optimiser divides by zero.
            self.inputs = self._points.inputs.to(torch.float64, copy=True)
        many = [self.log_diagonal, self.below, *([self.inputs] if inducing else [])]
        few = [*([self.log_precision] if prior_precision else []), *([self.log_noise] if noise else [])]
        for tensor in (*many, *few):
            tensor.requires_grad_()
        groups: list[dict[str, Any]] = [{"params": many, "lr": lr}]
        return [*groups, {"params": few, "lr": HYPERPARAMETER_RATE * lr}] if few else groups

    @property
    def points(self) -> InducingPoints:
        """Where the inducing points are now."""
        if not self._moving:
            return self._points
        return replace(self._points, inputs=self.inputs.detach().to(self._points.inputs.dtype, copy=True))

    @property
    def _moving(self) -> bool:
        return isinstance(self.inputs, Tensor) and self.inputs.requires_grad

    def sparse(self) -> Sparse:
        """The posterior that the numbers stand for.

        Raises:
            FloatingPointError: if there is none.
        """
        rows = self._rows
        if self._moving:
            try:
                points = replace(self._points, inputs=self.inputs.to(self._points.inputs.dtype))
                rows = points.rows(self._recorder, differentiable=torch.is_grad_enabled())
            except OutputError as error:
                raise FloatingPointError(str(error)) from error
        delta, sigma = self.log_precision.exp(), self.log_noise.exp()
        for name, value in (("prior precision", delta), ("noise scale", sigma)):
            if not bool(((value > 0) & torch.isfinite(value)).all()):
                raise FloatingPointError(f"found a {name} of {value.tolist()}")
        lower = torch.eye(len(self.below)).to(self.below) + self.below.tril(-1)
        root = (delta / self._scale).sqrt() * self.log_diagonal.exp().unsqueeze(-1) * lower
        return Sparse(rows, root, delta, sigma)
