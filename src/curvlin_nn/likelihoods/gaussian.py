"""The Gaussian likelihood with one noise scale: regression."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from curvlin._check import floating
from curvlin_nn._check import numbers
from curvlin_nn.errors import OutputError
from curvlin_nn.likelihoods import _check
from curvlin_nn.likelihoods.base import Likelihood
from curvlin_nn.likelihoods.registry import register


@register
class Gaussian(Likelihood):
    """``y ~ N(f, sigma^2 Sigma)``; ``Lambda = Sigma^-1`` at sigma = 1, Hessian and Fisher information alike.

    Sigma is the identity unless given, one matrix for the last axis of the outputs. What is fixed is its shape:
    sigma stays outside and scales it.

    Args:
        variances: the diagonal of Sigma: a number, or one for each output of a term.
        covariance: Sigma in full, ``(E, E)``.
    """

    name = "regression"
    has_noise = True
    has_additive_noise = True
    has_link = False

    def __init__(
        self, variances: float | Tensor | None = None, covariance: Float[Tensor, "E E"] | None = None
    ) -> None:
        if variances is not None and covariance is not None:
            raise ValueError("variances and covariance exclude each other; give one")
        self._factor: Tensor | None = None  # L of Sigma = L L^T, or its diagonal
        self._options: dict[str, Any] = {}
        if variances is not None:
            self._options["variances"] = _check.variances("variances", variances)
            self._factor = self._options["variances"].sqrt()
            if self._factor.ndim > 1:
                raise ValueError(
                    f"variances must be a number or one for each output, found shape {tuple(self._factor.shape)}"
                )
        if covariance is not None:
            self._factor = _cholesky(covariance)
            self._options["covariance"] = covariance.detach()
        self.has_noise_by_output = covariance is None

    def options(self) -> dict[str, Any]:
        """See `Likelihood.options`."""
        return dict(self._options)

    def check(self, outputs: Float[Tensor, N * T], targets: Tensor, where: str) -> Float[Tensor, "N R E"]:
        """See `Likelihood.check`."""
        _check.real_targets(targets, where)
        _check.target_shape(targets, outputs.shape, where)
        terms = self.terms(targets)
        if self._factor is not None and self._factor.ndim and len(self._factor) != terms.shape[-1]:
            raise OutputError(
                f"outputs on {where} must have {len(self._factor)} numbers along their last axis like the noise "
                f"covariance, found {terms.shape[-1]}"
            )
        return terms

    def root(self, terms: Float[Tensor, "N R E"], targets: Tensor) -> Float[Tensor, "N R E E"]:
        """``L^-T`` for ``Sigma = L L^T``."""
        root = self._whitened(torch.eye(terms.shape[-1], dtype=torch.float64, device=terms.device))
        return root.to(terms.dtype).expand(*terms.shape, terms.shape[-1])

    def total_curvature(
        self, terms: Float[Tensor, "N R E"], targets: Tensor, weights: Float[Tensor, "N R"] | None
    ) -> Float[Tensor, "E E"]:
        """``Sigma^-1`` for each term."""
        root = self.root(terms[:1, :1], targets)[0, 0]
        count = terms[..., 0].numel() if weights is None else weights.sum()
        return count * (root @ root.mT)

    def draw(
        self, terms: Float[Tensor, "N R E"], targets: Tensor, n_draws: int, generator: torch.Generator | None
    ) -> Float[Tensor, "K N R E"]:
        """See `Likelihood.draw`."""
        noise = torch.randn(
            n_draws, *terms.shape, dtype=terms.dtype, device=terms.device, generator=generator
        )
        return terms + noise @ self._factor_of(terms.shape[-1]).mT.to(terms)

    def score(
        self, terms: Float[Tensor, "N R E"], targets: Float[Tensor, "*K N R E"]
    ) -> Float[Tensor, "*K N R E"]:
        """``Sigma^-1 (f - y)``."""
        residual = terms - targets.to(terms)
        if self._factor is None:
            return residual
        L = self._factor.to(terms)
        if L.ndim < 2:
            return residual / L.square()
        return torch.cholesky_solve(residual.reshape(-1, len(L)).mT, L).mT.reshape(residual.shape)

    def log_prob(
        self, terms: Float[Tensor, "N R E"], targets: Float[Tensor, "N R E"]
    ) -> Float[Tensor, "N R"]:
        """``- (y - f)^T Sigma^-1 (y - f) / 2 - logdet(2 pi Sigma) / 2``."""
        squares = self._whitened(targets.to(terms) - terms).square().sum(-1)
        return -(squares + terms.shape[-1] * math.log(2 * math.pi) + self._logdet(terms.shape[-1])) / 2

    def statistics(self, outputs: Float[Tensor, N * T], targets: Tensor) -> Float[Tensor, " K"]:
        """The number of terms, then the sum of squares of each entry of the residuals ``L^-1 (y - f)``."""
        terms = self.terms(outputs).double()
        squares = self._whitened(targets.double() - terms).square().sum((0, 1))
        return torch.cat([squares.new_full((1,), terms[..., 0].numel()), squares])

    def log_likelihood(
        self, statistics: Float[Tensor, " K"], sigma_noise: Float[Tensor, "*E"]
    ) -> Float[Tensor, ""]:
        """``- sum r^T Sigma^-1 r / (2 sigma^2) - logdet(2 pi sigma^2 Sigma) / 2``, summed over terms.

        With one sigma for each entry, sigma^2 stands for the diagonal matrix of these.
        """
        n_terms, squares = statistics[0], statistics[1:]
        variance = sigma_noise.double().square().to(squares.device).expand(len(squares))
        logdet = torch.log(2 * math.pi * variance).sum() + self._logdet(len(squares))
        return -((squares / variance).sum() + n_terms * logdet) / 2

    def link(self, terms: Float[Tensor, "*batch E"]) -> Float[Tensor, "*batch E"]:
        """The outputs themselves."""
        return terms

    def noise_covariance(
        self, mean: Float[Tensor, "N C"], covariance: Float[Tensor, "N C C"] | None
    ) -> Float[Tensor, "C C"]:
        """Sigma for each term of a sample."""
        n_outputs = mean.shape[-1]
        event = len(self._factor) if self._factor is not None and self._factor.ndim else n_outputs
        L = self._factor_of(event)
        return torch.block_diag(*[L @ L.mT] * (n_outputs // event)).to(mean)

    def _whitened(self, rows: Float[Tensor, "*batch E"]) -> Float[Tensor, "*batch E"]:
        """``rows L^-T``."""
        if self._factor is None:
            return rows
        L = self._factor.to(rows)
        return rows / L if L.ndim < 2 else torch.linalg.solve_triangular(L.mT, rows, upper=True, left=False)

    def _factor_of(self, event: int) -> Float[Tensor, "E E"]:
        """L as a matrix."""
        if self._factor is None:
            return torch.eye(event, dtype=torch.float64)
        return self._factor if self._factor.ndim == 2 else torch.diag(self._factor.expand(event))

    def _logdet(self, event: int) -> float:
        """``logdet Sigma``."""
        if self._factor is None:
            return 0.0
        diagonal = self._factor.diagonal() if self._factor.ndim == 2 else self._factor.expand(event)
        return 2 * float(diagonal.log().sum())


def _cholesky(covariance: object) -> Float[Tensor, "E E"]:
    """L of a covariance matrix, float64.

    Raises:
        ValueError: if it is not a symmetric, positive definite matrix.
    """
    Sigma = floating("covariance", numbers("covariance", covariance)).detach().double()
    if Sigma.ndim != 2 or not torch.equal(Sigma, Sigma.mT):
        raise ValueError(
            f"covariance must be a symmetric matrix, found shape {tuple(Sigma.shape)}; symmetrise it with "
            "(S + S.mT) / 2"
        )
    L, info = torch.linalg.cholesky_ex(Sigma)
    if int(info):
        lowest = float(torch.linalg.eigvalsh(Sigma)[0])
        raise ValueError(f"covariance must be positive definite, found the eigenvalue {lowest:.3g}")
    return L
