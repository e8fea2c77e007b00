"""The layer that a surrogate ends in, and its regression on features that are known."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from curvlin_nn.capture.inputs import called


class WidenedHead(nn.Module):
    """A layer with K features in the place of each output: linear in its inputs, and in hidden units made of them.

    Args:
        in_features: H, of the layer that it is put in the place of.
        out_features: of that layer.
        rank: K.
        n_hidden: the number of hidden units; none for a linear layer.
        kind: dtype and device.
    """

    def __init__(
        self, in_features: int, out_features: int, rank: int, n_hidden: int = 0, **kind: Any
    ) -> None:
        super().__init__()
        self.rank = rank
        self.hidden = nn.Linear(in_features, n_hidden, **kind) if n_hidden else None
        self.linear = nn.Linear(in_features + n_hidden, out_features * rank, **kind)

    def forward(self, h: Tensor) -> Tensor:
        """``(N, *T, H) -> (N, C, K)``, the outputs of all positions side by side."""
        return self.linear(self.inputs(h)).unflatten(-1, (-1, self.rank)).flatten(1, -2)

    def inputs(self, h: Tensor) -> Tensor:
        """What the features are linear in."""
        return h if self.hidden is None else torch.cat([h, self.hidden(h).relu()], -1)


def heads_of(network: nn.Module) -> list[WidenedHead]:
    """The heads of a network that `widened` made, whose features are added."""
    return [module for module in network.modules() if isinstance(module, WidenedHead)]


@torch.no_grad()
def solve_heads(
    network: nn.Module, batches: Iterable[tuple[Any, Float[Tensor, "N C K"], float]], ridge: float = 1e-3
) -> None:
    """Set the heads of a widened network to the ridge regression of features on all that these are linear in.

    Args:
        network: of `widened`.
        batches: inputs, the features that are wanted there, and the weight of their errors.
        ridge: relative to the mean square of the heads' inputs.
    """
    heads = heads_of(network)
    seen: dict[WidenedHead, Tensor] = {}
    hooks = [
        head.register_forward_pre_hook(lambda head, args: seen.update({head: args[0]})) for head in heads
    ]
    widths = [head.linear.in_features for head in heads]
    weight = heads[0].linear.weight
    gram = torch.zeros(sum(widths) + 1, sum(widths) + 1, dtype=torch.float64, device=weight.device)
    cross = torch.zeros(sum(widths) + 1, len(weight), dtype=torch.float64, device=weight.device)
    try:
        for x, wanted, batch_weight in batches:
            called(network, x)
            h = torch.cat([head.inputs(seen[head]) for head in heads], -1).double().flatten(0, -2)
            h = torch.cat([h, h.new_ones(len(h), 1)], 1)
            weighted = batch_weight**2 * h.mT
            gram += weighted @ h
            cross += weighted @ wanted.double().reshape(len(h), -1)
    finally:
        for hook in hooks:
            hook.remove()
    gram.diagonal().add_(ridge * gram.diagonal().mean())
    *slopes, intercept = torch.linalg.solve(gram, cross).to(weight.dtype).split([*widths, 1])
    for head, slope in zip(heads, slopes, strict=True):
        head.linear.weight.copy_(slope.mT)
        head.linear.bias.zero_()
    heads[0].linear.bias.copy_(intercept[0])
