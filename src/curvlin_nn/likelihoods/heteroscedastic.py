"""The Gaussian likelihood whose mean and variance are both outputs: heteroscedastic regression."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from curvlin_nn.errors import OutputError
from curvlin_nn.likelihoods import _check
from curvlin_nn.likelihoods.base import Likelihood
from curvlin_nn.likelihoods.registry import register


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
    has_additive_noise = True
    has_link = False
    is_linear = False

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

    def link(self, terms: Float[Tensor, "*batch 2"]) -> Float[Tensor, "*batch 1"]:
        """The mean."""
        return _mean_and_precision(terms)[0][..., None]

    def moments(
        self, mean: Float[Tensor, "N 2D"], covariance: Float[Tensor, "N 2D 2D"]
    ) -> tuple[Float[Tensor, "N D"], Float[Tensor, "N D D"]]:
        """Mean and covariance of ``mu = f_1 exp(-f_2)`` under Gaussian outputs, exactly.

        Weighting a normal distribution by ``exp(-u)`` shifts means by their covariance with u (exponential tilting):
        with ``f_1, f_2`` of one target and ``g_1, g_2`` of another,

            E mu_f      = exp(-E f_2 + Var f_2 / 2) (E f_1 - Cov(f_1, f_2))
            E mu_f mu_g = exp(-E u + Var u / 2) ((E f_1 - Cov(f_1, u)) (E g_1 - Cov(g_1, u)) + Cov(f_1, g_1))

        for ``u = f_2 + g_2``. Of their difference, what is of the size of ``mu^2`` is taken together before it cancels.
        """
        m_1, m_2 = mean.chunk(2, dim=-1)
        V_11, V_12, V_22 = _blocks(covariance)
        own = V_12.diagonal(dim1=-2, dim2=-1)  # Cov(f_1, f_2)
        tilted = m_1 - own
        scale = torch.exp(-m_2 + V_22.diagonal(dim1=-2, dim2=-1) / 2)
        # exp(Var u / 2) = exp(Var f_2 / 2 + Var g_2 / 2) exp(Cov(f_2, g_2)); row: f, column: g.
        row, column = tilted[..., :, None] - V_12, tilted[..., None, :] - V_12.mT
        rest = V_12 * V_12.mT - tilted[..., :, None] * V_12.mT - V_12 * tilted[..., None, :]
        spread = torch.expm1(V_22) * row * column + rest + torch.exp(V_22) * V_11
        return scale * tilted, scale[..., :, None] * scale[..., None, :] * spread

    def noise_covariance(
        self, mean: Float[Tensor, "N 2D"], covariance: Float[Tensor, "N 2D 2D"] | None
    ) -> Float[Tensor, "N D D"]:
        """``E 1/tau = exp(-E f_2 + Var f_2 / 2)`` of each target."""
        assert covariance is not None
        variance = _blocks(covariance)[2].diagonal(dim1=-2, dim2=-1)
        return torch.diag_embed(torch.exp(-mean.chunk(2, dim=-1)[1] + variance / 2))


def _blocks(
    covariance: Float[Tensor, "N 2D 2D"],
) -> tuple[Float[Tensor, "N D D"], Float[Tensor, "N D D"], Float[Tensor, "N D D"]]:
    """Covariances of ``f_1`` with ``f_1``, of ``f_1`` with ``f_2``, and of ``f_2`` with ``f_2``."""
    (V_11, V_12), (_, V_22) = (half.chunk(2, dim=-1) for half in covariance.chunk(2, dim=-2))
    return V_11, V_12, V_22


def _mean_and_precision(terms: Float[Tensor, "N R 2"]) -> tuple[Float[Tensor, "N R"], Float[Tensor, "N R"]]:
    """``mu`` and ``tau``."""
    f_1, f_2 = terms.unbind(-1)
    return f_1 * torch.exp(-f_2), torch.exp(f_2)
