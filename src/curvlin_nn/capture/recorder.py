"""Captures: a model's factored per-sample Jacobian, block by block, from a forward and a backward pass."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from curvlin_nn.capture.alone import Autodiff, Rest, SampleBySample
from curvlin_nn.capture.blocks import Block, Captures, merged
from curvlin_nn.capture.checks import (
    Possibilities,
    check_dependent,
    check_finite,
    check_independent,
    check_repeatable,
    checked_outputs,
    coupling_at,
    find_layouts,
    possible_layouts,
)
from curvlin_nn.capture.completeness import incomplete
from curvlin_nn.capture.course import Course
from curvlin_nn.capture.detours import attention_by_matrix_products
from curvlin_nn.capture.graph import Graph, Signature, named_pieces
from curvlin_nn.capture.inputs import can_be_cut, map_tensors, tensors_of
from curvlin_nn.capture.intercept import Interceptor
from curvlin_nn.capture.layout import SINGLE, Layout
from curvlin_nn.capture.linear import Matrix
from curvlin_nn.capture.one_hot import OneHot
from curvlin_nn.capture.patches import Patches
from curvlin_nn.capture.reduction import reduced
from curvlin_nn.capture.second_order import check_differentiable
from curvlin_nn.capture.state import capturing, forward, nothing_drawn, prepared
from curvlin_nn.errors import CouplingError, UnsupportedUseError
from curvlin_nn.parameters import ParameterSpace

_RULE, _RULE_ALONE, _AUTODIFF_ALONE = "rule", "rule on each sample", "autodiff on each sample"


@dataclass(frozen=True)
class Recording:
    """One forward pass, ready to be asked for captures."""

    _space: ParameterSpace
    _graph: Graph
    _layouts: tuple[Layout, ...]
    _rest: Rest
    _where: str
    _differentiable: bool

    @property
    def outputs(self) -> Float[Tensor, N * C]:
        """The model's outputs; detached, unless the pass was to be differentiable."""
        outputs = self._graph.outputs
        return (outputs if self._differentiable else outputs.detach()).reshape(-1, *self._graph.shape)

    def ends_in(self, terms: Float[Tensor, "N R E"]) -> bool:
        """Whether what is chosen is one linear layer, whose output at each position is one of these terms."""
        if not self._graph.direct or len(self._graph.uses) != 1 or self._rest is not _nothing:
            return False
        (use,) = self._graph.uses
        if {*use.names} != {*self._space.names} or not isinstance(use.rule, Matrix):
            return False
        event = use.shape[-1] == terms.shape[-1]
        return event and torch.equal(terms.flatten(), self._graph.outputs.detach().flatten())

    def streamed(self, columns: Float[Tensor, "V N *C"], *, first: bool = True) -> Iterator[Captures]:
        """The same as `captures`, some columns at a time: as many as stay in cache on their way to a sum.

        Where samples are run alone, they are run for all columns at once.
        """
        at_once = self._graph.columns_at_once if self._rest is _nothing else len(columns)
        for index, some in enumerate(columns.split(at_once)):
            yield self.captures(some, first=first and index == 0)

    def captures(self, columns: Float[Tensor, "V N *C"], *, first: bool = True) -> Captures:
        """The rows ``column^T J`` of every sample and column; unit columns give the Jacobian itself.

        Args:
            columns: one cotangent of the outputs for each row.
            first: whether these are the first columns that are asked of this batch.

        Raises:
            OutputError: if a gradient is not finite, naming a parameter of the layer.
            CouplingError: if samples that are run alone turn out to have influenced each other.
        """
        n_samples = len(self._graph.outputs)
        columns = columns.reshape(len(columns), *self._graph.outputs.shape)
        with torch.set_grad_enabled(self._differentiable):
            blocks = tuple(self._blocks(self._by_rule(columns), self._rest(columns), columns))
        return Captures(n_samples, blocks, first)

    def _by_rule(self, columns: Float[Tensor, "V N C"]) -> dict[str, list[Block]]:
        """The blocks of each use that a layer rule serves, by parameter."""
        n_samples = columns.shape[1]
        parts: dict[str, list[Block]] = {name: [] for name in self._space.names}
        gradients = self._graph.gradients(columns, differentiable=self._differentiable)
        for use, layout, gradient in zip(self._graph.uses, self._layouts, gradients, strict=True):
            check_finite("gradient", gradient, use, self._where)
            for name, piece in named_pieces(use, gradient):
                left = _occupied(layout.split(piece.left, n_samples, 1).movedim(0, 1))
                if isinstance(piece.compact, Patches) and (
                    layout != SINGLE or len(piece.compact.images) != n_samples
                ):
                    piece = piece.without_patches()
                compact = piece.compact
                if isinstance(compact, OneHot):
                    compact = _by_sample(compact, layout, n_samples)
                right = piece.right
                if right is not None:
                    right = _occupied(layout.split(right, n_samples, 0))
                    right = right if self._differentiable else right.detach()
                elif compact is None and left.shape[2] > 1:
                    left = left.sum(2, keepdim=True)
                start = self._space.spans[name].start + piece.start
                parts[name].append(Block(name, start, left, right, piece.transposed, compact=compact))
        return parts

    def _blocks(
        self, parts: Mapping[str, list[Block]], rest: Mapping[str, list[Block]], columns: Tensor
    ) -> Iterator[Block]:
        for name, shape in zip(self._space.names, self._space.shapes, strict=True):
            if name in rest:
                yield from rest[name]
            elif not parts[name]:
                yield _zero_block(name, self._space.spans[name].start, shape, columns)
            for start in sorted({block.start for block in parts[name]}):
                yield merged(name, start, (block for block in parts[name] if block.start == start))


