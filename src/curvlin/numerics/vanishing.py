"""Terms that are zero in value and count only through their derivatives.

An expansion in quantities that are zero holds terms whose value is known beforehand: a term of first order has
no value, one of second order no first derivative either. `vanishing` adds such a term without computing it. A
derivative that is not zero is computed when it is asked for, from the arguments and not from kept intermediates, so
that a sum of many terms needs the memory of one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from curvlin._tree import hide_from_compiler
from curvlin.errors import NotClosedError
from curvlin.numerics.implicit import directional, saved


def vanishing(
    term: Callable[..., Tensor], order: int, shape: Sequence[int], arguments: Sequence[Tensor]
) -> Tensor:
    """``term(*arguments)``, which is zero, with its first and second derivatives.

    Args:
        term: a function by differentiable operations that closes over no tensor.
        order: 1 if the term is linear in quantities that are zero, 2 if it is quadratic in them.
        shape: of the result.
        arguments: the tensors it depends on.

    Raises:
        NotClosedError: when a third derivative is asked for; an expansion that ends at second order has none.
    """
    return _Term(lambda *tensors: (term(*tensors),), order, 2, (tuple(shape),))(*arguments)[0]


@dataclass(frozen=True)
class _Term:
    """A function of tensors, of an order in quantities that are zero, and how often it may be differentiated."""

    function: Callable[..., tuple[Tensor, ...]]
    order: int
    derivatives: int
    shapes: tuple[tuple[int, ...], ...]

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        result: tuple[Tensor, ...] = _Vanishing.apply(self, *tensors)  # type: ignore[no-untyped-call]
        return result

    def derivative(
        self, function: Callable[..., tuple[Tensor, ...]], shapes: Sequence[Sequence[int]]
    ) -> _Term:
        """A derivative is such a term again, of one order less."""
        if self.derivatives == 0:
            raise NotClosedError(
                "the third derivative of a Kronecker operator's answer is not available; first and second ones are"
            )
        own = tuple(tuple(shape) for shape in shapes)
        return _Term(function, max(self.order - 1, 0), self.derivatives - 1, own)

    def of(self, places: Sequence[int], tensors: Sequence[Tensor]) -> Callable[..., tuple[Tensor, ...]]:
        """The function of some of its arguments, the others held fixed."""

        def function(*some: Tensor) -> tuple[Tensor, ...]:
            everything = list(tensors)
            for i, t in zip(places, some, strict=True):
                everything[i] = t
            return self.function(*everything)

        return function


@hide_from_compiler
class _Vanishing(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(term: _Term, *tensors: Tensor) -> tuple[Tensor, ...]:
        if term.order == 0:
            return term.function(*tensors)
        return tuple(tensors[0].new_zeros(shape) for shape in term.shapes)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.term, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Any, ...]:
        term: _Term = ctx.term
        tensors, n = saved(ctx), len(cotangents)
        if term.order > 1 and not torch.is_grad_enabled():
            return (None,) * (1 + len(tensors))  # zero, and nobody will differentiate it
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad[1:]) if needed]

        def pulled(*arguments: Tensor) -> tuple[Tensor, ...]:
            cotangents, tensors = arguments[:n], arguments[n:]
            vjp = torch.func.vjp(term.of(wanted, tensors), *(tensors[i] for i in wanted))[1]
            gradients: tuple[Tensor, ...] = vjp(cotangents)
            return gradients

        gradients: list[Tensor | None] = [None] * len(tensors)
        pull = term.derivative(pulled, [tensors[i].shape for i in wanted])
        for i, gradient in zip(wanted, pull(*cotangents, *tensors), strict=True):
            gradients[i] = gradient
        return None, *gradients

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        term: _Term = ctx.term
        moving = [i for i, tangent in enumerate(tangents) if tangent is not None]
        n = len(moving)

        def pushed(*arguments: Tensor) -> tuple[Tensor, ...]:
            directions, tensors = arguments[:n], arguments[n:]
            primals = tuple(tensors[i] for i in moving)
            change: tuple[Tensor, ...] = directional(term.of(moving, tensors), primals, directions)
            return change

        push = term.derivative(pushed, term.shapes)
        return push(*(t for t in tangents if t is not None), *saved(ctx))
