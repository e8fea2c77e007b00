"""Predictions on the coordinates of a feature map, with the prior variance that its features leave out.

    Cov[f(x), f(x')] = Phi P^-1 Phi'^T + (kappa(x, x') - Phi Phi'^T) / delta

With ``Phi = J V`` and orthonormal V data speak about V only, and weights orthogonal to it keep their prior
``N(0, I / delta)``: the second term, the *residual*. Without it variances vanish where features do, which is far from
the data first. (Sharma et al., 2021, have it for a sketched curvature; a Gaussian process of inducing points, in the
difference ``k(x, x) - q(x, x)``.)

It is exact between all inputs for orthonormal maps. That of other maps need not be a covariance: it is taken for each
input alone, with eigenvalues clamped at zero, and what was clamped is reported.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from curvlin import FeatureOperator, Isotropic
from curvlin_nn.input_parts import in_parts
from curvlin_nn.predictive import Predictive
from curvlin_nn.predictive.draws import some_at_a_time
from curvlin_nn.predictive.linearised import FEATURE_BUDGET
from curvlin_nn.predictive.links import draw


@dataclass(frozen=True)
class Residual:
    """The prior variance that features leave out.

    Attributes:
        covariance: of the outputs of each sample, positive semidefinite up to rounding.
        clamped: for each sample, the sum of the negative eigenvalues that were set to zero, as a positive fraction of
            the trace of ``kappa(x, x)``. Zero for orthonormal maps, which have none: nothing is clamped there.
    """

    covariance: Float[Tensor, "N C C"]
    clamped: Float[Tensor, " N"]


@dataclass(frozen=True)
class ResidualPredictive(Predictive):
    """The linearised posterior on features, with the residual prior variance.

    Differences of kernels are taken in float64 whatever the network's dtype.

    Attributes:
        prior_precision: delta.
    """

    prior_precision: float = 1.0

    def mean_and_covariance(self, x: Any) -> tuple[Float[Tensor, "N C"], Float[Tensor, "N C C"]]:
        """See `Predictive.mean_and_covariance`."""
        parts = [
            (f, self._informed(Phi) + self._residual(Phi, J).covariance.to(f.dtype))
            for f, Phi, J in self._parts(x)
        ]
        return torch.cat([f for f, _ in parts]), torch.cat([covariance for _, covariance in parts])

    def mean_and_variance(self, x: Any) -> tuple[Float[Tensor, "N C"], Float[Tensor, "N C"]]:
        """See `Predictive.mean_and_variance`."""
        parts = []
        for f, Phi, J in self._parts(x):
            if self.feature_map.orthonormal:
                left_out = (_squares(J) - _squares(Phi)) / self.prior_precision
            else:
                left_out = self._residual(Phi, J).covariance.diagonal(dim1=1, dim2=2)
            informed = self.precision.inv_congruence_diagonal(Phi.to(self.precision.dtype))
            parts.append((f, informed + left_out.to(f.dtype)))
        return torch.cat([f for f, _ in parts]), torch.cat([variance for _, variance in parts])

    def joint(self, x: Any) -> tuple[Float[Tensor, " NC"], Float[Tensor, "NC NC"]]:
        """See `Predictive.joint`; the residual of a learned map is that of each sample alone."""
        f, Phi, J = self.feature_map.with_jacobian(x)
        covariance = self.precision.inv_congruence(Phi.to(self.precision.dtype), joint=True)
        covariance = covariance.reshape(f.numel(), f.numel())
        if self.feature_map.orthonormal:
            left_out = ((J.gram() - Phi.gram()) / self.prior_precision).reshape(f.numel(), f.numel())
        else:
            left_out = torch.block_diag(*self._residual(Phi, J).covariance)
        return f.flatten(), covariance + left_out.to(f.dtype)

    def samples(
        self, x: Any, n_samples: int, generator: torch.Generator | None = None
    ) -> Float[Tensor, "S N C"]:
        """See `Predictive.samples`.

        The residual of an orthonormal map is drawn as weights, so that draws are functions as well; that of a learned
        map is drawn for each sample alone, and anew for every x.
        """
        if self.feature_map.orthonormal:
            return self._functions(x, n_samples, generator)
        coordinates = self.precision.sample((n_samples,), generator=generator)
        rows = []
        for f, Phi, J in self._parts(x):
            functions = f + (Phi.to(coordinates.dtype) @ coordinates.mT).movedim(-1, 0)
            left_out = self._residual(Phi, J).covariance
            rows.append(functions + draw(torch.zeros_like(f), left_out, n_samples, generator))
        return torch.cat(rows, dim=1)

    def residual(self, x: Any) -> Residual:
        """The residual prior variance at x."""
        parts = [self._residual(Phi, J) for _, Phi, J in self._parts(x)]
        return Residual(torch.cat([p.covariance for p in parts]), torch.cat([p.clamped for p in parts]))

    def _functions(self, x: Any, n_samples: int, generator: torch.Generator | None) -> Float[Tensor, "S N C"]:
        """``f + Phi z + J (I - V V^T) w``, with z of the posterior and w of the prior."""
        jacobian = self.feature_map.jacobian
        assert jacobian is not None
        parts = []
        for some in some_at_a_time(n_samples, jacobian.size):
            z = self.precision.sample((some,), generator=generator)
            w = torch.randn((some, jacobian.size), dtype=torch.float64, device=z.device, generator=generator)
            w = w.mT / self.prior_precision**0.5
            z = z.mT.double() - self.feature_map.project(w)
            rows = [f + ((Phi @ z) + (J @ w)).movedim(-1, 0).to(f.dtype) for f, Phi, J in self._parts(x)]
            parts.append(torch.cat(rows, dim=1))
        return torch.cat(parts)

    def _informed(self, Phi: FeatureOperator) -> Float[Tensor, "N C C"]:
        return self.precision.inv_congruence(Phi.to(self.precision.dtype))

    def _residual(self, Phi: FeatureOperator, J: FeatureOperator) -> Residual:
        kappa = _kernel(J)
        left_out = (kappa - _kernel(Phi)) / self.prior_precision
        if self.feature_map.orthonormal:
            return Residual(left_out, left_out.new_zeros(len(left_out)))
        values, vectors = torch.linalg.eigh(left_out)
        trace = kappa.diagonal(dim1=1, dim2=2).sum(1) / self.prior_precision
        clamped = (-values.clamp(max=0)).sum(1) / trace.clamp(min=torch.finfo(trace.dtype).tiny)
        positive = (vectors * values.clamp(min=0).unsqueeze(-2)) @ vectors.mT
        return Residual(positive, clamped)

    def _parts(self, x: Any) -> Iterator[tuple[Tensor, FeatureOperator, FeatureOperator]]:
        """Outputs, features and Jacobian of x, a bounded number of samples at a time."""
        return in_parts(
            x,
            self.feature_map.with_jacobian,
            n_samples=self.feature_map.n_samples,
            entries=lambda found: sum(t.numel() for Phi in found[1:] for t, _ in Phi._tensors()),
            budget=FEATURE_BUDGET,
            progress_bar=self.progress_bar,
        )


def _kernel(Phi: FeatureOperator) -> Float[Tensor, "N C C"]:
    """``Phi Phi^T`` of each sample."""
    return Isotropic(_one(Phi), Phi.size).inv_congruence(Phi)


def _squares(Phi: FeatureOperator) -> Float[Tensor, "N C"]:
    """The diagonal of the kernel."""
    return Isotropic(_one(Phi), Phi.size).inv_congruence_diagonal(Phi)


def _one(Phi: FeatureOperator) -> Float[Tensor, ""]:
    return torch.ones((), dtype=Phi.dtype, device=Phi.device)
