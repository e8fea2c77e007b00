import pytest
import torch
import torch.nn.functional as F
from networks import mlp
from torch import nn
from torch.nn.utils import parameters_to_vector

from curvlin_nn import ParameterSpace, curvature
from curvlin_nn.errors import UnsupportedError


def test_flat_order_is_that_of_parameters_to_vector():
    model = mlp()
    space = ParameterSpace.of(model)
    assert torch.equal(space.flatten(space.tensors(model)), parameters_to_vector(model.parameters()).detach())
    assert space.size == sum(p.numel() for p in model.parameters())


def test_unflatten_inverts_flatten_with_leading_dimensions():
    model = mlp()
    space = ParameterSpace.of(model)
    draws = torch.randn(2, 3, space.size)
    named = space.unflatten(draws)
    assert named["2.weight"].shape == (2, 3, 5, 6)
    assert torch.equal(
        torch.stack(
            [space.flatten({k: v[i, j] for k, v in named.items()}) for i in range(2) for j in range(3)]
        ).view_as(draws),
        draws,
    )
    with pytest.raises(ValueError, match=f"vector must have {space.size} entries"):
        space.unflatten(draws[..., 1:])


@pytest.mark.parametrize(
    ("select", "expected"),
    [
        (["2"], ["2.weight", "2.bias"]),
        (["4.bias", "0.weight"], ["0.weight", "4.bias"]),
        (lambda name, p: p.ndim == 1, ["0.bias", "2.bias", "4.bias"]),
    ],
)
def test_subsets_keep_the_flat_order(select, expected):
    assert list(ParameterSpace.of(mlp(), select).names) == expected


def test_all_means_those_that_require_a_gradient_and_names_override_that():
    model = mlp()
    model[0].weight.requires_grad_(False)
    assert "0.weight" not in ParameterSpace.of(model).names
    assert ParameterSpace.of(model, ["0"]).names == ("0.weight", "0.bias")


def test_tied_parameters_count_once_and_answer_to_both_names():
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Tanh(), nn.Linear(3, 3, bias=False))
    model[2].weight = model[0].weight
    assert ParameterSpace.of(model).names == ("0.weight",)
    assert ParameterSpace.of(model, ["2.weight"]).names == ("0.weight",)


@pytest.mark.parametrize(
    ("select", "message"),
    [
        (["7"], "names '7', which is no parameter or module"),
        ("subnetwork", "'subnetwork' is not supported"),
        (lambda name, p: False, "chooses no parameter"),
    ],
)
def test_a_subset_that_selects_nothing_is_refused(select, message):
    with pytest.raises(UnsupportedError, match=message):
        ParameterSpace.of(mlp(), select)


def test_mixed_dtypes_are_refused():
    model = mlp()
    model[0].float()
    with pytest.raises(
        UnsupportedError, match=r"must share one dtype and device, found torch.float32 on cpu, torch.f"
    ):
        ParameterSpace.of(model)


@pytest.mark.parametrize("structure", ["full", "kron", "diag", "block"])
def test_parameters_without_entries_have_no_coordinates(structure):
    """Of a model that prunes a layer away: no input, or no output."""

    class Pruned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.empty = nn.Linear(3, 2), nn.Parameter(torch.zeros(0, 4))
            self.none = nn.Parameter(torch.zeros(2, 0))

        def forward(self, x):
            return self.body(x) + F.linear(x[:, :0], self.none)

    torch.manual_seed(0)
    model, x, y = Pruned().double(), torch.randn(5, 3).double(), torch.randn(5, 2).double()
    pruned = curvature(model, "regression", [(x, y)], structure)
    whole = curvature(model.body, "regression", [(x, y)], structure)
    torch.testing.assert_close(pruned.to_dense(), whole.to_dense(), rtol=1e-12, atol=0)
    assert ParameterSpace.of(model).names == ("body.weight", "body.bias")
