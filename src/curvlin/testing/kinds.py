"""Every kind of operator, made from tensors of prescribed condition, scale and spectrum.

A builder is a function ``(Draw) -> Recipe`` entered under a name; `make_case` runs it. The dense formulas
here are the definitions in the documentation, written out; they share nothing with the operators.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from curvlin.testing.cases import Arrays, Case, Parameter, Recipe
from curvlin.testing.matrices import eigenvalues, orthogonal, root_matrix, spd_matrix


@dataclass(frozen=True)
class Spec:
    """What a case is asked to be.

    Args:
        size: D, the number of rows; Kronecker kinds take its most balanced divisors.
        batch: batch shape.
        mixed: let only every other parameter have the batch dimensions (the others broadcast).
        dtype: storage dtype.
        log10cond: of the whole operator, roughly; what was reached is `Case.condition`.
        log10scale: of the largest eigenvalue, roughly.
        spectrum: one of `SPECTRA`, for the part of the operator that carries the structure.
        seed: of everything random.
    """

    size: int = 12
    batch: tuple[int, ...] = ()
    mixed: bool = False
    dtype: torch.dtype = torch.float64
    log10cond: float = 2.0
    log10scale: float = 0.0
    spectrum: str = "decay"
    seed: int = 0

    @property
    def scale(self) -> float:
        """The largest eigenvalue, roughly."""
        return float(10.0**self.log10scale)

    @property
    def sides(self) -> tuple[int, int]:
        """Kronecker sizes (a, b) with ``a b = size``, as equal as divisors allow."""
        a = next(d for d in range(math.isqrt(self.size), 0, -1) if self.size % d == 0)
        return a, self.size // a


class Draw:
    """Draws parameters for a spec."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.generator = torch.Generator().manual_seed(spec.seed)
        self._count = 0

    def uniform(self, low: float, high: float) -> float:
        """One number."""
        return low + (high - low) * float(torch.rand((), dtype=torch.float64, generator=self.generator))

    def parameter(
        self, make: Callable[[], Tensor], *, symmetric: bool = False, constant: bool = False
    ) -> Parameter:
        """One parameter: `make()` for every element of the batch, rounded to the storage dtype."""
        carries_batch = not (self.spec.mixed and self._count % 2 == 1)
        self._count += 1
        batch = self.spec.batch if carries_batch else ()
        items = [make() for _ in range(math.prod(batch))]
        own = items[0].shape
        tensor = torch.stack(items).reshape((*batch, *own)).to(self.spec.dtype)
        return Parameter(tensor, len(own), symmetric=symmetric, differentiable=not constant)

    def scalar(self, value: float) -> Parameter:
        """A number within a factor of two of `value`."""
        return self.parameter(lambda: torch.tensor(value * self.uniform(0.5, 1.0), dtype=torch.float64))

    def spd(self, n: int, log10cond: float, log10scale: float, spectrum: str | None = None) -> Parameter:
        """A symmetric matrix of the given (by default the spec's) spectrum."""
        values = eigenvalues(n, spectrum or self.spec.spectrum, log10cond) * 10.0**log10scale
        return self.parameter(lambda: spd_matrix(values, self.generator), symmetric=True)

    def root(self, n: int, log10cond: float, log10scale: float, spectrum: str | None = None) -> Parameter:
        """R, with as many rows as ``R^T R`` has rank, plus one."""
        values = eigenvalues(n, spectrum or self.spec.spectrum, log10cond) * 10.0**log10scale
        rows = int((values > 0).sum()) + 1
        return self.parameter(lambda: root_matrix(values, rows, self.generator))

    def positive(self, n: int, log10cond: float, log10scale: float) -> Parameter:
        """n positive numbers spread geometrically, in random order."""
        values = eigenvalues(n, "decay", log10cond) * 10.0**log10scale
        return self.parameter(lambda: values[torch.randperm(n, generator=self.generator)])

    def columns(self, n: int, k: int, log10scale: float) -> Parameter:
        """``U``, n x k, with ``|U U^T| = 10^log10scale`` and the spec's spectrum in its singular values."""
        spectrum = self.spec.spectrum

        def make() -> Tensor:
            if (
                spectrum == "clustered"
            ):  # nearly collinear columns: the Gram matrix is singular to working precision
                base = torch.randn(n, 1, dtype=torch.float64, generator=self.generator)
                U = base + 1e-7 * torch.randn(n, k, dtype=torch.float64, generator=self.generator)
            elif spectrum == "rank-deficient":  # the last column repeats the first, another is zero
                U = torch.randn(n, k, dtype=torch.float64, generator=self.generator)
                U[:, -1] = U[:, 0]
                if k > 2:
                    U[:, 1] = 0.0
            else:
                left = torch.linalg.qr(torch.randn(n, k, dtype=torch.float64, generator=self.generator))[0]
                U = left * eigenvalues(k, spectrum, min(4.0, self.spec.log10cond)).sqrt()
            scaled: Tensor = U / torch.linalg.matrix_norm(U, 2) * 10.0 ** (log10scale / 2)
            return scaled

        return self.parameter(make)