class Recorder:
    """Runs a model in evaluation mode and records how the chosen parameters are used.

    The model comes back as it was, whatever happens. The first batch is checked: no random numbers drawn,
    every use captured, samples independent, outputs the same again; a later batch is checked again if the forward
    pass takes another course.

    A parameter with a use that no rule covers is served by autodiff of each sample alone, in all batches to come; one
    that samples share (a position embedding), by its rule on each sample alone. `served` tells which.

    Args:
        model: maps an input to outputs ``(N, ...)``.
        space: the chosen parameters.
        fallback: whether to serve what no rule captures from a whole batch; if not, it is refused by name.
        feature_reduction: how the model reduces the positions of its last layer to one; see `reduction`.

    Attributes:
        output_shape: of the outputs of one sample of the last input; None before the first.
    """

    def __init__(
        self,
        model: nn.Module,
        space: ParameterSpace,
        *,
        fallback: bool = True,
        feature_reduction: str | None = None,
    ) -> None:
        self.model, self.space, self.fallback = model, space, fallback
        self.feature_reduction = feature_reduction
        self._verified: set[tuple[object, ...]] = set()
        self._layouts: dict[tuple[Signature, Course, Possibilities], tuple[Layout, ...]] = {}
        self._unserved: dict[str, str] = {}
        self._shared: set[str] = set()
        self._alone: Recorder | None = None
        self._partial = False
        self.output_shape: tuple[int, ...] | None = None

    @property
    def served(self) -> dict[str, str]:
        """How each parameter is served as far as is known from the inputs seen, by name.

        ``"rule"``, ``"rule on each sample"`` or ``"autodiff on each sample"``; empty before the first input.
        """
        if not self._verified:
            return {}
        own = dict.fromkeys(self.space.names, _RULE) | dict.fromkeys(self._shared, _RULE_ALONE)
        own |= dict.fromkeys(self._unserved, _AUTODIFF_ALONE)
        alone = {} if self._alone is None else self._alone.served
        return own | {name: _RULE_ALONE if how == _RULE else how for name, how in alone.items()}

    def __call__(self, x: Any, where: str = "the input", *, differentiable: bool = False) -> Recording:
        """One forward pass.

        Args:
            x: what the model takes.
            where: what to call this input in error messages.
            differentiable: whether outputs and captures have gradients with respect to `x`.

        Raises:
            DataError: if x holds no sample, or has a dtype that the model does not take.
            OutputError: if the outputs are not finite, or not of shape ``(N, ...)``.
            UnsupportedUseError: if a chosen parameter is used in a way that no layer rule covers, and there is no
                fallback, or none for this use.
            CouplingError: if samples influence each other.
            StochasticModelError: if the model draws random numbers, or its outputs differ from pass to pass.
            ModifiedInputError: if a layer's input is changed in place after its use.
        """
        x = prepared(self.model, x, where)
        if not differentiable:
            x = map_tensors(torch.detach, x)
        originals = {name: self.model.get_parameter(name) for name in self.space.names}
        with capturing(self.model, originals.values()) as device:
            leaves = {name: p.detach().requires_grad_() for name, p in originals.items()}
            attention = attention_by_matrix_products() if differentiable else nullcontext()
            with nothing_drawn(device, where), attention, Interceptor(leaves) as interceptor:
                outputs = forward(self.model, leaves, x, where)
            outputs = checked_outputs(outputs, where)
            if not self._partial:
                check_dependent(outputs, where)
            rows = outputs.reshape(len(outputs), -1)
            names = {id(t): name for tensors in (leaves, originals) for name, t in tensors.items()}
            uses, course = interceptor.uses, Course.of(rows, names, tensors_of(x))
            direct = len(uses) == 1 and uses[0].edge == get_gradient_edge(outputs)
            if self.feature_reduction is not None:
                uses, direct = (reduced(uses, outputs, self.feature_reduction, where),), True
            graph = Graph(leaves, uses, rows, outputs.shape[1:], course, direct)
            question = (
                graph.signature,
                graph.course.steps,
                frozenset(interceptor.unserved),
                len(graph.outputs) > 1,
            )
            new = question not in self._verified
            self._leave_out(interceptor.unserved)
            graph = graph.without(self._unserved)
            graph.check_untouched()
            for use in graph.uses:
                check_finite("input", use.call.input.detach(), use, where)
            if new:
                self._leave_out(incomplete(graph, originals, self._unserved))
                graph = graph.without(self._unserved)
            graph, layouts = self._placed(graph, x, where, new=new)
            rest = self._rest(graph, originals, x, where, differentiable)
            recording = Recording(self.space, graph, layouts, rest, where, differentiable)
            if new and differentiable:
                blocks = recording.captures(torch.ones_like(graph.outputs)[None]).blocks
                inputs = [t for t in tensors_of(x) if t.requires_grad]
                check_differentiable(graph.outputs, _factors(blocks), inputs, where)
            if new:
                self._verified.add(question)
            self.output_shape = tuple(graph.shape)
            return recording

    def n_samples(self, x: Any, where: str = "the input") -> int:
        """N, by a forward pass of which nothing is recorded.

        Raises:
            DataError, OutputError: as a call does.
        """
        x = prepared(self.model, x, where)
        with capturing(self.model, ()), torch.no_grad():
            return len(checked_outputs(forward(self.model, {}, x, where), where))

    def _of_samples(self, names: Sequence[str]) -> Recorder:
        """A recorder of some parameters, of which a sample need not use any, though the batch does."""
        shapes = dict(zip(self.space.names, self.space.shapes, strict=True))
        recorder = Recorder(self.model, ParameterSpace(tuple(names), tuple(shapes[name] for name in names)))
        recorder._partial = True
        return recorder

    def _leave_out(self, reasons: Mapping[str, str]) -> None:
        """Parameters that no rule serves."""
        if reasons and not self.fallback:
            raise UnsupportedUseError(*next(iter(reasons.items())))
        self._unserved = {**reasons, **self._unserved}

    def _placed(self, graph: Graph, x: Any, where: str, *, new: bool) -> tuple[Graph, tuple[Layout, ...]]:
        """The uses by rule, and their layouts; samples are found independent on the way.

        A use without a layout is one that samples share, or through which they influence each other. Which of the two
        is for the outputs to say: they change with other samples only in the latter case.
        """
        if len(graph.outputs) == 1:
            if new:
                self._check_function(graph, x, where)
            return graph, (SINGLE,) * len(graph.uses)
        graph = graph.without(self._shared)
        layouts = self._layouts_of(graph)
        lost = [
            name
            for use, layout in zip(graph.uses, layouts, strict=True)
            if layout is None
            for name in use.names
        ]
        try:
            if lost and not (self.fallback and can_be_cut(x, len(graph.outputs))):
                raise coupling_at(lost[0])
            if new:
                self._check_function(graph, x, where)
        except CouplingError:
            if not lost:
                raise
            raise coupling_at(lost[0]) from None
        if lost:
            self._shared.update(lost)
            graph = graph.without(self._shared)
            layouts = self._layouts_of(graph)
        return graph, tuple(layout for layout in layouts if layout is not None)

    def _check_function(self, graph: Graph, x: Any, where: str) -> None:
        """Whether the outputs are a function of each sample's input alone."""

        def run(x: Any) -> Tensor:
            outputs = checked_outputs(forward(self.model, graph.leaves, x, where), where).detach()
            return outputs.reshape(len(outputs), -1)

        check_repeatable(graph.outputs, run(x))
        if len(graph.outputs) > 1 and can_be_cut(x, len(graph.outputs)):
            check_independent(run, x, graph.outputs)

    def _layouts_of(self, graph: Graph) -> tuple[Layout | None, ...]:
        # One position per sample allows fewer layouts than several: an answer holds where the question is the same.
        question = graph.signature, graph.course, possible_layouts(graph)
        if question in self._layouts:
            return self._layouts[question]
        layouts, certain = find_layouts(graph)
        flattened = any(
            layout is not None and use.positions[layout.axis] > len(graph.outputs)
            for use, layout in zip(graph.uses, layouts, strict=True)
        )  # a sample's positions may be as many as its data say, and be summed by a matrix of them
        if certain and not flattened and not graph.course.placed_by_values:
            self._layouts[question] = tuple(layout for layout in layouts if layout is not None)
        return layouts

    def _rest(
        self, graph: Graph, originals: Mapping[str, Tensor], x: Any, where: str, differentiable: bool
    ) -> Rest:
        """What serves the parameters that the rules do not, in this batch."""
        n_samples = len(graph.outputs)
        left_out = {*self._unserved} if n_samples == 1 else {*self._unserved, *self._shared}
        names = [name for name in self.space.names if name in left_out]
        if not names:
            return _nothing
        if n_samples == 1 or not can_be_cut(x, n_samples):
            return Autodiff.of(self.space, graph, originals, names, where, differentiable)
        if self._alone is None or self._alone.space.names != tuple(names):
            self._alone = self._of_samples(names)
        copy = map_tensors(torch.clone, x)  # it is run again when columns come
        return SampleBySample(self.space, self._alone, copy, graph.outputs.detach(), where, differentiable)


