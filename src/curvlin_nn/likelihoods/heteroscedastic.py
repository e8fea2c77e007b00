"""The Gaussian likelihood whose mean and variance are both outputs: heteroscedastic regression."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from curvlin_nn.errors import OutputError
from curvlin_nn.likelihoods import _check
from curvlin_nn.likelihoods.base import Likelihood, LinkApproximation
from curvlin_nn.likelihoods.registry import register


def predictive_moments(
    mean: Float[Tensor, "N 2D"], covariance: Float[Tensor, "N 2D 2D"]
) -> tuple[Float[Tensor, "N D"], Float[Tensor, "N D"]]:
    """Mean and variance of the targets under Gaussian outputs, exactly.

    With ``(f_1, f_2) ~ N(m, V)`` of a term, exponential tilting gives ``E exp(-k f_2) = exp(-k m_2 + k^2 V_22 / 2)``,
    under which ``f_1`` has mean ``m_1 - k V_12`` and variance ``V_11``:

        E y   = E f_1 exp(-f_2)
        Var y = E exp(-f_2) + E f_1^2 exp(-2 f_2) - (E y)^2
    """
    m_1, m_2 = mean.chunk(2, dim=-1)
    V_11, V_22 = covariance.diagonal(dim1=-2, dim2=-1).chunk(2, dim=-1)
    V_12 = covariance[..., : m_1.shape[-1], m_1.shape[-1] :].diagonal(dim1=-2, dim2=-1)
    noise = torch.exp(-m_2 + V_22 / 2)
    first = noise * (m_1 - V_12)
    # E f_1^2 exp(-2 f_2) - (E y)^2 with (m_1 - 2 V_12)^2 - (m_1 - V_12)^2 taken together: small V cancel nothing
    spread = (
        torch.exp(V_22) * V_11 + torch.expm1(V_22) * (m_1 - 2 * V_12).square() - V_12 * (2 * m_1 - 3 * V_12)
    )
    return first, noise + torch.exp(-2 * m_2 + V_22) * spread


def predictive_mean(
    mean: Float[Tensor, "N 2D"], covariance: Float[Tensor, "N 2D 2D"]
) -> Float[Tensor, "N D"]:
    """The first of `predictive_moments`."""
    return predictive_moments(mean, covariance)[0]


@register
class HeteroscedasticGaussian(Likelihood):
    """``y ~ N(mu, 1/tau)`` in natural parameters: ``eta_1 = mu tau = f_1``, ``eta_2 = -tau / 2``, ``tau = exp(f_2)``.

    Outputs ``(N, *T, 2D)`` hold ``f_1`` of all D targets, then ``f_2``: the logarithm of the precision, so that every
    output is allowed, linearised ones too, and moments of ``y`` have closed forms.

    In ``(eta_1, eta_2)`` the Hessian is the covariance of ``(y, y^2)``, whatever the target (Immer et al., 2023,
    Effective Bayesian heteroscedastic regression with deep neural networks). In ``(f_1, f_2)`` it has a further term in
    ``d^2 eta_2 / d f_2^2`` that depends on the target and makes it indefinite. Lambda is the Fisher information, which
    leaves out that term, whose mean is zero:

        Lambda = [[1 / tau, -mu], [-mu, mu^2 tau + 1/2]]
    """

    name = "heteroscedastic"
    link_approximations: Mapping[str, LinkApproximation] = {"exact": predictive_mean}
    link_takes_covariance = True

    def check(self, outputs: Float[Tensor, "N *T 2D"], targets: Tensor, where: str) -> Float[Tensor, "N R"]:
        """See `Likelihood.check`."""
        if outputs.ndim < 2 or outputs.shape[-1] % 2:
            raise OutputError(
                f"outputs on {where} must hold two numbers for each target along their last axis, mean times "
                f"precision and log-precision, found shape {tuple(outputs.shape)}"
            )
        f_2 = self.terms(outputs)[..., 1]
        lost = ~torch.isfinite(f_2.abs().exp())
        if bool(lost.any()):
            raise OutputError(
                f"outputs on {where} must hold logarithms of precisions in the range of {outputs.dtype}, found "
                f"{float(f_2[lost][0]):.4g}"
            )
        _check.real_targets(targets, where)
        _check.target_shape(targets, torch.Size([*outputs.shape[:-1], outputs.shape[-1] // 2]), where)
        return targets.reshape(len(targets), -1)

    def terms(self, outputs: Float[Tensor, "N *T 2D"]) -> Float[Tensor, "N R 2"]:
        """See `Likelihood.terms`."""
        return outputs.unflatten(-1, (2, -1)).transpose(-1, -2).reshape(len(outputs), -1, 2)

    def outputs(
        self, terms: Float[Tensor, "*V N R 2"], like: Float[Tensor, "N *T 2D"]
    ) -> Float[Tensor, "*V N *T 2D"]:
        """See `Likelihood.outputs`."""
        by_target = terms.reshape(*terms.shape[:-3], *like.shape[:-1], -1, 2)
        return by_target.transpose(-1, -2).flatten(-2)

    def root(self, terms: Float[Tensor, "N R 2"], targets: Tensor) -> Float[Tensor, "N R 2 2"]:
        """The Cholesky factor ``[[tau^-1/2, 0], [-mu tau^1/2, 2^-1/2]]``."""
        mu, tau = _mean_and_precision(terms)
        first = torch.stack([tau.rsqrt(), -mu * tau.sqrt()], dim=-1)
        second = torch.stack([torch.zeros_like(mu), torch.full_like(mu, 0.5**0.5)], dim=-1)
        return torch.stack([first, second], dim=-1)

    def draw(
        self, terms: Float[Tensor, "N R 2"], targets: Tensor, n_draws: int, generator: torch.Generator | None
    ) -> Float[Tensor, "K N R"]:
        """See `Likelihood.draw`."""
        mu, tau = _mean_and_precision(terms)
        noise = torch.randn(n_draws, *mu.shape, dtype=mu.dtype, device=mu.device, generator=generator)
        return mu + noise * tau.rsqrt()

    def score(
        self, terms: Float[Tensor, "N R 2"], targets: Float[Tensor, "*K N R"]
    ) -> Float[Tensor, "*K N R 2"]:
        """``(mu - y, (tau (y - mu) (y + mu) - 1) / 2)``."""
        mu, tau = _mean_and_precision(terms)
        y = targets.to(terms)
        return torch.stack([mu - y, (tau * (y - mu) * (y + mu) - 1) / 2], dim=-1)

    def log_prob(self, terms: Float[Tensor, "N R 2"], targets: Float[Tensor, "N R"]) -> Float[Tensor, "N R"]:
        """``- tau (y - mu)^2 / 2 + f_2 / 2 - log(2 pi) / 2``."""
        mu, tau = _mean_and_precision(terms)
        return (terms[..., 1] - tau * (targets.to(terms) - mu).square() - math.log(2 * math.pi)) / 2

    def link(self, outputs: Float[Tensor, "*batch 2D"]) -> Float[Tensor, "*batch D"]:
        """The mean."""
        f_1, f_2 = outputs.chunk(2, dim=-1)
        return f_1 * torch.exp(-f_2)


def _mean_and_precision(terms: Float[Tensor, "N R 2"]) -> tuple[Float[Tensor, "N R"], Float[Tensor, "N R"]]:
    """``mu`` and ``tau``."""
    f_1, f_2 = terms.unbind(-1)
    return f_1 * torch.exp(-f_2), torch.exp(f_2)
