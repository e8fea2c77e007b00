"""A likelihood from any log-probability, by automatic differentiation."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import grad, hessian, vmap

from curvlin_nn.errors import DataError, OutputError, UnsupportedError, one_of
from curvlin_nn.likelihoods.base import Likelihood, LinkApproximation

LogProb = Callable[[Tensor, Tensor], Tensor]
"""``(outputs (E,) or (), target) -> log-probability ()`` of one term; mapped with `torch.vmap`."""

Sampler = Callable[[Tensor, int, "torch.Generator | None"], Tensor]
"""``(terms (N, R, E) or (N, R), n_draws, generator) -> targets (n_draws, N, R, ...)``."""

POLICIES = ("raise", "clip")
"""What to do with negative eigenvalues of a Hessian."""


class Custom(Likelihood):
    """The family that a log-probability defines.

    Lambda is the Hessian of ``-log_prob`` of each term at its target. Where that is indefinite, it is no generalised
    Gauss-Newton matrix: the policy "raise" says so, "clip" takes the positive part and counts what it cuts away.
    Monte-Carlo columns give the Fisher information instead, which is positive semidefinite always.

    Args:
        log_prob: the normalised log-probability of one term: its outputs, ``(E,)`` or ``()``, and its target. It is
            mapped and differentiated by `torch.func`; of distributions in torch, `validate_args=False` is needed.
        event_ndim: 1 where the last axis of the outputs belongs to one term, 0 where each output is a term.
        target_ndim: the number of axes of one term's target.
        sample: draws targets, for Monte-Carlo columns.
        link: the mean of the output distribution of terms ``(*, E)``, of the same shape; None reports moments of the
            outputs as predictions.
        link_approximations: closed forms of the expected link by name, the default first.
        indefinite: ``"raise"`` or ``"clip"``.
    """

    name = "custom"

    def __init__(
        self,
        log_prob: LogProb,
        *,
        event_ndim: int = 1,
        target_ndim: int = 0,
        sample: Sampler | None = None,
        link: Callable[[Tensor], Tensor] | None = None,
        link_approximations: Mapping[str, LinkApproximation] | None = None,
        indefinite: str = "raise",
    ) -> None:
        if event_ndim not in (0, 1):
            raise ValueError(f"event_ndim must be 0 or 1, found {event_ndim!r}")
        if indefinite not in POLICIES:
            raise UnsupportedError(f"indefinite={indefinite!r} is not supported; expected {one_of(POLICIES)}")
        self._log_prob, self._sample, self._link = log_prob, sample, link
        self.event_ndim, self.target_ndim, self.indefinite = event_ndim, target_ndim, indefinite
        self.has_link = link is not None
        self.link_approximations = dict(link_approximations or {})
        self._clipped = self._total = 0.0

    @property
    def clipped_share(self) -> float:
        """The share of ``sum |eigenvalue|``, over all Hessians since construction, that was negative and cut away."""
        return self._clipped / self._total if self._total else 0.0

    def check(self, outputs: Float[Tensor, N * T], targets: Tensor, where: str) -> Tensor:
        """The targets as ``(N, R, ...)``; the log-probability is tried on them."""
        events = outputs.shape[:-1] if self.event_ndim and outputs.ndim > 1 else outputs.shape
        if targets.shape[: len(events)] != events or targets.ndim != len(events) + self.target_ndim:
            more = f" and {self.target_ndim} axes more" if self.target_ndim else ""
            raise DataError(
                f"targets of {where} must have shape {tuple(events)}{more}, found {tuple(targets.shape)}"
            )
        terms = self.terms(outputs)
        targets = targets.reshape(*terms.shape[:2], *targets.shape[len(events) :])
        try:
            found = self.log_prob(terms, targets)
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            raise UnsupportedError(f"log_prob cannot be mapped over terms by torch.vmap: {reason}") from error
        if found.shape != terms.shape[:2]:
            raise OutputError(
                f"log_prob must be a single number for each term, found shape {tuple(found.shape[2:])}"
            )
        if not bool(torch.isfinite(found).all()):
            raise DataError(f"log_prob must be finite at the targets of {where}, found NaN or Inf")
        return targets

    def root(self, terms: Float[Tensor, "N R E"], targets: Tensor) -> Float[Tensor, "N R E E"]:
        """``V sqrt(max(lambda, 0))`` of each term's Hessian ``V diag(lambda) V^T``.

        Raises:
            UnsupportedError: if a Hessian is indefinite, unless that is to be clipped.
            OutputError: if one is not finite.
        """
        H = self._each(hessian(self._loss), terms, targets).reshape(*terms.shape, terms.shape[-1])
        if not bool(torch.isfinite(H).all()):
            raise OutputError("the Hessian of log_prob must be finite, found NaN or Inf")
        eigenvalues, V = torch.linalg.eigh((H + H.mT) / 2)
        negative, total = (
            -eigenvalues.clamp(max=0).sum(dtype=torch.float64),
            eigenvalues.abs().sum(dtype=torch.float64),
        )
        # What rounding leaves of a zero: the Hessians are summed, so the largest says what counts.
        rounding = 8 * terms.shape[-1] * torch.finfo(H.dtype).eps * eigenvalues.abs().max()
        if self.indefinite == "raise" and bool((lowest := eigenvalues.min()) < -rounding):
            raise UnsupportedError(
                f"the Hessian of log_prob has the eigenvalue {float(lowest):.3g}, expected none below zero; use "
                "indefinite='clip' for its positive part, or columns='mc' for the Fisher information"
            )
        self._clipped, self._total = self._clipped + float(negative), self._total + float(total)
        return V * eigenvalues.clamp(min=0).sqrt().unsqueeze(-2)

    def draw(
        self, terms: Float[Tensor, "N R E"], targets: Tensor, n_draws: int, generator: torch.Generator | None
    ) -> Tensor:
        """What `sample` draws.

        Raises:
            UnsupportedError: if there is none, or its draws have the wrong shape.
        """
        if self._sample is None:
            raise UnsupportedError(
                "columns='mc' needs draws of a custom likelihood; give it sample=, or use columns='exact'"
            )
        draws = self._sample(self._of_log_prob(terms), n_draws, generator)
        if draws.shape != (n_draws, *targets.shape):
            raise UnsupportedError(
                f"sample must return shape {(n_draws, *targets.shape)}, found {tuple(draws.shape)}"
            )
        return draws

    def score(self, terms: Float[Tensor, "N R E"], targets: Tensor) -> Float[Tensor, "*K N R E"]:
        """By reverse mode."""
        places = targets.shape[: targets.ndim - self.target_ndim]
        terms = terms.expand(*places, terms.shape[-1])
        return self._each(grad(self._loss), terms, targets).reshape(terms.shape)

    def log_prob(self, terms: Float[Tensor, "N R E"], targets: Tensor) -> Float[Tensor, "N R"]:
        """As given."""
        return self._each(self._log_prob, terms, targets)

    def link(self, terms: Float[Tensor, "*batch E"]) -> Tensor:
        """As given; the outputs themselves otherwise."""
        return terms if self._link is None else self._link(terms)

    def _loss(self, outputs: Tensor, target: Tensor) -> Tensor:
        return -self._log_prob(outputs, target)

    def _of_log_prob(self, terms: Float[Tensor, "*places E"]) -> Tensor:
        """Terms as `log_prob` takes them."""
        return terms if self.event_ndim else terms.squeeze(-1)

    def _each(self, function: LogProb, terms: Float[Tensor, "*places E"], targets: Tensor) -> Tensor:
        """A function of each term and its target."""
        places = terms.shape[:-1]
        outputs = self._of_log_prob(terms).flatten(0, len(places) - 1)
        return vmap(function)(outputs, targets.flatten(0, len(places) - 1)).unflatten(0, places)
