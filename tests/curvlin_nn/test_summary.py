"""`la.describe()`: its numbers against dense traces, counts by hand, and the table that it renders."""

from __future__ import annotations

import io

import pytest
import torch
from networks import Tied, assert_same, fitted, problem, state
from rich.console import Console
from torch import nn

from curvlin import Dense, Diagonal
from curvlin_nn import Laplace
from curvlin_nn.errors import NotFittedError

STRUCTURES = ["full", "kron", "diag", "ekfac", "lowrank", "block"]


def dense_gamma(la: Laplace, prior: torch.Tensor) -> torch.Tensor:
    """``1 - (P^-1 P0)_ii`` of each coordinate, by dense inversion."""
    H = la.curvature.to_dense().double() / (float(la.sigma_noise) ** 2 * la.temperature)
    return 1 - torch.linalg.solve(H + torch.diag(prior), torch.diag(prior)).diagonal()


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("prior", ["scalar", "layerwise"])
def test_effective_parameters_are_dense_traces_of_each_layer(structure, prior):
    delta = torch.tensor([0.3, 2.0, 1.0, 0.1, 5.0, 0.7], dtype=torch.float64)
    delta = delta[:1] if prior == "scalar" else delta
    la = fitted(structure, prior_precision=delta.squeeze(), temperature=0.5)
    sizes = torch.tensor([24, 6, 30, 5, 15, 3])
    coordinates = delta.expand(6).repeat_interleave(sizes)
    gamma = dense_gamma(la, coordinates)
    summary = la.describe()
    for layer, span in zip(summary.layers, gamma.split([30, 35, 18]), strict=True):
        assert layer.effective_parameters == pytest.approx(float(span.sum()), rel=1e-9)
    assert summary.effective_parameters == pytest.approx(float(gamma.sum()), rel=1e-9)
    expected = [(0.3, 2.0), (0.1, 1.0), (0.7, 5.0)] if prior == "layerwise" else [(0.3, 0.3)] * 3
    assert [layer.prior_precision for layer in summary.layers] == expected


def test_effective_parameters_of_regression_count_the_noise():
    la = fitted("full", "regression", sigma_noise=0.2, prior_precision=3.0)
    gamma = dense_gamma(la, torch.full((83,), 3.0, dtype=torch.float64))
    assert la.describe().effective_parameters == pytest.approx(float(gamma.sum()), rel=1e-9)
    assert la.describe().sigma_noise == pytest.approx(0.2)


def test_effective_parameters_are_resolved_where_the_prior_is_all_there_is():
    """In float64 ``1 - delta (P^-1)_ii`` would be rounding at a prior of 1e18."""
    la = fitted("kron", prior_precision=1e18)
    trace = float(la.curvature.diagonal().sum())
    assert la.describe().effective_parameters == pytest.approx(trace / 1e18, rel=1e-9)


def test_a_prior_given_as_an_operator_has_a_total_only():
    precision = torch.linspace(0.5, 2, 83, dtype=torch.float64)
    la = fitted("diag", prior_precision=Diagonal(precision))
    summary = la.describe()
    assert summary.effective_parameters == pytest.approx(float(dense_gamma(la, precision).sum()), rel=1e-10)
    assert {(layer.prior_precision, layer.effective_parameters) for layer in summary.layers} == {(None, None)}
    assert "operator" in str(summary)


def test_layers_are_modules_with_their_shapes_and_memory():
    la = fitted("kron")
    summary = la.describe()
    assert [(layer.name, layer.kind, layer.n_params) for layer in summary.layers] == [
        ("0", "Linear", 30),
        ("2", "Linear", 35),
        ("4", "Linear", 18),
    ]
    assert summary.layers[0].shapes == {"weight": (6, 4), "bias": (6,)}
    assert {layer.structures for layer in summary.layers} == {("KroneckerSum", "Dense")}
    assert {layer.served for layer in summary.layers} == {("rule",)}
    # Two factors and the bias's block, in float64.
    assert [layer.memory for layer in summary.layers] == [
        8 * (6 * 6 + 4 * 4 + 6 * 6),
        8 * (5 * 5 + 6 * 6 + 5 * 5),
        8 * (3 * 3 + 5 * 5 + 3 * 3),
    ]
    assert summary.memory == sum(layer.memory for layer in summary.layers)
    assert (summary.n_params, summary.n_data, summary.n_outputs) == (83, 8, 3)
    assert summary.log_marginal_likelihood == float(la.log_marginal_likelihood())


