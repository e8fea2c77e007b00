"""Captures: a model's factored per-sample Jacobian, block by block, from a forward and a backward pass."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from curvlin_nn.capture.blocks import Block, Captures, merged
from curvlin_nn.capture.checks import (
    Possibilities,
    check_complete,
    check_gradient,
    check_independent,
    check_repeatable,
    checked_outputs,
    find_layouts,
    possible_layouts,
)
from curvlin_nn.capture.graph import Graph, Signature, named_pieces
from curvlin_nn.capture.inputs import tensors_of
from curvlin_nn.capture.intercept import Interceptor
from curvlin_nn.capture.layout import SINGLE, Layout
from curvlin_nn.capture.state import capturing, device_of, forward, prepared, random_state
from curvlin_nn.errors import StochasticModelError, UnsupportedUseError
from curvlin_nn.parameters import ParameterSpace


@dataclass(frozen=True)
class Recording:
    """One forward pass, ready to be asked for captures."""

    _space: ParameterSpace
    _graph: Graph
    _layouts: tuple[Layout, ...]
    _where: str

    @property
    def outputs(self) -> Float[Tensor, N * C]:
        """The model's outputs, detached."""
        return (
            self._graph.outputs.detach()
            .unflatten(1, self._graph.shape or (1,))
            .reshape(-1, *self._graph.shape)
        )

    def captures(self, columns: Float[Tensor, "V N *C"], *, first: bool = True) -> Captures:
        """The rows ``column^T J`` of every sample and column; unit columns give the Jacobian itself.

        Args:
            columns: one cotangent of the outputs for each row.
            first: whether these are the first columns that are asked of this batch.

        Raises:
            OutputError: if a gradient is not finite, naming a parameter of the layer.
        """
        n_samples = len(self._graph.outputs)
        columns = columns.reshape(len(columns), n_samples, -1)
        parts: dict[str, list[Block]] = {name: [] for name in self._space.names}
        for use, layout, gradient in zip(
            self._graph.uses, self._layouts, self._graph.gradients(columns), strict=True
        ):
            check_gradient(gradient, use, self._where)
            for name, piece in named_pieces(use, gradient):
                left = layout.split(piece.left, n_samples, 1).movedim(0, 1)
                right = None if piece.right is None else layout.split(piece.right.detach(), n_samples, 0)
                if right is None and left.shape[2] > 1:
                    left = left.sum(2, keepdim=True)
                start = self._space.spans[name].start + piece.start
                parts[name].append(Block(name, start, left, right, piece.transposed))
        return Captures(n_samples, tuple(self._blocks(parts, columns)), first)

    def _blocks(self, parts: Mapping[str, list[Block]], columns: Tensor) -> Iterator[Block]:
        for name, shape, span in zip(
            self._space.names, self._space.shapes, self._space.spans.values(), strict=True
        ):
            starts = sorted({block.start for block in parts[name]})
            blocks = [
                merged(name, start, (block for block in parts[name] if block.start == start))
                for start in starts
            ] or [_zero_block(name, span.start, shape, columns)]
            if [block.start for block in blocks[1:]] + [span.stop] != [block.span.stop for block in blocks]:
                raise UnsupportedUseError(name, "is used in parts of different shapes")
            yield from blocks


class Recorder:
    """Runs a model in evaluation mode and records how the chosen parameters are used.

    The model comes back as it was, whatever happens. The first batch is checked: no random numbers drawn,
    every use captured, samples independent, outputs the same again; a later batch is checked again if the forward
    pass takes another course.

    Args:
        model: maps one argument to outputs of shape ``(N, C)``.
        space: the chosen parameters.
    """

    def __init__(self, model: nn.Module, space: ParameterSpace) -> None:
        self.model, self.space = model, space
        self._verified: set[tuple[Signature, bool]] = set()
        self._layouts: dict[tuple[Signature, Possibilities], tuple[Layout, ...]] = {}

    def __call__(self, x: Any, where: str = "the input") -> Recording:
        """One forward pass.

        Args:
            x: what the model takes.
            where: what to call this input in error messages.

        Raises:
            DataError: if x holds no sample, or has a dtype that the model does not take.
            OutputError: if the outputs are not finite, or not of shape ``(N, C)``.
            UnsupportedUseError: if a chosen parameter is used in a way that no layer rule covers.
            CouplingError: if samples influence each other.
            StochasticModelError: if the model draws random numbers, or its outputs differ from pass to pass.
            ModifiedInputError: if a layer's input is changed in place after its use.
        """
        x = prepared(self.model, x, where)
        originals = {name: self.model.get_parameter(name) for name in self.space.names}
        device = device_of(self.model)
        with capturing(self.model, originals.values()):
            leaves = {name: p.detach().requires_grad_() for name, p in originals.items()}
            before = random_state(device)
            with Interceptor(leaves) as interceptor:
                outputs = forward(self.model, leaves, x, where)
            if not all(map(torch.equal, before, random_state(device))):
                raise StochasticModelError(
                    f"the model drew random numbers on {where}, expected the same outputs each time in "
                    "evaluation mode; is dropout applied with training=True?"
                )
            outputs = checked_outputs(outputs, where)
            graph = Graph(
                leaves, tuple(interceptor.uses), outputs.reshape(len(outputs), -1), outputs.shape[1:]
            )
            graph.check_untouched()
            question = graph.signature, len(graph.outputs) > 1
            new = question not in self._verified
            if new:
                check_complete(graph, originals)
            layouts = self._layouts_of(graph)
            if new:
                self._check_function(graph, x, where)
                self._verified.add(question)
            return Recording(self.space, graph, layouts, where)

    def _check_function(self, graph: Graph, x: Any, where: str) -> None:
        """Whether the outputs are a function of each sample's input alone."""

        def run(x: Any) -> Tensor:
            outputs = checked_outputs(forward(self.model, graph.leaves, x, where), where).detach()
            return outputs.reshape(len(outputs), -1)

        check_repeatable(graph.outputs, run(x))
        if len(graph.outputs) > 1 and any(t.shape[:1] == graph.outputs.shape[:1] for t in tensors_of(x)):
            check_independent(run, x, graph.outputs)

    def _layouts_of(self, graph: Graph) -> tuple[Layout, ...]:
        if len(graph.outputs) == 1:
            return (SINGLE,) * len(graph.uses)
        # One position per sample allows fewer layouts than several: an answer holds where the question is the same.
        question = graph.signature, possible_layouts(graph)
        if question in self._layouts:
            return self._layouts[question]
        layouts, certain = find_layouts(graph)
        if certain:
            self._layouts[question] = layouts
        return layouts


def _zero_block(name: str, start: int, shape: torch.Size, columns: Tensor) -> Block:
    """A parameter without influence on these outputs."""
    n_columns, n_samples, _ = columns.shape
    zero = columns.new_zeros(())
    left = zero.expand(n_samples, n_columns, 1, shape[0] if shape else 1)
    if len(shape) < 2:
        return Block(name, start, left, None)
    return Block(name, start, left, zero.expand(n_samples, 1, math.prod(shape[1:])))
