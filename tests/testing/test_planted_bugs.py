"""Every law must be able to fail: operators with one bug each, and the law that finds it.

The ten bugs that every kit should find are mixins, planted in a diagonal operator, in a sum of Kronecker products and
in a low-rank change; others are planted in the diagonal one. `check_operator` is all that looks for them.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from soils import SOILS, Soil
from torch import Tensor

from curvlin.precision.base import PrecisionOperator
from curvlin.precision.dense import Dense
from curvlin.precision.diagonal import Diagonal
from curvlin.testing import LAWS, OperatorViolation, check_operator


def operator(*bases: type) -> type:
    """A dataclass like the operators of the library."""
    return dataclasses.dataclass(eq=False, repr=False, init=False)(*bases)  # type: ignore[call-overload]


# -- the ten: mixins that spoil one answer of a sound operator -----------------------------------------------------


class WrongSign:
    def _logdet(self, factors: Any) -> Tensor:
        return -super()._logdet(factors)  # type: ignore[misc]


class DroppedSize:
    """The log-determinant as a mean over coordinates."""

    def _logdet(self, factors: Any) -> Tensor:
        return super()._logdet(factors) / self.size  # type: ignore[misc, attr-defined]


class AbsoluteJitter:
    """``(P + 1e-9 I)^-1`` to first order: no more than rounding, until P is small."""

    def _solve(self, X: Tensor, factors: Any) -> Tensor:
        solved = super()._solve(X, factors)  # type: ignore[misc]
        return solved - 1e-9 * super()._solve(solved, factors)  # type: ignore[misc]


class OrderDependent:
    """``P + Q`` is a dense matrix, ``Q + P`` is not."""

    def __add__(self, Q: PrecisionOperator) -> PrecisionOperator:
        return Dense(self.to_dense() + Q.to_dense())  # type: ignore[attr-defined]


class StaleCache:
    """Factors are kept on the operator, whatever becomes of its tensors."""

    def _factored(self) -> Any:
        if "_memo" not in self.__dict__:
            object.__setattr__(self, "_memo", super()._factored())  # type: ignore[misc]
        return self.__dict__["_memo"]


class StaleLogdet:
    """The log-determinant is kept on the operator."""

    def logdet(self) -> Tensor:
        if "_memo" not in self.__dict__:
            object.__setattr__(self, "_memo", super().logdet())  # type: ignore[misc]
        memo: Tensor = self.__dict__["_memo"]
        return memo


class Densifying:
    def _matmul(self, X: Tensor) -> Tensor:
        return self._to_dense() @ X  # type: ignore[attr-defined]


class WrongGradient:
    """Half of the gradient of the log-determinant."""

    def _logdet(self, factors: Any) -> Tensor:
        value = super()._logdet(factors)  # type: ignore[misc]
        return value / 2 + value.detach() / 2


class NotSymmetric:
    def _matmul(self, X: Tensor) -> Tensor:
        return super()._matmul(X) + 1e-6 * super()._matmul(X.roll(1, dims=-2))  # type: ignore[misc]


class WrongCovariance:
    """Samples of 0.1 per cent too much variance."""

    def _unwhiten(self, Z: Tensor, factors: Any) -> Tensor:
        return super()._unwhiten(Z, factors) * 1.001**0.5  # type: ignore[misc]


class IgnoredGenerator:
    def sample(self, sample_shape: Sequence[int] = (), generator: torch.Generator | None = None) -> Tensor:
        return super().sample(sample_shape, None)  # type: ignore[misc]


THE_TEN = {
    WrongSign: {"log_determinant"},
    DroppedSize: {"log_determinant"},
    AbsoluteJitter: {"scale"},
    OrderDependent: {"sums"},
    StaleCache: {"determinism"},
    StaleLogdet: {"determinism", "gradients"},
    Densifying: {"no_dense"},
    WrongGradient: {"gradients"},
    NotSymmetric: {"products"},
    WrongCovariance: {"roots"},
    IgnoredGenerator: {"determinism"},
}
"""Bug -> the laws that have to find it. Stale caches come in two kinds: of factors and of answers."""


# -- planted in three structures ----------------------------------------------------------------------------------


STRUCTURES = ("diagonal", "Kronecker", "low rank")


def examine(soil: Soil, *bugs: type) -> Any:
    """A short run: one size and condition; float32 where the float64 copy that hooks see is not the tensor itself."""
    dtype = torch.float32 if StaleCache in bugs else torch.float64
    sweep = {"sizes": (4,), "conditions": (1e2,), "dtypes": [dtype], "large": 192}
    return check_operator(soil.plant(*bugs), soil.dense, raises=False, **sweep)


@pytest.mark.parametrize("soil", STRUCTURES)
def test_sound_operators_pass_every_law(soil: str) -> None:
    report = check_operator(SOILS[soil].plant(), SOILS[soil].dense, sizes=(6, 4), large=192)
    measured = {entry.law for entry in report.entries if entry.worst is not None}
    assert measured == set(LAWS)


@pytest.mark.parametrize("soil", STRUCTURES)
@pytest.mark.parametrize("bug", THE_TEN, ids=lambda cls: cls.__name__)
def test_each_of_the_ten_bugs_is_found(bug: type, soil: str) -> None:
    report = examine(SOILS[soil], bug)
    assert THE_TEN[bug] <= {entry.law for entry in report.violations}, str(report)
    assert report.reproduction


@pytest.mark.slow
@pytest.mark.parametrize("soil", STRUCTURES)
@pytest.mark.parametrize("bug", THE_TEN, ids=lambda cls: cls.__name__)
def test_each_of_the_ten_bugs_is_found_without_its_definition_or_options(bug: type, soil: str) -> None:
    """`check_operator(make_op)` alone, as a newcomer would call it first."""
    with pytest.raises(OperatorViolation) as caught:
        check_operator(SOILS[soil].plant(bug))
    assert THE_TEN[bug] <= {entry.law for entry in caught.value.report.violations}


# -- others, planted in a diagonal operator ------------------------------------------------------------------------


@operator
class Healthy(Diagonal):
    """A diagonal precision of another type, which its own methods keep."""

    def _scale(self, c: Tensor) -> Diagonal:
        return type(self)(self.values * c[..., None])

    def _marginal(self, index: Tensor, max_size: int) -> Diagonal:
        return type(self)(self.values[..., index])

    def _conditional(self, index: Tensor, max_size: int) -> Diagonal:
        return type(self)(self.values[..., index])


@operator
class ClampedVariance(Healthy):
    def _inverse_diagonal(self, factors: Any) -> Tensor:
        return super()._inverse_diagonal(factors).clamp(min=1e-6)


@operator
class OneOrderOnly(Healthy):
    """The gradient is right; its own derivative is lost, without an error."""

    def _inv_quad(self, X: Tensor, factors: Any) -> Tensor:
        return _FirstOrder.apply(self.values, X)


class _FirstOrder(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, X: Tensor) -> Tensor:
        ctx.save_for_backward(values, X)
        return (X.square() / values.unsqueeze(-1)).sum(-2)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        values, X = (t.detach() for t in ctx.saved_tensors)
        g, d = g.unsqueeze(-2), values.unsqueeze(-1)
        return -(g * X.square() / d.square()).sum(-1), 2 * g * X / d


@operator
class LowRankSamples(Healthy):
    """Samples live on half of the coordinates."""

    def sample(self, sample_shape: Sequence[int] = (), generator: torch.Generator | None = None) -> Tensor:
        draws = super().sample(sample_shape, generator)
        draws[..., self.size // 2 :] = 0
        return draws


@operator
class SecretRandomness(Healthy):
    def _inv_quad(self, X: Tensor, factors: Any) -> Tensor:
        return super()._inv_quad(X, factors) * (1 + 1e-15 * torch.randn(()))


@operator
class SinglePrecision(Healthy):
    def _solve(self, X: Tensor, factors: Any) -> Tensor:
        return (X.float() / self._column().float()).double()


@operator
class SizeThreshold(Healthy):
    """Above 20 rows an approximation takes over."""

    def _inv_quad(self, X: Tensor, factors: Any) -> Tensor:
        exact = super()._inv_quad(X, factors)
        return exact if self.size <= 20 else exact * 1.01


@operator
class NegativeQuadraticForm(Healthy):
    def _inv_quad(self, X: Tensor, factors: Any) -> Tensor:
        return super()._inv_quad(X, factors) - 1e-9 * X.square().sum(-2)


@operator
class UnorderedParts(Healthy):
    def _conditional(self, index: Tensor, max_size: int) -> Diagonal:
        return Diagonal(self.values[..., index.sort().values])


@operator
class SilentlySingular(Healthy):
    def _factorize(self) -> None:
        return None


@operator
class DoubleResults(Healthy):
    def diagonal(self) -> Tensor:
        return super().diagonal().double()


@operator
class UncheckedInput(Healthy):
    def solve(self, X: Tensor) -> Tensor:
        return X / (self._column() if X.ndim > 1 else self.values)


BUGS = {
    ClampedVariance: "scale",
    OneOrderOnly: "gradients",
    LowRankSamples: "roots",
    SecretRandomness: "determinism",
    SinglePrecision: "solve",
    SizeThreshold: "quadratic_form",
    NegativeQuadraticForm: "quadratic_form",
    UnorderedParts: "parts",
    DoubleResults: "storage",
    UncheckedInput: "errors",
}


def make(cls: type[Diagonal], generator: torch.Generator) -> Diagonal:
    return cls(torch.rand(24, dtype=torch.float64, generator=generator) + 0.5)


def definition(P: Diagonal) -> Tensor:
    return torch.diag(P.values)


def test_a_sound_operator_passes_every_law() -> None:
    report = check_operator(lambda generator: make(Healthy, generator), dense=definition)
    assert report.holds
    measured = {entry.law for entry in report.entries if entry.worst is not None}
    assert measured == {entry.law for entry in report.entries}


@pytest.mark.parametrize("bug", BUGS, ids=lambda cls: cls.__name__)
def test_another_bug_is_found_by_its_law(bug: type[Diagonal]) -> None:
    with pytest.raises(OperatorViolation) as caught:
        check_operator(
            lambda generator: make(bug, generator), dense=definition, dtypes=[torch.float64, torch.float32]
        )
    assert BUGS[bug] in {entry.law for entry in caught.value.report.violations}


def test_a_singular_operator_that_answers_is_found() -> None:
    values = torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64)
    assert check_operator(Healthy(values), dense=torch.diag(values), singular=True).holds
    with pytest.raises(
        OperatorViolation, match=r"solve of a matrix that is (singular|indefinite): NotPositiveDefiniteError"
    ):
        check_operator(SilentlySingular(values), dense=torch.diag(values), singular=True)


def test_a_wrong_matrix_is_found_only_with_its_definition() -> None:
    """Without `dense` an operator is compared with itself; the definition is what tells twice the matrix apart."""
    doubled = make(Healthy, torch.Generator().manual_seed(0)) * 2.0
    assert check_operator(doubled, laws=["matrix"]).holds
    with pytest.raises(OperatorViolation, match="to_dense against the definition"):
        check_operator(doubled, dense=definition(doubled) / 2, laws=["matrix"])
