"""What is verified on the first batch: outputs are a function of the input, and samples do not influence each other."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from curvlin.numerics.repeats import distinct
from curvlin_nn.capture.graph import Graph
from curvlin_nn.capture.inputs import select_samples
from curvlin_nn.capture.intercept import Use
from curvlin_nn.capture.layout import Layout, candidates
from curvlin_nn.errors import CouplingError, OutputError, StochasticModelError

WATCHED = 16
"""The number of samples of which every pair is tried."""

ALONE = 4
"""The number of samples that are run alone."""

RADIX = 17
"""Powers of two from 2^-8 to 2^8 tell that many samples apart at once."""

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


def check_finite(what: str, tensor: Tensor, use: Use, where: str) -> None:
    """Whether the gradient of a layer's output, or the layer's input, is finite.

    Raises:
        OutputError: naming a parameter of the layer.
    """
    # A sum that is finite says that all terms are, at the cost of one pass and no mask; one that is not may overflow.
    tensor = distinct(tensor)
    if not math.isfinite(tensor.sum().item()) and not bool(torch.isfinite(tensor).all()):
        raise OutputError(
            f"the {what} of the layer with parameter {use.names[0]!r} on {where} must be finite, found NaN or Inf"
        )


def possible_layouts(graph: Graph) -> Possibilities:
    """For every use, the layouts that its positions and the number of samples allow."""
    n_samples = len(graph.outputs)
    return tuple(tuple(candidates(use.positions, n_samples)) for use in graph.uses)


def find_layouts(graph: Graph) -> tuple[tuple[Layout | None, ...], bool]:
    """The layout of every use, by probing with cotangents that tell samples apart.

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
    everywhere = _by_position(graph, weights.expand(n_samples, n_outputs))
    options = _proportional(graph, weights, everywhere)
    if not all(options):
        options = _separated(graph, weights, everywhere)
    layouts = tuple(layouts[0] if layouts else None for layouts in options)
    return layouts, all(len(layouts) == 1 for layouts in options)


def _proportional(graph: Graph, weights: Tensor, everywhere: list[Tensor]) -> list[list[Layout]]:
    """The layouts in which a sample's positions follow the scale of its cotangent, to the bit.

    A backward pass is linear, and a power of two is not rounded: where samples do not meet, a probe that gives each a
    power of its own multiplies the gradients at its positions by just that. A few probes tell all samples apart.
    Rounding that depends on other samples, or underflow, may break this where nothing is wrong.
    """
    n_samples = len(graph.outputs)
    options = [list(layouts) for layouts in possible_layouts(graph)]
    for exponents in _distinct_digits(n_samples):
        scale = torch.pow(2.0, exponents).to(graph.outputs)
        for i, found in enumerate(_by_position(graph, scale[:, None] * weights)):
            options[i] = [
                layout
                for layout in options[i]
                if torch.equal(found, everywhere[i] * scale[_owner(layout, found, n_samples)].unsqueeze(-1))
            ]
    return options


def _separated(graph: Graph, weights: Tensor, everywhere: list[Tensor]) -> list[list[Layout]]:
    """The layouts in which a cotangent of some samples reaches their positions and no others."""
    n_samples = len(graph.outputs)
    reached = [(gradient != 0).any(dim=-1) for gradient in everywhere]
    options = [list(layouts) for layouts in possible_layouts(graph)]
    for members in separating_sets(n_samples).to(graph.outputs.device):
        for i, gradient in enumerate(_by_position(graph, members[:, None] * weights)):
            found = (gradient != 0).any(dim=-1)
            options[i] = [
                layout
                for layout in options[i]
                if torch.equal(found, reached[i] & members[_owner(layout, gradient, n_samples)])
            ]
    return options


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

    Each half of the batch is kept while the other is not; and among the first samples, alone, each is kept while any
    given other one is not. Gradients, which `find_layouts` looks at, know only what happens behind the chosen
    parameters. Some samples are run alone as well: what a model decides by a sum or a maximum over the batch may be the
    same for most mixtures of its samples. A model that cannot be run on one sample is not asked.

    Raises:
        CouplingError: if an output moves.
    """
    n_samples = len(outputs)

    def check(kept: Tensor) -> None:
        """Whether these stay, of as many first samples as there are entries, where each other is its neighbour."""
        own = torch.arange(len(kept), device=kept.device)
        mixed = run(select_samples(x, torch.where(kept, own, own.roll(1)), n_samples))
        expected = outputs[: len(kept)]
        if mixed.shape != expected.shape or not close(expected[kept], mixed[kept]):
            raise CouplingError(
                f"the output for one sample changes when other samples of the batch do, {_EXPECTED_INDEPENDENT}"
            )

    if n_samples > WATCHED:
        first_half = torch.arange(n_samples, device=outputs.device) < n_samples // 2
        check(first_half)
        check(~first_half)
    for kept in separating_sets(min(n_samples, WATCHED)).to(outputs.device):
        check(kept)
    for n in range(0, n_samples, -(-n_samples // ALONE)):
        alone = _if_it_runs(run, select_samples(x, slice(n, n + 1), n_samples))
        if alone is not None and alone.shape == outputs[n : n + 1].shape and not close(outputs[n], alone[0]):
            raise CouplingError(
                f"the output for one sample changes when it is the only one of a batch, {_EXPECTED_INDEPENDENT}"
            )


def _if_it_runs(run: Callable[[Any], Tensor], x: Any) -> Tensor | None:
    try:
        return run(x)
    except Exception:
        return None  # it squeezes its axes, or holds a constant of the size of the batch


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


def _by_position(graph: Graph, cotangent: Tensor) -> list[Tensor]:
    """For each use, the gradient at each position, features last."""
    gradients = zip(graph.uses, graph.gradients(cotangent[None]), strict=True)
    return [use.rule.by_position(use.call, gradient)[0] for use, gradient in gradients]


def _distinct_digits(n_samples: int) -> Iterator[Tensor]:
    """Few vectors of small integers, such that any two samples differ in one."""
    left = torch.arange(n_samples)
    while True:
        yield left % RADIX - RADIX // 2
        left = left // RADIX
        if not left.any():
            return


def _owner(layout: Layout, by_position: Tensor, n_samples: int) -> Tensor:
    return layout.owner(tuple(by_position.shape[:-1]), n_samples).to(by_position.device)
