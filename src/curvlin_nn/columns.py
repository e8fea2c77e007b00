"""Columns: the cotangents S that a batch sends backward, so that ``sum_v (S_v^T J)^T (S_v^T J)`` is its curvature.

    exact       S S^T = Lambda, one term of the log-likelihood at a time: R K columns for R terms of rank K
    mc          gradients at targets drawn from the model, evenly spread; unbiased
    sketch      S times random orthonormal columns, drawn for each term; unbiased, exact for one term at V = K
    empirical   the gradient at the targets of the data: the empirical Fisher, which is no GGN

Of all but "exact", one column serves all terms of a sample at once. Between different terms its products are zero on
average only, which is why targets (or orthonormal columns, with their signs) are drawn for each term.

A term's weight w scales its columns by sqrt(w), as it scales Lambda; the gradient at the targets by w, as it scales the
loss.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from curvlin._check import positive_integer
from curvlin_nn.errors import UnsupportedError, one_of
from curvlin_nn.likelihoods.base import Likelihood, weighted

KINDS = ("exact", "mc", "sketch", "empirical")
"""The kinds of columns by name."""

COLUMN_BUDGET = 2**22
"""Entries of the columns that are made at once, where there are many: 16 MiB in float32."""


@dataclass(frozen=True)
class Columns:
    """How many columns of what kind.

    Attributes:
        kind: one of `KINDS`.
        n_columns: how many for "mc" and "sketch"; the others know their number, and take 1 only.
        generator: source of randomness for these; None is torch's default generator.
    """

    kind: str = "exact"
    n_columns: int = 1
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UnsupportedError(f"columns={self.kind!r} is not supported; expected {one_of(KINDS)}")
        if positive_integer("n_columns", self.n_columns) > 1 and self.kind not in ("mc", "sketch"):
            raise UnsupportedError(
                f"n_columns={self.n_columns} is not supported for columns={self.kind!r}, whose number is fixed; leave "
                "it at 1, or use columns='mc' or 'sketch'"
            )

    def __call__(
        self, likelihood: Likelihood, outputs: Float[Tensor, N * T], targets: Tensor
    ) -> Iterator[Float[Tensor, "V N *T"]]:
        """The columns of a batch, some at a time.

        Raises:
            UnsupportedError: if the likelihood cannot give these.
        """
        terms = likelihood.terms(outputs)
        weights = likelihood.weights(terms, targets)
        for columns in self._of_terms(likelihood, terms, targets, weights):
            yield likelihood.outputs(columns, outputs)

    def _of_terms(
        self, likelihood: Likelihood, terms: Tensor, targets: Tensor, weights: Tensor | None
    ) -> Iterator[Float[Tensor, "V N R E"]]:
        if self.kind == "empirical":
            yield _scaled(likelihood.score(terms, targets), weights)[None]
            return
        scale = None if weights is None else weights.sqrt()
        if self.kind == "mc":
            draws = likelihood.draw(terms, targets, self.n_columns, self.generator)
            yield _scaled(likelihood.score(terms, draws) / self.n_columns**0.5, scale)
        elif self.kind == "sketch":
            Q = self._orthonormal(terms, likelihood.rank(terms.shape[-1]))
            yield _scaled(likelihood.root_product(terms, targets, Q).movedim(3, 0), scale)
        else:
            yield from _one_term_at_a_time(likelihood, terms, targets, scale)

    def _orthonormal(self, terms: Float[Tensor, "N R E"], rank: int) -> Float[Tensor, "N R K V"]:
        """``Q sqrt(K / V)`` with V random orthonormal columns Q of length K for each term."""
        if self.n_columns > rank:
            raise UnsupportedError(
                f"n_columns must be at most the rank {rank} of the output curvature for columns='sketch', found "
                f"{self.n_columns}"
            )
        noise = torch.randn(
            *terms.shape[:2],
            rank,
            self.n_columns,
            dtype=terms.dtype,
            device=terms.device,
            generator=self.generator,
        )
        Q, R = torch.linalg.qr(noise)
        # With a positive diagonal of R, Q is uniform over all matrices of orthonormal columns (Mezzadri, 2007); for
        # K = 1 it is a random sign.
        signs = torch.where(R.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0)
        return Q * signs.unsqueeze(-2) * (rank / self.n_columns) ** 0.5


EXACT = Columns()
"""Exact columns."""


def _one_term_at_a_time(
    likelihood: Likelihood, terms: Float[Tensor, "N R E"], targets: Tensor, scale: Float[Tensor, "N R"] | None
) -> Iterator[Float[Tensor, "V N R E"]]:
    """Each column of each term, zero in all other terms."""
    n_terms, rank = terms.shape[1], likelihood.rank(terms.shape[2])
    at_once = max(1, COLUMN_BUDGET // (terms.numel() * rank))
    for start in range(0, n_terms, at_once):
        some = slice(start, start + at_once)
        root = likelihood.root(terms[:, some], targets[:, some]).movedim(3, 0)
        root = _scaled(root, None if scale is None else scale[:, some])
        if n_terms == 1:
            yield root
            return
        columns = root.new_zeros(root.shape[2], rank, *terms.shape)
        for i in range(len(columns)):
            columns[i, :, :, start + i] = root[:, :, i]
        yield columns.flatten(0, 1)


def _scaled(
    columns: Float[Tensor, "*V N R E"], scale: Float[Tensor, "N R"] | None
) -> Float[Tensor, "*V N R E"]:
    """Zero where the scale is: a term of weight zero does not exist, whatever its outputs are."""
    return weighted(columns, None if scale is None else scale[..., None])
