"""Immutable objects over tensors, registered as pytrees: what every operator, feature map and Gaussian is.

A subclass is a dataclass whose fields are tensors, `None`, other `Tree` objects, or tuples of these, each
set once. A tensor field declares how many trailing dimensions are its own (`tensor_field(2)` for a matrix);
what stands left of them is batch. Static fields (`static_field()`) are hashable and live in the pytree context.
Unflattening bypasses validation, so that `torch.func` may put gradients, tangents and wrapped tensors in.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from types import FunctionType
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

SelfT = TypeVar("SelfT", bound="Tree")
ClassT = TypeVar("ClassT", bound=type)
Fields = tuple[dataclasses.Field[Any], ...]
TensorMap = Callable[[Tensor, int], Tensor]


def tensor_field(ndim: int, default: Any = dataclasses.MISSING, *, constant: bool = False) -> Any:
    """A field of tensors (or tuples of them, or trees) whose own dimensions are the last `ndim`.

    Args:
        ndim: how many trailing dimensions are the tensor's own; what stands to the left is batch.
        default: of the field.
        constant: whether no derivative flows into it, by contract.
    """
    return dataclasses.field(default=default, metadata={"ndim": ndim, "constant": constant})


def static_field(default: Any = dataclasses.MISSING) -> Any:
    """A hashable field that is structure, not data."""
    return dataclasses.field(default=default, metadata={"static": True})


def hide_from_compiler(cls: ClassT) -> ClassT:
    """Class decorator: every public method runs as it is written inside `torch.compile`, between two graphs.

    Factorisations look at values, run in LAPACK and stay in float64: there is nothing in them to fuse, and a
    compiler that traces half of one would only find new ways to fail.
    """
    for name, member in list(vars(cls).items()):
        if name.startswith("_") and not (name.startswith("__") and name.endswith("__")):
            continue
        if isinstance(member, FunctionType) and name not in _NOT_HIDDEN:
            setattr(cls, name, torch.compiler.disable(member))
        elif isinstance(member, (classmethod, staticmethod)) and name not in _NOT_HIDDEN:
            setattr(cls, name, type(member)(torch.compiler.disable(member.__func__)))
    return cls


# What may be traced, as properties may, and is called too often to pay for the way around.
_NOT_HIDDEN = {"__init_subclass__", "__hash__", "__repr__", "__setattr__", "__delattr__"}


@hide_from_compiler
class Tree:
    """Base of all immutable tensor objects; see the module docstring."""

    __array_ufunc__ = None  # NumPy leaves `array * P` to us instead of making an object array
    __hash__ = object.__hash__

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(f"{type(self).__name__} is not turned into an array silently; use to_dense().numpy()")

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        hide_from_compiler(cls)
        pytree.register_pytree_node(
            cls,
            lambda obj: ([t for t, _ in obj._tensors()], obj._structure()),
            lambda tensors, structure: build(structure, tensors),
            serialized_type_name=f"{cls.__module__}.{cls.__qualname__}",
            to_dumpable_context=repr,
            from_dumpable_context=_refuse_load,
        )

    # Not `frozen=True`: torch.compile takes frozen dataclasses for records that it may rebuild from their fields.

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__ or name not in type(self).__dataclass_fields__:  # type: ignore[attr-defined]  # a dataclass
            raise dataclasses.FrozenInstanceError(
                f"cannot assign to {name!r}: a {type(self).__name__} is immutable"
            )
        object.__setattr__(self, name, value)

    def __delattr__(self, name: str) -> None:
        raise dataclasses.FrozenInstanceError(f"cannot delete {name!r}: a {type(self).__name__} is immutable")

    def _structure(self) -> Structure:
        """Everything but the tensors, hashable: equal structures mean objects of the same kind and make."""
        cls = type(self)
        parts = tuple(_structure_of(getattr(self, f.name)) for f in _data_fields(cls))
        static = tuple(getattr(self, f.name) for f in _static_fields(cls))
        return Structure(cls, static, parts, self.__dict__.get("_inherited_resolution", 0.0))

    @classmethod
    def _make(cls: type[SelfT], values: Iterable[Any], structure: Structure) -> SelfT:
        """An object with these field values, without validation."""
        obj = object.__new__(cls)
        for f, value in zip(_data_fields(cls), values, strict=True):
            obj.__dict__[f.name] = value
        for f, value in zip(_static_fields(cls), structure.static, strict=True):
            obj.__dict__[f.name] = value
        if structure.resolution:
            obj.__dict__["_inherited_resolution"] = structure.resolution
        return obj

    def _map(self: SelfT, fn: TensorMap) -> SelfT:
        """The same structure with `fn(tensor, own_ndim)` in the place of every tensor."""
        result: SelfT = build(self._structure(), [fn(t, n) for t, n in self._tensors()])
        return result

    def _tensors(self) -> Iterator[tuple[Tensor, int]]:
        """Every tensor with the number of dimensions that are its own, in pytree order."""
        for f in _data_fields(type(self)):
            yield from _iterate(getattr(self, f.name), f.metadata["ndim"])

    def _with(self, cls: type | None = None, **changes: Any) -> Any:
        """A copy with some fields replaced, without validation; of the class `cls` with the same fields if given."""
        copy: Any = object.__new__(cls or type(self))
        # Subclasses are dataclasses, which the base is not declared to be.
        copy.__dict__.update({f.name: getattr(self, f.name) for f in dataclasses.fields(self)} | changes)  # type: ignore[arg-type]
        if "_inherited_resolution" in self.__dict__:
            copy.__dict__["_inherited_resolution"] = self.__dict__["_inherited_resolution"]
        return copy

    def to(self: SelfT, *args: Any, **kwargs: Any) -> SelfT:
        """`Tensor.to` of every tensor.

        Raises:
            TypeError: for a dtype that is not floating.
            ValueError: if an entry exceeds what a narrower dtype holds.
        """
        tensors = [t.to(*args, **kwargs) for t, _ in self._tensors()]
        structure = self._structure()
        if (dtype := tensors[0].dtype) != self.dtype:
            if not dtype.is_floating_point:
                raise TypeError(f"a {type(self).__name__} must have a floating dtype, found {dtype}")
            narrower = torch.finfo(dtype).max < torch.finfo(self.dtype).max
            if narrower and not all(all_finite(t) for t in tensors if is_concrete(t)):
                raise ValueError(
                    f"a {type(self).__name__} must have entries that fit {dtype}, found an overflow"
                )
            structure = structure.with_resolution(torch.finfo(self.dtype).eps)
        result: SelfT = build(structure, tensors)
        return result

    def detach(self: SelfT) -> SelfT:
        """`Tensor.detach` of every tensor."""
        return self._map(lambda t, _: t.detach())

    def expand(self: SelfT, batch_shape: tuple[int, ...] | torch.Size) -> SelfT:
        """Every tensor with its batch dimensions expanded to `batch_shape`, as `torch.vmap` needs them.

        Raises:
            ValueError: if the batch of this object does not expand to it.
        """
        if common_shape(self.batch_shape, torch.Size(batch_shape)) != torch.Size(batch_shape):
            raise ValueError(
                f"batch_shape must be one that {tuple(self.batch_shape)} expands to, found {tuple(batch_shape)}"
            )
        return self._map(lambda t, n: t.expand((*batch_shape, *t.shape[t.ndim - n :])))

    @property
    def batch_shape(self) -> torch.Size:
        """The shape of the batch: the broadcast of what each tensor has left of its own dimensions."""
        # Asked with every operation, and nearly always of tensors that agree.
        shapes = {t.shape[: t.ndim - n] for t, n in self._tensors()} - {torch.Size()}
        return shapes.pop() if len(shapes) == 1 else torch.broadcast_shapes(*shapes)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the tensors (all share one)."""
        return next(self._tensors())[0].dtype

    @property
    def resolution(self) -> float:
        """The relative rounding of the numbers held: eps of the dtype in which they were given.

        It survives a later cast to a wider dtype, so that what float32 rounding made of a zero eigenvalue is
        recognised as zero when a factorisation runs in float64.
        """
        inherited: float = self.__dict__.get("_inherited_resolution", 0.0)
        return max(inherited, torch.finfo(self.dtype).eps)

    @property
    def device(self) -> torch.device:
        """The device of the tensors (all share one)."""
        return next(self._tensors())[0].device

    def _needs_grad(self) -> bool:
        """Whether a derivative with respect to some tensor may be asked for."""
        tensors = [t for t, _ in self._tensors()]
        return any(needs_grad(t) for t in tensors)

    def _is_concrete(self) -> bool:
        """Whether values may be looked at (not inside `torch.func` transforms or `torch.compile`)."""
        return all(is_concrete(t) for t, _ in self._tensors())


