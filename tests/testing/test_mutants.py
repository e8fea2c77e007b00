"""Mutants of the library's own operators, written after the kit was finished, to see what it finds at first try.

Of the first sixteen, thirteen were found at first try by the whole of `check_operator`. The other three (`Cliff`,
`UnweightedDiagonal`, `SwappedTrace`) made three changes to the kit: the diagonal of a scaled operator, traces between
operators of one kind, and one large operator in every check. A second round of six, written after that, was found
whole. Here each mutant is given to the law that finds it.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from soils import SOILS
from torch import Tensor

from curvlin.extend import TRACE_SOLVE, PrecisionOperator, register, trace_solve
from curvlin.precision.block_diag import BlockDiag
from curvlin.testing import check_operator

MUTANTS: dict[type, tuple[str, str]] = {}
"""Mutant -> the structure that it is made of, and the law that has to find it."""


def of(soil: str, law: str) -> Callable[[type], type]:
    def enter(mutant: type) -> type:
        MUTANTS[mutant] = soil, law
        return mutant

    return enter


# -- Kronecker sums ------------------------------------------------------------------------------------------------


@of("Kronecker", "inverse")
class TransposedVariances:
    """Variances of ``B (x) A`` in the place of those of ``A (x) B``."""

    def _inverse_diagonal(self, factors: Any) -> Tensor:
        return super()._inverse_diagonal(factors).unflatten(-1, self.sizes).mT.flatten(-2)


@of("Kronecker", "products")
class FirstOfTheBatch:
    """Every element of the batch gets the variances of the first."""

    def _inverse_diagonal(self, factors: Any) -> Tensor:
        value = super()._inverse_diagonal(factors)
        return value[:1].expand(value.shape) if value.ndim > 1 else value


@of("Kronecker", "log_determinant")
class SinglePrecisionSum:
    """The logarithms are added up in float32."""

    def _logdet_value(self, factors: Any) -> Tensor:
        return super()._logdet_value(factors).float().double()


@of("Kronecker", "determinism")
class RandomisedSolve:
    """A solve that draws a random number, and does nothing with it."""

    def _solve_value(self, X: Tensor, factors: Any) -> Tensor:
        torch.rand(())
        return super()._solve_value(X, factors)


@of("Kronecker", "solve")
class Cliff:
    """Beyond a hundred rows a solve is done in float32."""

    def _solve_once(self, X: Tensor, factors: Any) -> Tensor:
        solved = super()._solve_once(X, factors)
        return solved.float().double() if self.size > 100 else solved


# -- low rank ------------------------------------------------------------------------------------------------------


@of("low rank", "scale")
class ScaledBaseOnly:
    """``c P`` scales the base and forgets the change."""

    def _scale(self, c: Tensor) -> Any:
        return self._with(base=self.base._scale(c))


@of("low rank", "parts")
class SortedConditional:
    """The columns of the change are cut in another order than the base."""

    def _conditional(self, index: Tensor, max_size: int) -> Any:
        cut = super()._conditional(index, max_size)
        return cut._with(U=self.U[..., index.sort().values, :])


@of("low rank", "gradients")
class DetachedColumns:
    """The derivative of the log-determinant in the columns is lost."""

    def _logdet(self, factors: Any) -> Tensor:
        fixed = self._with(U=self.U.detach())
        return super(DetachedColumns, fixed)._logdet(factors)


@of("low rank", "congruence")
class ForgottenSecondSide:
    """A cross covariance is computed as one with itself."""

    def _tensor_congruence(self, Phi: Tensor, Psi: Tensor | None, layout: str) -> Tensor:
        return super()._tensor_congruence(Phi, None, layout)


@of("downdate", "scale")
class UnweightedDiagonal:
    """A downdate whose diagonal forgets that it was scaled."""

    def _diagonal(self) -> Tensor:
        return self.base._diagonal() + self.sign * self._low_rank_diagonal()


@of("downdate", "inverse")
class AddedInsteadOfRemoved:
    """Variances of the update instead of those of the downdate."""

    def _inverse_diagonal(self, factors: Any) -> Tensor:
        value = super()._inverse_diagonal(factors)
        prior = self.base._inverse_diagonal(factors.base)
        return prior - (value - prior)


# -- blocks --------------------------------------------------------------------------------------------------------


@of("blocks", "parts")
class SortedMarginal:
    """The marginal comes in ascending order of coordinates, whatever was asked."""

    def _marginal(self, index: Tensor, max_size: int) -> Any:
        return super()._marginal(index.sort().values, max_size)


@of("blocks", "parts")
class ConditionalForMarginal:
    def _marginal(self, index: Tensor, max_size: int) -> Any:
        return self._conditional(index, max_size)


@of("blocks", "storage")
class DoubleMarginal:
    """The marginal of a float32 operator is in float64."""

    def _marginal(self, index: Tensor, max_size: int) -> Any:
        return super()._marginal(index, max_size).to(torch.float64)


@of("blocks", "determinism")
class EditsItsArgument:
    """The quadratic form scales its argument in place."""

    def _inv_quad(self, X: Tensor, factors: Any) -> Tensor:
        value = super()._inv_quad(X, factors)
        X.detach().mul_(0.5)
        return value


@of("blocks", "inverse")
class SwappedTrace:
    """``tr(Q^-1 P)`` in the place of ``tr(P^-1 Q)`` for two block-diagonal operators."""


@register(TRACE_SOLVE, SwappedTrace, BlockDiag)
def _swapped(P: PrecisionOperator, Q: PrecisionOperator, factors: Any) -> Tensor:
    Q, known = BlockDiag(Q.blocks, Q.indices)._factored()
    return trace_solve(Q, BlockDiag(P.blocks, P.indices), known)


# -- a second round, after the changes that the first one made -------------------------------------------------------


@of("blocks", "solve")
class SwappedFactors:
    """Blocks are solved with each other's factors where those fit."""

    def _factorize(self) -> Any:
        factors = super()._factorize()
        return factors[::-1] if len({block.size for block in self.blocks}) == 1 else factors


