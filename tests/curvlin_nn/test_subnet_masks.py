"""Masks: which coordinates they choose, by the definition of each."""

from __future__ import annotations

import copy

import network_oracle as oracle
import pytest
import torch
from networks import assert_same, mlp, problem, state
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

from curvlin_nn import Laplace
from curvlin_nn.errors import ConvergenceError, DataError, NotSelectedError, UnsupportedError
from curvlin_nn.subnetwork import (
    LargestMagnitudeSubnetMask,
    LargestVarianceDiagLaplaceSubnetMask,
    LargestVarianceSWAGSubnetMask,
    LastLayerSubnetMask,
    ModuleNameSubnetMask,
    ParamNameSubnetMask,
    RandomSubnetMask,
    SubnetMask,
)


def largest(scores: Tensor, k: int) -> Tensor:
    return scores.topk(k).indices.sort().values


def test_largest_magnitude():
    model = mlp()
    mask = LargestMagnitudeSubnetMask(model, n_params_subnet=9)
    theta = parameters_to_vector(model.parameters()).detach()
    assert torch.equal(mask.parameter_vector, theta)
    assert torch.equal(mask.select(), largest(theta.abs(), 9))
    assert torch.equal(mask.indices, largest(theta.abs(), 9))
    assert mask.n_params_subnet == 9


def test_largest_variance_under_a_diagonal_laplace():
    p = problem("mlp", "classification")
    before = state(p.model)
    diagonal = Laplace(p.model, p.likelihood, "all", "diag", prior_precision=0.3)
    mask = LargestVarianceDiagLaplaceSubnetMask(p.model, 11, diag_laplace_model=diagonal)
    chosen = mask.select(p.batches())
    variance = 1 / (oracle.ggn(p.model, p.x, p.y, oracle.cross_entropy).diagonal() + 0.3)
    # Many parameters of a dead unit tie at the prior's variance: of those none is preferred.
    assert torch.equal(variance[chosen].sort().values, variance.topk(11).values.sort().values)
    assert_same(before, state(p.model))


@pytest.mark.parametrize("likelihood", ["classification", "regression"])
def test_largest_variance_along_sgd(likelihood):
    p = problem("mlp", likelihood)
    before = state(p.model)
    mask = LargestVarianceSWAGSubnetMask(
        p.model, 11, likelihood, swag_n_snapshots=5, swag_snapshot_freq=2, swag_lr=0.1
    )
    scores = mask.compute_param_scores(p.batches())
    assert_same(before, state(p.model))

    model = copy.deepcopy(p.model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=3e-4)
    loss = nn.CrossEntropyLoss() if likelihood == "classification" else nn.MSELoss()
    snapshots = []
    for epoch in range(10):
        for x, y in p.batches():
            optimizer.zero_grad()
            loss(model(x), y).backward()
            optimizer.step()
        if epoch % 2 == 0:
            snapshots.append(parameters_to_vector(model.parameters()).detach())
    variance = torch.stack(snapshots).var(0, correction=0)
    torch.testing.assert_close(scores, variance, rtol=1e-9, atol=1e-15)
    assert torch.equal(mask.select(p.batches()), largest(variance, 11))


def test_swag_of_any_likelihood_minimises_its_mean_negative_log_likelihood():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, y = torch.randn(6, 3).double(), torch.randint(2, (6, 2)).double()
    mask = LargestVarianceSWAGSubnetMask(model, 3, "binary", swag_n_snapshots=3)
    scores = mask.compute_param_scores([(x, y)])
    trained, snapshots = copy.deepcopy(model), []
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.01, momentum=0.9, weight_decay=3e-4)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.binary_cross_entropy_with_logits(trained(x), y).backward()
        optimizer.step()
        snapshots.append(parameters_to_vector(trained.parameters()).detach())
    torch.testing.assert_close(scores, torch.stack(snapshots).var(0, correction=0), rtol=1e-8, atol=1e-16)


def test_swag_that_diverges_says_so():
    p = problem("mlp", "regression")
    mask = LargestVarianceSWAGSubnetMask(p.model, 3, "regression", swag_lr=1e8)
    with pytest.raises((ConvergenceError, ValueError), match=r"diverged|finite"):
        mask.select(p.batches())


