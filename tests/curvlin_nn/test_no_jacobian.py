"""Fitting and predicting never hold a Jacobian: tensors stay far below samples x parameters."""

import functools

import pytest
import torch
from torch import nn

from curvlin.testing import forbid_dense
from curvlin.testing.guard import DenseTensorError
from curvlin_nn import Laplace, curvature, feature_maps, predictive, structures

N, CLASSES = 60, 10
JOINT = functools.partial(structures.KFOC, joint_bias=True)


def wide() -> nn.Module:
    return nn.Sequential(
        nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, CLASSES)
    )


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 64, 3), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, CLASSES)),
    )


@pytest.mark.parametrize("structure", ["kron", "diag", "ekfac", "kfoc", "kron-lowrank", JOINT], ids=str)
@pytest.mark.parametrize(("make", "widest"), [(wide, 128), (convolutional, 16 * 64)])
def test_no_tensor_of_the_size_of_a_jacobian_is_made(make, widest, structure):
    """Nothing is larger than the gradients of C outputs with respect to the widest layer."""
    model, x = make(), torch.randn(N, 64)
    n_parameters = sum(p.numel() for p in model.parameters())
    data = [(x[:30], torch.randint(CLASSES, (30,))), (x[30:], torch.randint(CLASSES, (30,)))]
    limit = N * CLASSES * widest
    assert limit < N * n_parameters / 4
    with forbid_dense(limit):
        la = Laplace(model, "classification", "all", structure).fit(data)
        la.optimize_prior_precision()
        la(x)
        la(x, link_approx="mc", n_samples=2)
        la.functional_samples(x, n_samples=2)
    _, features = feature_maps.JacobianMap(model)(x)
    with pytest.raises(DenseTensorError), forbid_dense(limit):
        features.to_dense()  # the guard sees what it is here to see


def test_memory_does_not_grow_with_the_number_of_inputs(monkeypatch):
    """With a budget of features, the largest tensor of a prediction is the same for 60 inputs as for 600."""
    monkeypatch.setattr(predictive.linearised, "FEATURE_BUDGET", 40_000)
    model, x = wide(), torch.randn(600, 64)
    la = Laplace(model, "classification", "all", "kron").fit([(x[:60], torch.randint(CLASSES, (60,)))])
    la(x[:1])  # what is made once, the posterior, is made
    largest = []
    for inputs in (x[:60], x):
        with forbid_dense(10**9) as guard:
            la(inputs)
        largest.append(guard.largest)
    assert largest[0] == largest[1]


@pytest.mark.parametrize(
    "structure", ["kron", "diag", functools.partial(structures.LowRank, rank=3, oversampling=2)]
)
def test_memory_of_a_fit_does_not_grow_with_the_number_of_batches(structure):
    model, x, y = wide(), torch.randn(200, 64), torch.randint(CLASSES, (200,))
    largest = []
    for n in (40, 200):
        with forbid_dense(10**9) as guard:
            curvature(
                model, "classification", list(zip(x[:n].split(20), y[:n].split(20), strict=True)), structure
            )
        largest.append(guard.largest)
    assert largest[0] == largest[1]
