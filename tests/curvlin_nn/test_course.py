"""Batches on which a forward pass takes another course than on the first: the answers about the first do not hold."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from network_oracle import jacobian_row_by_row
from torch import Tensor, nn

from curvlin_nn import curvature
from curvlin_nn.capture import Recorder
from curvlin_nn.parameters import ParameterSpace


class Net(nn.Module):
    """A function of its own parameters."""

    def __init__(self, function: Callable[..., Tensor], **owned: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, module in owned.items():
            setattr(self, name, module.double())

    def forward(self, *x: Tensor) -> Tensor:
        return self.function(self, *x)


class HandWritten(torch.autograd.Function):
    """``x W``, which no interception of torch's functions sees."""

    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return g @ w.mT, x.mT @ g


def unpadded(net: Net, x: Tensor, mask: Tensor) -> Tensor:
    """Only tokens that are no padding pass through the layers."""
    h = net.b(torch.tanh(net.a(x[mask])))
    return h.new_zeros(*mask.shape, h.shape[-1]).index_put((mask,), h).sum(1)


def pooled(net: Net, x: Tensor, mask: Tensor) -> Tensor:
    """The same, with the tokens of each sample summed by a matrix that the mask makes."""
    h = net.b(torch.tanh(net.a(x[mask])))
    return torch.nn.functional.one_hot(mask.nonzero()[:, 0], len(mask)).to(h).mT @ h


def _rows(recorder: Recorder, x: Tensor | tuple[Tensor, ...]) -> Tensor:
    recording = recorder(x)
    n, c = recording.outputs.shape
    unit = torch.eye(c, dtype=torch.float64)[:, None].expand(c, n, c)
    return torch.cat([block.flat_rows() for block in recording.captures(unit).blocks], dim=2)


def samples(*args: Tensor) -> list[tuple[Tensor, ...]]:
    return list(zip(*(a.split(1) for a in args), strict=True))


@pytest.mark.parametrize("also_served", [False, True])
def test_an_uncaptured_use_that_comes_with_a_later_batch_counts(also_served):
    def forward(net: Net, x: Tensor) -> Tensor:
        h = net.a(x) + (net.w(x) if also_served else 0)
        chosen = (x[:, :1] > 0).to(x)
        return h + HandWritten.apply(x * chosen, net.w.weight) if bool(chosen.any()) else h

    torch.manual_seed(0)
    model = Net(forward, a=nn.Linear(3, 3), w=nn.Linear(3, 3, bias=False))
    x, y = torch.randn(7, 3).double(), torch.randn(7, 3).double()
    x[:3, 0], x[3:, 0] = -x[:3, 0].abs(), x[3:, 0].abs()
    found = curvature(model, "regression", [(x[:3], y[:3]), (x[3:], y[3:])], "full").to_dense()
    torch.testing.assert_close(found, ggn_alone(model, x), rtol=1e-10, atol=1e-12)


def ggn_alone(model: nn.Module, *args: Tensor) -> Tensor:
    J = jacobian_row_by_row(model, samples(*args)).flatten(0, 1)
    return J.mT @ J


@pytest.mark.parametrize("forward", [unpadded, pooled])
def test_tokens_of_samples_are_found_where_every_batch_has_them_elsewhere(forward):
    """12 tokens, all in order; 8, of samples of different lengths; 8, as many for each sample."""
    torch.manual_seed(1)
    model = Net(forward, a=nn.Linear(2, 4), b=nn.Linear(4, 3))
    recorder = Recorder(model, ParameterSpace.of(model))
    for lengths in ([3, 3, 3, 3], [2, 2, 2, 2], [2, 1, 3, 2], [1, 3, 1, 3]):
        mask = torch.arange(3) < torch.tensor(lengths)[:, None]
        x = torch.randn(4, 3, 2).double()
        expected = jacobian_row_by_row(model, samples(x, mask))
        torch.testing.assert_close(_rows(recorder, (x, mask)), expected, rtol=1e-10, atol=1e-12)


def test_samples_are_found_where_they_stand_along_another_axis_of_a_later_batch():
    def forward(net: Net, x: Tensor) -> Tensor:
        return net.a(x).mean(1) if x[0, 0, 0] > 0 else net.a(x.transpose(0, 1)).mean(0)

    torch.manual_seed(2)
    model = Net(forward, a=nn.Linear(2, 3))
    recorder = Recorder(model, ParameterSpace.of(model))
    x = torch.randn(4, 4, 2).double()
    for sign in (1, -1):
        x[:, 0, 0] = sign * x[:, 0, 0].abs()
        expected = jacobian_row_by_row(model, samples(x))
        torch.testing.assert_close(_rows(recorder, x), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("structure", ["full", "diag", "kron", "ekfac", "block", "lowrank"])
def test_an_expert_that_no_sample_of_a_batch_is_sent_to(structure):
    """Its layers are called on no rows."""

    def forward(net: Net, x: Tensor) -> Tensor:
        h = torch.zeros_like(x)
        for expert, name in enumerate(("a", "b")):
            chosen = ((x[:, 0] > 0) == bool(expert)).nonzero()[:, 0]
            h = h.index_add(0, chosen, getattr(net, name)(x[chosen]))
        return h

    torch.manual_seed(3)
    model = Net(forward, a=nn.Linear(3, 3), b=nn.Linear(3, 3))
    x, y = torch.randn(8, 3).double(), torch.randn(8, 3).double()
    x[:4, 0] = x[:4, 0].abs()
    x[5, 0] = -x[5, 0].abs()
    found = curvature(model, "regression", [(x[:4], y[:4]), (x[4:], y[4:])], structure).to_dense()
    expected = ggn_alone(model, x)
    for span in (slice(9, 12), slice(21, 24)):  # of biases, which all structures have exactly
        compared = found[span, span] if structure != "diag" else found[span, span].diagonal().diag()
        exact = expected[span, span] if structure != "diag" else expected[span, span].diagonal().diag()
        torch.testing.assert_close(compared, exact, rtol=1e-10, atol=1e-12)
