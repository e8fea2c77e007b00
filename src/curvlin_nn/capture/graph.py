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

    def gradients(self, columns: Float[Tensor, "V N C"]) -> list[Float[Tensor, V * output]]:
        """For each column, the gradients of ``sum(column * outputs)`` with respect to every use's output."""
        edges = [use.edge for use in self.uses]
        found: tuple[Tensor | None, ...]
        if len(columns) > 1 and all(use.rule.batched_columns for use in self.uses):
            found = torch.autograd.grad(
                self.outputs, edges, columns, retain_graph=True, is_grads_batched=True, allow_unused=True
            )
        else:
            by_column = [
                torch.autograd.grad(self.outputs, edges, column, retain_graph=True, allow_unused=True)
                for column in columns
            ]
            found = tuple(
                None if of_use[0] is None else torch.stack(of_use) for of_use in zip(*by_column, strict=True)
            )
        return [
            columns.new_zeros(len(columns), *use.shape) if gradient is None else gradient
            for use, gradient in zip(self.uses, found, strict=True)
        ]


def named_pieces(use: Use, gradient: Tensor) -> Iterator[tuple[str, Piece]]:
    """The pieces of the chosen parameters of one use, by parameter name."""
    for piece in use.rule.pieces(use.call, gradient):
        if piece.role in use.names:
            yield use.names[piece.role], piece
