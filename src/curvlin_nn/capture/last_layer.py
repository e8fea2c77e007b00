"""Finding the last layer of a model by running it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import Node

from curvlin_nn.capture.checks import check_dependent, checked_outputs
from curvlin_nn.capture.course import nodes_behind
from curvlin_nn.capture.intercept import Interceptor, Use
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
        OutputError: if the outputs are not finite, or not of shape ``(N, C)``.
        UnsupportedError: if the pass uses no layer that has a rule, or the outputs depend on other parameters than
            through it: on a head without a rule, a second head, or what its weight is computed from.
    """
    x = prepared(model, x, where)
    originals = {name: p for name, p in model.named_parameters() if p.is_floating_point()}
    with capturing(model, originals.values()):
        leaves = {name: p.detach().requires_grad_() for name, p in originals.items()}
        with Interceptor(leaves, strict=False) as interceptor:
            outputs = checked_outputs(forward(model, leaves, x, where), where)
    check_dependent(outputs, where)
    behind = nodes_behind(outputs.grad_fn)
    uses = [use for use in interceptor.uses if use.edge.node in behind]
    last = next((use for use in reversed(uses) if use.rule.is_layer), None)
    if last is None:
        raise UnsupportedError(
            "subset_of_weights='last_layer' found no linear or convolutional layer that the outputs depend on; "
            "name the layer instead, as in subset_of_weights=['head']"
        )
    chosen = list(dict.fromkeys(last.names))
    names = {id(p): name for tensors in (originals, leaves) for name, p in tensors.items()}
    found = _other_than(last, uses, outputs, names)
    if found is not None:
        suggested = list(_heads(uses, outputs)) or chosen
        raise UnsupportedError(
            f"subset_of_weights='last_layer' found {chosen[0]!r} used last, but {found}, expected one linear or "
            f"convolutional layer at the end; name what to take instead, as in subset_of_weights={suggested}"
        )
    return ParameterSpace.of(model, chosen)


def _other_than(last: Use, uses: Sequence[Use], outputs: Tensor, names: Mapping[int, str]) -> str | None:
    """What the outputs come from other than through the parameters of the last use, in words.

    Args:
        last: the last use.
        uses: the uses of layers that the outputs depend on.
        outputs: the outputs.
        names: what parameters are called, by the identity of their tensors.
    """
    for role, tensor in last.call.roles.items():
        if role not in last.references and tensor.requires_grad:
            return f"its {role} is computed from other parameters (by weight_norm or the like)"
    chosen = set(last.names)
    layer = {use.edge.node for use in uses if chosen & set(use.names)}
    for leaf in _leaves(nodes_behind(outputs.grad_fn, layer)):
        if id(leaf) in names:
            return f"the outputs depend on parameter {names[id(leaf)]!r} not only through it"
    return None


def _heads(uses: Sequence[Use], outputs: Tensor) -> dict[str, None]:
    """The modules (or parameters outside of any) of all layers without another between them and the outputs."""
    layers = [use for use in uses if use.rule.is_layer]
    nodes = {use.edge.node for use in layers}
    direct = nodes_behind(outputs.grad_fn, nodes)
    roots = {following for node in direct for following, _ in node.next_functions} | {outputs.grad_fn}
    heads = [use for use in layers if use.edge.node in roots]
    return dict.fromkeys(name.rpartition(".")[0] or name for use in heads for name in use.names)


def _leaves(nodes: Iterable[Node]) -> Iterator[Tensor]:
    for node in nodes:
        if node.name() == "torch::autograd::AccumulateGrad":
            yield node.variable  # type: ignore[attr-defined]  # only this kind of node has one
