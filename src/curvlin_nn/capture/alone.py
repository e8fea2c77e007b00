"""What no rule captures from a whole batch, exactly: by autodiff, and from each sample alone.

autodiff    the gradient of one output cotangent with respect to the parameter itself: a row of its Jacobian
alone       a forward pass on one sample, on which the rules serve what samples share (a position embedding), and
            autodiff serves the rest, at the cost of N passes on one sample
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from curvlin_nn.capture.blocks import Block, joined
from curvlin_nn.capture.checks import close
from curvlin_nn.capture.graph import Graph
from curvlin_nn.capture.inputs import select_samples
from curvlin_nn.errors import CouplingError, OutputError
from curvlin_nn.parameters import ParameterSpace

if TYPE_CHECKING:
    from curvlin_nn.capture.recorder import Recorder

Rest = Callable[[Float[Tensor, "V N C"]], Mapping[str, list[Block]]]
"""For columns, the blocks of the parameters that no rule captures from the whole batch."""


@dataclass(frozen=True)
class Autodiff:
    """Rows by autodiff on the graph of the batch: one backward pass for every sample and column.

    Attributes:
        space: all chosen parameters.
        graph: the forward pass.
        edges: for each parameter to serve, the places in the graph of the leaf and of the model's own tensor, of which
            a module may keep a reference. Its Jacobian is the sum of both.
        where: what to call this input in error messages.
        differentiable: whether the rows have a graph of their own.
    """

    space: ParameterSpace
    graph: Graph
    edges: Mapping[str, tuple[GradientEdge, GradientEdge]]
    where: str
    differentiable: bool

    @classmethod
    def of(
        cls,
        space: ParameterSpace,
        graph: Graph,
        originals: Mapping[str, Tensor],
        names: Sequence[str],
        where: str,
        differentiable: bool,
    ) -> Autodiff:
        """The rows of some parameters; while all tensors require gradients."""
        edges = {
            name: (get_gradient_edge(graph.leaves[name]), get_gradient_edge(originals[name]))
            for name in names
        }
        return cls(space, graph, edges, where, differentiable)

    def __call__(self, columns: Float[Tensor, "V N C"]) -> dict[str, list[Block]]:
        """The blocks, one for each parameter: rows that are multiplied out."""
        outputs = self.graph.outputs
        n_columns, n_samples, _ = columns.shape
        rows = {
            name: columns.new_zeros(n_samples, n_columns, 1, len(self.space.spans[name]))
            for name in self.edges
        }
        edges = [edge for pair in self.edges.values() for edge in pair]
        for n in range(n_samples if outputs.requires_grad else 0):
            with torch.enable_grad():
                output = outputs[n]
            for v, column in enumerate(columns[:, n]):
                found = iter(
                    torch.autograd.grad(
                        output,
                        edges,
                        column,
                        retain_graph=True,
                        create_graph=self.differentiable,
                        allow_unused=True,
                    )
                )
                for name in self.edges:
                    for gradient in (next(found), next(found)):
                        if gradient is not None:
                            rows[name][n, v, 0] += gradient.flatten()
        for name, left in rows.items():
            if not bool(torch.isfinite(left).all()):
                raise OutputError(
                    f"the gradient of parameter {name!r} on {self.where} must be finite, found NaN or Inf"
                )
        return {name: [Block(name, self.space.spans[name].start, left, None)] for name, left in rows.items()}


@dataclass(frozen=True)
class SampleBySample:
    """Blocks from a forward pass on each sample alone.

    Attributes:
        space: all chosen parameters.
        recorder: records those that are served in this way.
        x: the input.
        outputs: what the model makes of the whole batch.
        where: what to call this input in error messages.
        differentiable: whether the blocks have gradients with respect to `x`.
    """

    space: ParameterSpace
    recorder: Recorder
    x: Any
    outputs: Float[Tensor, "N C"]
    where: str
    differentiable: bool

    def __call__(self, columns: Float[Tensor, "V N C"]) -> dict[str, list[Block]]:
        """The blocks.

        Raises:
            CouplingError: if the outputs for a sample alone are not those in the batch.
        """
        names = self.recorder.space.names
        by_sample: dict[str, list[list[Block]]] = {name: [] for name in names}
        for n in range(len(self.outputs)):
            x = select_samples(self.x, slice(n, n + 1), len(self.outputs))
            where = f"sample {n} of {self.where}"
            recording = self.recorder(x, where, differentiable=self.differentiable)
            alone = recording.outputs.detach().reshape(len(recording.outputs), -1)
            if alone.shape != self.outputs[n : n + 1].shape or not close(self.outputs[n], alone[0]):
                raise CouplingError(
                    f"the outputs for sample {n} of {self.where} are others when the model is given this sample alone, "
                    "expected samples along axis 0 of the inputs that do not depend on each other (for parameter "
                    f"{names[0]!r}, which no layer rule serves)"
                )
            blocks = recording.captures(columns[:, n : n + 1]).parts
            for name in names:
                by_sample[name].append([block for block in blocks if block.parameter == name])
        offsets = {
            name: self.space.spans[name].start - self.recorder.space.spans[name].start for name in names
        }
        return {
            name: [block.moved(offsets[name]) for block in joined(name, of_samples)]
            for name, of_samples in by_sample.items()
        }
