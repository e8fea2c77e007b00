"""Random numbers that are decided about now and drawn later."""

from __future__ import annotations

from collections.abc import Callable

import torch

from curvlin._random import checked_generator


def frozen(generator: torch.Generator | None, device: torch.device) -> Callable[[], torch.Generator]:
    """What makes a generator that gives the same draws each time, whatever becomes of `generator` in between.

    One number is drawn from `generator` now (None is torch's default one), so that it decides about them and moves on.

    Args:
        generator: source of randomness.
        device: where the draws are made.

    Raises:
        TypeError: if `generator` is neither a generator nor None.
    """
    generator = checked_generator(generator)
    own = torch.device("cpu") if generator is None else generator.device
    seed = int(torch.randint(2**62, (), generator=generator, device=own))
    return lambda: torch.Generator(device).manual_seed(seed)
