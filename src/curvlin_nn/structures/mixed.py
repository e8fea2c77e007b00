"""Structures side by side: each group of parameters has its own, and between groups the curvature is zero."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from curvlin import BlockDiag
from curvlin.precision.base import PrecisionOperator
from curvlin_nn.capture import Captures
from curvlin_nn.errors import UnsupportedError
from curvlin_nn.parameters import ParameterSpace
from curvlin_nn.structures.base import Structure, StructureFactory


class SideBySide(Structure):
    """A structure of its own for each group of parameters; takes as many passes as the one that needs most.

    Args:
        space: all parameters.
        groups: names of parameters, each in one group, and what makes the state over them.
    """

    name = "mixed"

    def __init__(
        self, space: ParameterSpace, groups: Sequence[tuple[Sequence[str], StructureFactory]]
    ) -> None:
        super().__init__(space)
        shapes = dict(zip(space.names, space.shapes, strict=True))
        self._parts: list[Structure] = []
        for names, factory in groups:
            ordered = tuple(name for name in space.names if name in set(names))
            self._parts.append(factory(ParameterSpace(ordered, tuple(shapes[name] for name in ordered))))
        self.passes = max(part.passes for part in self._parts)
        self.restricts = all(part.restricts for part in self._parts)
        self.takes_output_curvature = all(part.takes_output_curvature for part in self._parts)
        self._pass = 0

    def begin(self, pass_index: int) -> None:
        """See `Structure.begin`."""
        self._pass = pass_index
        for part in self._unfinished():
            part.begin(pass_index)

    def update(self, captures: Captures) -> None:
        """See `Structure.update`."""
        for part in self._unfinished():
            part.update(_restricted(captures, self.space, part.space))

    def check_merge(self, other: SideBySide) -> None:
        """See `Structure.check_merge`."""
        if [part.space for part in self._parts] != [part.space for part in other._parts]:
            raise UnsupportedError(
                f"hessian_structure={self.name!r} cannot merge states that group the parameters in different ways; "
                "give both the same choice of structures"
            )
        for mine, theirs in zip(self._parts, other._parts, strict=True):
            mine.check_merge(theirs)

    def merge(self, other: SideBySide) -> None:
        """See `Structure.merge`: all groups, or none where one cannot."""
        self.check_merge(other)
        for mine, theirs in zip(self._parts, other._parts, strict=True):
            mine.merge(theirs)

    def finish(self) -> BlockDiag:
        """See `Structure.finish`."""
        blocks: list[PrecisionOperator] = []
        indices: list[Tensor] = []
        for part in self._parts:
            coordinates, operator = _coordinates(self.space, part.space), part.finish()
            if isinstance(operator, BlockDiag):
                blocks.extend(operator.blocks)
                indices.extend(coordinates[index.cpu()] for index in operator.indices.blocks)
            else:
                blocks.append(operator)
                indices.append(coordinates)
        return BlockDiag(blocks, indices)

    def state_dict(self) -> dict[str, Any]:
        """See `Structure.state_dict`."""
        return {"pass": self._pass, "parts": [part.state_dict() for part in self._parts]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Structure.load_state_dict`."""
        self._pass = state["pass"]
        for part, of_part in zip(self._parts, state["parts"], strict=True):
            part.load_state_dict(of_part)

    def _unfinished(self) -> list[Structure]:
        return [part for part in self._parts if self._pass < part.passes]


class Mixed(SideBySide):
    """Structures chosen by name: the first pattern that matches a parameter or a module above it.

    Args:
        space: all parameters.
        patterns: ``fnmatch`` patterns and what makes the state over all parameters of that pattern.

    Raises:
        UnsupportedError: if no pattern matches a parameter, or a pattern takes none.
    """

    def __init__(self, space: ParameterSpace, patterns: Mapping[str, StructureFactory]) -> None:
        taken: dict[str, list[str]] = {pattern: [] for pattern in patterns}
        for name in space.names:
            pattern = next((pattern for pattern in patterns if _matches(name, pattern)), None)
            if pattern is None:
                raise UnsupportedError(
                    f"hessian_structure={list(patterns)} has no pattern for parameter {name!r}, expected one for "
                    "each; end it with '*'"
                )
            taken[pattern].append(name)
        for pattern, names in taken.items():
            if not names:
                raise UnsupportedError(
                    f"hessian_structure pattern {pattern!r} takes no parameter, expected at least one; leave it "
                    "out, or put it before the patterns that match the same names"
                )
        super().__init__(space, [(names, patterns[pattern]) for pattern, names in taken.items()])


def _matches(name: str, pattern: str) -> bool:
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[:end]), pattern) for end in range(1, len(parts) + 1))


def _coordinates(space: ParameterSpace, part: ParameterSpace) -> Int[Tensor, " size"]:
    spans = space.spans
    return torch.cat([torch.arange(spans[name].start, spans[name].stop) for name in part.names])


def _restricted(captures: Captures, space: ParameterSpace, part: ParameterSpace) -> Captures:
    """The blocks of some parameters, at their places in the flat vector of these alone."""
    old, new = space.spans, part.spans
    shifts = {name: new[name].start - old[name].start for name in part.names}
    parts = [part.moved(shifts[part.parameter]) for part in captures.parts if part.parameter in shifts]
    return replace(captures, parts=tuple(parts))
