"""Hypothesis strategies for matrices, operators, index sets and right-hand sides.

Everything random comes from an integer seed that hypothesis draws, so a failing example is a short line of
code; what hypothesis shrinks is the size, the batch, the condition, the scale and the spectrum.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from hypothesis import strategies as st
from torch import Tensor

from curvlin.testing.cases import Case, right_hand_sides
from curvlin.testing.kinds import KINDS, Spec, make_case
from curvlin.testing.matrices import SPECTRA, eigenvalues, spd_matrix

SIZES = (1, 2, 4, 6, 9, 12)
BATCHES: tuple[tuple[int, ...], ...] = ((), (3,), (2, 1))
MAX_LOG10COND = {torch.float64: 12.0, torch.float32: 5.0}
"""Up to these conditions an answer is promised; beyond, an answer that is right or an error."""


def seeds() -> st.SearchStrategy[int]:
    """Seeds for a `torch.Generator`."""
    return st.integers(0, 2**31 - 1)


def exponents(low: float, high: float) -> st.SearchStrategy[float]:
    """Decimal exponents in steps of a quarter, which shrink well."""
    return st.integers(round(4 * low), round(4 * high)).map(lambda quarters: quarters / 4)


@st.composite
def spd(
    draw: st.DrawFn,
    n: int | st.SearchStrategy[int] = 6,
    log10cond: tuple[float, float] = (0, 12),
    log10scale: tuple[float, float] = (-8, 8),
    spectra: Sequence[str] = SPECTRA,
) -> Tensor:
    """Symmetric positive (semi)definite float64 matrices of prescribed spectrum, condition and scale."""
    size = n if isinstance(n, int) else draw(n)
    values = eigenvalues(size, draw(st.sampled_from(spectra)), draw(exponents(*log10cond)))
    generator = torch.Generator().manual_seed(draw(seeds()))
    return spd_matrix(values * 10.0 ** draw(exponents(*log10scale)), generator)


@st.composite
def specs(
    draw: st.DrawFn,
    sizes: Sequence[int] = SIZES,
    batches: Sequence[tuple[int, ...]] = BATCHES,
    dtypes: Sequence[torch.dtype] = (torch.float64, torch.float32),
    log10cond: tuple[float, float] = (0, 12),
    log10scale: tuple[float, float] = (-8, 8),
    spectra: Sequence[str] = SPECTRA,
) -> Spec:
    """What an operator is asked to be; the condition stays below `MAX_LOG10COND` of the drawn dtype."""
    dtype = draw(st.sampled_from(dtypes))
    high = min(log10cond[1], MAX_LOG10COND[dtype])
    batch = draw(st.sampled_from(batches))
    return Spec(
        size=draw(st.sampled_from(sizes)),
        batch=batch,
        mixed=draw(st.booleans()) if batch else False,
        dtype=dtype,
        log10cond=draw(exponents(min(log10cond[0], high), high)),
        log10scale=draw(exponents(*log10scale)),
        spectrum=draw(st.sampled_from(spectra)),
        seed=draw(seeds()),
    )


@st.composite
def operators(
    draw: st.DrawFn,
    kinds: Sequence[str] | None = None,
    sizes: Sequence[int] = SIZES,
    batches: Sequence[tuple[int, ...]] = BATCHES,
    dtypes: Sequence[torch.dtype] = (torch.float64, torch.float32),
    log10cond: tuple[float, float] = (0, 12),
    log10scale: tuple[float, float] = (-8, 8),
    spectra: Sequence[str] = SPECTRA,
    roots: bool | None = None,
    singular: bool = False,
) -> Case:
    """Cases: an operator, its dense matrix, its condition and, where known, its spectrum.

    Args:
        draw: given by hypothesis.
        kinds: names in `KINDS`; all of them when None.
        sizes: of the matrix.
        batches: batch shapes; parameters may carry them all, or only every other parameter.
        dtypes: storage dtypes.
        log10cond: least and greatest, before the dtype's own limit.
        log10scale: of the largest eigenvalue.
        spectra: shapes of the spectrum.
        roots: only Kronecker operators with (True) or without (False) stored roots.
        singular: whether operators without an inverse may be drawn.
    """
    names = list(KINDS if kinds is None else kinds)
    if roots is not None:
        names = [name for name in names if name.endswith("_roots") == roots]
    name = draw(st.sampled_from(names))
    spec = draw(specs(sizes, batches, dtypes, log10cond, log10scale, spectra))
    case = make_case(name, spec)
    if case.recipe.singular and not singular:
        case = make_case(name, Spec(**{**vars(spec), "spectrum": "decay"}))
    return case


@st.composite
def operator_pairs(
    draw: st.DrawFn,
    kinds: Sequence[str] | None = None,
    sizes: Sequence[int] = SIZES,
    log10cond: tuple[float, float] = (0, 6),
    singular: bool = False,
) -> tuple[Case, Case]:
    """Two operators of any two kinds on the same space, with the same batch, dtype and similar scale."""
    names = list(KINDS if kinds is None else kinds)
    left, right = draw(st.sampled_from(names)), draw(st.sampled_from(names))
    spec = draw(specs(sizes, log10cond=log10cond))
    spectra = SPECTRA if singular else SPECTRA[:-1]
    changes = {"spectrum": draw(st.sampled_from(spectra)), "seed": draw(seeds())}
    first = make_case(left, Spec(**{**vars(spec), "spectrum": draw(st.sampled_from(spectra))}))
    return first, make_case(right, Spec(**{**vars(spec), **changes}))


@st.composite
def index_sets(draw: st.DrawFn, size: int) -> Tensor:
    """Non-empty sets of distinct coordinates in any order."""
    count = draw(st.integers(1, size))
    generator = torch.Generator().manual_seed(draw(seeds()))
    return torch.randperm(size, generator=generator)[:count]


@st.composite
def rhs(
    draw: st.DrawFn,
    case: Case,
    kinds: Sequence[str] = ("random", "in_range", "in_complement", "product", "zero", "huge"),
    columns: int = 1,
) -> Tensor:
    """Right-hand sides for a case, ``(*batch, D, columns)``; see `right_hand_sides`."""
    return right_hand_sides(case, columns)[draw(st.sampled_from(kinds))]
