"""What is verified on the first batch: every use is captured, and samples do not influence each other."""

from __future__ import annotations

import torch
from torch import Tensor

from curvlin_nn.capture.graph import Graph, named_pieces
from curvlin_nn.capture.layout import Layout, candidates, reaches_only
from curvlin_nn.errors import CouplingError, UnsupportedUseError


def check_complete(graph: Graph) -> None:
    """Captures summed over the batch must equal what autograd says about each parameter.

    Raises:
        UnsupportedUseError: naming the parameter whose uses were not all captured.
    """
    generator = torch.Generator().manual_seed(0)
    cotangent = torch.randn(graph.outputs.shape, generator=generator).to(graph.outputs)
    expected = torch.autograd.grad(
        graph.outputs, list(graph.leaves.values()), cotangent, retain_graph=True, allow_unused=True
    )
    captured = {name: torch.zeros_like(leaf).flatten() for name, leaf in graph.leaves.items()}
    magnitude = {name: 0.0 for name in graph.leaves}  # of the terms, which may cancel in the sum
    for use, gradient in zip(graph.uses, graph.gradients(cotangent[None]), strict=True):
        for name, piece in named_pieces(use, gradient):
            part = _total(piece.left, piece.right)
            captured[name][piece.start : piece.start + len(part)] += part
            magnitude[name] += float(_total(piece.left.abs(), _abs(piece.right)).max())
    tolerance = torch.finfo(cotangent.dtype).eps ** 0.5
    for name, truth in zip(graph.leaves, expected, strict=True):
        total = torch.zeros_like(captured[name]) if truth is None else truth.flatten()
        gap, scale = (captured[name] - total).abs().max(), total.abs().max() + magnitude[name]
        if not bool(gap <= tolerance * scale):
            raise UnsupportedUseError(
                name, "influences the outputs through an operation that was not captured"
            )


def find_layouts(graph: Graph) -> tuple[tuple[Layout, ...], bool]:
    """The layout of every use, by probing with cotangents of one sample.

    Returns:
        The layouts, and whether they are the only possible ones. Where they are not, every probe left the
        positions in doubt at zero, so that any choice is right for this batch, but not necessarily for the
        next.

    Raises:
        CouplingError: if a sample's output depends on other samples' positions.
    """
    n_samples = graph.outputs.shape[0]
    options: list[list[Layout]] = []
    for sample in _probing_order(n_samples):
        cotangent = torch.zeros_like(graph.outputs)
        cotangent[sample] = 1 + torch.arange(cotangent.shape[1]).to(cotangent).cos() / 2
        reached = [
            (use.rule.by_position(gradient)[0] != 0).any(dim=-1)
            for use, gradient in zip(graph.uses, graph.gradients(cotangent[None]), strict=True)
        ]
        options = options or [candidates(tuple(mask.shape), n_samples) for mask in reached]
        options = [
            [layout for layout in layouts if reaches_only(layout, mask, sample, n_samples)]
            for layouts, mask in zip(options, reached, strict=True)
        ]
        for use, layouts in zip(graph.uses, options, strict=True):
            if not layouts:
                raise CouplingError(
                    f"the output for one sample depends on other samples at parameter "
                    f"{next(iter(use.names.values()))!r}, expected independent samples along axis 0 of the "
                    "outputs (is a normalisation using statistics of the batch?)"
                )
        if all(len(layouts) == 1 for layouts in options):
            break
    return tuple(layouts[0] for layouts in options), all(len(layouts) == 1 for layouts in options)


def _probing_order(n_samples: int) -> list[int]:
    """The middle sample first: it tells layouts apart that agree at the ends."""
    return sorted(range(n_samples), key=lambda n: abs(n - n_samples // 2))


def _total(left: Tensor, right: Tensor | None) -> Tensor:
    """One column's outer products summed over all positions: a part of the parameter's gradient."""
    left = left[0].flatten(0, -2)
    if right is None:
        return left.sum(0)
    return (left.mT @ right.detach().flatten(0, -2)).flatten()


def _abs(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().abs()
