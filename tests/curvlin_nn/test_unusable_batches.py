"""Batches and models that cannot be used: one line that names the batch and what is wrong, and nothing changed."""

import pytest
import torch
from networks import assert_same, problem, state
from torch import Tensor, nn

from curvlin_nn import Laplace, curvature
from curvlin_nn.errors import DataError, OutputError, UnsupportedError

NAN, INF = float("nan"), float("inf")


class Fragile(nn.Module):
    """Samples that begin above 9 have an infinite hidden layer, below -9 an infinite gradient, at 8 such outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h, first = torch.tanh(self.a(x)), x[:, :1]
        if bool((first < -9).all()):
            h = (h - h.detach()).abs().sqrt()
        f = self.b(torch.where(first > 9, INF, h))
        return torch.where(first == 8, INF, torch.nan_to_num(f))


def spoilt(column: int, value: float):
    """The batch with an entry of every sample replaced."""

    def spoil(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        x = x.clone()
        x[:, column] = value
        return x, y

    return spoil


LAYER = "the input of the layer with parameter '{}' on {{}} must be finite"
CASES = {
    "NaN in the inputs": (DataError, "{} must hold numbers, found NaN among the inputs", spoilt(1, NAN)),
    "Inf in the inputs": (OutputError, LAYER.format("a.weight"), spoilt(1, INF)),
    "Inf in a layer": (OutputError, LAYER.format("b.weight"), spoilt(0, 10.0)),
    "Inf in a gradient": (
        OutputError,
        "gradient of .*parameter 'a.weight' on .*{} must be finite",
        spoilt(0, -10.0),
    ),
    "Inf in the outputs": (OutputError, "model outputs on {} must be finite", spoilt(0, 8.0)),
    "no samples": (
        DataError,
        r"{} must hold at least one sample, found shape \(0, 4\)",
        lambda x, y: (x[:0], y[:0]),
    ),
    "fewer targets": (
        DataError,
        r"targets of {} must have shape \(3,\), found \(2,\)",
        lambda x, y: (x, y[:2]),
    ),
    "targets of another dtype": (DataError, "targets of {}", lambda x, y: (x, y.double() + 0.5)),
    "a class that is none": (DataError, "targets of {}", lambda x, y: (x, y + 3)),
    "no pair": (DataError, "{} must be a pair", lambda x, y: x),
}


@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize("case", CASES)
def test_the_batch_and_the_layer_are_named(case, at):
    torch.manual_seed(0)
    error, message, spoil = CASES[case]
    model = Fragile().double()
    x, y = torch.randn(6, 4).double(), torch.randint(3, (6,))
    good = list(zip(x.split(3), y.split(3), strict=True))
    bad = [spoil(*batch) if index == at else batch for index, batch in enumerate(good)]
    la = Laplace(model, "classification", "all", "kron").fit(good)
    before, H = state(model), la.curvature.to_dense()
    for structure in ("kron", "diag"):
        with pytest.raises(error, match=f"batch {at}") as caught:
            curvature(model, "classification", bad, structure)
        assert "\n" not in str(caught.value)
    with pytest.raises(error, match=message.format(f"batch {at}")):
        la.fit(bad)
    assert_same(before, state(model))
    assert torch.equal(la.curvature.to_dense(), H)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("structure", ["full", "kron", "diag", "ekfac"])
def test_a_model_of_half_precision_is_served_to_that_precision(dtype, structure):
    """Sums are in float64 whatever the dtype, and evidence and posterior are of that sum."""
    p = problem("mlp", "classification")
    exact = curvature(p.model, p.likelihood, p.batches(), structure).to_dense()
    x_test = p.x_test
    expected = Laplace(p.model, p.likelihood, "all", structure).fit(p.batches())(x_test)
    p.model.to(dtype)
    data = [(x.to(dtype), y) for x, y in p.batches()]
    la = Laplace(p.model, p.likelihood, "all", structure).fit(data)
    assert la.curvature.dtype == dtype
    gap = (la.curvature.to_dense().double() - exact).norm() / exact.norm()
    assert float(gap) < 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(
        la(x_test.to(dtype)).double(), expected, rtol=0, atol=8 * torch.finfo(dtype).eps
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_precisions_that_are_mixed_are_refused(dtype):
    model, data = (
        nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)),
        [(torch.randn(3, 4), torch.randint(3, (3,)))],
    )
    with pytest.raises(DataError, match=f"batch 0 has dtype {dtype} and the model torch.float32"):
        curvature(model, "classification", [(data[0][0].to(dtype), data[0][1])])
    model[1].to(dtype)
    with pytest.raises(
        UnsupportedError, match=f"must share one dtype and device, found {dtype} on cpu, torch.float32 on cpu"
    ):
        curvature(model, "classification", data)
    with (
        pytest.raises(UnsupportedError, match=r"torch\.autocast is on for cpu"),
        torch.autocast("cpu", dtype=torch.bfloat16),
    ):
        Laplace(model.float(), "classification").fit(data)
