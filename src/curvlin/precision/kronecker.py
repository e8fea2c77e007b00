"""Kronecker-structured precisions: one or two terms ``L (x) R``, in the basis that diagonalises them together.

Row-major vectorisation: for a weight W of shape (out, in), ``(L (x) R) vec(W) = vec(L W R^T)``; L is the factor of the
outputs, R that of the inputs. With ``a x a`` and ``b x b`` factors a factorisation costs O(a^3 + b^3), a solve
O(ab(a + b)), and nothing of size ``ab x ab`` is ever formed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from curvlin._check import broadcastable, floating, pair_of_sizes, same_kind, symmetric
from curvlin._tree import Tree, is_concrete, needs_grad, static_field, tensor_field
from curvlin.errors import NotClosedError, NotPositiveDefiniteError
from curvlin.numerics import frozen_basis
from curvlin.numerics.frozen_basis import FrozenBasis, OffDiagonal, stacked
from curvlin.numerics.implicit import graft
from curvlin.numerics.kronecker import congruence, in_basis, product, rotate
from curvlin.numerics.pencil import Side, diagonalise
from curvlin.numerics.rotation import rotated_diagonal, rotated_rest
from curvlin.precision.implicit import ImplicitOperator
from curvlin.precision.spectral import SpectralKronecker

if TYPE_CHECKING:
    from curvlin.precision.base import PrecisionOperator
    from curvlin.precision.whitened import WhitenedFrame

Pair = tuple[Tensor | None, Tensor | None]


@dataclass(eq=False, repr=False)
class KroneckerFactors(Tree):
    """``P = (Y_l (x) Y_r) diag(eigenvalues) (Y_l (x) Y_r)^T`` with the bases of the two sides."""

    left: Side = tensor_field(0)
    right: Side = tensor_field(0)
    eigenvalues: Tensor = tensor_field(2)

    @property
    def sides(self) -> tuple[Side, Side]:
        return self.left, self.right

    def function(self, values: Tensor, X: Tensor) -> Tensor:
        """``Q diag(values) Q^T X`` with the orthogonal bases of the sides, in the dtype of X."""
        return in_basis(self.left.orthogonal, values, self.right.orthogonal, X)


@dataclass(eq=False, repr=False, init=False)
class KroneckerSum(ImplicitOperator):
    """``sum_i left_i (x) right_i + shift I`` with one or two terms.

    Closed-form throughout: one term, one term with a shift, the direct sum ``A (x) I + I (x) B`` with or without a
    shift, and two general terms (both may be singular if their sum is not). The rule behind it: on each side there
    is one matrix besides the identity, or there are two matrices and no identity.

    Args:
        terms: one or two pairs (left, right) of symmetric PSD matrices ``(*batch, a, a)`` and ``(*batch, b, b)``;
            None is the identity.
        shift: delta, one number per batch element.
        roots: for each term a pair of roots R with ``matrix = R^T R``, shape ``(*batch, m, n)``, or None where not
            known; they are used for accuracy only (the condition number is then never squared), and carry no
            gradient.
        sizes: (a, b), needed only where a whole side is the identity.

    Raises:
        TypeError, ValueError: if a factor is not a symmetric floating matrix, or sizes, dtypes or devices differ.
        NotClosedError: for more than two terms, or terms that no basis diagonalises together.
    """

    terms: tuple[Pair, ...] = tensor_field(2)
    shift: Float[Tensor, "*batch"] | None = tensor_field(0)
    roots: tuple[Pair, ...] | None = tensor_field(2, constant=True)
    sizes: tuple[int, int] = static_field()

    def __init__(
        self,
        terms: Sequence[tuple[Tensor | None, Tensor | None]],
        shift: Float[Tensor, "*batch"] | float | None = None,
        roots: Sequence[tuple[Tensor | None, Tensor | None]] | None = None,
        sizes: tuple[int, int] | None = None,
    ) -> None:
        if len(terms) == 0:
            raise ValueError("terms must hold one or two pairs of factors, found none")
        if len(terms) > 2:
            raise NotClosedError(
                f"a KroneckerSum has one or two terms, found {len(terms)}: three terms have no joint "
                "diagonalisation; project the sum onto one term, or solve it iteratively"
            )
        reference = next((M for pair in terms for M in pair if isinstance(M, Tensor)), None)
        if reference is None:
            raise ValueError(
                "terms must hold at least one matrix; for a multiple of the identity use Isotropic"
            )
        checked: list[Pair] = []
        batch = torch.Size()
        for i, pair in enumerate(terms):
            factors: list[Tensor | None] = []
            for name, M in _named_sides(f"terms[{i}]", pair):
                if M is not None:
                    M = symmetric(name, M, like=reference)
                    batch = broadcastable(name, M.shape[:-2], batch)
                factors.append(M)
            checked.append((factors[0], factors[1]))
        self.terms = tuple(checked)
        if sizes is not None:
            sizes = pair_of_sizes("sizes", sizes)
        self.sizes = (self._size_of(0, sizes), self._size_of(1, sizes))
        if shift is not None:
            if not isinstance(shift, Tensor):
                shift = torch.tensor(float(shift), dtype=reference.dtype, device=reference.device)
            floating("shift", shift, like=reference)
            batch = broadcastable("shift", shift.shape, batch)
        self.shift = shift
        for side, name in enumerate(("left", "right")):
            general = sum(pair[side] is not None for pair in checked)
            identity = shift is not None or any(pair[side] is None for pair in checked)
            if general > 1 and identity:
                raise NotClosedError(
                    f"two {name} factors and an identity have no joint diagonalisation (two general terms cannot "
                    "be shifted); project the sum onto fewer terms, or solve it iteratively"
                )
        self.roots = None if roots is None else self._check_roots(roots, batch)

    def _size_of(self, side: int, sizes: tuple[int, int] | None) -> int:
        name = ("left", "right")[side]
        # mypy does not carry the condition over to an index.
        found = {pair[side].shape[-1] for pair in self.terms if pair[side] is not None}  # type: ignore[union-attr]
        if sizes is not None:
            found.add(sizes[side])
        if len(found) > 1:
            raise ValueError(f"{name} factors must have equal sizes, found {sorted(found)}")
        if not found:
            raise ValueError(f"the {name} factors are all identities; give sizes=(a, b)")
        return found.pop()

    def _check_roots(self, roots: Sequence[Pair], batch: torch.Size) -> tuple[Pair, ...]:
        if len(roots) != len(self.terms):
            raise ValueError(
                f"roots must hold one pair per term, found {len(roots)} for {len(self.terms)} terms"
            )
        checked: list[Pair] = []
        for i, (pair, matrices) in enumerate(zip(roots, self.terms, strict=True)):
            known: list[Tensor | None] = []
            for (name, R), M in zip(_named_sides(f"roots[{i}]", pair), matrices, strict=True):
                if R is not None:
                    if M is None:
                        raise ValueError(f"{name} must be None where the factor is the identity")
                    _check_root(name, R, M)
                    batch = broadcastable(name, R.shape[:-2], batch)
                    if is_concrete(R) and is_concrete(M):
                        _check_proportional(name, R, M)
                    R = R.detach()
                known.append(R)
            checked.append((known[0], known[1]))
        return tuple(checked)

    # -- constructors -----------------------------------------------------------------------------------------

    @classmethod
    def direct(cls, A: Float[Tensor, "*batch a a"], B: Float[Tensor, "*batch b b"]) -> KroneckerSum:
        """The direct sum ``A (x) I + I (x) B``."""
        return cls([(A, None), (None, B)])

    @classmethod
    def shifted(
        cls,
        A: Float[Tensor, "*batch a a"],
        B: Float[Tensor, "*batch b b"],
        delta: Float[Tensor, "*batch"] | float,
        *,
        roots: tuple[Tensor | None, Tensor | None] | None = None,
    ) -> KroneckerSum:
        """``A (x) B + delta I``."""
        return cls([(A, B)], delta, None if roots is None else [roots])

    @classmethod
    def damped(
        cls,
        A: Float[Tensor, "*batch a a"],
        B: Float[Tensor, "*batch b b"],
        delta: Float[Tensor, "*batch"] | float,
        *,
        roots: tuple[Tensor | None, Tensor | None] | None = None,
    ) -> KroneckerSum:
        """The damped product ``(A + sqrt(delta) I) (x) (B + sqrt(delta) I)``.

        Martens & Grosse (2015), section 6.3. Known roots of A and B are extended by ``delta^(1/4) I``.
        """
        A, B = symmetric("A", A), symmetric("B", B)
        same_kind("B", B, A)
        delta = floating("delta", torch.as_tensor(delta, dtype=A.dtype, device=A.device))
        if is_concrete(delta) and bool((delta < 0).any()):
            raise ValueError(f"delta must be non-negative, found {float(delta.min()):.3e}")
        for M in (A, B):
            broadcastable("delta", delta.shape, M.shape[:-2])
        root = delta.sqrt()[..., None, None]
        damped: list[Tensor] = []
        extended: list[Tensor | None] = []
        for (name, R), M in zip(_named_sides("roots", roots or (None, None)), (A, B), strict=True):
            eye = torch.eye(M.shape[-1], dtype=M.dtype, device=M.device)
            damped.append(M + root * eye)
            if R is not None:
                _check_root(name, R, M)
                batch = broadcastable(name, R.shape[:-2], delta.shape)
                R = torch.cat([t.expand(*batch, *t.shape[-2:]) for t in (R, root.sqrt() * eye)], -2)
            extended.append(R)
        return cls([(damped[0], damped[1])], None, None if roots is None else [(extended[0], extended[1])])

    # -- structure --------------------------------------------------------------------------------------------

    @property
    def size(self) -> int:
        return self.sizes[0] * self.sizes[1]

    @property
    def orthogonal(self) -> bool:
        """Whether the joint eigenbasis is orthogonal (no side holds two matrices)."""
        return all(sum(pair[side] is not None for pair in self.terms) < 2 for side in (0, 1))

    def _factors_need_grad(self) -> bool:
        return any(needs_grad(M) for pair in self.terms for M in pair if M is not None)

    def _side(self, side: int) -> list[Tensor | None]:
        return [pair[side] for pair in self.terms]

    def _side_roots(self, side: int) -> list[Tensor | None]:
        return [None] * len(self.terms) if self.roots is None else [pair[side] for pair in self.roots]

    def _ones(self, side: int) -> Tensor:
        return torch.ones(self.sizes[side], dtype=self.dtype, device=self.device)

    # -- factorisation ----------------------------------------------------------------------------------------

    def _factorize(self) -> KroneckerFactors:
        left, right = (
            diagonalise(
                self._side(s), self._side_roots(s), self.resolution, f"KroneckerSum.{name}", self._ones(s)
            )
            for s, name in enumerate(("left", "right"))
        )
        eigenvalues = self._combine(left.spectra, right.spectra)
        if not bool((eigenvalues > 0).all()):
            largest, smallest = float(eigenvalues.max()), float(eigenvalues.min())
            damping = (
                self.resolution * max(self.sizes) * 100 - min(smallest / largest, 0.0)
                if largest > 0
                else None
            )
            raise NotPositiveDefiniteError("KroneckerSum", smallest, damping)
        return KroneckerFactors(left, right, eigenvalues)

    def _combine(self, left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
        """The eigenvalues ``sum_t l_t r_t^T + shift`` as a matrix ``(..., a, b)``."""
        total = sum(
            (l[..., :, None] * r[..., None, :] for l, r in zip(left, right, strict=True)),
            start=torch.zeros(()),
        )
        return total if self.shift is None else total + self.shift[..., None, None]

    # -- products, solves, determinants -----------------------------------------------------------------------

    def _matmul(self, X: Tensor) -> Tensor:
        V = X.mT.unflatten(-1, self.sizes)
        total = sum(
            (rotate(left, V, right) for left, right in self.terms), start=torch.zeros((), dtype=X.dtype)
        )
        if self.shift is not None:
            total = total + self.shift[..., None, None, None] * V
        return total.flatten(-2).mT

    def _solve_value(self, X: Tensor, factors: KroneckerFactors) -> Tensor:
        x = self._solve_once(X, factors)
        if self.orthogonal:
            return x
        # The bases of a pencil are as ill-conditioned as its sum; one step of refinement makes the residual small.
        return x + self._solve_once(X - self._matmul(x), factors)

    def _solve_once(self, X: Tensor, factors: KroneckerFactors) -> Tensor:
        left, right = (side.solve_basis for side in factors.sides)
        V = congruence(left, X.mT.unflatten(-1, self.sizes), right) / factors.eigenvalues.unsqueeze(-3)
        return rotate(left, V, right).flatten(-2).mT

    def _inv_quad_value(self, X: Tensor, factors: KroneckerFactors) -> Tensor:
        left, right = (side.solve_basis for side in factors.sides)
        V = congruence(left, X.mT.unflatten(-1, self.sizes), right)
        return (V.square() / factors.eigenvalues.unsqueeze(-3)).sum((-2, -1))

    def _inv_quad_and_solution(self, X: Tensor, factors: KroneckerFactors) -> tuple[Tensor, Tensor]:
        if not self.orthogonal:
            return super()._inv_quad_and_solution(X, factors)
        left, right = (side.solve_basis for side in factors.sides)
        V = congruence(left, X.mT.unflatten(-1, self.sizes), right)
        solved = V / factors.eigenvalues.unsqueeze(-3)
        return (V * solved).sum((-2, -1)), rotate(left, solved, right).flatten(-2).mT

    def _logdet(self, factors: KroneckerFactors) -> Tensor:
        value = self._logdet_value(factors)
        return graft(value, frozen_basis.log_det(self._frozen(factors))) if self._needs_grad() else value

    def _logdet_value(self, factors: KroneckerFactors) -> Tensor:
        a, b = self.sizes
        whitening = 2 * b * factors.left.logdet_whitening() + 2 * a * factors.right.logdet_whitening()
        return factors.eigenvalues.log().sum((-2, -1)) + whitening

    def _frozen(self, factors: KroneckerFactors) -> FrozenBasis:
        """P in its eigenbasis, which is a constant of the calculus."""
        spectra = [list(side.spectra) for side in factors.sides]
        off: list[list[tuple[int, Tensor]]] = [[], []]
        for s, side in enumerate(factors.sides):
            for t, M in enumerate(self._side(s)):
                if M is not None and needs_grad(M):
                    X = side.solve_basis
                    assert X is not None
                    spectra[s][t] = rotated_diagonal(M, X, spectra[s][t])
                    off[s].append((t, rotated_rest(M, X)))
        parts = [
            OffDiagonal(
                stacked([M for _, M in found], 2),
                stacked([spectra[1 - s][t] for t, _ in found], 1),
                tuple(t for t, _ in found),
            )
            if found
            else None
            for s, found in enumerate(off)
        ]
        bases = factors.left.solve_basis, factors.right.solve_basis
        return FrozenBasis(bases, self._combine(*spectra), (parts[0], parts[1]))

    def _diagonal(self) -> Tensor:
        total: Tensor | float = 0.0
        for left, right in self.terms:
            l, r = (
                self._ones(s) if M is None else M.diagonal(dim1=-2, dim2=-1)
                for s, M in enumerate((left, right))
            )
            total = total + l[..., :, None] * r[..., None, :]
        assert isinstance(total, Tensor)
        if self.shift is not None:
            total = total + self.shift[..., None, None]
        return total.flatten(-2)

    def _inverse_diagonal(self, factors: KroneckerFactors) -> Tensor:
        return frozen_basis.inverse_diagonal(self._frozen(factors)).flatten(-2)

    # -- roots ------------------------------------------------------------------------------------------------

    def _whiten(self, X: Tensor, factors: KroneckerFactors) -> Tensor:
        return self._frame(factors).whiten(X)

    def _unwhiten(self, Z: Tensor, factors: KroneckerFactors) -> Tensor:
        return self._frame(factors).unwhiten(Z)

    def _draw(self, Z: Tensor, factors: KroneckerFactors) -> Tensor:
        if not self.orthogonal or self._needs_grad():
            return super()._draw(Z, factors)
        return self._unwhiten(Z, factors)

    def _root_matvec(self, Z: Tensor, factors: KroneckerFactors) -> Tensor:
        return self._frame(factors).root_matvec(Z)

    def _root_solve(self, G: Tensor, factors: KroneckerFactors) -> Tensor:
        return self._frame(factors).root_solve(G)

    def _frame(self, factors: KroneckerFactors) -> WhitenedFrame:
        from curvlin.precision.whitened import whitened  # which has a KroneckerSum inside

        return whitened(self, factors)

    # -- algebra ----------------------------------------------------------------------------------------------

    def _scale(self, c: Tensor) -> KroneckerSum:
        """The scale goes into one factor of each term: the left one, or the right one beside an identity."""
        matrix_scale = c[..., None, None]
        terms = [
            # One of the two is not None.
            (left * matrix_scale, right) if left is not None else (None, right * matrix_scale)  # type: ignore[operator]
            for left, right in self.terms
        ]
        # Roots matter only up to scale, so they stay as they are, and powers of two stay exact.
        return self._with(terms=tuple(terms), shift=None if self.shift is None else self.shift * c)

    def _marginal(self, index: Tensor, max_size: int) -> KroneckerSum | None:
        grid = product_index(index, self.sizes[1])
        if grid is None or len(self.terms) > 1 or self.shift is not None:
            return None
        from curvlin.precision.dense import Dense

        parts = [
            None if M is None else Dense(M).marginal(part, max_size=len(part)).to_dense()
            for M, part in zip(self.terms[0], grid, strict=True)
        ]
        return KroneckerSum([(parts[0], parts[1])], sizes=(len(grid[0]), len(grid[1])))

    def _conditional(self, index: Tensor, max_size: int) -> PrecisionOperator | None:
        grid = product_index(index, self.sizes[1])
        if grid is None:
            return self._entries(index) if len(index) <= max_size else None
        rows, columns = grid
        terms = [
            (
                None if left is None else left[..., rows[:, None], rows],
                None if right is None else right[..., columns[:, None], columns],
            )
            for left, right in self.terms
        ]
        roots = None
        if self.roots is not None:
            roots = [
                (None if l is None else l[..., rows], None if r is None else r[..., columns])
                for l, r in self.roots
            ]
        return KroneckerSum(terms, self.shift, roots, (len(rows), len(columns)))

    def _entries(self, index: Tensor) -> PrecisionOperator:
        """The sub-matrix of coordinates that are no product, entry by entry: nothing has more than its k^2."""
        from curvlin.precision.dense import Dense

        places = index // self.sizes[1], index % self.sizes[1]
        eye = torch.eye(len(index), dtype=self.dtype, device=self.device)
        total = eye * 0 if self.shift is None else self.shift[..., None, None] * eye
        for pair in self.terms:
            sides = [
                (place[:, None] == place).to(self.dtype) if M is None else M[..., place[:, None], place]
                for M, place in zip(pair, places, strict=True)
            ]
            total = total + sides[0] * sides[1]
        return Dense(total)

    def _to_dense(self) -> Tensor:
        eyes = [torch.eye(n, dtype=self.dtype, device=self.device) for n in self.sizes]
        total: Tensor | float = 0.0
        for pair in self.terms:
            left, right = (eye if M is None else M for M, eye in zip(pair, eyes, strict=True))
            total = total + product(left, right)
        assert isinstance(total, Tensor)
        if self.shift is not None:
            total = total + self.shift[..., None, None] * torch.eye(
                self.size, dtype=self.dtype, device=self.device
            )
        return total


def _named_sides(name: str, pair: Pair) -> list[tuple[str, Tensor | None]]:
    if len(pair) != 2:
        raise ValueError(f"{name} must be a pair (left, right), found {len(pair)} entries")
    return [(f"{name}.left", pair[0]), (f"{name}.right", pair[1])]


def _check_root(name: str, R: Tensor, M: Tensor) -> None:
    floating(name, R, ndim=2, like=M)
    if R.shape[-1] != M.shape[-1]:
        raise ValueError(f"{name} must have {M.shape[-1]} columns, found shape {tuple(R.shape)}")


def _check_proportional(name: str, R: Tensor, M: Tensor) -> None:
    R, M = R.detach(), M.detach()
    gap = (_of_unit_size(R.mT @ R) - _of_unit_size(M)).abs().amax((-2, -1))
    if not bool((gap <= 8 * (R.shape[-2] + R.shape[-1]) * torch.finfo(R.dtype).eps).all()):
        raise ValueError(
            f"{name} must satisfy R^T R = factor up to a positive scale, found a relative difference of "
            f"{float(gap.max()):.1e}"
        )


def _of_unit_size(A: Tensor) -> Tensor:
    """A over its trace if it is positive semidefinite; always over a number that is zero only if A is."""
    trace = A.diagonal(dim1=-2, dim2=-1).abs().sum(-1)
    size = torch.maximum(trace, A.abs().amax((-2, -1)))[..., None, None]
    return A / torch.where(size > 0, size, 1.0)


def product_index(index: Tensor, columns: int) -> tuple[Tensor, Tensor] | None:
    """``(rows, columns)`` if the flat row-major index is their product in order, else None."""
    row, column = index // columns, index % columns
    width = int((row == row[0]).sum())
    if len(index) % width:
        return None
    rows, first = row[::width], column[:width]
    expected = (rows[:, None] * columns + first).flatten()
    return (rows, first) if bool((index == expected).all()) else None


def spectral_form(
    P: KroneckerSum | SpectralKronecker, factors: KroneckerFactors | None
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """X, Y and d with ``P^-1 = (X (x) Y) diag(1 / d) (X (x) Y)^T``; None is the identity.

    The bases are constants; d, ``(..., a, b)``, is differentiable in the shift and in spectral eigenvalues.
    """
    if isinstance(P, SpectralKronecker):
        return P.QL, P.QR, P.eigenvalues
    assert factors is not None
    left, right = factors.sides
    return left.solve_basis, right.solve_basis, P._combine(left.spectra, right.spectra)


def frozen(P: KroneckerSum | SpectralKronecker, factors: KroneckerFactors | None) -> FrozenBasis:
    """P in its eigenbasis, with what its derivatives need."""
    if isinstance(P, SpectralKronecker):
        return FrozenBasis((P.QL, P.QR), P.eigenvalues)
    assert factors is not None
    return P._frozen(factors)