@dataclasses.dataclass(frozen=True)
class Structure:
    """What is left of a `Tree` when its tensors are taken out."""

    cls: type
    static: tuple[Any, ...]
    parts: tuple[Any, ...]
    resolution: float = 0.0

    def with_resolution(self, resolution: float) -> Structure:
        """The same structure, of numbers that are known to this relative accuracy at best."""
        return dataclasses.replace(
            self, parts=_coarsen(self.parts, resolution), resolution=max(self.resolution, resolution)
        )


def build(structure: Structure, tensors: Iterable[Any]) -> Any:
    """The object of this structure on these tensors, without validation."""
    return _fill(structure, iter(tensors))


def _coarsen(part: Any, resolution: float) -> Any:
    if isinstance(part, Structure):
        return part.with_resolution(resolution)
    return tuple(_coarsen(p, resolution) for p in part) if isinstance(part, tuple) else part


def _structure_of(value: Any) -> Any:
    if isinstance(value, Tree):
        return value._structure()
    if isinstance(value, tuple):
        return tuple(_structure_of(v) for v in value)
    return value is not None


def _fill(part: Any, tensors: Iterator[Any]) -> Any:
    if isinstance(part, Structure):
        return part.cls._make([_fill(p, tensors) for p in part.parts], part)  # type: ignore[attr-defined]  # a Tree
    if isinstance(part, tuple):
        return tuple(_fill(p, tensors) for p in part)
    return next(tensors) if part else None


