"""One forward pass with its autograd graph, and the backward pass that stops at the layers' outputs."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.graph import GradientEdge

from curvlin_nn.capture.course import Course
from curvlin_nn.capture.detours import loops_of_vmap_unannounced
from curvlin_nn.capture.intercept import Use
from curvlin_nn.capture.references import Reference
from curvlin_nn.capture.rules import Piece
from curvlin_nn.errors import ModifiedInputError

COLUMN_BUDGET = 2**21
"""Entries of the gradients of one layer that are sent backward at once: 8 MiB in float32."""

Signature = tuple[tuple[str, tuple[tuple[str, Reference, torch.Size], ...], int], ...]


@dataclass(frozen=True)
class Graph:
    """What a forward pass left behind.

    Attributes:
        leaves: the chosen parameters as the graph's leaves, by name.
        uses: their uses, in order.
        outputs: the model's outputs with their graph, all of a sample's in one row.
        shape: the shape that the outputs of one sample had.
        course: what the whole graph looks like.
        direct: whether the output of the only use is the model's output, which then has the same cotangents.
    """

    leaves: dict[str, Tensor]
    uses: tuple[Use, ...]
    outputs: Float[Tensor, "N C"]
    shape: torch.Size
    course: Course
    direct: bool = False

    @property
    def signature(self) -> Signature:
        """How the parameters are used by rule, which distinguishes one course of the forward pass from another."""
        return tuple(
            (
                type(use.rule).__name__,
                tuple((role, place, use.call.roles[role].shape) for role, place in use.references.items()),
                len(use.shape),
            )
            for use in self.uses
        )

    def without(self, names: Container[str]) -> Graph:
        """The same pass with some parameters' uses left out."""
        kept = (use.without(names) for use in self.uses)
        return replace(self, uses=tuple(use for use in kept if use is not None))

    def check_untouched(self) -> None:
        """Whether every layer's input still holds what the layer saw.

        Raises:
            ModifiedInputError: naming a parameter of the layer.
        """
        for use in self.uses:
            if use.call.input._version != use.version:
                raise ModifiedInputError(
                    f"the input of the layer with parameter {use.names[0]!r} was changed in place after the layer "
                    "used it, expected it untouched; write x = x + y instead of x += y there"
                )

    @property
    def columns_at_once(self) -> int:
        """How many columns' gradients stay in cache: more gain nothing, and are written to memory and read back."""
        largest = max((use.shape.numel() for use in self.uses), default=0)
        # A layer may have seen nothing: an expert without samples.
        return max(1, COLUMN_BUDGET // max(1, largest))

    def gradients(
        self, columns: Float[Tensor, "V N C"], *, differentiable: bool = False
    ) -> list[Float[Tensor, V * output]]:
        """For each column, the gradients of ``sum(column * outputs)`` with respect to every use's output.

        Args:
            columns: the cotangents.
            differentiable: whether the gradients have a graph of their own.
        """
        edges = [use.edge for use in self.uses]
        if not edges:
            return []
        if self.direct:
            return [columns.reshape(len(columns), *self.uses[0].shape)]
        found = None
        if len(columns) > 1 and all(use.rule.batched_columns for use in self.uses):
            parts = [
                self._at_once(some, edges, differentiable) for some in columns.split(self.columns_at_once)
            ]
            found = None if None in parts else _joined([part for part in parts if part is not None])
        if found is None:
            found = self._one_by_one(columns, edges, differentiable)
        # A gradient may be that of what the output is a view of.
        return [
            columns.new_zeros(len(columns), *use.shape)
            if gradient is None
            else gradient.reshape(len(columns), *use.shape)
            for use, gradient in zip(self.uses, found, strict=True)
        ]

    def _at_once(
        self, columns: Tensor, edges: Sequence[GradientEdge], differentiable: bool
    ) -> tuple[Tensor | None, ...] | None:
        """All columns in one backward pass; None where the model has an operation that this cannot be done with."""
        try:
            with loops_of_vmap_unannounced():
                return torch.autograd.grad(
                    self.outputs,
                    edges,
                    columns,
                    retain_graph=True,
                    create_graph=differentiable,
                    is_grads_batched=True,
                    allow_unused=True,
                )
        except RuntimeError:  # as raised by a hand-written backward pass that looks at its numbers
            return None

    def _one_by_one(
        self, columns: Tensor, edges: Sequence[GradientEdge], differentiable: bool
    ) -> tuple[Tensor | None, ...]:
        by_column = [
            torch.autograd.grad(
                self.outputs,
                edges,
                column,
                retain_graph=True,
                create_graph=differentiable,
                allow_unused=True,
            )
            for column in columns
        ]
        if len(columns) == 1:
            return tuple(None if gradient is None else gradient[None] for gradient in by_column[0])
        return tuple(
            None if of_use[0] is None else torch.stack(of_use) for of_use in zip(*by_column, strict=True)
        )


def _joined(parts: Sequence[tuple[Tensor | None, ...]]) -> tuple[Tensor | None, ...]:
    """The gradients of all columns from those of some at a time."""
    if len(parts) == 1:
        return parts[0]
    return tuple(
        None if of_use[0] is None else torch.cat([part for part in of_use if part is not None])
        for of_use in zip(*parts, strict=True)
    )


def named_pieces(use: Use, gradient: Tensor) -> Iterator[tuple[str, Piece]]:
    """The pieces of the chosen parameters of one use, by parameter name, and as they stand in the parameter."""
    chosen = replace(use.call, roles={role: use.call.roles[role] for role in use.references})
    for piece in use.rule.pieces(chosen, gradient):
        place = use.references[piece.role]
        transposed = piece.transposed != place.transposed
        yield place.name, replace(piece, start=place.start + piece.start, transposed=transposed)