def test_a_block_of_several_layers_has_no_memory_of_one():
    summary = fitted("full").describe()
    assert {layer.memory for layer in summary.layers} == {None}
    assert {layer.structures for layer in summary.layers} == {(Dense.__name__,)}
    assert summary.memory == 8 * 83 * 83


def test_layers_say_how_they_are_served():
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.scale = nn.Linear(2, 3), nn.Parameter(torch.ones(2, 2))

        def forward(self, x):
            return self.linear(torch.linalg.solve(self.scale + 2 * torch.eye(2), x.mT).mT)

    la = Laplace(Odd(), "classification", subset_of_weights="all", hessian_structure="diag")
    la.fit([(torch.randn(5, 2), torch.tensor([0, 1, 2, 0, 1]))])
    assert {layer.kind: layer.served for layer in la.describe().layers} == {
        "Odd": ("autodiff on each sample",),
        "Linear": ("rule",),
    }


def test_tied_weights_and_the_last_layer():
    torch.manual_seed(0)
    x = torch.randint(5, (3, 4))
    la = Laplace(Tied(), "classification", subset_of_weights="all").fit([(x, x)])
    assert [layer.name for layer in la.describe().layers] == ["embed", "mix", "head"]
    p = problem("mlp", "classification")
    last = Laplace(p.model, "classification").fit(p.batches()).describe()
    assert [layer.name for layer in last.layers] == ["4"]


def test_time_is_that_of_the_fit(monkeypatch):
    clock = iter([10.0, 12.5, 20.0, 20.25])
    monkeypatch.setattr("curvlin_nn.laplace.time.perf_counter", lambda: next(clock))
    la = fitted()
    assert la.describe().fit_seconds == 2.5
    p = problem("mlp", "classification")
    assert la.fit(p.batches()).describe().fit_seconds == 0.25


def test_the_table_shows_the_numbers():
    la = fitted("kron", prior_precision=2.5)
    summary = la.describe()
    text = str(summary)
    assert max(map(len, text.splitlines())) <= 120
    for layer in summary.layers:
        (row,) = (line for line in text.splitlines() if f"Linear {layer.name} " in line)
        shapes = f"weight {'x'.join(map(str, layer.shapes['weight']))}"
        for cell in (
            shapes,
            f" {layer.n_params} ",
            "KroneckerSum, Dense",
            "rule",
            " 2.5 ",
            f" {layer.memory} B",
        ):
            assert cell in row
        assert f" {layer.effective_parameters:.1f} " in row
    assert f"{summary.log_marginal_likelihood:.2f} nats" in text
    assert "8 samples of 3 outputs" in text and "noise" not in text
    console = Console(file=io.StringIO(), width=120, color_system=None)
    console.print(summary)
    assert [line.rstrip() for line in console.file.getvalue().splitlines()] == text.splitlines()


def test_names_are_no_markup():
    model = nn.Sequential()
    model.add_module("[red]", nn.Linear(2, 2))
    la = Laplace(model, "classification", subset_of_weights="all")
    la.fit([(torch.randn(4, 2), torch.tensor([0, 1, 0, 1]))])
    assert "Linear [red]" in str(la.describe())


def test_describing_changes_and_prints_nothing(capsys):
    la = fitted("kron", prior_precision=torch.tensor(1.0, requires_grad=True))
    before = state(la.model)
    first = la.describe()
    with torch.inference_mode():
        assert la.describe() == first
    assert_same(before, state(la.model))
    assert capsys.readouterr() == ("", "")


def test_nothing_is_described_before_fit():
    with pytest.raises(NotFittedError, match="call fit"):
        Laplace(problem("mlp", "classification").model, "classification").describe()
