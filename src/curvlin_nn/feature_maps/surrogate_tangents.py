"""What a model's last layer sees, and how it changes along a few directions in the space of weights.

Few directions make up most of a tangent kernel, and their features ``J v`` are the hardest to learn. They are linear in
the last layer's inputs h and in the tangents ``dh/dtheta v``, and so are, in large part, those of other directions that
change the same early layers. A tangent is the difference of h in two copies of the model, one with its weights a little
along v: passes forward, as a surrogate is meant to be, and no derivative.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from curvlin_nn.capture.inputs import called
from curvlin_nn.feature_maps.surrogate_head import WidenedHead


class Tangents(nn.Module):
    """Tangents of ``h(x)`` along directions of weights, each as large as h; they are not trained.

    Args:
        trunk: from inputs to h.
        n_directions: q; tangents are zero until `point` has been called.
    """

    scales: Tensor

    def __init__(self, trunk: nn.Module, n_directions: int) -> None:
        super().__init__()
        self.copies = nn.ModuleList(copy.deepcopy(trunk) for _ in range(n_directions + 1))
        self.requires_grad_(False)
        weight = next(self.copies.parameters())
        self.register_buffer("scales", torch.zeros(n_directions, dtype=weight.dtype, device=weight.device))

    def forward(self, x: Any) -> Float[Tensor, "N *T qH"]:
        """All of them side by side."""
        h, *moved = (called(trunk, x) for trunk in self.copies)
        return torch.cat([(m - h) * scale for m, scale in zip(moved, self.scales, strict=True)], -1)

    @torch.no_grad()
    def point(self, directions: Sequence[Mapping[str, Tensor]], x: Any) -> None:
        """Set the directions.

        Rounding and curvature are in balance where h changes by about the root of the resolution of its dtype. A
        direction that does not change h has a tangent of zero.

        Args:
            directions: unit vectors of parameters by their names in the model; those that h does not have are left out.
            x: inputs that tell how large changes are.
        """
        base, *others = self.copies
        h = called(base, x)
        resolution = torch.finfo(h.dtype).eps ** 0.5
        size = float(h.double().norm())
        weights = sum(float(p.double().square().sum()) for p in base.parameters()) ** 0.5
        self.scales.zero_()
        for k, (trunk, direction) in enumerate(zip(others, directions, strict=True)):
            step, change = resolution * weights, 0.0
            for _ in range(3):  # the first step is a guess
                for (name, p), start in zip(trunk.named_parameters(), base.parameters(), strict=True):
                    if name in direction:
                        p.copy_(start + step * direction[name].to(p))
                change = float((called(trunk, x) - h).double().norm())
                if change == 0:
                    break
                step *= resolution * size / change
            if change > 0:
                self.scales[k] = size / change


class WithTangents(nn.Module):
    """The features of a network, and those that are linear in tangents, added.

    Args:
        network: maps an input to ``(N, C, K)``.
        tangents: of the model.
        head: of them.
    """

    def __init__(self, network: nn.Module, tangents: Tangents, head: WidenedHead) -> None:
        super().__init__()
        self.network, self.tangents, self.head = network, tangents, head

    def forward(self, x: Any) -> Float[Tensor, "N C K"]:
        """The features; `x` is spread over the network's arguments as a model's input is."""
        features: Tensor = called(self.network, x) + self.head(self.tangents(x))
        return features
