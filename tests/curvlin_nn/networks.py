"""Small networks and data in float64, shared by the tests."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from curvlin_nn import Laplace, structures

ADDITIVE = {
    "full": "full",
    "diag": "diag",
    "block": "block",
    "kron": "kron",
    "reduce": functools.partial(structures.Kronecker, approximation="reduce"),
    "joint bias": functools.partial(structures.Kronecker, joint_bias=True),
    "mixed": {"0": "full", "2*": "kron", "*": "diag"},
}
"""Structures of `mlp` whose sums over data, or over outputs, add."""


@dataclass(frozen=True)
class Problem:
    """A network with a few data."""

    model: nn.Module
    likelihood: str
    x: Tensor
    y: Tensor
    x_test: Tensor

    def batches(self, size: int = 3) -> list[tuple[Tensor, Tensor]]:
        return list(zip(self.x.split(size), self.y.split(size), strict=True))


def mlp(n_outputs: int = 3) -> nn.Module:
    """Two hidden layers, different activations."""
    return nn.Sequential(
        nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, n_outputs)
    ).double()


def cnn(n_outputs: int = 3) -> nn.Module:
    """Every option of a convolution, in three layers."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular"),
        nn.Tanh(),
        nn.Conv2d(4, 6, (2, 3), stride=(2, 1), dilation=(1, 2), padding=(1, 2), groups=2, bias=False),
        nn.ReLU(inplace=True),
        nn.Conv2d(6, 2, 2, padding="same", padding_mode="reflect"),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(32, n_outputs),
    ).double()


def problem(kind: str, likelihood: str, n: int = 8, n_outputs: int = 3) -> Problem:
    torch.manual_seed(7)
    model = mlp(n_outputs) if kind == "mlp" else cnn(n_outputs)
    shape = (4,) if kind == "mlp" else (2, 6, 4)
    x, x_test = torch.randn(n, *shape).double(), torch.randn(5, *shape).double()
    labels, targets = torch.randint(n_outputs, (n,)), torch.randn(n, n_outputs).double()
    return Problem(model, likelihood, x, labels if likelihood == "classification" else targets, x_test)


def fitted(structure: str = "kron", likelihood: str = "classification", **options: Any) -> Laplace:
    p = problem("mlp", likelihood)
    la = Laplace(p.model, likelihood, subset_of_weights="all", hessian_structure=structure, **options)
    return la.fit(p.batches())


class Sequences(nn.Module):
    """Samples along axis 0, along axis 1, and flattened both ways; one layer used four times."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 5)
        self.shared = nn.Linear(5, 5)
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.embed(x.transpose(0, 1)))  # (T, N, 5)
        h = torch.tanh(self.shared(h.reshape(-1, 5))).reshape(h.shape)  # time-major rows
        h = torch.tanh(self.shared(h)).transpose(0, 1)  # (N, T, 5)
        h = torch.tanh(self.shared(h))
        h = torch.tanh(self.shared(h.reshape(-1, 5))).reshape(h.shape)  # sample-major rows
        return self.head(h.mean(1))


class Tied(nn.Module):
    """A small language model whose output layer is its embedding; logits for each token."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(5, 3), nn.Linear(3, 3), nn.Linear(3, 5)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(self.embed(x)).cumsum(1)))


class Faint(nn.Module):
    """A linear layer, and two parameters that the outputs hardly depend on."""

    def __init__(self, influence: float) -> None:
        super().__init__()
        self.layer, self.faint = nn.Linear(4, 3), nn.Parameter(torch.ones(2))
        self.influence = influence

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.influence * (x[:, :2] @ self.faint)[:, None]


def state(model: nn.Module) -> dict[str, object]:
    """All that must come back as it was."""
    return dict(_state(model))


def _state(model: nn.Module) -> Iterator[tuple[str, object]]:
    for name, p in model.named_parameters():
        yield f"{name}.id", id(p)
        yield f"{name}.value", p.detach().clone()
        yield f"{name}.version", p._version
        yield f"{name}.requires_grad", p.requires_grad
        yield f"{name}.grad", None if p.grad is None else p.grad.clone()
        yield f"{name}.hooks", dict(p._backward_hooks or {})
    for name, b in model.named_buffers():
        yield f"{name}.id", id(b)
        yield f"{name}.value", b.clone()
    for name, m in model.named_modules():
        yield f"{name}.training", m.training
        yield f"{name}.keys", sorted(vars(m))
        for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
            yield f"{name}.{hooks}", dict(getattr(m, hooks))
    yield "rng", torch.get_rng_state()
    yield "grad_enabled", torch.is_grad_enabled()


def assert_same(before: dict[str, object], after: dict[str, object]) -> None:
    assert before.keys() == after.keys()
    for key, value in before.items():
        if isinstance(value, Tensor):
            assert isinstance(after[key], Tensor), key
            assert torch.equal(value, after[key]), key
        else:
            assert value == after[key], key


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10 * float(expected.abs().max()))
    assert float(expected.abs().max()) > 0
