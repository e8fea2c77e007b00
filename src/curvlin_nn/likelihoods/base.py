"""Likelihoods: what turns a model's outputs into a distribution of targets, and into curvature columns.

A likelihood gives, at outputs f, columns S with ``S S^T = Lambda``, the Hessian of the negative
log-likelihood with respect to f (or the Fisher information of the output distribution; each family says
which). A family with a noise scale sigma gives everything at ``sigma = 1``; the scale enters later.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

LinkApproximation = Callable[[Tensor, Tensor], Tensor]
"""``(mean (N, C), variance (N, C)) -> prediction (N, C)``: a closed form of the link's expectation."""


class Likelihood(ABC):
    """One family of output distributions.

    Attributes:
        name: the name it is registered under.
        has_noise: whether it has a noise scale sigma, kept outside.
        link_approximations: closed forms of the expected link by name; empty where outputs are the prediction
            and moments are reported instead of probabilities.
    """

    name: ClassVar[str]
    has_noise: ClassVar[bool]
    link_approximations: ClassVar[Mapping[str, LinkApproximation]]

    @abstractmethod
    def check(self, outputs: Float[Tensor, "N C"], targets: Tensor, where: str) -> Tensor:
        """The targets in the form the other methods take.

        Args:
            outputs: the model's outputs.
            targets: as the loader gave them.
            where: what to call this batch in error messages.

        Raises:
            DataError: if the targets have the wrong dtype, shape or range.
            OutputError: if the outputs do not fit the family.
        """

    @abstractmethod
    def columns(self, outputs: Float[Tensor, "N C"]) -> Float[Tensor, "V N C"]:
        """Exact columns S of ``Lambda = S S^T`` per sample."""

    @abstractmethod
    def statistics(self, outputs: Float[Tensor, "N C"], targets: Tensor) -> Float[Tensor, " K"]:
        """What the log-likelihood needs to know of a batch; adds up over batches, in float64."""

    @abstractmethod
    def log_likelihood(
        self, statistics: Float[Tensor, " K"], sigma_noise: Float[Tensor, ""]
    ) -> Float[Tensor, ""]:
        """The normalised log-likelihood of everything summed in `statistics`, in nats."""

    @abstractmethod
    def link(self, outputs: Float[Tensor, "*batch C"]) -> Float[Tensor, "*batch C"]:
        """The mean of the output distribution."""
