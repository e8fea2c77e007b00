"""Which parameters of a model a posterior is about, and where each stands in the flat vector.

The flat order is that of `torch.nn.utils.parameters_to_vector` over the chosen parameters, in the order of
``model.named_parameters()``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from jaxtyping import Float
from torch import Tensor, nn

from curvlin.index import IndexSet
from curvlin_nn.errors import UnsupportedError

Selection = str | Sequence[str] | Callable[[str, nn.Parameter], bool]
"""``"all"``, names of parameters or modules, or a predicate of a parameter's name and value."""

_EXPECTED = (
    "expected 'all', 'last_layer', 'subnetwork', a list of names of parameters or modules, a predicate of name and "
    "parameter, or a mask of curvlin_nn.subnetwork"
)


@dataclass(frozen=True)
class ParameterSpace:
    """Named parameters side by side in one flat vector.

    Attributes:
        names: names as in ``model.named_parameters()``, in flat order.
        shapes: their shapes.
    """

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]

    @classmethod
    def of(cls, model: nn.Module, select: Selection = "all") -> ParameterSpace:
        """The parameters of `model` that `select` chooses.

        Args:
            model: any module; tied parameters count once, under their first name, and those without entries do not.
            select: ``"all"`` (those that require a gradient), names of parameters or of modules (which stand
                for everything below them), or a predicate ``(name, parameter) -> bool``.

        Raises:
            UnsupportedError: if `model` cannot be served, a name matches nothing, nothing is chosen, or the chosen
                parameters are not floating tensors of one dtype on one device.
        """
        check_model(model)
        chosen = _chosen(model, select)
        parameters = {name: p for name, p in model.named_parameters() if name in chosen and p.numel()}
        if not parameters:
            raise UnsupportedError(
                "subset_of_weights chooses no parameter of the model; expected at least one "
                "('all' takes those that require a gradient)"
            )
        kinds = {(p.dtype, p.device) for p in parameters.values()}
        if len(kinds) > 1:
            found = ", ".join(sorted(f"{dtype} on {device}" for dtype, device in kinds))
            raise UnsupportedError(f"the chosen parameters must share one dtype and device, found {found}")
        ((dtype, _),) = kinds
        if not dtype.is_floating_point:
            raise UnsupportedError(f"the chosen parameters must have a real floating dtype, found {dtype}")
        return cls(tuple(parameters), tuple(p.shape for p in parameters.values()))

    @property
    def size(self) -> int:
        """P, the number of coordinates."""
        return sum(map(math.prod, self.shapes))

    @property
    def spans(self) -> dict[str, range]:
        """The coordinates of each parameter."""
        ends = list(accumulate(map(math.prod, self.shapes)))
        return {
            name: range(start, end) for name, start, end in zip(self.names, [0, *ends], ends, strict=False)
        }

    @property
    def modules(self) -> dict[str, tuple[str, ...]]:
        """The parameters of each module that owns some directly, in flat order."""
        owned: dict[str, tuple[str, ...]] = {}
        for name in self.names:
            owner = name.rpartition(".")[0]
            owned[owner] = (*owned.get(owner, ()), name)
        return owned

    def tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """The model's current values, detached and sharing its memory."""
        return {name: model.get_parameter(name).detach() for name in self.names}

    def dtype(self, model: nn.Module) -> torch.dtype:
        """The dtype that the model has them in now."""
        return model.get_parameter(self.names[0]).dtype

    def flatten(self, tensors: Mapping[str, Tensor]) -> Float[Tensor, " P"]:
        """Named tensors as one flat vector."""
        return torch.cat([tensors[name].reshape(-1) for name in self.names])

    def unflatten(self, vector: Float[Tensor, "*batch P"]) -> dict[str, Tensor]:
        """A flat vector (or a batch of them) as named tensors; the inverse of `flatten`."""
        if vector.shape[-1] != self.size:
            raise ValueError(f"vector must have {self.size} entries, found shape {tuple(vector.shape)}")
        parts = vector.split([math.prod(shape) for shape in self.shapes], dim=-1)
        return {
            name: part.reshape(*vector.shape[:-1], *shape)
            for name, shape, part in zip(self.names, self.shapes, parts, strict=True)
        }


def check_model(model: object) -> None:
    """Whether `model` is a module that can be run with other tensors in the place of its parameters.

    Raises:
        UnsupportedError: if it is not.
    """
    if not isinstance(model, nn.Module):
        raise UnsupportedError(f"model must be a torch.nn.Module, found {type(model).__name__}")
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    if isinstance(model, wrappers):
        raise UnsupportedError(
            f"model must be a module on one device, found {type(model).__name__}; give it model.module"
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise UnsupportedError(
            f"model must be a torch.nn.Module that runs in Python, found {type(model).__name__}; give the module it "
            "was made from"
        )
    for name, p in model.named_parameters():
        if nn.parameter.is_lazy(p):
            raise UnsupportedError(
                f"parameter {name!r} is uninitialized, expected one with a shape; call the model once on an input"
            )
        if p.is_inference():
            raise UnsupportedError(
                f"parameter {name!r} was made in torch.inference_mode, expected an ordinary one; make the model "
                "outside of that mode"
            )


@functools.lru_cache(maxsize=64)
def consecutive(sizes: tuple[int, ...]) -> IndexSet:
    """The partition into consecutive blocks: one object per sizes, so that telling two equal is free."""
    return IndexSet.of_sizes(sizes)


def _chosen(model: nn.Module, select: Selection) -> set[str]:
    named = dict(model.named_parameters())
    if callable(select):
        return {name for name, p in named.items() if select(name, p)}
    if isinstance(select, str):
        if select != "all":
            raise UnsupportedError(f"subset_of_weights={select!r} is not supported; {_EXPECTED}")
        return {name for name, p in named.items() if p.requires_grad}
    if not isinstance(select, Iterable):
        raise UnsupportedError(f"subset_of_weights={select!r} is not supported; {_EXPECTED}")
    first_name = {id(p): name for name, p in named.items()}
    aliases = {name: first_name[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}
    chosen: set[str] = set()
    for wanted in select:
        found = {first for name, first in aliases.items() if name == wanted or name.startswith(f"{wanted}.")}
        if not found:
            raise UnsupportedError(
                f"subset_of_weights names {wanted!r}, which is no parameter or module of the model"
            )
        chosen |= found
    return chosen
