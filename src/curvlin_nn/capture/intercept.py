"""Interception of every use of tracked tensors in a forward pass, by module or by function."""

from __future__ import annotations

import functools
import inspect
from collections import Counter
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode

from curvlin_nn.capture.detours import linear_replaced
from curvlin_nn.capture.references import Reference, References, tensors_in
from curvlin_nn.capture.rules import RULES, Call, LayerRule, NotCovered, NotServable, load_entry_points
from curvlin_nn.errors import UnsupportedError, UnsupportedUseError

_EMBEDDINGS = (F.embedding, F.embedding_bag)


@dataclass(frozen=True)
class Use:
    """One use of tracked parameters by a function that has a layer rule.

    Attributes:
        rule: the layer rule.
        call: the bound call.
        references: the tracked parameters by their role in the call.
        shape: the shape of the output.
        edge: the output's place in the autograd graph, fixed before anything can change the output in place.
        version: the input's version counter at the time of use.
        viewed: if the output is a view, all of another tensor in the same order, the place of that one.
    """

    rule: LayerRule
    call: Call
    references: Mapping[str, Reference]
    shape: torch.Size
    edge: GradientEdge
    version: int
    viewed: GradientEdge | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters."""
        return tuple(reference.name for reference in self.references.values())

    @property
    def positions(self) -> tuple[int, ...]:
        """The shape of the output's positions: all but the feature axis."""
        shape_only = torch.empty(1, *self.shape, device="meta")
        return tuple(self.rule.by_position(self.call, shape_only).shape[1:-1])

    def without(self, names: Container[str]) -> Use | None:
        """The use of other parameters than these, if there is one."""
        kept = {role: reference for role, reference in self.references.items() if reference.name not in names}
        return replace(self, references=kept) if kept else None


class Interceptor(TorchFunctionMode):
    """Records, while active, each differentiable use of the tracked tensors.

    Args:
        tracked: the tensors by name; they must require gradients.
        strict: whether uses that cannot be served at all are refused, or passed over.

    Attributes:
        unserved: what the other uses are, by parameter, in the words of an `UnsupportedUseError`.
    """

    def __init__(self, tracked: Mapping[str, Tensor], *, strict: bool = True) -> None:
        super().__init__()
        load_entry_points()
        self._strict = strict
        self._references = References(tracked)
        self._found: list[tuple[Use, Tensor]] = []
        self.unserved: dict[str, str] = {}

    @property
    def uses(self) -> tuple[Use, ...]:
        """Those that a layer rule covers, at the places in the graph that they have now.

        Of some layers torch returns a view. What changes that in place takes the view's own place in the graph, and
        leaves the place of what is viewed.
        """
        return tuple(
            replace(use, edge=use.viewed)
            if use.viewed is not None and use.edge != get_gradient_edge(output)
            else use
            for use, output in self._found
        )

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        used = [t for t in tensors_in((args, kwargs)) if self._references.name(t) is not None]
        if func in _EMBEDDINGS:
            self._check_unchanging(func, args, kwargs)
        if used and func is F.multi_head_attention_forward:
            with linear_replaced(functools.partial(self._intercepted, F.linear)):
                return func(*args, **kwargs)
        output = func(*args, **kwargs)
        if used and any(t.requires_grad and self._references.name(t) is None for t in tensors_in(output)):
            self._record(func, args, kwargs, used, output)
        return output

    def _intercepted(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self.__torch_function__(func, (), args, kwargs)

    def _record(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        used: list[Tensor],
        output: Any,
    ) -> None:
        names = Counter(name for t in used if (name := self._references.name(t)) is not None)
        rule = RULES.get(func)
        try:
            if rule is None:
                raise NotCovered
            call = rule.bind(*args, **kwargs)
            if self._strict and any(self._is_cast(tensor, output) for tensor in call.roles.values()):
                raise NotServable(
                    f"in {output.dtype} (is torch.autocast on in the model?)",
                    "outputs in the dtype of the parameter",
                )
        except NotCovered as found:
            how = f"is used by {_name(func)} {found}".strip()
            if self._strict and isinstance(found, NotServable):
                expected = f"{found.expected}, or leave it out with subset_of_weights"
                raise UnsupportedUseError(next(iter(names)), how, expected) from None
            self.unserved |= dict.fromkeys(names, how)
            return
        references: dict[str, Reference] = {}
        for role, tensor in call.roles.items():
            name = self._references.name(tensor)
            if name is None:
                continue
            names[name] -= 1
            reference = self._references.reference(tensor)
            if reference is None:
                self.unserved[name] = f"is used by {_name(func)} as a view that is no contiguous part of it"
            else:
                references[role] = reference
        self.unserved |= {name: f"is an input of {_name(func)}" for name, left in names.items() if left > 0}
        if references:
            edge, viewed = get_gradient_edge(output), _viewed(output)
            use = Use(rule, call, references, output.shape, edge, call.input._version, viewed)
            self._found.append((use, output))

    def _check_unchanging(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Whether an embedding, of a tracked parameter or not, leaves its weight as it is."""
        given = inspect.signature(func).bind(*args, **kwargs).arguments
        if given.get("max_norm") is not None:
            weight = self._references.name(given["weight"])
            raise UnsupportedError(
                f"{_name(func)} {'' if weight is None else f'of parameter {weight!r} '}with max_norm changes its "
                "weight in place on every forward pass, expected max_norm=None; renormalise the weight once beforehand"
            )

    def _is_cast(self, tensor: Tensor, output: Tensor) -> bool:
        return self._references.name(tensor) is not None and tensor.dtype != output.dtype


def _viewed(output: Tensor) -> GradientEdge | None:
    """The place of what an output is a view of, if that is the same numbers in the same order of memory."""
    viewed = output._base
    if viewed is None or viewed.numel() != output.numel():
        return None
    return get_gradient_edge(viewed) if viewed.is_contiguous() and output.is_contiguous() else None


def _name(func: Callable[..., Any]) -> str:
    attribute = getattr(func, "__self__", None)  # the getter of Tensor.mT is seen as a bound __get__
    if getattr(func, "__name__", "") == "__get__" and attribute is not None:
        return f"Tensor.{attribute.__name__}"
    return str(getattr(func, "__name__", func))
