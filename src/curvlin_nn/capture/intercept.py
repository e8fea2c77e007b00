"""Interception of every use of tracked tensors in a forward pass, by module or by function."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode

from curvlin_nn.capture.rules import RULES, Call, LayerRule, load_entry_points
from curvlin_nn.errors import UnsupportedUseError


@dataclass(frozen=True)
class Use:
    """One use of tracked parameters by a function that has a layer rule.

    Attributes:
        rule: the layer rule.
        call: the bound call.
        names: the tracked parameters by their role in the call.
        shape: the shape of the output.
        edge: the output's place in the autograd graph, fixed before anything can change the output in place.
        version: the input's version counter at the time of use.
    """

    rule: LayerRule
    call: Call
    names: Mapping[str, str]
    shape: torch.Size
    edge: GradientEdge
    version: int

    @property
    def positions(self) -> tuple[int, ...]:
        """The shape of the output's positions: all but the feature axis."""
        shape_only = torch.empty(1, *self.shape, device="meta")
        return tuple(self.rule.by_position(shape_only).shape[1:-1])


class Interceptor(TorchFunctionMode):
    """Records, while active, each differentiable use of the tracked tensors; refuses those without a rule.

    Args:
        tracked: the tensors by name; they must require gradients.
        strict: whether uses without a rule are refused, or passed over.
    """

    def __init__(self, tracked: Mapping[str, Tensor], *, strict: bool = True) -> None:
        super().__init__()
        load_entry_points()
        self._strict = strict
        self._names = {id(tensor): name for name, tensor in tracked.items()}
        self.uses: list[Use] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        used = [name for t in _tensors((args, kwargs)) if (name := self._names.get(id(t))) is not None]
        output = func(*args, **kwargs)
        if used and any(t.requires_grad and id(t) not in self._names for t in _tensors(output)):
            self._record(func, args, kwargs, used, output)
        return output

    def _record(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        used: list[str],
        output: Any,
    ) -> None:
        rule = RULES.get(func)
        if rule is None:
            if not self._strict:
                return
            raise UnsupportedUseError(used[0], f"is used by {_name(func)}")
        call = rule.bind(*args, **kwargs)
        names = {role: name for role, t in call.roles.items() if (name := self._names.get(id(t))) is not None}
        for name in used:
            if self._strict and used.count(name) > list(names.values()).count(name):
                raise UnsupportedUseError(name, f"is an input of {_name(func)}")
        for role, name in names.items():
            if self._strict and call.roles[role].dtype != output.dtype:
                raise UnsupportedUseError(
                    name, f"is used in {output.dtype} (is torch.autocast on in the model?)"
                )
        self.uses.append(Use(rule, call, names, output.shape, get_gradient_edge(output), call.input._version))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)


def _name(func: Callable[..., Any]) -> str:
    attribute = getattr(func, "__self__", None)  # the getter of Tensor.mT is seen as a bound __get__
    if getattr(func, "__name__", "") == "__get__" and attribute is not None:
        return f"Tensor.{attribute.__name__}"
    return str(getattr(func, "__name__", func))
