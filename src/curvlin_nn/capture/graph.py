"""One forward pass with its autograd graph, and the backward pass that stops at the layers' outputs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from curvlin_nn.capture.intercept import Use
from curvlin_nn.capture.rules import Piece
from curvlin_nn.errors import ModifiedInputError

COLUMN_BUDGET = 2**21
"""Entries of the gradients of one layer that are sent backward at once: 8 MiB in float32."""

Signature = tuple[tuple[str, tuple[str, ...], int], ...]


@dataclass(frozen=True)
class Graph:
    """What a forward pass left behind.

    Attributes:
        leaves: the chosen parameters as the graph's leaves, by name.
        uses: their uses, in order.
        outputs: the model's outputs with their graph, all of a sample's in one row.
        shape: the shape that the outputs of one sample had.
    """

    leaves: dict[str, Tensor]
    uses: tuple[Use, ...]
    outputs: Float[Tensor, "N C"]
    shape: torch.Size

    @property
    def signature(self) -> Signature:
        """What distinguishes one course of the forward pass from another."""
        return tuple(
            (type(use.rule).__name__, tuple(use.names.values()), len(use.shape)) for use in self.uses
        )

    def check_untouched(self) -> None:
        """Whether every layer's input still holds what the layer saw.

        Raises:
            ModifiedInputError: naming a parameter of the layer.
        """
        for use in self.uses:
            if use.call.input._version != use.version:
                name = next(iter(use.names.values()))
                raise ModifiedInputError(
                    f"the input of the layer with parameter {name!r} was changed in place after the layer "
                    "used it, expected it untouched; write x = x + y instead of x += y there"
                )

    @property
    def columns_at_once(self) -> int:
        """How many columns a backward pass takes: as many as stay in cache, and one where batches of them are slow."""
        if not all(use.rule.batched_columns for use in self.uses):
            return 1
        return max(1, COLUMN_BUDGET // max(use.shape.numel() for use in self.uses))

    def gradients(self, columns: Float[Tensor, "V N C"]) -> list[Float[Tensor, V * output]]:
        """For each column, the gradients of ``sum(column * outputs)`` with respect to every use's output."""
        edges = [use.edge for use in self.uses]
        at_once = self.columns_at_once
        parts = [
            torch.autograd.grad(
                self.outputs,
                edges,
                some if batched else some[0],
                retain_graph=True,
                is_grads_batched=batched,
                allow_unused=True,
            )
            for some in columns.split(at_once)
            for batched in [at_once > 1]
        ]
        found = [
            None if of_use[0] is None else _joined(of_use, at_once > 1) for of_use in zip(*parts, strict=True)
        ]
        return [
            columns.new_zeros(len(columns), *use.shape) if gradient is None else gradient
            for use, gradient in zip(self.uses, found, strict=True)
        ]


def _joined(parts: tuple[Tensor, ...], batched: bool) -> Tensor:
    """Gradients of all columns, from those of some at a time or of each."""
    if len(parts) == 1:
        return parts[0] if batched else parts[0][None]
    return torch.cat(parts) if batched else torch.stack(parts)


def named_pieces(use: Use, gradient: Tensor) -> Iterator[tuple[str, Piece]]:
    """The pieces of the chosen parameters of one use, by parameter name."""
    for piece in use.rule.pieces(use.call, gradient):
        if piece.role in use.names:
            yield use.names[piece.role], piece
