"""Whether the captures of a forward pass are all there is: the check of the rules, and of what no rule can see."""

from __future__ import annotations

import itertools
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from curvlin_nn.capture.graph import Graph, named_pieces
from curvlin_nn.capture.one_hot import OneHot
from curvlin_nn.capture.rules import Piece


@dataclass(frozen=True)
class _Part:
    """The form of one piece of a parameter."""

    start: int
    shape: tuple[int, int]
    factored: bool
    transposed: bool

    @classmethod
    def of(cls, piece: Piece) -> _Part:
        factored = piece.right is not None or piece.compact is not None
        return cls(piece.start, (piece.left.shape[-1], piece.inputs), factored, piece.transposed)

    @property
    def stop(self) -> int:
        return self.start + self.shape[0] * self.shape[1]


def incomplete(graph: Graph, originals: Mapping[str, Tensor], unserved: Container[str]) -> dict[str, str]:
    """The parameters whose captures, summed over the batch, are not what autograd says, and why.

    Args:
        graph: the forward pass.
        originals: the model's own tensors, which the graph's leaves stood in for. None may have been reached, as
            happens where a module keeps a parameter in a list, a closure or a partial.
        unserved: the parameters that need not be looked at.

    Returns:
        What is wrong, by parameter, in the words of an `UnsupportedUseError`.
    """
    names = [name for name in graph.leaves if name not in unserved]
    if not names or not graph.outputs.requires_grad:
        return {}
    generator = torch.Generator().manual_seed(0)
    cotangent = torch.randn(graph.outputs.shape, generator=generator).to(graph.outputs)
    tensors = [graph.leaves[name] for name in names] + [originals[name] for name in names]
    found = torch.autograd.grad(graph.outputs, tensors, cotangent, retain_graph=True, allow_unused=True)
    expected, bypassed = found[: len(names)], found[len(names) :]
    captured = {name: torch.zeros_like(graph.leaves[name]).flatten() for name in names}
    pieces: dict[str, list[Piece]] = {name: [] for name in names}
    parts: dict[str, set[_Part]] = {name: set() for name in names}
    with torch.no_grad():
        for use, gradient in zip(graph.uses, graph.gradients(cotangent[None]), strict=True):
            for name, piece in named_pieces(use, gradient):
                if name in unserved:
                    continue
                piece = piece.without_patches()
                total = _total(piece)
                parts[name].add(_Part.of(piece))
                captured[name][piece.start : piece.start + len(total)] += total
                pieces[name].append(piece)
    tolerance = torch.finfo(cotangent.dtype).eps ** 0.5
    reasons = {}
    for name, truth, past in zip(names, expected, bypassed, strict=True):
        total = torch.zeros_like(captured[name]) if truth is None else truth.flatten()
        gap, largest = (captured[name] - total).abs().max(), total.abs().max()
        if past is not None:
            reasons[name] = (
                "reaches the outputs past its module (is it kept in a list, a closure or a partial?)"
            )
        elif not (
            bool(gap <= tolerance * largest)
            or bool(gap <= tolerance * (largest + sum(map(_magnitude, pieces[name]))))
        ):
            reasons[name] = "influences the outputs through an operation that was not captured"
        elif parts[name] and not _tile(parts[name], graph.leaves[name].numel()):
            reasons[name] = "is used in parts of different shapes"
    return reasons


def _tile(parts: Iterable[_Part], size: int) -> bool:
    """Whether parts stand side by side without gaps, those at one place of one shape, as it is or transposed."""
    end = 0
    for start, group in itertools.groupby(sorted(parts, key=_start), key=_start):
        first, *others = group
        if start != end or not all(_agree(first, other) for other in others):
            return False
        end = first.stop
    return end == size


def _start(part: _Part) -> int:
    return part.start


def _agree(part: _Part, other: _Part) -> bool:
    if part.transposed == other.transposed:
        return part == other
    return part.factored and other.factored and part.shape == other.shape[::-1]


def _total(piece: Piece) -> Tensor:
    """One column's outer products summed over all positions: a part of the parameter's gradient."""
    left = piece.left[0].reshape(-1, piece.left.shape[-1])
    if isinstance(piece.compact, OneHot):
        total = piece.compact.summed(piece.left[0]).mT
        return total.mT.flatten() if piece.transposed else total.flatten()
    if piece.right is None:
        return left.sum(0)
    total = left.mT @ piece.right.reshape(-1, piece.right.shape[-1])
    return total.mT.flatten() if piece.transposed else total.flatten()


@torch.no_grad()
def _magnitude(piece: Piece) -> float:
    """The largest sum of the absolute values of terms, which may cancel in the sum itself."""
    return float(_total(replace(piece, left=piece.left.abs(), right=_abs(piece.right))).max())


def _abs(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.abs()
