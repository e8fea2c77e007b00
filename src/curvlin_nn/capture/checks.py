"""What is verified on the first batch: outputs are a function of the input, and samples do not influence each other."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from curvlin_nn.capture.graph import Graph
from curvlin_nn.capture.inputs import map_tensors
from curvlin_nn.capture.intercept import Use
from curvlin_nn.capture.layout import Layout, candidates
from curvlin_nn.errors import CouplingError, OutputError, StochasticModelError

Possibilities = tuple[tuple[Layout, ...], ...]
"""Layouts by use: what a probe has to choose between."""

_EXPECTED_INDEPENDENT = (
    "expected independent samples along axis 0 of the outputs "
    "(is a normalisation using statistics of the batch?)"
)


def checked_outputs(outputs: Any, where: str) -> Tensor:
    """What a model returned on `where`, if it is a finite tensor with samples along axis 0.

    Raises:
        OutputError: if it is not.
    """
    if not isinstance(outputs, Tensor):
        raise OutputError(
            f"model outputs on {where} must be a tensor (N, ...), or have one under 'logits', found "
            f"{type(outputs).__name__}"
        )
    if outputs.ndim == 0 or 0 in outputs.shape:
        raise OutputError(
            f"model outputs on {where} must have shape (N, ...) with at least one output for each sample, found "
            f"{tuple(outputs.shape)}; wrap the model so that it returns one row of outputs per sample"
        )
    if not bool(torch.isfinite(outputs).all()):
        raise OutputError(f"model outputs on {where} must be finite, found NaN or Inf")
    return outputs


def check_dependent(outputs: Tensor, where: str) -> None:
    """Whether the outputs have a graph.

    Raises:
        OutputError: if they have none.
    """
    if not outputs.requires_grad:
        raise OutputError(f"model outputs on {where} depend on none of the chosen parameters")


def check_gradient(gradient: Tensor, use: Use, where: str) -> None:
    """Whether the gradient of a layer's output, and the layer's input, are finite.

    Raises:
        OutputError: naming a parameter of the layer.
    """
    # A sum that is finite says that all terms are, at the cost of one pass and no mask; one that is not may overflow.
    for what, tensor in (("gradient", gradient), ("input", use.call.input)):
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor.detach().sum())):
            if bool(torch.isfinite(tensor.detach()).all()):
                continue
            raise OutputError(
                f"the {what} of the layer with parameter {use.names[0]!r} on {where} must be finite, found NaN or Inf"
            )


def possible_layouts(graph: Graph) -> Possibilities:
    """For every use, the layouts that its positions and the number of samples allow."""
    n_samples = len(graph.outputs)
    return tuple(tuple(candidates(use.positions, n_samples)) for use in graph.uses)


def find_layouts(graph: Graph) -> tuple[tuple[Layout | None, ...], bool]:
    """The layout of every use, by probing with cotangents of some samples.

    Each probe must reach the positions of its samples, and no others, among those that a cotangent of all samples
    reaches. As the probes separate any two samples, layouts that agree with all of them differ at most where nothing
    reaches, and one sample's positions cannot influence another's output unnoticed.

    Returns:
        The layouts, None where samples share positions or stand in another way; and whether they are the only possible
        ones. Where they are not, they differ at positions that nothing reaches, so that any choice is right for this
        batch, but not necessarily for the next.
    """
    n_samples, n_outputs = graph.outputs.shape
    weights = 1 + torch.arange(n_outputs).to(graph.outputs).cos() / 2  # no output goes unnoticed
    everywhere = _reached(graph, weights.expand(n_samples, n_outputs))
    options = [list(layouts) for layouts in possible_layouts(graph)]
    for members in separating_sets(n_samples).to(graph.outputs.device):
        probe = _reached(graph, members[:, None] * weights)
        for i, reached in enumerate(probe):
            options[i] = [
                layout
                for layout in options[i]
                if torch.equal(reached, everywhere[i] & members[_owner(layout, reached, n_samples)])
            ]
    layouts = tuple(layouts[0] if layouts else None for layouts in options)
    return layouts, all(len(layouts) == 1 for layouts in options)


def coupling_at(parameter: str) -> CouplingError:
    """What to raise where one sample's positions at a parameter influence another's output."""
    return CouplingError(
        f"the output for one sample depends on other samples at parameter {parameter!r}, {_EXPECTED_INDEPENDENT}"
    )


def check_repeatable(outputs: Tensor, again: Tensor) -> None:
    """The same input must give the same outputs: not all random numbers come from torch's default generators.

    Raises:
        StochasticModelError: if it does not.
    """
    if not close(outputs, again):
        raise StochasticModelError(
            "the model's outputs differ between two passes over one input, expected the same each time in evaluation "
            "mode; does it draw random numbers, or keep something from one call to the next?"
        )


def check_independent(run: Callable[[Any], Tensor], x: Any, outputs: Tensor) -> None:
    """A sample's outputs must stay when other samples take other values: those of their neighbours in the batch.

    Which samples are kept is chosen such that each sample is kept while any given other one is not. Gradients, which
    `find_layouts` looks at, know only what happens behind the chosen parameters.

    Raises:
        CouplingError: if an output moves.
    """
    n_samples = len(outputs)

    def mix(t: Tensor, kept: Tensor) -> Tensor:
        if t.shape[:1] != (n_samples,):
            return t
        return torch.where(kept.reshape(-1, *(1,) * (t.ndim - 1)), t, t.roll(1, dims=0))

    for kept in separating_sets(n_samples).to(outputs.device):
        mixed = run(map_tensors(functools.partial(mix, kept=kept), x))
        if mixed.shape != outputs.shape or not close(outputs[kept], mixed[kept]):
            raise CouplingError(
                f"the output for one sample changes when other samples of the batch do, {_EXPECTED_INDEPENDENT}"
            )


def separating_sets(n_samples: int) -> Bool[Tensor, "M N"]:
    """Few sets of samples; for any two samples, each is in one of the sets that the other is not in.

    Sample i is in the M // 2 sets of the i-th such choice: none contains another (Sperner, 1928), and there are enough
    of them for ``M = log2 N + O(log log N)``.
    """
    n_sets = next(m for m in itertools.count(1) if math.comb(m, m // 2) >= n_samples)
    choices = itertools.islice(itertools.combinations(range(n_sets), n_sets // 2), n_samples)
    return torch.zeros(n_samples, n_sets, dtype=torch.bool).scatter(1, torch.tensor(list(choices)), True).mT


def close(outputs: Tensor, others: Tensor) -> bool:
    """Equal but for rounding, which may depend on how a model groups its samples."""
    gap = (outputs - others).detach().abs().max()
    return bool(gap <= torch.finfo(outputs.dtype).eps ** 0.5 * outputs.detach().abs().max())


def _reached(graph: Graph, cotangent: Tensor) -> list[Tensor]:
    """For each use, the positions at which the gradient is not zero."""
    gradients = zip(graph.uses, graph.gradients(cotangent[None]), strict=True)
    return [(use.rule.by_position(use.call, gradient)[0] != 0).any(dim=-1) for use, gradient in gradients]


def _owner(layout: Layout, positions: Tensor, n_samples: int) -> Tensor:
    return layout.owner(tuple(positions.shape), n_samples).to(positions.device)
