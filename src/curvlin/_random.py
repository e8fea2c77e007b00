"""Standard normal noise: the one source of randomness, from a generator that the caller chose."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import SupportsIndex

import torch
from torch import Tensor


def standard_normal(sample_shape: object, shape: torch.Size, generator: object, like: Tensor) -> Tensor:
    """Noise ``(*sample_shape, *shape)`` of `like`'s dtype and device.

    Raises:
        TypeError: if `generator` is neither a generator nor None.
        ValueError: if `sample_shape` does not consist of sizes.
    """
    generator = checked_generator(generator)
    if not isinstance(sample_shape, Sequence) or not all(
        isinstance(n, SupportsIndex) and operator.index(n) >= 0 for n in sample_shape
    ):
        raise ValueError(f"sample_shape must be a tuple of sizes, found {sample_shape!r}")
    return torch.randn((*sample_shape, *shape), generator=generator, dtype=like.dtype, device=like.device)


def random_signs(shape: tuple[int, ...], generator: object, like: Tensor) -> Tensor:
    """Independent random signs of `like`'s dtype and device.

    Raises:
        TypeError: if `generator` is neither a generator nor None.
    """
    bits = torch.randint(0, 2, shape, generator=checked_generator(generator), device=like.device)
    return bits.to(like.dtype) * 2 - 1


def checked_generator(generator: object) -> torch.Generator | None:
    """The generator, or None.

    Raises:
        TypeError: if it is neither.
    """
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(
            f"generator must be a torch.Generator or None, found {type(generator).__name__}; "
            "torch.Generator().manual_seed(0) makes one"
        )
    return generator
