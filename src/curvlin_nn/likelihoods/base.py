"""Likelihoods: what turns a model's outputs into a distribution of targets, and into curvature columns.

The outputs of one sample are R *terms* of E numbers each: one term of C logits for a classifier, a term for each token
of a language model. Given the outputs, terms are independent; the log-likelihood is the sum of theirs, each with a
weight. A family says what it knows of one term, and `curvlin_nn.columns` makes curvature of it.

A family with a noise scale sigma gives everything at ``sigma = 1``; the scale enters later.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from curvlin_nn.errors import UnsupportedError

LinkApproximation = Callable[[Tensor, Tensor], Tensor]
"""``(mean (*, E), variance (*, E)) -> prediction (*, E)`` of terms: a closed form of the link's expectation."""

CovarianceLink = Callable[[Tensor, Tensor], Tensor]
"""``(mean (*, E), covariance (*, E, E)) -> prediction (*, E)``: one that looks at covariances within a term as well."""


ROOT_BUDGET = 2**21
"""Entries of the columns of several terms that are held at once, where only their sum is wanted."""


class Likelihood(ABC):
    """One family of output distributions.

    Attributes:
        name: the name it is registered under.
        has_noise: whether it has a noise scale sigma, kept outside.
        has_noise_by_output: whether sigma may be one for each of the E outputs of a term, which are independent.
        has_additive_noise: whether targets scatter around the prediction by noise that may be added to it.
        has_link: whether predictions are expectations of `link`; otherwise its mean and covariance are reported.
        is_linear: whether the link is the identity, so that these are the moments of the outputs.
        has_classes: whether targets are classes, of which `log_probabilities` gives the distribution.
        has_counts: whether targets are 0, 1, 2, ..., of which `largest_count` tells where to stop summing.
        link_approximations: closed forms of the expected link by name, the default first.
        covariance_links: those that need covariances within a term.
        event_ndim: 1 where the last axis of the outputs holds the E numbers of a term, 0 where every output is a
            term of its own.
    """

    name: ClassVar[str]
    has_noise: ClassVar[bool] = False
    has_noise_by_output: bool = False
    has_additive_noise: ClassVar[bool] = False
    has_link: bool = True
    is_linear: ClassVar[bool] = True
    has_classes: ClassVar[bool] = False
    has_counts: ClassVar[bool] = False
    link_approximations: Mapping[str, LinkApproximation] = {}
    covariance_links: Mapping[str, CovarianceLink] = {}
    event_ndim: int = 1

    def options(self) -> dict[str, Any] | None:
        """The arguments that make this member of its family again, as tensors and plain values.

        None where no file can hold them; a family whose constructor takes none has none.
        """
        return {} if type(self).__init__ is object.__init__ else None

    @abstractmethod
    def check(self, outputs: Float[Tensor, N * T], targets: Tensor, where: str) -> Tensor:
        """The targets in the form the other methods take: ``(N, R)``, or ``(N, R, ...)``.

        Args:
            outputs: the model's outputs.
            targets: as the loader gave them.
            where: what to call this batch in error messages.

        Raises:
            DataError: if the targets have the wrong dtype, shape or range.
            OutputError: if the outputs do not fit the family.
        """

    def terms(self, outputs: Float[Tensor, N * T]) -> Float[Tensor, "N R E"]:
        """The outputs term by term."""
        event = outputs.shape[-1] if self.event_ndim and outputs.ndim > 1 else 1
        return outputs.reshape(len(outputs), -1, event)

    def outputs(
        self, terms: Float[Tensor, "*V N R E"], like: Float[Tensor, N * T]
    ) -> Float[Tensor, "*V N *T"]:
        """The inverse of `terms`, for cotangents of outputs of the shape of `like`."""
        return terms.reshape(*terms.shape[:-3], *like.shape)

    def weights(self, terms: Float[Tensor, "N R E"], targets: Tensor) -> Float[Tensor, "N R"] | None:
        """The weight of each term; None where all are one. A term of weight zero does not exist."""
        return None

    def rank(self, event: int) -> int:
        """K, the number of columns of `root` for terms of `event` numbers."""
        return event

    @abstractmethod
    def root(self, terms: Float[Tensor, "N R E"], targets: Tensor) -> Float[Tensor, "N R E K"]:
        """Exact columns S of ``Lambda = S S^T`` of each term, weights left out.

        Lambda is the Hessian of the negative log-likelihood with respect to the term, where that is positive
        semidefinite whatever the target, and otherwise the Fisher information; each family says which.
        """

    def root_product(
        self, terms: Float[Tensor, "N R E"], targets: Tensor, Q: Float[Tensor, "N R K V"]
    ) -> Float[Tensor, "N R E V"]:
        """``S Q`` with the columns S of `root`."""
        return self.root(terms, targets) @ Q

    def curvature_diagonal(self, terms: Float[Tensor, "N R E"], targets: Tensor) -> Float[Tensor, "N R E"]:
        """The diagonal of Lambda of each term, weights left out."""
        parts = _some_at_a_time(terms, self.rank(terms.shape[-1]))
        return torch.cat([self.root(terms[n], targets[n]).square().sum(-1) for n in parts])

    def total_curvature(
        self, terms: Float[Tensor, "N R E"], targets: Tensor, weights: Float[Tensor, "N R"] | None
    ) -> Float[Tensor, "E E"]:
        """``sum_nr w Lambda`` over all terms."""
        total = terms.new_zeros(terms.shape[-1], terms.shape[-1])
        scale = None if weights is None else weights.sqrt()[..., None, None]
        for n in _some_at_a_time(terms, self.rank(terms.shape[-1])):
            S = weighted(self.root(terms[n], targets[n]), None if scale is None else scale[n])
            S = S.movedim(-2, 0).flatten(1)
            total += S @ S.mT
        return total

    @abstractmethod
    def draw(
        self, terms: Float[Tensor, "N R E"], targets: Tensor, n_draws: int, generator: torch.Generator | None
    ) -> Tensor:
        """Targets drawn from the output distribution, ``(n_draws, N, R)`` or ``(n_draws, N, R, ...)``.

        Each draw has the distribution of the targets, independent between terms; the draws of one term may be spread
        more evenly than independent ones. `targets` are those of the data, for what is no property of the outputs.
        """

    @abstractmethod
    def score(self, terms: Float[Tensor, "N R E"], targets: Tensor) -> Float[Tensor, "*K N R E"]:
        """The gradient of each term's negative log-likelihood with respect to its outputs, weights left out.

        Targets may have axes more on the left, as draws have.
        """

    @abstractmethod
    def log_prob(self, terms: Float[Tensor, "N R E"], targets: Tensor) -> Float[Tensor, "N R"]:
        """The normalised log-probability of each term's target at sigma = 1, weights left out."""

    def statistics(self, outputs: Float[Tensor, N * T], targets: Tensor) -> Float[Tensor, " K"]:
        """What the log-likelihood needs to know of a batch; adds up over batches, in float64. Weights count."""
        terms = self.terms(outputs).double()
        return weighted(self.log_prob(terms, targets), self.weights(terms, targets)).sum().reshape(1)

    def log_likelihood(
        self, statistics: Float[Tensor, " K"], sigma_noise: Float[Tensor, "*E"]
    ) -> Float[Tensor, ""]:
        """The normalised log-likelihood of everything summed in `statistics`, in nats."""
        return statistics[0]

    @abstractmethod
    def link(self, terms: Float[Tensor, "*batch E"]) -> Float[Tensor, "*batch E"]:
        """The mean of the output distribution of each term, of as many numbers where the family has a link."""

    def inverse_link(self, prediction: Float[Tensor, "*batch E"]) -> Float[Tensor, "*batch E"]:
        """Terms whose link is `prediction`.

        Raises:
            UnsupportedError: if the family does not know any.
        """
        raise UnsupportedError(f"{self.name} has no inverse link to score predictions with; give a loss")

    def log_probabilities(self, terms: Float[Tensor, "*batch E"]) -> Float[Tensor, "*batch K"]:
        """The logarithms of the probabilities of the K classes of each term's target.

        Raises:
            UnsupportedError: if targets are no classes.
        """
        raise UnsupportedError(f"log_probabilities needs targets that are classes, found {self.name}")

    def largest_count(self, terms: Float[Tensor, "*batch E"]) -> Float[Tensor, "*batch"]:
        """For targets 0, 1, 2, ...: one above which ``-p log p`` sums to less than 1e-30.

        Raises:
            UnsupportedError: if targets are no counts.
        """
        raise UnsupportedError(f"largest_count needs targets that are counts, found {self.name}")

    def target_variance(self, terms: Float[Tensor, "*batch E"]) -> Float[Tensor, "*batch E"]:
        """The variance of targets around the link, where there is one and targets are numbers.

        Raises:
            UnsupportedError: if the family does not say.
        """
        raise UnsupportedError(
            f"aleatoric uncertainty is not supported for {self.name}, which does not say how targets vary; give the "
            "likelihood a target_variance"
        )

    def moments(
        self, mean: Float[Tensor, "N C"], covariance: Float[Tensor, "N C C"]
    ) -> tuple[Float[Tensor, "N D"], Float[Tensor, "N D D"]]:
        """Mean and covariance of the link of Gaussian outputs, where moments are what is reported.

        The outputs hold the first numbers of all terms, then the second ones, and so on.
        """
        return mean, covariance

    def noise_covariance(
        self, mean: Float[Tensor, "N C"], covariance: Float[Tensor, "N C C"] | None
    ) -> Float[Tensor, "*N D D"]:
        """The expected covariance of the targets given Gaussian outputs, at sigma = 1.

        One matrix where outputs do not matter, and the covariance may be None.
        """
        return torch.eye(mean.shape[-1], dtype=mean.dtype, device=mean.device)


