"""Law 13: first and second derivatives with respect to every tensor of the operator."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
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
    whole = case
    case = case.single((0,) * len(case.batch_shape))
    generator = case.generator(61)
    n = case.size

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    W, w, B, J = noise(n, 2), noise(n, n), noise(n, 2), noise(2, n)
    questions = [
        _Question(
            "matmul",
            lambda P, B: (W * (P @ B)).sum(),
            lambda M, B: (W * (M @ B)).sum(),
            lambda M, B: W.norm() * M.norm() * B.norm(),
        ),
        _Question(
            "diagonal",
            lambda P, B: (W[:, 0] * P.diagonal()).sum(),
            lambda M, B: (W[:, 0] * M.diagonal()).sum(),
            lambda M, B: W.norm() * M.norm(),
        ),
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
        _Question(
            "covariance of P times samples",
            lambda P, B: (w * _covariance(P, case, inverse=False)).sum(),
            lambda M, B: (w * M).sum(),
            lambda M, B: M.norm() * w.norm(),
            of_a_root=True,
        ),
    ]
    for question in questions:
        yield from _derivatives(case, question, B, noise)
    yield from _reuse(case)
    yield from _functional(case, questions, B)
    if whole.batch_shape:
        yield from _batched(whole, noise)


def _covariance(P: PrecisionOperator, case: Case, inverse: bool = True) -> Tensor:
    F = through(P.unwhiten if inverse else P.root_matvec, case)
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

    if question.of_a_root and case.recipe.differentiable_roots is False:
        yield claim(f"the derivative of {question.name} is refused", _refused(case, question, B))
        return
    try:
        found = derivatives(lambda leaves, b: question.ours(case.rebuilt(leaves), b))
    except NotClosedError:
        if question.of_a_root and case.recipe.differentiable_roots is None:
            return
        raise
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


def _functional(case: Case, questions: list[_Question], B: Tensor) -> Iterator[Measurement]:
    """`torch.func.grad` gives what `autograd` gives."""
    mask = [p.differentiable for p in case.recipe.parameters]
    for question in questions:
        if question.name not in ("matmul", "logdet", "solve"):
            continue

        def value(*free: Tensor, question: _Question = question) -> Tensor:
            given = iter(free)
            leaves = [next(given) if m else t for t, m in zip(case.tensors, mask, strict=True)]
            return question.ours(case.rebuilt(leaves), B)

        free = [t.clone() for t, m in zip(case.tensors, mask, strict=True) if m]
        functional = torch.func.grad(value, argnums=tuple(range(len(free))))(*free)
        leaves = [t.requires_grad_() for t in free]
        plain = torch.autograd.grad(value(*leaves), leaves, materialize_grads=True)
        unit = CONSTANT * ((case.size + case.recipe.storage_roundings) * EPS64)
        for i, (f, g, x) in enumerate(zip(functional, plain, free, strict=True)):
            size = g.norm() + question.size(case.matrix, B) / x.detach().abs().amax()
            limit = unit * case.condition**2 * size
            yield from worst_counted(
                f"torch.func.grad of {question.name}, input {i}", (f - g).norm(), limit, size
            )


def _batched(case: Case, noise: Callable[..., Tensor]) -> Iterator[Measurement]:
    """The gradients of a batch are those of its elements, for tensors with the batch and without it."""
    n, batch = case.size, case.batch_shape
    c, W, B = noise(*batch), noise(*batch, n, 2), noise(*batch, n, 2)
    indices = list(np.ndindex(*batch))
    asked: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
        "logdet": (lambda P: c * P.logdet(), lambda M, i: c[i] * torch.linalg.slogdet(M)[1]),
        "solve": (
            lambda P: (W * P.solve(B)).sum((-2, -1)),
            lambda M, i: (W[i] * torch.linalg.solve(M, B[i])).sum(),
        ),
        "inv_quad": (
            lambda P: c * P.inv_quad(B[..., 0]),
            lambda M, i: c[i] * (B[i][:, 0] @ torch.linalg.solve(M, B[i][:, 0])),
        ),
        "inverse_diagonal": (
            lambda P: (W[..., 0] * P.inverse_diagonal()).sum(-1),
            lambda M, i: (W[i][:, 0] * torch.linalg.inv(M).diagonal()).sum(),
        ),
    }
    own = [p.ndim for p in case.recipe.parameters]
    unit = CONSTANT * ((n + case.recipe.storage_roundings) * EPS64)
    for name, (ours, dense) in asked.items():
        gradients, sizes = [], 1.0
        for structured in (True, False):
            leaves = [
                t.clone().requires_grad_(p.differentiable)
                for t, p in zip(case.tensors, case.recipe.parameters, strict=True)
            ]
            inputs = [t for t in leaves if t.requires_grad]
            if structured:
                values = ours(case.rebuilt(leaves))
            else:
                # One element at a time, each from the tensors that are its own.
                parts = []
                for i in indices:
                    single = [
                        t.expand(*batch, *t.shape[t.ndim - k :])[i] for t, k in zip(leaves, own, strict=True)
                    ]
                    parts.append(dense(_dense(case, single), i))
                values = torch.stack(parts)
                sizes = max(float(values.detach().abs().max()), float(n) if name == "logdet" else 0.0)
            gradients.append(torch.autograd.grad(values.sum(), inputs, materialize_grads=True))
        for k, (mine, exact, x) in enumerate(zip(*gradients, inputs, strict=True)):
            size = exact.norm() + sizes / x.detach().abs().amax()
            limit = unit * case.condition**2 * size
            yield from worst_counted(
                f"gradient of {name} in a batch, input {k}", (mine - exact).norm(), limit, size
            )