def test_random_masks_are_uniform_and_reproducible():
    model = mlp()
    generator = torch.Generator().manual_seed(0)
    before = torch.get_rng_state()
    draws = [RandomSubnetMask(model, 20, generator=generator).select() for _ in range(400)]
    assert torch.equal(before, torch.get_rng_state())
    again = RandomSubnetMask(model, 20, generator=torch.Generator().manual_seed(0)).select()
    assert torch.equal(draws[0], again)
    counts = torch.bincount(torch.cat(draws), minlength=83).double()
    share = 20 / 83
    assert ((counts - 400 * share) / (400 * share * (1 - share)) ** 0.5).abs().max() < 4


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (lambda model: ParamNameSubnetMask(model, ["2.bias", "0.bias"]), [*range(24, 30), *range(60, 65)]),
        (lambda model: ModuleNameSubnetMask(model, ["4", "0"]), [*range(30), *range(65, 83)]),
        (lambda model: LastLayerSubnetMask(model), [*range(65, 83)]),
        (lambda model: LastLayerSubnetMask(model, last_layer_name="2"), [*range(30, 65)]),
    ],
)
def test_masks_by_name(mask, expected):
    p = problem("mlp", "classification")
    mask = mask(p.model)
    assert mask.select(p.batches()).tolist() == expected
    assert mask.n_params_subnet == len(expected)
    la = Laplace(p.model, p.likelihood, mask, "kron").fit(p.batches())
    by_index = Laplace(p.model, p.likelihood, "subnetwork", "kron", subnetwork_indices=mask.indices)
    assert torch.equal(la(p.x_test), by_index.fit(p.batches())(p.x_test))
    assert la.subset_of_weights == "subnetwork"


def test_a_last_layer_mask_is_the_last_layer():
    p = problem("mlp", "classification")
    mask = LastLayerSubnetMask(p.model)
    mask.select(p.batches())
    la = Laplace(p.model, p.likelihood, mask, "kron").fit(p.batches())
    last = Laplace(p.model, p.likelihood, "last_layer", "kron").fit(p.batches())
    torch.testing.assert_close(la(p.x_test), last(p.x_test), rtol=1e-12, atol=0)


def test_coordinates_are_those_of_parameters_that_require_a_gradient():
    model = mlp()
    model[0].weight.requires_grad_(False)
    assert ParamNameSubnetMask(model, ["0.bias"]).select().tolist() == list(range(6))
    with pytest.raises(UnsupportedError, match=r"require a gradient, found \['0.weight'\]"):
        ParamNameSubnetMask(model, ["0.weight"]).select()
    with pytest.raises(UnsupportedError, match="n_params_subnet must be at most 59"):
        LargestMagnitudeSubnetMask(model, 60)


def test_refusals():
    p = problem("mlp", "classification")
    mask = LargestMagnitudeSubnetMask(p.model, 3)
    with pytest.raises(NotSelectedError, match="call select"):
        Laplace(p.model, p.likelihood, mask)
    mask.select()
    with pytest.raises(UnsupportedError, match="selected already"):
        mask.select()
    with pytest.raises(UnsupportedError, match="expected one of them"):
        Laplace(p.model, p.likelihood, mask, subnetwork_indices=mask.indices)
    with pytest.raises(DataError, match="train_loader=None"):
        LargestVarianceSWAGSubnetMask(p.model, 3).select()
    with pytest.raises(DataError, match="no batch"):
        LastLayerSubnetMask(p.model).select([])
    nested = nn.Sequential(p.model, nn.ReLU())
    with pytest.raises(UnsupportedError, match="'0', which has modules below it"):
        ModuleNameSubnetMask(nested, ["0"]).select()
    with pytest.raises(UnsupportedError, match="'9', which is no module"):
        ModuleNameSubnetMask(p.model, ["9"]).select()
    with pytest.raises(UnsupportedError, match="modules with parameters"):
        ModuleNameSubnetMask(p.model, ["1"]).select()
    with pytest.raises(UnsupportedError, match="must be Laplace"):
        LargestVarianceDiagLaplaceSubnetMask(p.model, 3, Laplace(p.model, p.likelihood, "last_layer", "diag"))
    with pytest.raises(ValueError, match="n_params_subnet must be a positive integer"):
        RandomSubnetMask(p.model, 0)


class Own(SubnetMask):
    """What a user writes."""

    def __init__(self, model: nn.Module, mask: Tensor) -> None:
        super().__init__(model)
        self._mask = mask

    def get_subnet_mask(self, train_loader: object) -> Tensor:
        return self._mask


def test_a_mask_of_ones_own():
    model = mlp()
    mask = torch.zeros(83, dtype=torch.long)
    mask[[5, 80]] = 1
    assert Own(model, mask).select().tolist() == [5, 80]
    for wrong in (mask[1:], mask.float(), [1, 0]):
        with pytest.raises(UnsupportedError, match="a boolean vector of 83 entries"):
            Own(model, wrong).select()
    for wrong in (mask * 2, mask * 0):
        with pytest.raises(UnsupportedError, match="ones and zeros"):
            Own(model, wrong).select()
