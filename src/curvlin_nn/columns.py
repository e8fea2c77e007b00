"""Columns: the cotangents S that a batch sends backward, so that ``sum_v (S_v^T J)^T (S_v^T J)`` is its curvature.

    exact       S S^T = Lambda, one term of the log-likelihood at a time: R K columns for R terms of rank K
    mc          gradients at targets drawn from the model, evenly spread; unbiased
    sketch      S times random orthonormal columns, signs drawn for each term; unbiased, exact with as many as rank
    empirical   the gradient at the targets of the data: the empirical Fisher, which is no GGN

Of all but "exact", one column serves all terms of a sample at once. Between different terms its products are zero on
average only, which is why signs (or targets) are drawn for each term.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from curvlin._check import positive_integer
from curvlin_nn.errors import UnsupportedError, one_of
from curvlin_nn.likelihoods import Likelihood

KINDS = ("exact", "mc", "sketch", "empirical")
"""The kinds of columns by name."""

COLUMN_BUDGET = 2**22
"""Entries of the columns that are made at once, where there are many: 16 MiB in float32."""


@dataclass(frozen=True)
class Columns:
    """How many columns of what kind.

    Attributes:
        kind: one of `KINDS`.
        n_columns: how many for "mc" and "sketch".
        generator: source of randomness for these; None is torch's default generator.
    """

    kind: str = "exact"
    n_columns: int = 1
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UnsupportedError(f"columns={self.kind!r} is not supported; expected {one_of(KINDS)}")
        positive_integer("n_columns", self.n_columns)

    def __call__(
        self, likelihood: Likelihood, outputs: Float[Tensor, N * T], targets: Tensor
    ) -> Iterator[Float[Tensor, "V N *T"]]:
        """The columns of a batch, some at a time."""
        terms = likelihood.terms(outputs)
        weights = likelihood.weights(terms, targets)
        for columns in self._of_terms(likelihood, terms, targets, weights):
            yield likelihood.outputs(columns, outputs)

    def _of_terms(
        self, likelihood: Likelihood, terms: Tensor, targets: Tensor, weights: Tensor | None
    ) -> Iterator[Float[Tensor, "V N R E"]]:
        if self.kind == "empirical":
            score = likelihood.score(terms, targets)
            yield (score if weights is None else weights[..., None] * score)[None]
            return
        scale = None if weights is None else weights.sqrt()[..., None]
        if self.kind == "mc":
            draws = likelihood.draw(terms, targets, self.n_columns, self.generator)
            columns = likelihood.score(terms, draws) / self.n_columns**0.5
            yield columns if scale is None else scale * columns
            return
        root = likelihood.root(terms, targets)
        root = root if scale is None else scale[..., None] * root
        if self.kind == "sketch":
            yield _sketched(root, self.n_columns, self.generator)
        else:
            yield from _one_term_at_a_time(root)


EXACT = Columns()
"""Exact columns."""


def _one_term_at_a_time(root: Float[Tensor, "N R E K"]) -> Iterator[Float[Tensor, "V N R E"]]:
    """Each column of each term, zero in all other terms."""
    n_terms, rank = root.shape[1], root.shape[3]
    if n_terms == 1:
        yield root.movedim(3, 0)
        return
    at_once = max(1, COLUMN_BUDGET // (root[..., 0].numel() * rank))
    for start in range(0, n_terms, at_once):
        chosen = range(start, min(start + at_once, n_terms))
        columns = root.new_zeros(len(chosen), rank, *root.shape[:3])
        for i, term in enumerate(chosen):
            columns[i, :, :, term] = root[:, term].movedim(2, 0)
        yield columns.flatten(0, 1)


def _sketched(
    root: Float[Tensor, "N R E K"], n_columns: int, generator: torch.Generator | None
) -> Float[Tensor, "V N R E"]:
    """``S Q sqrt(K / V)`` with V random orthonormal columns Q for each term; all K of them are exact."""
    *places, rank = root.shape[0], root.shape[1], root.shape[3]
    if n_columns > rank:
        raise UnsupportedError(
            f"n_columns must be at most the rank {rank} of the output curvature for columns='sketch', found {n_columns}"
        )
    noise = torch.randn(*places, rank, n_columns, dtype=root.dtype, device=root.device, generator=generator)
    Q, R = torch.linalg.qr(noise)
    Q = Q * torch.where(torch.diagonal(R, dim1=-2, dim2=-1) < 0, -1.0, 1.0).unsqueeze(
        -2
    )  # uniform over all Q
    return (root @ Q * (rank / n_columns) ** 0.5).movedim(3, 0)
