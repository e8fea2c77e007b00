"""The course of a forward pass, as its autograd graph tells it: when an answer about one batch holds for another.

The functions that rules see are not all there is. A hand-written autograd function shows in the graph only, and so does
what a model does to its positions between two layers.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node

_PLACING = tuple(
    f"_saved_{name}"
    for name in ("dim", "dim0", "dim1", "dims", "start", "end", "length", "split_size", "split_sizes")
)
"""Arguments, as nodes save them, that say which positions a view takes."""

_BY_INDEX = ("Index", "Gather", "Scatter", "Masked", "Take", "Put", "Sort", "Topk", "PackPadded")
"""Beginnings of the names of operations (after underscores) that place positions by values of tensors."""


@dataclass(frozen=True)
class Course:
    """The nodes of a graph, the nearest to the outputs first.

    Attributes:
        steps: the operation of each node, or the parameter, and the nodes that it reads.
        places: of each node, the arguments that say which positions it takes.
        placed_by_values: whether an operation may place positions by the values in a batch, so that two passes of one
            course need not have samples at the same positions.
    """

    steps: tuple[tuple[str, tuple[int, ...]], ...]
    places: tuple[tuple[object, ...], ...]
    placed_by_values: bool

    @classmethod
    def of(cls, outputs: Tensor, names: Mapping[int, str], inputs: Iterable[Tensor] = ()) -> Course:
        """The course that led to the outputs.

        Args:
            outputs: with their graph.
            names: what to call the parameters, by the `id` of the tensor.
            inputs: where it begins: what an input was computed by does not count.
        """
        given = {x.grad_fn for x in inputs if x.grad_fn is not None}
        found = {node: number for number, node in enumerate(nodes_behind(outputs.grad_fn, given))}
        steps, places = [], []
        for node in found:
            reads = tuple(-1 if child is None else found.get(child, -1) for child, _ in node.next_functions)
            steps.append((names.get(id(getattr(node, "variable", None)), node.name()), reads))
            places.append(tuple((name, _plain(getattr(node, name))) for name in _placing(type(node))))
        return cls(tuple(steps), tuple(places), any(map(_places_by_values, found)))


def nodes_behind(root: Node | None, stop: Iterable[Node] = ()) -> dict[Node, None]:
    """The part of the autograd graph that `root` reaches without passing through `stop`, the nearest nodes first."""
    found: dict[Node, None] = {}
    waiting = deque([root])
    while waiting:
        node = waiting.popleft()
        if node is not None and node not in found and node not in stop:
            found[node] = None
            waiting.extend(following for following, _ in node.next_functions)
    return found


@functools.lru_cache(maxsize=256)
def _placing(kind: type[Node]) -> tuple[str, ...]:
    """The attributes of a kind of node that say which positions it takes; looking for others takes time."""
    return tuple(name for name in _PLACING if hasattr(kind, name))


def _places_by_values(node: Node) -> bool:
    """Whether an operation is one of these, or unknown."""
    return isinstance(node, BackwardCFunction) or node.name().lstrip("_").startswith(_BY_INDEX)


def _plain(value: object) -> object:
    return tuple(value) if isinstance(value, (list, tuple)) else value