def weighted(
    values: Float[Tensor, "*V N R"], weights: Float[Tensor, "N R"] | None
) -> Float[Tensor, "*V N R"]:
    """``weights * values``, and zero where the weight is, whatever stands there."""
    return values if weights is None else torch.where(weights > 0, weights * values, 0.0)


def _some_at_a_time(terms: Float[Tensor, "N R E"], rank: int) -> list[slice]:
    """The samples in parts whose columns fit `ROOT_BUDGET`."""
    step = max(1, ROOT_BUDGET // (terms[0].numel() * rank))
    return [slice(start, start + step) for start in range(0, len(terms), step)]


def systematic_uniforms(
    shape: tuple[int, ...], n_draws: int, like: Tensor, generator: torch.Generator | None
) -> Float[Tensor, n_draws * shape]:
    """``u + k / n_draws`` modulo 1, for one uniform u in each place: together evenly spread.

    Each is uniform by itself, whatever k: draws of two places with one k are independent, so that products of their
    scores are zero on average. (``(u + k) / n_draws`` is as evenly spread, but grows with k in every place.)
    """
    u = torch.rand(shape, dtype=like.dtype, device=like.device, generator=generator)
    steps = torch.arange(n_draws, dtype=like.dtype, device=like.device) / n_draws
    return (u + steps.reshape(-1, *(1,) * len(shape))) % 1
