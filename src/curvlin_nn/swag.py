"""Diagonal SWAG: the variance of each parameter along a run of SGD (Maddox et al., 2019)."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from curvlin_nn.batches import Labelled, Passes
from curvlin_nn.capture.inputs import called, map_tensors
from curvlin_nn.capture.state import device_of, random_state_kept
from curvlin_nn.errors import ConvergenceError
from curvlin_nn.inference_mode import outside_inference_mode
from curvlin_nn.likelihoods import Gaussian, Likelihood
from curvlin_nn.likelihoods.base import weighted
from curvlin_nn.parameters import ParameterSpace

MOMENTUM, WEIGHT_DECAY = 0.9, 3e-4
"""Of SGD, as in laplace-torch."""


@outside_inference_mode()
def diagonal_swag_variance(
    model: nn.Module,
    likelihood: Likelihood,
    train_loader: Iterable[Any],
    *,
    n_snapshots: int = 40,
    snapshot_every: int = 1,
    lr: float = 0.01,
    dict_key_y: str = "labels",
) -> Float[Tensor, " P"]:
    """The variance of each parameter over snapshots of a copy of the model that SGD trains on.

    Args:
        model: where to start; neither it nor torch's random state changes.
        likelihood: the loss is its mean negative logarithm per term, for regression the mean squared error.
        train_loader: batches ``(inputs, targets)``, or mappings with targets under `dict_key_y`; gone through
            ``n_snapshots * snapshot_every`` times.
        n_snapshots: how many parameter vectors.
        snapshot_every: epochs between them.
        lr: the learning rate, constant: large enough to leave the minimum.
        dict_key_y: the name of the targets in loaders that yield mappings.

    Returns:
        Float64, over the parameters that require a gradient; the variance with divisor `n_snapshots`.

    Raises:
        ConvergenceError: if SGD diverges.
    """
    space, device = ParameterSpace.of(model, "all"), device_of(model)
    trained = copy.deepcopy(model).train()
    optimizer = torch.optim.SGD(
        [trained.get_parameter(name) for name in space.names],
        lr=lr,
        momentum=MOMENTUM,
        weight_decay=WEIGHT_DECAY,
    )
    passes = Passes(Labelled(train_loader, dict_key_y), model)
    mean, squares = torch.zeros(2, space.size, dtype=torch.float64, device=device)
    with torch.enable_grad(), random_state_kept(device):
        for epoch in range(n_snapshots * snapshot_every):
            for where, x, targets in passes:
                optimizer.zero_grad()
                _loss(trained, likelihood, map_tensors(lambda t: t.to(device), x), targets, where).backward()
                optimizer.step()
            if epoch % snapshot_every:
                continue
            snapshot = space.flatten(space.tensors(trained)).double()
            if not bool(torch.isfinite(snapshot).all()):
                raise ConvergenceError(f"SGD of SWAG diverged in epoch {epoch}; lower swag_lr, found {lr}")
            # Welford (1962): no difference of large numbers.
            change = snapshot - mean
            mean = mean + change / (epoch // snapshot_every + 1)
            squares = squares + change * (snapshot - mean)
    return squares / n_snapshots


def _loss(model: nn.Module, likelihood: Likelihood, x: Any, targets: Tensor, where: str) -> Tensor:
    outputs = called(model, x)
    targets = likelihood.check(outputs, targets, where)
    terms = likelihood.terms(outputs)
    if isinstance(likelihood, Gaussian):
        return F.mse_loss(terms, targets.to(terms))
    weights = likelihood.weights(terms, targets)
    count = terms[..., 0].numel() if weights is None else weights.sum()
    return -weighted(likelihood.log_prob(terms, targets), weights).sum() / count
