"""Inputs of every nesting are taken in parts, and those that cannot be cut are taken whole."""

from collections import UserDict

import pytest
import torch
from torch import Tensor, nn

from curvlin_nn import Laplace, predictive

N = 7

SIZES: list[int] = []
"""How many samples each forward pass had."""


class Batch(UserDict):
    """As Hugging Face tokenisers return it: attributes, and a device to go to."""

    def __getattr__(self, name: str) -> Tensor:
        return self.data[name]


class Pair(nn.Module):
    """Two arguments, one by name of a mapping."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(3, 4), nn.Linear(2, 4), nn.Linear(4, 2)

    def forward(self, a: Tensor, b: Tensor, table: Tensor | None = None) -> Tensor:
        SIZES.append(len(a))
        h = torch.tanh(self.first(a) + self.second(b))
        return self.head(h if table is None else h + table.mean(0))


class Mapped(Pair):
    """One argument, as models in laplace-torch take a batch of Hugging Face."""

    def forward(self, batch: Batch) -> Tensor:
        return super().forward(batch["a"], batch["b"])


def inputs() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(N, 3).double(), torch.randn(N, 2).double()


TABLE = torch.randn(3, 4).double()
CASES = {
    "tuple": (Pair, lambda a, b: (a, b)),
    "list": (Pair, lambda a, b: [a, b]),
    "dict": (Pair, lambda a, b: {"a": a, "b": b}),
    "Hugging Face": (Mapped, lambda a, b: Batch(a=a, b=b)),
    "shared by all": (Pair, lambda a, b: (a, b, TABLE)),
    "a number beside": (Pair, lambda a, b: {"a": a, "b": b, "table": None}),
}


@pytest.mark.parametrize("name", CASES)
def test_parts_change_nothing_and_hold_one_sample_each(name, monkeypatch):
    make, wrap = CASES[name]
    model, x = make().double(), wrap(*inputs())
    la = Laplace(model, "regression", "all", "kron").fit([(x, torch.randn(N, 2).double())])
    generator = torch.Generator()
    calls = [
        lambda: la(x),
        lambda: la(x, diagonal_output=True),
        lambda: (la.functional_samples(x, 3, generator.manual_seed(1)),),
        lambda: la(x, "nn", n_samples=3, generator=generator.manual_seed(1)),
    ]
    whole = [call() for call in calls]
    monkeypatch.setattr(predictive.linearised, "FEATURE_BUDGET", 1)
    monkeypatch.setattr(predictive.weight_space, "ACTIVATION_BUDGET", 1)
    for call, expected in zip(calls, whole, strict=True):
        SIZES.clear()
        torch.testing.assert_close(call(), expected, rtol=1e-11, atol=1e-12)
        ones = [size for size in SIZES if size == 1]
        assert len(ones) >= N and max(SIZES) <= (N if name == "shared by all" else 2)


def test_samples_along_another_axis_are_taken_whole(monkeypatch):
    """What the model does with inputs is its own business; a part of the first axis has too many rows."""

    class TimeFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x.mean(0))

    torch.manual_seed(0)
    x, y = torch.randn(4, N, 3).double(), torch.randn(N, 2).double()
    la = Laplace(TimeFirst().double(), "regression", "all", "full").fit([(x, y)])
    expected = la(x), la(x, "nn", n_samples=3, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(predictive.linearised, "FEATURE_BUDGET", 1)
    monkeypatch.setattr(predictive.weight_space, "ACTIVATION_BUDGET", 1)
    found = la(x), la(x, "nn", n_samples=3, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    alone = la(x[:, :1]), la(x[:, :1], "nn", n_samples=3, generator=torch.Generator().manual_seed(1))
    for mine, whole in zip(alone, expected, strict=True):
        torch.testing.assert_close(mine, tuple(t[:1] for t in whole), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("n_steps", [3, 4, 5])
def test_two_samples_along_another_axis_are_told_from_two_steps(n_steps, monkeypatch):
    """Any part of the steps has two rows, as a part of two samples has."""

    class TimeFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.body(x)).mean(0))

    torch.manual_seed(0)
    x, y = torch.randn(n_steps, N, 3).double(), torch.randn(N, 2).double()
    la = Laplace(TimeFirst().double(), "regression", "all", "full").fit([(x, y)])
    mean, covariance = la(x)
    at_draws = la(x, "nn", n_samples=3, generator=torch.Generator().manual_seed(1))
    expected = mean[:2], covariance[:2], at_draws[0][:2]
    for exponent in range(12):  # room for one step, two, three, ...
        monkeypatch.setattr(predictive.linearised, "FEATURE_BUDGET", 2**exponent)
        monkeypatch.setattr(predictive.weight_space, "ACTIVATION_BUDGET", 2**exponent)
        pair = x[:, :2]
        found = (*la(pair), la(pair, "nn", n_samples=3, generator=torch.Generator().manual_seed(1))[0])
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