Builder = Callable[[Draw], Recipe]
KINDS: dict[str, Builder] = {}
"""Name -> builder; enter your own with `kind`."""


def kind(name: str) -> Callable[[Builder], Builder]:
    """Decorator that enters a builder under a name."""

    def enter(builder: Builder) -> Builder:
        if name in KINDS:
            raise ValueError(f"a kind named {name!r} is already registered")
        KINDS[name] = builder
        return builder

    return enter


def make_case(kind: str, spec: Spec | None = None, **changes: Any) -> Case:
    """The case of a kind: ``make_case("dense", size=12, log10cond=8.0, seed=3)``, or with a ready `Spec`."""
    spec = Spec(**changes) if spec is None else spec
    return Case(kind, KINDS[kind](Draw(spec)), spec, spec.seed)


def _rank(size: int) -> int:
    """Columns of a low-rank part."""
    return max(1, min(size // 4, 8))


def _has_zero(values: Tensor) -> bool:
    return bool((values == 0).any())


# -- no structure to speak of --------------------------------------------------------------------------------


@kind("isotropic")
def _isotropic(draw: Draw) -> Recipe:
    from curvlin.precision.diagonal import Isotropic

    n = draw.spec.size
    value = draw.scalar(draw.spec.scale)
    return Recipe((value,), lambda v: Isotropic(v, n), lambda xp, v: v * xp.eye(n), n)


@kind("diagonal")
def _diagonal(draw: Draw) -> Recipe:
    from curvlin.precision.diagonal import Diagonal

    spec = draw.spec
    values = eigenvalues(spec.size, spec.spectrum, spec.log10cond) * spec.scale
    d = draw.parameter(lambda: values[torch.randperm(spec.size, generator=draw.generator)])
    return Recipe(
        (d,), Diagonal, lambda xp, d: xp.diag(d), spec.size, spectrum=values, singular=_has_zero(values)
    )


@kind("dense")
def _dense(draw: Draw) -> Recipe:
    from curvlin.precision.dense import Dense

    spec = draw.spec
    values = eigenvalues(spec.size, spec.spectrum, spec.log10cond) * spec.scale
    matrix = draw.parameter(lambda: spd_matrix(values, draw.generator), symmetric=True)
    return Recipe((matrix,), Dense, lambda xp, m: m, spec.size, spectrum=values, singular=_has_zero(values))


# -- Kronecker -----------------------------------------------------------------------------------------------


@kind("kronecker")
def _kronecker(draw: Draw) -> Recipe:
    """One term, the condition shared out between the factors."""
    from curvlin.precision.kronecker import KroneckerSum

    spec, (a, b) = draw.spec, draw.spec.sides
    share = draw.uniform(0.0, 1.0) * spec.log10cond
    A = draw.spd(a, share, 0.7 * spec.log10scale)
    B = draw.spd(b, spec.log10cond - share, 0.3 * spec.log10scale)
    return Recipe(
        (A, B),
        lambda A, B: KroneckerSum([(A, B)]),
        lambda xp, A, B: xp.kron(A, B),
        a * b,
        singular=spec.spectrum == "rank-deficient" and b > 1,
    )


@kind("kronecker_shifted")
def _kronecker_shifted(draw: Draw) -> Recipe:
    """``A (x) B + delta I``; delta alone bounds the condition, so that the factors may be singular."""
    from curvlin.precision.kronecker import KroneckerSum

    spec, (a, b) = draw.spec, draw.spec.sides
    A = draw.spd(a, spec.log10cond, 0.7 * spec.log10scale)
    B = draw.spd(b, spec.log10cond, 0.3 * spec.log10scale)
    delta = draw.scalar(spec.scale * 10.0**-spec.log10cond)
    return Recipe(
        (A, B, delta),
        KroneckerSum.shifted,
        lambda xp, A, B, delta: xp.kron(A, B) + delta * xp.eye(a * b),
        a * b,
    )


@kind("kronecker_damped")
def _kronecker_damped(draw: Draw) -> Recipe:
    """``(A + sqrt(delta) I) (x) (B + sqrt(delta) I)``."""
    from curvlin.precision.kronecker import KroneckerSum

    spec, (a, b) = draw.spec, draw.spec.sides
    A = draw.spd(a, spec.log10cond, 0.5 * spec.log10scale)
    B = draw.spd(b, spec.log10cond, 0.5 * spec.log10scale)
    delta = draw.scalar(spec.scale * 10.0**-spec.log10cond)

    def assemble(xp: Arrays, A: Any, B: Any, delta: Any) -> Any:
        return xp.kron(A + delta**0.5 * xp.eye(a), B + delta**0.5 * xp.eye(b))

    return Recipe((A, B, delta), KroneckerSum.damped, assemble, a * b, storage_roundings=2.0)


@kind("kronecker_direct")
def _kronecker_direct(draw: Draw) -> Recipe:
    """``A (x) I + I (x) B``, A of the spec's spectrum (it may be singular), B positive definite."""
    from curvlin.precision.kronecker import KroneckerSum

    spec, (a, b) = draw.spec, draw.spec.sides
    A = draw.spd(a, spec.log10cond, spec.log10scale)
    B = draw.spd(b, spec.log10cond, spec.log10scale, "decay")
    return Recipe(
        (A, B),
        KroneckerSum.direct,
        lambda xp, A, B: xp.kron(A, xp.eye(b)) + xp.kron(xp.eye(a), B),
        a * b,
    )


@kind("kronecker_two")
def _kronecker_two(draw: Draw) -> Recipe:
    """``A1 (x) B1 + A2 (x) B2``: the first term as the spec says, the second positive definite."""
    from curvlin.precision.kronecker import KroneckerSum

    spec, (a, b) = draw.spec, draw.spec.sides
    share = draw.uniform(0.3, 0.7) * spec.log10cond
    A1 = draw.spd(a, spec.log10cond, 0.6 * spec.log10scale)
    B1 = draw.spd(b, spec.log10cond, 0.4 * spec.log10scale)
    A2 = draw.spd(a, share, 0.2 * spec.log10scale, "decay")
    B2 = draw.spd(b, spec.log10cond - share, 0.8 * spec.log10scale, "step")
    return Recipe(
        (A1, B1, A2, B2),
        lambda A1, B1, A2, B2: KroneckerSum([(A1, B1), (A2, B2)]),
        lambda xp, A1, B1, A2, B2: xp.kron(A1, B1) + xp.kron(A2, B2),
        a * b,
    )


@kind("kronecker_complementary")
def _kronecker_complementary(draw: Draw) -> Recipe:
    """Two terms, each nearly singular where the other is large, so that the sum is well conditioned."""
    from curvlin.precision.kronecker import KroneckerSum

    spec, (a, b) = draw.spec, draw.spec.sides
    values = eigenvalues(a, "decay", spec.log10cond) * 10.0 ** (0.5 * spec.log10scale)

    def pair() -> Tensor:
        Q = orthogonal(a, draw.generator)
        first, second = (Q * values) @ Q.mT, (Q * values.flip(0)) @ Q.mT
        return torch.stack([first, second]) / 2 + torch.stack([first, second]).mT / 2

    both = draw.parameter(pair, symmetric=True)
    B1 = draw.spd(b, 1.0, 0.5 * spec.log10scale, "decay")
    B2 = draw.spd(b, 1.0, 0.5 * spec.log10scale, "step")
    return Recipe(
        (both, B1, B2),
        lambda A, B1, B2: KroneckerSum([(A[..., 0, :, :], B1), (A[..., 1, :, :], B2)]),
        lambda xp, A, B1, B2: xp.kron(A[0], B1) + xp.kron(A[1], B2),
        a * b,
    )


@kind("kronecker_repeated")
def _kronecker_repeated(draw: Draw) -> Recipe:
    """``I (x) B + delta I``: one matrix for every row, and a side without any."""
    from curvlin.precision.kronecker import KroneckerSum

    spec, (a, b) = draw.spec, draw.spec.sides
    B = draw.spd(b, spec.log10cond, spec.log10scale)
    delta = draw.scalar(spec.scale * 10.0**-spec.log10cond)
    return Recipe(
        (B, delta),
        lambda B, delta: KroneckerSum([(None, B)], delta, sizes=(a, b)),
        lambda xp, B, delta: xp.kron(xp.eye(a), B) + delta * xp.eye(a * b),
        a * b,
    )


@kind("kronecker_one_side")
def _kronecker_one_side(draw: Draw) -> Recipe:
    """``A1 (x) I + A2 (x) I``, which nobody added up: a pencil on one side, nothing on the other."""
    from curvlin.precision.kronecker import KroneckerSum

    spec, (a, b) = draw.spec, draw.spec.sides
    A1 = draw.spd(a, spec.log10cond, spec.log10scale)
    A2 = draw.spd(a, spec.log10cond, spec.log10scale, "decay")
    return Recipe(
        (A1, A2),
        lambda A1, A2: KroneckerSum([(A1, None), (A2, None)], sizes=(a, b)),
        lambda xp, A1, A2: xp.kron(A1, xp.eye(b)) + xp.kron(A2, xp.eye(b)),
        a * b,
    )


@kind("kronecker_shifted_roots")
def _kronecker_shifted_roots(draw: Draw) -> Recipe:
    """``R^T R (x) S^T S + delta I`` with the roots stored."""
    from curvlin.precision.kronecker import KroneckerSum

    spec, (a, b) = draw.spec, draw.spec.sides
    R = draw.root(a, spec.log10cond, 0.7 * spec.log10scale)
    S = draw.root(b, spec.log10cond, 0.3 * spec.log10scale)
    delta = draw.scalar(spec.scale * 10.0**-spec.log10cond)
    return Recipe(
        (R, S, delta),
        lambda R, S, delta: KroneckerSum([(R.mT @ R, S.mT @ S)], shift=delta, roots=[(R, S)]),
        lambda xp, R, S, delta: xp.kron(R.T @ R, S.T @ S) + delta * xp.eye(a * b),
        a * b,
        storage_roundings=float(a + b),
    )


@kind("kronecker_two_roots")
def _kronecker_two_roots(draw: Draw) -> Recipe:
    """Two terms, both given with roots; the first may be singular."""
    from curvlin.precision.kronecker import KroneckerSum

    spec, (a, b) = draw.spec, draw.spec.sides
    R1 = draw.root(a, spec.log10cond, 0.6 * spec.log10scale)
    S1 = draw.root(b, spec.log10cond, 0.4 * spec.log10scale)
    R2 = draw.root(a, spec.log10cond / 2, 0.2 * spec.log10scale, "decay")
    S2 = draw.root(b, spec.log10cond / 2, 0.8 * spec.log10scale, "step")
    return Recipe(
        (R1, S1, R2, S2),
        lambda R1, S1, R2, S2: KroneckerSum(
            [(R1.mT @ R1, S1.mT @ S1), (R2.mT @ R2, S2.mT @ S2)], roots=[(R1, S1), (R2, S2)]
        ),
        lambda xp, R1, S1, R2, S2: xp.kron(R1.T @ R1, S1.T @ S1) + xp.kron(R2.T @ R2, S2.T @ S2),
        a * b,
        storage_roundings=float(a + b),
    )


@kind("spectral_kronecker")
def _spectral_kronecker(draw: Draw) -> Recipe:
    """``(QL (x) QR) diag(lambda) (QL (x) QR)^T`` with lambda no product (EKFAC)."""
    from curvlin.precision.spectral import SpectralKronecker

    spec, (a, b) = draw.spec, draw.spec.sides
    values = eigenvalues(a * b, spec.spectrum, spec.log10cond) * spec.scale
    QL = draw.parameter(lambda: orthogonal(a, draw.generator), constant=True)
    QR = draw.parameter(lambda: orthogonal(b, draw.generator), constant=True)
    lam = draw.parameter(lambda: values[torch.randperm(a * b, generator=draw.generator)].reshape(a, b))

    def assemble(xp: Arrays, QL: Any, QR: Any, lam: Any) -> Any:
        Q = xp.kron(QL, QR)
        return (Q * lam.reshape(-1)) @ Q.T

    # The stored bases are orthogonal to rounding only, and solving treats them as orthogonal.
    return Recipe(
        (QL, QR, lam),
        SpectralKronecker,
        assemble,
        a * b,
        spectrum=values,
        storage_roundings=2.0 * math.sqrt(a + b),
        singular=_has_zero(values),
    )


# -- parts and sums ------------------------------------------------------------------------------------------


def _block_sizes(size: int) -> list[int]:
    """Unequal blocks, three where there is room."""
    if size < 3:
        return [1] * size
    first = max(1, size // 2)
    second = max(1, (size - first) * 2 // 3)
    rest = size - first - second
    return [s for s in (first, second, rest) if s > 0]


def _block_recipes(draw: Draw) -> list[Recipe]:
    spec = draw.spec
    kinds = ("kronecker_shifted", "dense", "diagonal")
    recipes = []
    for name, size in zip(kinds, _block_sizes(spec.size), strict=False):
        definite = spec.spectrum != "rank-deficient" or name == "kronecker_shifted"
        sub = Draw(replace(spec, size=size, spectrum=spec.spectrum if definite else "decay"))
        sub.generator = draw.generator
        recipes.append(KINDS[name](sub))
    return recipes


def _parts(recipes: Sequence[Recipe], tensors: Sequence[Any]) -> list[Sequence[Any]]:
    """The flat parameters cut into those of each recipe."""
    cut, start = [], 0
    for r in recipes:
        cut.append(tensors[start : start + len(r.parameters)])
        start += len(r.parameters)
    return cut


def _block_matrix(
    xp: Arrays, recipes: Sequence[Recipe], indices: Sequence[Tensor], tensors: Sequence[Any]
) -> Any:
    """``sum_k S_k^T P_k S_k`` with S_k the rows of the identity that block k acts on."""
    size = sum(r.size for r in recipes)
    total: Any = 0
    for r, index, own in zip(recipes, indices, _parts(recipes, tensors), strict=True):
        selection = torch.eye(size, dtype=torch.float64)[index]
        S = xp.constant(selection if xp.eye(1).__class__ is Tensor else selection.numpy().astype(int))
        total = total + S.T @ r.assemble(xp, *own) @ S
    return total


def _blocks_along(recipes: Sequence[Recipe], order: Tensor | None) -> Recipe:
    """Blocks on the coordinates in this order; None for the default partition, block after block."""
    from curvlin.precision.block_diag import BlockDiag

    sizes = [r.size for r in recipes]
    indices = None if order is None else list(order.split(sizes))
    consecutive = torch.arange(sum(sizes)).split(sizes)
    return Recipe(
        tuple(p for r in recipes for p in r.parameters),
        lambda *t: BlockDiag(
            [r.build(*own) for r, own in zip(recipes, _parts(recipes, t), strict=True)], indices
        ),
        lambda xp, *t: _block_matrix(xp, recipes, indices or consecutive, t),
        sum(sizes),
    )


@kind("block_diag")
def _block_diag(draw: Draw) -> Recipe:
    """Blocks of different types and sizes, on interleaved coordinates."""
    recipes = _block_recipes(draw)
    return _blocks_along(recipes, torch.randperm(draw.spec.size, generator=draw.generator))


@kind("block_diag_consecutive")
def _block_diag_consecutive(draw: Draw) -> Recipe:
    """The default partition: block after block."""
    return _blocks_along(_block_recipes(draw), None)


@kind("low_rank_plus_diag")
def _low_rank_plus_diag(draw: Draw) -> Recipe:
    """``diag(d) + U U^T``; d is heteroscedastic for the spectrum "decay", nearly constant otherwise."""
    from curvlin.precision.low_rank import LowRankPlusDiag

    spec = draw.spec
    n, k = spec.size, _rank(spec.size)
    if spec.spectrum == "decay":
        d = draw.positive(n, spec.log10cond, spec.log10scale)
    else:
        d = draw.positive(n, 0.3, spec.log10scale - spec.log10cond + 0.3)
    U = draw.columns(n, k, spec.log10scale)
    return Recipe(
        (d, U),
        LowRankPlusDiag,
        lambda xp, d, U: xp.diag(d) + U @ U.T,
        n,
        base=lambda xp, d, U: xp.diag(d),
        splits_leverage=True,
    )


@kind("woodbury")
def _woodbury(draw: Draw) -> Recipe:
    """``A (x) B + delta I + U C U^T``."""
    from curvlin.precision.low_rank import Woodbury

    base = _kronecker_shifted(draw)
    n, k = draw.spec.size, _rank(draw.spec.size)
    U = draw.columns(n, k, draw.spec.log10scale)
    C = draw.spd(k, min(1.0, draw.spec.log10cond), 0.0, "decay")
    return Recipe(
        (*base.parameters, U, C),
        lambda A, B, delta, U, C: Woodbury(base.build(A, B, delta), U, core=C),
        lambda xp, A, B, delta, U, C: base.assemble(xp, A, B, delta) + U @ C @ U.T,
        n,
        base=lambda xp, A, B, delta, U, C: base.assemble(xp, A, B, delta),
    )


@kind("woodbury_blocks")
def _woodbury_blocks(draw: Draw) -> Recipe:
    """A block-diagonal base with an update that couples the blocks, no core."""
    from curvlin.precision.low_rank import Woodbury

    base = _block_diag(draw)
    n, k = draw.spec.size, _rank(draw.spec.size)
    U = draw.columns(n, k, draw.spec.log10scale)
    return Recipe(
        (*base.parameters, U),
        lambda *t: Woodbury(base.build(*t[:-1]), t[-1]),
        lambda xp, *t: base.assemble(xp, *t[:-1]) + t[-1] @ t[-1].T,
        n,
        base=lambda xp, *t: base.assemble(xp, *t[:-1]),
    )


@kind("woodbury_updated")
def _woodbury_updated(draw: Draw) -> Recipe:
    """An update of an updated Kronecker sum with a core."""
    inner = _woodbury(draw)
    U = draw.columns(draw.spec.size, 1, draw.spec.log10scale)
    assert inner.base is not None
    base = inner.base
    return Recipe(
        (*inner.parameters, U),
        lambda *t: inner.build(*t[:-1]).update(t[-1]),
        lambda xp, *t: inner.assemble(xp, *t[:-1]) + t[-1] @ t[-1].T,
        draw.spec.size,
        base=lambda xp, *t: base(xp, *t[:-1]),
        whitening_costs=_rank(draw.spec.size) + 1 >= draw.spec.size,
    )


@kind("woodbury_downdated")
def _woodbury_downdated(draw: Draw) -> Recipe:
    """A change of a change: an updated Kronecker sum, downdated by less than half of its shift."""
    inner, spec = _woodbury(draw), draw.spec
    U = draw.columns(spec.size, 1, spec.log10scale - spec.log10cond + math.log10(0.25))
    assert inner.base is not None
    base = inner.base
    return Recipe(
        (*inner.parameters, U),
        lambda *t: inner.build(*t[:-1]).downdate(t[-1]),
        lambda xp, *t: inner.assemble(xp, *t[:-1]) - t[-1] @ t[-1].T,
        spec.size,
        base=lambda xp, *t: base(xp, *t[:-1]) - t[-1] @ t[-1].T,
        whitening_costs=True,
    )


@kind("woodbury_singular_core")
def _woodbury_singular_core(draw: Draw) -> Recipe:
    """``diag(d) + U C U^T`` with a core that has no root to differentiate: C = G G^T of less than full rank."""
    from curvlin.precision.diagonal import Diagonal
    from curvlin.precision.low_rank import Woodbury

    spec = draw.spec
    n, k = spec.size, max(2, _rank(spec.size))
    d = draw.positive(n, spec.log10cond, spec.log10scale)
    U = draw.columns(n, k, spec.log10scale)
    values = eigenvalues(k, "decay", min(1.0, spec.log10cond)).clone()
    values[-1] = 0.0
    C = draw.parameter(lambda: spd_matrix(values, draw.generator), symmetric=True)
    return Recipe(
        (d, U, C),
        lambda d, U, C: Woodbury(Diagonal(d), U, core=C),
        lambda xp, d, U, C: xp.diag(d) + U @ C @ U.T,
        n,
        base=lambda xp, d, U, C: xp.diag(d),
        differentiable_roots=False,
    )


@kind("woodbury_indefinite_core")
def _woodbury_indefinite_core(draw: Draw) -> Recipe:
    """``delta I + A (x) B + U C U^T`` whose core lifts some directions and lowers others, by less than delta / 2."""
    from curvlin.precision.low_rank import Woodbury

    base, spec = _kronecker_shifted(draw), draw.spec
    n, k = spec.size, max(2, _rank(spec.size))
    U = draw.columns(n, k, spec.log10scale - spec.log10cond + math.log10(0.25))
    signs = torch.ones(k, dtype=torch.float64)
    signs[::2] = -1.0

    def core() -> Tensor:
        Q = orthogonal(k, draw.generator)
        return ((Q * signs) @ Q.mT + ((Q * signs) @ Q.mT).mT) / 2

    C = draw.parameter(core, symmetric=True)
    return Recipe(
        (*base.parameters, U, C),
        lambda A, B, delta, U, C: Woodbury(base.build(A, B, delta), U, core=C),
        lambda xp, A, B, delta, U, C: base.assemble(xp, A, B, delta) + U @ C @ U.T,
        n,
        differentiable_roots=False,
    )


@kind("dual_rows")
def _dual_rows(draw: Draw) -> Recipe:
    """``diag(d) + Phi^T Phi`` with rows of features in the place of U."""
    from curvlin.features.dense import DenseFeatures
    from curvlin.precision.diagonal import Diagonal
    from curvlin.precision.low_rank import Woodbury

    spec = draw.spec
    n, k = spec.size, _rank(spec.size)
    d = draw.positive(n, spec.log10cond, spec.log10scale)
    U = draw.columns(n, k, spec.log10scale)
    return Recipe(
        (d, U),
        lambda d, U: Woodbury(Diagonal(d), DenseFeatures(U.mT.unsqueeze(-2))),
        lambda xp, d, U: xp.diag(d) + U @ U.T,
        n,
        base=lambda xp, d, U: xp.diag(d),
    )


@kind("dual_layer")
def _dual_layer(draw: Draw) -> Recipe:
    """``delta I + Phi^T Phi`` with Phi one layer's Jacobian: a posterior in its dual form."""
    from curvlin.features.khatri_rao import KhatriRaoFeatures
    from curvlin.precision.diagonal import Isotropic

    spec, (out, inputs) = draw.spec, draw.spec.sides
    R, S = min(2, _rank(spec.size)), 2
    N = max(1, _rank(spec.size) // R)
    delta = draw.scalar(spec.scale * 10.0**-spec.log10cond)

    def normal(*shape: int) -> Callable[[], Tensor]:
        size = 10.0 ** (spec.log10scale / 4) / math.sqrt(S * math.prod(shape[-1:]))
        return lambda: size * torch.randn(*shape, dtype=torch.float64, generator=draw.generator)

    left, right = draw.parameter(normal(N, R, S, out)), draw.parameter(normal(N, S, inputs))

    def assemble(xp: Arrays, delta: Any, left: Any, right: Any) -> Any:
        total: Any = delta * xp.eye(out * inputs)
        for n in range(N):
            for r in range(R):
                row = (left[n, r].T @ right[n]).reshape(1, -1)
                total = total + row.T @ row
        return total

    return Recipe(
        (delta, left, right),
        lambda delta, left, right: Isotropic(delta, out * inputs).update(KhatriRaoFeatures(left, right)),
        assemble,
        out * inputs,
        base=lambda xp, delta, left, right: delta * xp.eye(out * inputs),
        storage_roundings=float(S),  # the rows are sums over S positions
    )


@kind("dual_core")
def _dual_core(draw: Draw) -> Recipe:
    """``delta I + Phi^T C Phi``: the dual form with a core between the rows, which mixes samples."""
    from curvlin.features.khatri_rao import KhatriRaoFeatures
    from curvlin.precision.diagonal import Isotropic
    from curvlin.precision.low_rank import Woodbury

    dual = _dual_layer(draw)
    N, R = dual.parameters[1].tensor.shape[-4:-2]
    C = draw.spd(N * R, min(1.0, draw.spec.log10cond), 0.0, "decay")

    def assemble(xp: Arrays, delta: Any, left: Any, right: Any, C: Any) -> Any:
        rows = [(left[n, r].T @ right[n]).reshape(1, -1) for n in range(N) for r in range(R)]
        total: Any = delta * xp.eye(dual.size)
        for i, row in enumerate(rows):
            for j, other in enumerate(rows):
                total = total + C[i, j] * (row.T @ other)
        return total

    return Recipe(
        (*dual.parameters, C),
        lambda delta, left, right, C: Woodbury(
            Isotropic(delta, dual.size), KhatriRaoFeatures(left, right), core=C
        ),
        assemble,
        dual.size,
        base=lambda xp, delta, left, right, C: delta * xp.eye(dual.size),
        storage_roundings=dual.storage_roundings,
    )


@kind("downdated")
def _downdated(draw: Draw) -> Recipe:
    """``delta I + A (x) B - U U^T`` with ``|U U^T| = delta / 2``, still positive definite."""
    base = _kronecker_shifted(draw)
    spec = draw.spec
    n, k = spec.size, _rank(spec.size)
    # delta was drawn from [1/2, 1] 10^(scale - cond); half of its least value is safe.
    U = draw.columns(n, k, spec.log10scale - spec.log10cond + math.log10(0.25))
    return Recipe(
        (*base.parameters, U),
        lambda A, B, delta, U: base.build(A, B, delta).downdate(U),
        lambda xp, A, B, delta, U: base.assemble(xp, A, B, delta) - U @ U.T,
        n,
    )
