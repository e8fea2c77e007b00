"""An input of many samples, some of them at a time: what bounds the memory of outputs, features and Jacobians."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from tqdm import tqdm

from curvlin_nn.capture.inputs import can_be_cut, select_samples, tensors_of
from curvlin_nn.errors import OutputError

FoundT = TypeVar("FoundT")
PartT = TypeVar("PartT", bound="tuple[Any, ...]")

PROBED = 2
"""Samples of the first part, which tells how much memory one takes, and whether samples stand along axis 0: one sample
would not, if it is of as many time steps that come first."""


def count(x: Any, by_running: Callable[[Any], int]) -> int:
    """N, the number of samples in x; zero where x cannot be cut into samples.

    Args:
        x: what the model takes.
        by_running: tells N by a forward pass, where tensors of x differ in their length.
    """
    lengths = {len(tensor) for tensor in tensors_of(x) if tensor.ndim}
    if len(lengths) == 1:
        return lengths.pop()
    n_samples = by_running(x) if lengths else 0
    return n_samples if can_be_cut(x, n_samples) else 0


def cut(x: Any, n_samples: int, at_once: int) -> Iterator[tuple[Any, int]]:
    """Some samples at a time, and how many they are."""
    for start in range(0, n_samples, at_once):
        stop = min(start + at_once, n_samples)
        yield select_samples(x, slice(start, stop), n_samples), stop - start


def by_parts(
    x: Any, n_samples: int, at_once: int, at: Callable[[Any, int], FoundT], rows: Callable[[FoundT], int]
) -> Iterator[FoundT]:
    """What there is at some samples at a time, or at all of x where the first of these shows none for each row.

    As many samples along another axis as were probed have so many rows in any part of axis 0; the parts are of another
    length.

    Args:
        x: what the model takes, of which a part of `PROBED` samples has as many rows of outputs.
        n_samples: the length of axis 0.
        at_once: how many samples there is room for.
        at: gives what there is at a part, and is told how many samples that should be.
        rows: of outputs, in what `at` gave.

    Raises:
        OutputError: if a later part does not have as many rows of outputs as samples.
    """
    at_once = PROBED + 1 if at_once == PROBED else at_once
    for index, (part, expected) in enumerate(cut(x, n_samples, at_once)):
        found = at(part, expected)
        if rows(found) == expected:
            yield found
        elif index == 0:
            yield found if expected == n_samples else at(x, n_samples)
            return
        else:
            raise OutputError(
                f"model outputs for {expected} samples must have as many rows, found {rows(found)}; give inputs with "
                "samples along axis 0"
            )


def in_parts(
    x: Any,
    at: Callable[[Any], PartT],
    *,
    n_samples: Callable[[Any], int],
    entries: Callable[[PartT], int],
    budget: int,
    progress_bar: bool = False,
) -> Iterator[PartT]:
    """What there is at x, of a bounded number of samples at a time; the first two measure the size.

    Args:
        x: what the model takes.
        at: gives the outputs at an input first, and whatever else.
        n_samples: as `by_running` of `count`.
        entries: the numbers held in what `at` gave for `PROBED` samples.
        budget: how many may be held at once.
        progress_bar: whether to show one.

    Raises:
        OutputError: if a later part does not have as many rows of outputs as samples.
    """
    total = count(x, n_samples)
    if total <= PROBED:
        yield at(x)
        return
    probe = at(select_samples(x, slice(0, PROBED), total))
    if len(probe[0]) != PROBED:  # samples do not stand along axis 0 of the inputs
        yield at(x)
        return
    at_once = max(1, budget * PROBED // max(1, entries(probe)))
    parts = by_parts(x, total, at_once, lambda part, _: at(part), lambda found: len(found[0]))
    yield from tqdm(parts, "prediction", -(-total // at_once), disable=not progress_bar)