@of("blocks", "matrix")
class UnscatteredDiagonal:
    """The diagonal comes block after block, wherever the blocks lie."""

    def _diagonal(self) -> Tensor:
        return torch.cat([block.diagonal() for block in self.blocks], dim=-1)


@of("low rank", "roots")
class WhitenedByTheBase:
    """A root and its transpose of which one forgets the change in a batch."""

    def _whiten(self, X: Tensor, factors: Any) -> Tensor:
        white = super()._whiten(X, factors)
        return self.base._whiten(X, factors.base) if self.batch_shape else white


@of("low rank", "roots")
class InflatedSamples:
    """Samples of the variance of a small sample."""

    def sample(self, sample_shape: Any = (), generator: torch.Generator | None = None) -> Tensor:
        return super().sample(sample_shape, generator) * (1 + 1 / self.size) ** 0.5


@of("Kronecker", "scale")
class MeanShift:
    """One shift for the whole batch."""

    def _combine(self, left: Any, right: Any) -> Tensor:
        shift = self.shift
        return super(MeanShift, self._with(shift=shift.mean().expand(shift.shape)))._combine(left, right)


@of("Kronecker", "scale")
class UnscaledShift:
    """``c P`` scales the product and forgets the shift."""

    def _scale(self, c: Tensor) -> Any:
        return super()._scale(c)._with(shift=self.shift + 0 * c)


@pytest.mark.parametrize("soil", dict.fromkeys(soil for soil, _ in MUTANTS.values()))
def test_what_the_mutants_are_made_of_is_sound(soil: str) -> None:
    assert check_operator(
        SOILS[soil].plant(), SOILS[soil].dense, sizes=(6, 4), conditions=(1e2,), large=192
    ).holds


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda cls: cls.__name__)
def test_a_mutant_is_found(mutant: type) -> None:
    name, law = MUTANTS[mutant]
    soil = SOILS[name]
    report = check_operator(
        soil.plant(mutant), soil.dense, law, sizes=(6, 4), conditions=(1e2,), large=192, raises=False
    )
    assert report.violations, str(report)
