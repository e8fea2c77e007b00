"""Law 13: first and second derivatives with respect to every tensor of the operator."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from curvlin.errors import NotClosedError
from curvlin.precision.base import PrecisionOperator
from curvlin.testing.cases import TORCH, Case
from curvlin.testing.laws._law import CONSTANT, EPS64, Measurement, claim, law, worst, worst_counted
from curvlin.testing.laws.roots import through

LARGEST = 30
"""Derivatives are compared with those of the dense formula up to this size."""


@dataclass(frozen=True)
class _Question:
    """A scalar answer of an operator, the same from the dense matrix, and its size before terms cancel."""

    name: str
    ours: Callable[[PrecisionOperator, Tensor], Tensor]
    dense: Callable[[Tensor, Tensor], Tensor]
    size: Callable[[Tensor, Tensor], Tensor]
    of_a_root: bool = False


@law(13)
def gradients(case: Case) -> Iterator[Measurement]:
    """First and second derivatives of every answer equal those of the dense formula; no graph is used up."""
    if case.size > LARGEST or case.dtype != torch.float64:
        return
    case = case.single((0,) * len(case.batch_shape))
    generator = case.generator(61)
    n = case.size

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    W, w, B, J = noise(n, 2), noise(n, n), noise(n, 2), noise(2, n)
    questions = [
        _Question(
            "logdet", lambda P, B: P.logdet(), lambda M, B: torch.linalg.slogdet(M)[1], lambda M, B: _size(n)
        ),
        _Question(
            "solve",
            lambda P, B: (W * P.solve(B)).sum(),
            lambda M, B: (W * torch.linalg.solve(M, B)).sum(),
            lambda M, B: W.norm() * torch.linalg.solve(M, B).norm(),
        ),
        _Question(
            "inv_quad",
            lambda P, B: P.inv_quad(B.mT).sum(),
            lambda M, B: (B * torch.linalg.solve(M, B)).sum(),
            lambda M, B: (B * torch.linalg.solve(M, B)).sum(),
        ),
        _Question(
            "inv_congruence",
            lambda P, B: (w[:2, :2] * P.inv_congruence(J * B[0, 0])).sum(),
            lambda M, B: (w[:2, :2] * (J @ torch.linalg.solve(M, J.mT)) * B[0, 0] ** 2).sum(),
            lambda M, B: w.norm() * (J @ torch.linalg.solve(M, J.mT)).norm() * B.abs().amax() ** 2,
        ),
        _Question(
            "inverse_diagonal",
            lambda P, B: (P.inverse_diagonal() * W[:, 0]).sum(),
            lambda M, B: (torch.linalg.inv(M).diagonal() * W[:, 0]).sum(),
            lambda M, B: torch.linalg.inv(M).norm() * W.norm(),
        ),
        _Question(
            "covariance of samples",
            lambda P, B: (w * _covariance(P, case)).sum(),
            lambda M, B: (w * torch.linalg.inv(M)).sum(),
            lambda M, B: torch.linalg.inv(M).norm() * w.norm(),
            of_a_root=True,
        ),
    ]
    for question in questions:
        yield from _derivatives(case, question, B, noise)
    yield from _reuse(case)


def _covariance(P: PrecisionOperator, case: Case) -> Tensor:
    F = through(P.unwhiten, case)
    return F.mT @ F


def _derivatives(
    case: Case, question: _Question, B: Tensor, noise: Callable[..., Tensor]
) -> Iterator[Measurement]:
    """Gradients, and Hessians times a random direction."""
    mask = [p.differentiable for p in case.recipe.parameters]
    directions = [noise(*t.shape) * t.abs().amax() for t in case.tensors] + [noise(*B.shape)]

    def derivatives(fn: Callable[[list[Tensor], Tensor], Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        leaves = [t.clone().requires_grad_(m) for t, m in zip(case.tensors, mask, strict=True)]
        b = B.clone().requires_grad_()
        value = fn(leaves, b)
        inputs = [*(t for t, m in zip(leaves, mask, strict=True) if m), b]
        along = [d for d, m in zip(directions, [*mask, True], strict=True) if m]
        first = torch.autograd.grad(value, inputs, create_graph=True, materialize_grads=True)
        slope = torch.stack([(g * d).sum() for g, d in zip(first, along, strict=True)]).sum()
        second = torch.autograd.grad(slope, inputs, materialize_grads=True)
        return [g.detach() for g in first], list(second)

    if question.of_a_root and not case.recipe.differentiable_roots:
        yield claim(f"the derivative of {question.name} is refused", _refused(case, question, B))
        return
    found = derivatives(lambda leaves, b: question.ours(case.rebuilt(leaves), b))
    truth = derivatives(lambda leaves, b: question.dense(_dense(case, leaves), b))
    kappa = case.condition
    unit = CONSTANT * ((case.size + case.recipe.storage_roundings) * EPS64)
    inputs = [*(t for t, m in zip(case.tensors, mask, strict=True) if m), B]
    for order, power in ((0, 2), (1, 3)):
        pairs = zip(found[order], truth[order], inputs, strict=True)
        for i, (mine, exact, x) in enumerate(pairs):
            # The size of a derivative: its own, or that of the value over that of the input.
            size = exact.norm() + question.size(case.matrix, B) / x.abs().amax()
            limit = unit * kappa**power * size
            label = f"{'gradient' if order == 0 else 'Hessian product'} of {question.name}, input {i}"
            yield from worst_counted(label, (mine - exact).norm(), limit, size)


def _refused(case: Case, question: _Question, B: Tensor) -> bool:
    leaves = [t.clone().requires_grad_(t.is_floating_point()) for t in case.tensors]
    try:
        torch.autograd.grad(question.ours(case.rebuilt(leaves), B), leaves)
    except NotClosedError:
        return True
    return False


def _size(n: int) -> Tensor:
    return torch.tensor(float(n), dtype=torch.float64)


def _dense(case: Case, leaves: list[Tensor]) -> Tensor:
    matrix: Tensor = case.recipe.assemble(TORCH, *case.symmetrised(leaves))
    return matrix


def _reuse(case: Case) -> Iterator[Measurement]:
    """A value taken without gradients does not spoil a later one; two backward passes do not meet."""
    leaves = [
        t.clone().requires_grad_(p.differentiable)
        for t, p in zip(case.tensors, case.recipe.parameters, strict=True)
    ]
    P = case.rebuilt(leaves)
    inputs = [t for t in leaves if t.requires_grad]
    with torch.no_grad():
        P.logdet()
        P.solve(torch.ones(case.size, dtype=torch.float64))
    first = torch.autograd.grad(P.logdet(), inputs, retain_graph=True)
    again = torch.autograd.grad(P.logdet(), inputs)
    for a, b in zip(first, again, strict=True):
        yield worst("two backward passes of logdet", (a - b).abs().amax(), 0.0)