def _nothing(columns: Tensor) -> Mapping[str, list[Block]]:
    return {}


def _factors(blocks: Iterable[Block]) -> Iterator[Tensor]:
    for block in blocks:
        yield block.left
        if block.right is not None:
            yield block.right


def _occupied(tensor: Tensor) -> Tensor:
    """With an axis of positions (the last but one) that is not empty: no position says what one of zeros says."""
    return tensor if tensor.shape[-2] else tensor.new_zeros(*tensor.shape[:-2], 1, tensor.shape[-1])


def _by_sample(inputs: OneHot, layout: Layout, n_samples: int) -> OneHot:
    """The inputs as ``(N, S)``, with a position as in `_occupied`."""
    index = layout.split(inputs.index.unsqueeze(-1), n_samples, 0).squeeze(-1)
    return OneHot(index, inputs.size).padded(max(1, index.shape[1]))


def _zero_block(name: str, start: int, shape: torch.Size, columns: Tensor) -> Block:
    """A parameter without influence on these outputs."""
    n_columns, n_samples, _ = columns.shape
    zero = columns.new_zeros(())
    left = zero.expand(n_samples, n_columns, 1, shape[0] if shape else 1)
    if len(shape) < 2:
        return Block(name, start, left, None)
    return Block(name, start, left, zero.expand(n_samples, 1, math.prod(shape[1:])))
