"""What is verified on the first batch: every use is captured, and samples do not influence each other."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from curvlin_nn.capture.graph import Graph, named_pieces
from curvlin_nn.capture.inputs import map_tensors
from curvlin_nn.capture.intercept import Use
from curvlin_nn.capture.layout import Layout, candidates
from curvlin_nn.capture.rules import Piece
from curvlin_nn.errors import CouplingError, OutputError, StochasticModelError, UnsupportedUseError

Possibilities = tuple[tuple[Layout, ...], ...]
"""Layouts by use: what a probe has to choose between."""

_EXPECTED_INDEPENDENT = (
    "expected independent samples along axis 0 of the outputs "
    "(is a normalisation using statistics of the batch?)"
)


def checked_outputs(outputs: Any, where: str) -> Tensor:
    """What a model returned on `where`, if it is a finite tensor with samples along axis 0 and a graph.

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
    if not outputs.requires_grad:
        raise OutputError(f"model outputs on {where} depend on none of the chosen parameters")
    return outputs


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
            name = next(iter(use.names.values()))
            raise OutputError(
                f"the {what} of the layer with parameter {name!r} on {where} must be finite, found NaN or Inf"
            )


def check_complete(graph: Graph, originals: Mapping[str, Tensor]) -> None:
    """Captures summed over the batch must equal what autograd says about each parameter.

    Args:
        graph: the forward pass.
        originals: the model's own tensors, which the graph's leaves stood in for. None may have been reached, as
            happens where a module keeps a parameter in a list, a closure or a partial.

    Raises:
        UnsupportedUseError: naming the parameter whose uses were not all captured.
    """
    generator = torch.Generator().manual_seed(0)
    cotangent = torch.randn(graph.outputs.shape, generator=generator).to(graph.outputs)
    found = torch.autograd.grad(
        graph.outputs,
        [*graph.leaves.values(), *originals.values()],
        cotangent,
        retain_graph=True,
        allow_unused=True,
    )
    expected, bypassed = found[: len(graph.leaves)], found[len(graph.leaves) :]
    for name, gradient in zip(originals, bypassed, strict=True):
        if gradient is not None:
            raise UnsupportedUseError(
                name, "reaches the outputs past its module (is it kept in a list, a closure or a partial?)"
            )
    captured = {name: torch.zeros_like(leaf).flatten() for name, leaf in graph.leaves.items()}
    magnitude = {name: 0.0 for name in graph.leaves}  # of the terms, which may cancel in the sum
    for use, gradient in zip(graph.uses, graph.gradients(cotangent[None]), strict=True):
        for name, piece in named_pieces(use, gradient):
            part = _total(piece)
            captured[name][piece.start : piece.start + len(part)] += part
            magnitude[name] += float(
                _total(replace(piece, left=piece.left.abs(), right=_abs(piece.right))).max()
            )
    tolerance = torch.finfo(cotangent.dtype).eps ** 0.5
    for name, truth in zip(graph.leaves, expected, strict=True):
        total = torch.zeros_like(captured[name]) if truth is None else truth.flatten()
        gap, scale = (captured[name] - total).abs().max(), total.abs().max() + magnitude[name]
        if not bool(gap <= tolerance * scale):
            raise UnsupportedUseError(
                name, "influences the outputs through an operation that was not captured"
            )


def possible_layouts(graph: Graph) -> Possibilities:
    """For every use, the layouts that its positions and the number of samples allow."""
    n_samples = len(graph.outputs)
    return tuple(tuple(candidates(use.positions, n_samples)) for use in graph.uses)


def find_layouts(graph: Graph) -> tuple[tuple[Layout, ...], bool]:
    """The layout of every use, by probing with cotangents of some samples.

    Each probe must reach the positions of its samples, and no others, among those that a cotangent of all samples
    reaches. As the probes separate any two samples, layouts that agree with all of them differ at most where nothing
    reaches, and one sample's positions cannot influence another's output unnoticed.

    Returns:
        The layouts, and whether they are the only possible ones. Where they are not, they differ at positions
        that nothing reaches, so that any choice is right for this batch, but not necessarily for the next.

    Raises:
        CouplingError: if a sample's output depends on other samples' positions.
    """
    n_samples, n_outputs = graph.outputs.shape
    weights = 1 + torch.arange(n_outputs).to(graph.outputs).cos() / 2  # no output goes unnoticed
    everywhere = _reached(graph, weights.expand(n_samples, n_outputs))
    options = [list(layouts) for layouts in possible_layouts(graph)]
    for members in separating_sets(n_samples).to(graph.outputs.device):
        probe = _reached(graph, members[:, None] * weights)
        for i, (use, reached) in enumerate(zip(graph.uses, probe, strict=True)):
            options[i] = [
                layout
                for layout in options[i]
                if torch.equal(reached, everywhere[i] & members[_owner(layout, reached, n_samples)])
            ]
            if not options[i]:
                raise CouplingError(
                    f"the output for one sample depends on other samples at parameter "
                    f"{next(iter(use.names.values()))!r}, {_EXPECTED_INDEPENDENT}"
                )
    return tuple(layouts[0] for layouts in options), all(len(layouts) == 1 for layouts in options)


def check_repeatable(outputs: Tensor, again: Tensor) -> None:
    """The same input must give the same outputs: not all random numbers come from torch's default generators.

    Raises:
        StochasticModelError: if it does not.
    """
    if not _close(outputs, again):
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
        if mixed.shape != outputs.shape or not _close(outputs[kept], mixed[kept]):
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


def _close(outputs: Tensor, others: Tensor) -> bool:
    """Equal but for rounding, which may depend on how a model groups its samples."""
    gap = (outputs - others).detach().abs().max()
    return bool(gap <= torch.finfo(outputs.dtype).eps ** 0.5 * outputs.detach().abs().max())


def _reached(graph: Graph, cotangent: Tensor) -> list[Tensor]:
    """For each use, the positions at which the gradient is not zero."""
    gradients = zip(graph.uses, graph.gradients(cotangent[None]), strict=True)
    return [(use.rule.by_position(gradient)[0] != 0).any(dim=-1) for use, gradient in gradients]


def _owner(layout: Layout, positions: Tensor, n_samples: int) -> Tensor:
    return layout.owner(tuple(positions.shape), n_samples).to(positions.device)


def _total(piece: Piece) -> Tensor:
    """One column's outer products summed over all positions: a part of the parameter's gradient."""
    left = piece.left[0].flatten(0, -2)
    if piece.right is None:
        return left.sum(0)
    total = left.mT @ piece.right.detach().flatten(0, -2)
    return total.mT.flatten() if piece.transposed else total.flatten()


def _abs(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().abs()
