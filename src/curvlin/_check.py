"""Checks of arguments, with the one-line messages that users read."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from curvlin._tree import all_finite, common_shape, hide_from_compiler, is_concrete
from curvlin.numerics.repeats import distinct


def floating(name: str, value: object, *, ndim: int = 0, like: Tensor | None = None) -> Tensor:
    """`value` as a floating, finite tensor of at least `ndim` dimensions (and `like`'s dtype and device)."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, found {type(value).__name__}")
    if not value.is_floating_point():
        raise TypeError(f"{name} must have a floating dtype, found {value.dtype}; convert it with .double()")
    if value.ndim < ndim:
        raise ValueError(f"{name} must have at least {ndim} dimensions, found shape {tuple(value.shape)}")
    if like is not None:
        same_kind(name, value, like)
    if is_concrete(value) and not all_finite(distinct(value.detach())):
        raise ValueError(f"{name} must be finite, found NaN or Inf")
    return value


def same_kind(name: str, value: Tensor, like: Tensor) -> None:
    """`value` has `like`'s dtype and device."""
    if value.dtype != like.dtype:
        raise TypeError(f"{name} must have dtype {like.dtype}, found {value.dtype}; convert it with .to()")
    if value.device != like.device:
        raise ValueError(f"{name} must be on {like.device}, found {value.device}; move it with .to()")


def broadcastable(name: str, found: torch.Size, expected: torch.Size) -> torch.Size:
    """The common shape of two batches: of `name`, and of what it meets."""
    shape = common_shape(found, expected)
    if shape is None:
        raise ValueError(
            f"{name} must have a batch shape that broadcasts with {tuple(expected)}, found {tuple(found)}"
        )
    return shape


def positive_integer(name: str, value: object) -> int:
    """`value` as an int of at least 1."""
    try:
        number = operator.index(value)  # type: ignore[arg-type]  # which is what is asked
    except TypeError:
        found = f"{type(value).__name__} {value!r:.40}".partition("\n")[0]
        raise TypeError(f"{name} must be an integer, found {found}") from None
    if number < 1:
        raise ValueError(f"{name} must be a positive integer, found {number}")
    return number


def pair_of_sizes(name: str, value: object) -> tuple[int, int]:
    """`value` as two positive integers."""
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise ValueError(f"{name} must be a pair (a, b), found {value!r}")
    return positive_integer(f"{name}[0]", value[0]), positive_integer(f"{name}[1]", value[1])


def square(name: str, value: object, *, like: Tensor | None = None) -> Tensor:
    """`value` as a floating square matrix (or a batch of them) with at least one row."""
    matrix = floating(name, value, ndim=2, like=like)
    if matrix.shape[-1] != matrix.shape[-2]:
        raise ValueError(f"{name} must be square, found shape {tuple(matrix.shape)}")
    if matrix.shape[-1] == 0:
        raise ValueError(f"{name} must have at least one row, found shape {tuple(matrix.shape)}")
    return matrix


def symmetric(name: str, value: object, *, like: Tensor | None = None) -> Tensor:
    """`value` symmetrised; asymmetry beyond rounding is refused, not averaged away."""
    matrix = square(name, value, like=like)
    exactly = is_concrete(matrix) and _equals_its_transpose(matrix)
    if exactly and not matrix.requires_grad and unpack_dual(matrix).tangent is None:
        return matrix.clone()
    if is_concrete(matrix) and not exactly:
        # What a product such as X^T X of this size and dtype may show, relative to the largest entry.
        gap = (matrix - matrix.mT).detach().abs().amax(dim=(-2, -1))
        scale = matrix.detach().abs().amax(dim=(-2, -1))
        limit = 8 * matrix.shape[-1] * torch.finfo(matrix.dtype).eps * scale
        if bool((gap > limit).any()):
            worst = float((gap / scale).max())
            raise ValueError(
                f"{name} must be symmetric, found asymmetry {worst:.1e} of its largest entry; "
                "pass (matrix + matrix.mT) / 2 if that is meant"
            )
    half: Tensor = _SymmetricPart.apply(matrix)  # type: ignore[no-untyped-call]
    return half


def _equals_its_transpose(matrix: Tensor) -> bool:
    """To the bit. Some rows at a time: a transpose that is read as a whole does not stay in cache."""
    return all(
        torch.equal(matrix[..., i : i + 128, i:], matrix[..., i:, i : i + 128].mT)
        for i in range(0, matrix.shape[-1], 128)
    )


@hide_from_compiler
class _SymmetricPart(torch.autograd.Function):
    """``(M + M^T) / 2``. Saves nothing: an operator over leaf tensors may be differentiated twice."""

    generate_vmap_rule = True

    @staticmethod
    def forward(matrix: Tensor) -> Tensor:
        return (matrix + matrix.mT).mul_(0.5)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        half: Tensor = _SymmetricPart.apply(gradient)  # type: ignore[no-untyped-call]
        return half

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        half: Tensor = _SymmetricPart.apply(tangent)  # type: ignore[no-untyped-call]
        return half