def common_shape(first: torch.Size, second: torch.Size) -> torch.Size | None:
    """What two shapes broadcast to, or None if they do not."""
    if first == second or not second:
        return first
    try:
        return torch.broadcast_shapes(first, second)
    except RuntimeError:
        return None


def is_concrete(tensor: Tensor) -> bool:
    """Whether the tensor's values may steer Python control flow."""
    return not (torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(tensor))


def all_finite(tensor: Tensor) -> bool:
    """Whether no entry is NaN or infinite."""
    # A finite sum proves all entries finite in one pass; only an overflow needs the closer look.
    return bool(torch.isfinite(tensor.detach().sum())) or bool(torch.isfinite(tensor).all())


def needs_grad(tensor: Tensor) -> bool:
    """Whether a derivative may be asked for: a live autograd graph, or any transform in progress."""
    if not is_concrete(tensor):
        return True
    return tensor.requires_grad and torch.is_grad_enabled()


def _data_fields(cls: type) -> Fields:
    return _fields(cls)[0]


def _static_fields(cls: type) -> Fields:
    return _fields(cls)[1]


def _fields(cls: type) -> tuple[Fields, Fields]:
    """The data fields and the static fields, collected once: every operation asks for them."""
    if cls not in _FIELDS:
        data, static = (
            tuple(f for f in dataclasses.fields(cls) if bool(f.metadata.get("static")) == wanted)
            for wanted in (False, True)
        )
        _FIELDS[cls] = data, static
    return _FIELDS[cls]


_FIELDS: dict[type, tuple[Fields, Fields]] = {}


def _iterate(value: Any, ndim: int) -> Iterator[tuple[Tensor, int]]:
    if isinstance(value, Tree):
        yield from value._tensors()
    elif isinstance(value, tuple):
        for v in value:
            yield from _iterate(v, ndim)
    elif value is not None:  # a tensor, or whatever a transform has put in its place
        yield value, ndim


def _refuse_load(_: str) -> Any:
    raise TypeError(
        "curvlin operators are not rebuilt from a pytree's text form; store their tensors instead"
    )
