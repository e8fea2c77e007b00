"""Finding the last layer of a model by running it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import Node

from curvlin_nn.capture.intercept import Interceptor
from curvlin_nn.capture.state import capturing, forward, prepared
from curvlin_nn.errors import UnsupportedError
from curvlin_nn.parameters import ParameterSpace


def last_layer(model: nn.Module, x: Any, where: str = "the input") -> ParameterSpace:
    """The parameters of the last layer that the forward pass of `model` on `x` uses.

    Args:
        model: maps one argument to outputs ``(N, C)``.
        x: what the model takes.
        where: what to call this input in error messages.

    Raises:
        DataError: if x holds no sample, or has a dtype that the model does not take.
        UnsupportedError: if the pass uses no layer that has a rule, or the outputs depend on other parameters than
            through it: on a head without a rule, or on a second head.
    """
    x = prepared(model, x, where)
    originals = {name: p for name, p in model.named_parameters() if p.is_floating_point()}
    with capturing(model, originals.values()):
        leaves = {name: p.detach().requires_grad_() for name, p in originals.items()}
        with Interceptor(leaves, strict=False) as interceptor:
            outputs = forward(model, leaves, x, where)
    root = outputs.grad_fn if isinstance(outputs, Tensor) else None
    behind = _nodes_behind(root)
    uses = [use for use in interceptor.uses if use.edge.node in behind]
    if not uses:
        raise UnsupportedError(
            "subset_of_weights='last_layer' found no linear or convolutional layer that the outputs depend on; "
            "name the layer instead, as in subset_of_weights=['head']"
        )
    chosen = list(uses[-1].names.values())
    layer = {use.edge.node for use in uses if set(use.names.values()) & set(chosen)}
    names = {id(p): name for tensors in (originals, leaves) for name, p in tensors.items()}
    for leaf in _leaves(_nodes_behind(root, layer)):
        if id(leaf) in names:
            raise UnsupportedError(
                f"subset_of_weights='last_layer' found {chosen[0]!r} used last, but the outputs depend on "
                f"parameter {names[id(leaf)]!r} not only through it, expected one linear or convolutional layer at "
                f"the end; name what to take instead, as in subset_of_weights={chosen}"
            )
    return ParameterSpace.of(model, chosen)


def _nodes_behind(root: Node | None, stop: Iterable[Node] = ()) -> dict[Node, None]:
    """The part of the autograd graph that `root` reaches without passing through `stop`, the nearest nodes first."""
    found: dict[Node, None] = {}
    waiting = deque([root])
    while waiting:
        node = waiting.popleft()
        if node is not None and node not in found and node not in stop:
            found[node] = None
            waiting.extend(following for following, _ in node.next_functions)
    return found


def _leaves(nodes: Iterable[Node]) -> Iterator[Tensor]:
    for node in nodes:
        if node.name() == "torch::autograd::AccumulateGrad":
            yield node.variable  # type: ignore[attr-defined]  # only this kind of node has one
