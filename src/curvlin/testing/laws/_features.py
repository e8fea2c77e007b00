"""Congruences with feature operators, for the law of congruences."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from curvlin.errors import NotClosedError
from curvlin.features.base import FeatureOperator
from curvlin.features.dense import DenseFeatures
from curvlin.features.khatri_rao import KhatriRaoFeatures
from curvlin.precision.base import PrecisionOperator
from curvlin.testing.cases import Case
from curvlin.testing.kinds import Spec
from curvlin.testing.laws._law import Measurement, claim, norms, product, whitened, worst_counted


def features(case: Case) -> Iterator[Measurement]:
    """``Phi P^-1 Phi^T`` per sample, jointly, across and on the diagonal, for every kind that has a rule."""
    for name, Phi, Psi in _pairs(case):
        with contextlib.suppress(NotClosedError):
            yield from _layouts(case, name, Phi, Psi)


def _layouts(case: Case, name: str, Phi: FeatureOperator, Psi: FeatureOperator) -> Iterator[Measurement]:
    P = case.operator
    N, R = Phi.shape[-3:-1]
    rows, others = (F.to_dense().double().flatten(-3, -2) for F in (Phi, Psi))
    solved, across = case.solution(rows.mT), case.solution(others.mT)
    length = norms(solved)
    energies = (rows.mT * solved).sum(-2)
    size = (energies.unsqueeze(-1) * energies.unsqueeze(-2)).sqrt()
    # Besides the perturbation of P, a contraction in the storage dtype rounds sums of D products.
    limit = whitened(case) * case.norm[..., None, None] * length.unsqueeze(-1) * length.unsqueeze(-2)
    limit = limit + product(case) * size
    if case.recipe.base is not None:
        # What the base explains, less what the low rank part takes away: rounding of the former.
        lengths = norms(rows.mT)
        explained = (
            lengths.unsqueeze(-1) * lengths.unsqueeze(-2) * case.condition / case.norm[..., None, None]
        )
        limit = limit + product(case) * explained
    exact = rows @ solved
    found = {
        "joint": P.inv_congruence(Phi, joint=True).double(),
        "per sample": P.inv_congruence(Phi).double(),
        "diagonal": P.inv_congruence_diagonal(Phi).double(),
    }

    def cut(K: Tensor, layout: str) -> Tensor:
        K = K.reshape(*K.shape[:-2], N, R, N, R)
        if layout == "joint":
            return K
        K = K.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)
        return K if layout == "per sample" else K.diagonal(dim1=-2, dim2=-1)

    for layout, answer in found.items():
        truth = cut(exact, layout)
        yield claim(f"shape of {name}, {layout}", answer.shape == truth.shape)
        if answer.shape == truth.shape:
            gap = (answer - truth).abs()
            yield from worst_counted(f"{name}, {layout}", gap, cut(limit, layout), cut(size, layout))
    cross = P.inv_congruence(Phi, Psi).double()
    truth = rows @ across
    yield claim(f"shape of {name}, cross", cross.shape == (*truth.shape[:-2], N, R, N, R))
    size = norms(rows.mT).unsqueeze(-1) * norms(across).unsqueeze(-2)
    limit = whitened(case) * case.norm[..., None, None] * length.unsqueeze(-1) * norms(across).unsqueeze(-2)
    gap = (cross.reshape(truth.shape) - truth).abs()
    yield from worst_counted(f"{name}, cross", gap, limit + product(case) * size, size)


def _pairs(case: Case) -> Iterator[tuple[str, FeatureOperator, FeatureOperator]]:
    generator = case.generator(47)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator).to(case.dtype)

    yield "rows", DenseFeatures(normal(2, 2, case.size)), DenseFeatures(normal(2, 2, case.size))
    out, inputs = _sides(case.operator)
    layers = [KhatriRaoFeatures(normal(2, 2, 3, out), normal(2, 3, inputs)) for _ in range(2)]
    yield "a layer", layers[0], layers[1]


def _sides(P: PrecisionOperator) -> tuple[int, int]:
    """The sizes of Kronecker factors, of the operator or of the base that it changes; else balanced divisors."""
    while isinstance(base := getattr(P, "base", None), PrecisionOperator):
        P = base
    sizes = getattr(P, "sizes", None)
    return sizes if isinstance(sizes, tuple) and len(sizes) == 2 else Spec(size=P.size).sides
