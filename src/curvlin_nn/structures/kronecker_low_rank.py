"""The leading eigenvectors of each Kronecker product of KFAC: what a truncation to low rank keeps of it.

With ``B = Q_B diag(l) Q_B^T`` and ``A = Q_A diag(m) Q_A^T``, the eigenvalues of ``B (x) A`` are the products
``l_i m_j`` and its eigenvectors the products of columns, so the k largest give its best approximation of rank k. Kept
in factored form: ``k (out + in)`` numbers, never ``k out in``. Biases are exact dense blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from curvlin import Isotropic, KhatriRaoFeatures, Woodbury
from curvlin._check import positive_integer
from curvlin.numerics.rounding import without_rounding
from curvlin.precision.base import PrecisionOperator
from curvlin_nn.parameters import ParameterSpace
from curvlin_nn.structures.kronecker import MAX_BLOCK, Kronecker
from curvlin_nn.structures.registry import register


@dataclass(frozen=True)
class Truncation:
    """A Kronecker product cut to low rank.

    Attributes:
        operator: ``0 + U U^T``, singular until a prior is added; the columns of U are products.
        kept_share: what it has of the trace of the whole product.
    """

    operator: Woodbury
    kept_share: float

    @classmethod
    def of(cls, left: Float[Tensor, "out out"], right: Float[Tensor, "in in"], rank: int) -> Truncation:
        """The best approximation of their product of at most this rank; eigenvalues below rounding stand for zero."""
        (l, Q_left), (m, Q_right) = _eigenpairs(left), _eigenpairs(right)
        products = torch.outer(l, m).flatten()
        top = products.topk(min(rank, max(1, int((products > 0).sum()))))
        rows, columns = top.indices // len(m), top.indices % len(m)
        features = KhatriRaoFeatures(
            (Q_left[:, rows] * top.values.sqrt()).mT[:, None, None], Q_right[:, columns].mT[:, None]
        )
        total = products.sum()
        share = float(top.values.sum() / total) if total > 0 else 1.0
        return cls(Woodbury(Isotropic(l.new_zeros(()), len(products)), features), share)


@register
class KroneckerLowRank(Kronecker):
    """`Kronecker` with the `rank` leading eigenvectors of each product only.

    Args:
        space: all parameters.
        rank: the most eigenvectors of a product.
        approximation: see `Kronecker`.
        max_block: see `Kronecker`.
        joint_bias: see `Kronecker`.
    """

    name = "kron-lowrank"

    def __init__(
        self,
        space: ParameterSpace,
        *,
        rank: int = 100,
        approximation: str = "expand",
        max_block: int = MAX_BLOCK,
        joint_bias: bool = False,
    ) -> None:
        super().__init__(space, approximation=approximation, max_block=max_block, joint_bias=joint_bias)
        self._rank = positive_integer("rank", rank)

    def truncations(self) -> list[Truncation | None]:
        """What is kept of each product, and how much of its trace; None for a dense block."""
        products = [factors.product() for factors in self._blocks]
        return [None if product is None else Truncation.of(*product, self._rank) for product in products]

    def _operators(self) -> list[PrecisionOperator]:
        return [
            factors.operator() if truncation is None else truncation.operator
            for factors, truncation in zip(self._blocks, self.truncations(), strict=True)
        ]


def _eigenpairs(matrix: Float[Tensor, "d d"]) -> tuple[Float[Tensor, " d"], Float[Tensor, "d d"]]:
    values, vectors = torch.linalg.eigh(matrix)
    return without_rounding(values, torch.finfo(matrix.dtype).eps), vectors
