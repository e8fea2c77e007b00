"""What another package adds to curvlin: one structure, one layer rule, one likelihood."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from curvlin import Isotropic
from curvlin_nn.capture import Captures, LayerRule, Piece
from curvlin_nn.capture.rules import Call
from curvlin_nn.errors import DataError
from curvlin_nn.likelihoods import Likelihood
from curvlin_nn.parameters import ParameterSpace
from curvlin_nn.structures import Structure


class Trace(Structure):
    """``(tr H / P) I``."""

    name = "trace"

    def __init__(self, space: ParameterSpace) -> None:
        super().__init__(space)
        self.total = torch.zeros((), dtype=torch.float64)

    def update(self, captures: Captures) -> None:
        self.total = self.total + sum(block.rows().double().square().sum() for block in captures.blocks)

    def merge(self, other: Trace) -> None:
        self.total = self.total + other.total

    def finish(self) -> Isotropic:
        return Isotropic(self.total / self.space.size, self.space.size)


class _ScaledLinear(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor) -> Tensor:
        return 3.0 * x @ weight.mT

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return 3.0 * gradient @ weight, 3.0 * gradient.mT @ x

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, weight: Tensor) -> tuple[Tensor, int]:
        raise NotImplementedError


def scaled_linear(x: Tensor, weight: Tensor) -> Tensor:
    """``3 x W^T`` with a backward pass of its own; torch's function modes see the call."""
    if has_torch_function((x, weight)) or torch._C._is_torch_function_mode_enabled():
        with torch._C.DisableTorchFunctionSubclass():
            return handle_torch_function(scaled_linear, (x, weight), x, weight)
    return _ScaledLinear.apply(x, weight)


class ScaledLinearRule(LayerRule):
    functions = (scaled_linear,)
    batched_columns = False

    def bind(self, x: Tensor, weight: Tensor) -> Call:
        return Call(x, {"weight": weight})

    def pieces(self, call: Call, gradient: Tensor) -> Iterator[Piece]:
        yield Piece("weight", 0, 3.0 * gradient, call.input)


class PoissonCounts(Likelihood):
    """Counts with the log-rate as output; each output is a term."""

    name = "poisson_counts"
    event_ndim = 0

    def check(self, outputs: Tensor, targets: Tensor, where: str) -> Tensor:
        if targets.shape != outputs.shape or bool((targets < 0).any()):
            raise DataError(f"targets of {where} must be counts of the shape of the outputs")
        return self.terms(targets.to(outputs.dtype))

    def root(self, terms: Tensor, targets: Tensor) -> Tensor:
        return torch.exp(terms / 2)[..., None]

    def draw(self, terms: Tensor, targets: Tensor, n_draws: int, generator: torch.Generator | None) -> Tensor:
        return torch.poisson(terms.exp().expand(n_draws, *terms.shape), generator=generator)

    def score(self, terms: Tensor, targets: Tensor) -> Tensor:
        return terms.exp() - targets

    def log_prob(self, terms: Tensor, targets: Tensor) -> Tensor:
        return (targets * terms - terms.exp() - torch.lgamma(targets.double() + 1)).sum(-1)

    def link(self, outputs: Tensor) -> Tensor:
        return outputs.exp()
