"""A guard that fails as soon as something allocates a tensor of the size of the dense matrix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from curvlin._tree import Tree

FACTOR = 4


class DenseTensorError(AssertionError):
    """A tensor larger than the limit was made under `forbid_dense`."""


class forbid_dense(TorchDispatchMode):
    """Context in which every tensor of more than `limit` elements is an error, backward passes included.

        with forbid_dense(P, x):
            P.solve(x)

    Args:
        *inputs: operators, feature operators and right-hand sides (or tensors shaped like outputs); or, in the
            first place, the limit.
        limit: the most elements a tensor may hold. None: `FACTOR` (4) times the elements of `inputs`, where
            an operator counts its own tensors and one vector of its size (what a diagonal or a sample
            returns).

    Raises:
        TypeError: if there is neither a limit nor an input to derive it from.

    Elements are counted by the memory behind a tensor, so that an `expand` costs nothing; no operation has to
    be known by name, and what `autograd` does in its backward pass is seen as well.
    """

    def __init__(self, *inputs: int | Tree | Tensor | None, limit: int | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        if inputs and isinstance(inputs[0], (int, type(None))):
            limit, inputs = inputs[0] if limit is None else limit, inputs[1:]
        sized = [x for x in inputs if isinstance(x, (Tree, Tensor))]
        if len(sized) < len(inputs):
            raise TypeError(
                f"forbid_dense takes operators and tensors, found {[type(x).__name__ for x in inputs]}"
            )
        if limit is None:
            if not sized:
                raise TypeError(
                    "forbid_dense needs a limit, or the operators and right-hand sides to derive it from"
                )
            limit = FACTOR * sum(_elements(x) for x in sized)
        self.limit = limit
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                held = min(leaf.numel(), leaf.untyped_storage().nbytes() // leaf.element_size())
                if leaf.dtype == torch.uint8:  # memory seen as bytes, while it is copied
                    held //= 8
                self.largest = max(self.largest, held)
                if held > self.limit:
                    raise DenseTensorError(
                        f"{func} made a tensor of shape {tuple(leaf.shape)} ({held} elements), and the "
                        f"limit is {self.limit}; the structured path must not form it"
                    )
        return result


def _elements(x: Tree | Tensor) -> int:
    if isinstance(x, Tensor):
        return x.numel()
    own = sum(t.numel() for t, _ in x._tensors())
    size = getattr(x, "size", 0)
    return own + (size * x.batch_shape.numel() if isinstance(size, int) else 0)
