"""What a model takes and gives back: inputs of any nesting, outputs of any shape behind the samples.

An input is a tensor, or tensors nested in tuples, lists and mappings. A tensor whose axis 0 is as long as the batch
holds one row for each sample; every other one is shared by all of them.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from curvlin_nn.errors import DataError


def split_batch(batch: Any, where: str, key: str = "labels") -> tuple[Any, Tensor]:
    """Inputs and targets of what a loader yields.

    The last of a tuple is the targets, what stands before is the input (a tuple, if there is more than one). A
    mapping, as Hugging Face loaders yield, holds its targets under `key`; all else in it is the input.

    Raises:
        DataError: if it is neither.
    """
    if isinstance(batch, Mapping) and isinstance(batch.get(key), Tensor):
        _check_axis(batch[key], where)
        inputs = copy.copy(batch) if isinstance(batch, MutableMapping) else dict(batch)
        del inputs[key]
        return inputs, batch[key]
    if isinstance(batch, (tuple, list)) and len(batch) > 1 and isinstance(batch[-1], Tensor):
        _check_axis(batch[-1], where)
        return batch[0] if len(batch) == 2 else tuple(batch[:-1]), batch[-1]
    raise DataError(
        f"{where} must be a pair (inputs, targets) with targets a tensor, or a mapping with a tensor under {key!r}, "
        f"found {_outline(batch)}"
    )


def _check_axis(targets: Tensor, where: str) -> None:
    """Whether targets have an axis of samples.

    Raises:
        DataError: if they have none, as in a data set that is given in the place of its loader.
    """
    if targets.ndim == 0:
        raise DataError(
            f"targets of {where} must have one entry for each sample along axis 0, found a single number; give "
            "batches, such as those of a DataLoader over the data set"
        )


def _outline(batch: Any) -> str:
    """What a batch is, with its parts: one name in a mapping may be the one that was meant."""
    if isinstance(batch, (tuple, list)):
        parts = ", ".join(type(part).__name__ for part in batch[:4])
        return f"{type(batch).__name__} of {parts or 'nothing'}"
    if not isinstance(batch, Mapping):
        return type(batch).__name__
    keys = ", ".join(map(str, batch))
    return (
        f"{type(batch).__name__} with {keys}; say how the targets are called with dict_key_y, or rename them"
    )


def map_tensors(function: Callable[[Tensor], Tensor], x: Any) -> Any:
    """The input with every tensor replaced; tuples, lists and mappings are made anew, of their own type."""
    if isinstance(x, Tensor):
        return function(x)
    if isinstance(x, Mapping):
        copied = copy.copy(x) if isinstance(x, MutableMapping) else dict(x)
        for key, value in x.items():
            copied[key] = map_tensors(function, value)
        return copied
    if isinstance(x, tuple) and hasattr(x, "_fields"):
        return type(x)(*(map_tensors(function, value) for value in x))
    if isinstance(x, (tuple, list)):
        return type(x)(map_tensors(function, value) for value in x)
    return x


def tensors_of(x: Any) -> Iterator[Tensor]:
    """Every tensor of the input."""
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, Mapping):
        for value in x.values():
            yield from tensors_of(value)
    elif isinstance(x, (tuple, list)):
        for value in x:
            yield from tensors_of(value)


def only_tensor(x: Any) -> Tensor | None:
    """The tensor of an input that holds one, itself or nested; None for an input of another number."""
    tensors = list(tensors_of(x))
    return tensors[0] if len(tensors) == 1 else None


def select_samples(x: Any, index: slice | Tensor, n_samples: int) -> Any:
    """The input of some samples only."""
    return map_tensors(lambda t: t[index] if t.shape[:1] == (n_samples,) else t, x)


def can_be_cut(x: Any, n_samples: int) -> bool:
    """Whether some tensor of the input has samples along axis 0."""
    return any(t.shape[:1] == (n_samples,) for t in tensors_of(x))


def arguments(model: nn.Module, x: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments that a model is called with on an input.

    A model whose `forward` takes one argument gets the input as it is. Where it takes several, a tuple or list is
    spread over them by position, and a mapping by name.
    """
    if isinstance(x, (tuple, list, Mapping)) and _takes_several(model):
        return ((), dict(x)) if isinstance(x, Mapping) else (tuple(x), {})
    return (x,), {}


def _takes_several(model: nn.Module) -> bool:
    kinds = [p.kind for p in inspect.signature(model.forward).parameters.values()]
    return (
        len(kinds) > 1 or inspect.Parameter.VAR_POSITIONAL in kinds or inspect.Parameter.VAR_KEYWORD in kinds
    )


def outputs_of(result: Any) -> Any:
    """The tensor of outputs in what a model returned: itself, or `logits` where there are such."""
    if isinstance(result, Tensor):
        return result
    if isinstance(result, Mapping) and "logits" in result:
        return result["logits"]
    return getattr(result, "logits", result)


def called(model: nn.Module, x: Any) -> Any:
    """The outputs of a model on an input, which is spread over its arguments."""
    args, kwargs = arguments(model, x)
    return outputs_of(model(*args, **kwargs))


def dtypes_of(x: Any) -> set[torch.dtype]:
    """The dtypes of the input's tensors."""
    return {t.dtype for t in tensors_of(x)}
