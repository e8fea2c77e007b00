"""The operators that `accuracy.py` measures, as plain tensors of a prescribed condition, scale, size and dtype."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from curvlin.testing.matrices import spd_matrix


@dataclass(frozen=True)
class Problem:
    """Tensors of a family, a right-hand side, and what a truth needs to know.

    ``P = factor (sum_t left_t (x) right_t + shift I) + U U^T``, with ``blockdiag(blocks)`` or ``diag(d)`` in the
    place of the Kronecker terms where there are any.
    """

    family: str
    condition: float
    b: Tensor
    terms: tuple[tuple[Tensor, Tensor], ...] = ()
    shift: Tensor | None = None
    blocks: Tensor | None = None
    d: Tensor | None = None
    U: Tensor | None = None
    factor: float = 1.0

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """What gradients are taken with respect to, in the order of the fields."""
        flat = [M for pair in self.terms for M in pair]
        return (*flat, *(t for t in (self.shift, self.blocks, self.d, self.U) if t is not None))

    def with_inputs(self, inputs: tuple[Tensor, ...]) -> Problem:
        """The same problem on other tensors."""
        rest = iter(inputs)
        terms = tuple((next(rest), next(rest)) for _ in self.terms)
        names = ("shift", "blocks", "d", "U")
        others = {name: None if getattr(self, name) is None else next(rest) for name in names}
        return Problem(self.family, self.condition, self.b, terms, factor=self.factor, **others)

    def dense(self) -> Tensor:
        """The matrix, formed in the dtype of its tensors."""
        N = self.b.numel()
        if self.blocks is not None:
            return torch.block_diag(*self.blocks)
        if self.d is not None:
            P = self.d.diag()
        else:
            P = torch.stack([torch.kron(left, right) for left, right in self.terms]).sum(0)
        if self.shift is not None:
            P = P + self.shift * torch.eye(N, dtype=P.dtype)
        P = self.factor * P
        return P if self.U is None else P + self.U @ self.U.mT


def _pair(a: int, b: int, log10cond: float, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Two factors whose product has eigenvalues from 1 down to 10^-log10cond."""
    halves = (torch.logspace(0, -log10cond / 2, n, dtype=torch.float64) for n in (a, b))
    left, right = (spd_matrix(values, g) for values in halves)
    return left, right


def _columns(N: int, k: int, largest: float, g: torch.Generator) -> Tensor:
    """Columns with squared singular values from 1 to `largest`."""
    Q = torch.linalg.qr(torch.randn(N, k, dtype=torch.float64, generator=g))[0]
    W = torch.linalg.qr(torch.randn(k, k, dtype=torch.float64, generator=g))[0]
    return Q * torch.logspace(0, torch.tensor(largest).log10().item() / 2, k, dtype=torch.float64) @ W


SIZES = {48: (6, 8, 3, 12), 1024: (32, 32, 4, 16)}  # rows: (a, b, rank, rows of a block)


def _kronecker(size: int, cond: float, g: torch.Generator) -> dict[str, object]:
    a, b, _, _ = SIZES[size]
    return {"terms": (_pair(a, b, torch.tensor(cond).log10().item(), g),)}


def _shifted(size: int, cond: float, g: torch.Generator) -> dict[str, object]:
    a, b, _, _ = SIZES[size]
    pair = _pair(
        a, b, torch.tensor(cond).log10().item() + 2, g
    )  # the shift, not the product, ends the spectrum
    return {"terms": (pair,), "shift": torch.tensor(1 / cond, dtype=torch.float64)}


def _two_terms(size: int, cond: float, g: torch.Generator) -> dict[str, object]:
    a, b, _, _ = SIZES[size]
    return {"terms": (_pair(a, b, 1.0, g), _pair(a, b, torch.tensor(cond).log10().item(), g))}


def _two_terms_swapped(size: int, cond: float, g: torch.Generator) -> dict[str, object]:
    return {"terms": tuple(reversed(_two_terms(size, cond, g)["terms"]))}  # type: ignore[call-overload]


def _low_rank(size: int, cond: float, g: torch.Generator) -> dict[str, object]:
    _, _, k, _ = SIZES[size]
    d = 0.5 + torch.rand(size, dtype=torch.float64, generator=g)
    return {"d": d, "U": _columns(size, k, cond, g)}


def _blocks(size: int, cond: float, g: torch.Generator) -> dict[str, object]:
    n = SIZES[size][3]
    values = torch.logspace(0, -torch.tensor(cond).log10().item(), n, dtype=torch.float64)
    return {"blocks": torch.stack([spd_matrix(values, g) for _ in range(size // n)])}


def _woodbury(size: int, cond: float, g: torch.Generator) -> dict[str, object]:
    _, _, k, _ = SIZES[size]
    return {**_shifted(size, 1e2, g), "U": _columns(size, k, cond, g)}


Build = Callable[[int, float, torch.Generator], dict[str, object]]
FAMILIES: dict[str, tuple[Build, float]] = {
    "A ⊗ B": (_kronecker, 1.0),
    "A ⊗ B + δI": (_shifted, 1.0),
    "δI + A ⊗ B": (_shifted, 1.0),
    "A₁ ⊗ B₁ + A₂ ⊗ B₂, second ill-conditioned": (_two_terms, 1.0),
    "A₁ ⊗ B₁ + A₂ ⊗ B₂, first ill-conditioned": (_two_terms_swapped, 1.0),
    "UUᵀ + diag(d), b in range(U)": (_low_rank, 1.0),
    "diag(d) + UUᵀ, b in range(U)": (_low_rank, 1.0),
    "blockdiag(B₁, ..., Bₙ)": (_blocks, 1.0),
    "2 (A ⊗ B)": (_kronecker, 2.0),
    "2 (A ⊗ B + δI)": (_shifted, 2.0),
    "A ⊗ B + δI + UUᵀ, b in range(U)": (_woodbury, 1.0),
}


def make(family: str, size: int, cond: float, dtype: torch.dtype, scale: float = 1.0) -> Problem:
    """A problem; `scale`, an even power of two, multiplies the matrix and not the right-hand side."""
    build, factor = FAMILIES[family]
    g = torch.Generator().manual_seed(0)
    parts = build(size, cond, g)
    U = parts.pop("U", None)
    if isinstance(U, Tensor):
        b = U @ torch.randn(U.shape[-1], dtype=torch.float64, generator=g)
        parts["U"] = (scale**0.5 * U).to(dtype)
    else:
        b = torch.randn(size, dtype=torch.float64, generator=g)
    if "terms" in parts:
        pairs = parts["terms"]
        parts["terms"] = tuple(((scale * left).to(dtype), right.to(dtype)) for left, right in pairs)
    for name in ("shift", "blocks", "d"):
        if name in parts:
            parts[name] = (scale * parts[name]).to(dtype)  # type: ignore[operator]
    return Problem(family, cond, b.to(dtype), factor=factor, **parts)  # type: ignore[arg-type]
