"""Online Laplace: prior precisions and noise are learned by the evidence while the network is trained.

Immer, Bauer, Fortuin, Ratsch & Khan (2021), Scalable marginal likelihood estimation for model selection in deep
learning, algorithm 1. Between epochs of training, on ``log p(D | theta) / T - sum_k delta_k |theta_k|^2 / 2``, the
curvature is fitted at the present parameters and some steps lead up the log marginal likelihood in the logarithms of
its hyperparameters.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm import tqdm

from curvlin._check import positive_integer
from curvlin_nn import likelihoods
from curvlin_nn._check import numbers
from curvlin_nn.batches import Labelled, batches
from curvlin_nn.capture.inputs import called
from curvlin_nn.capture.state import device_of, prepared
from curvlin_nn.errors import DataError, UnsupportedError
from curvlin_nn.inference_mode import outside_inference_mode
from curvlin_nn.laplace import Laplace
from curvlin_nn.likelihoods import Likelihood
from curvlin_nn.parameters import ParameterSpace
from curvlin_nn.prior import check_precision, check_structure, group_of_coordinate
from curvlin_nn.prior_search import climb
from curvlin_nn.structures import StructureChoice


class OnlineLaplace(NamedTuple):
    """What `marglik_training` returns; unpacks as ``la, model, margliks, losses``.

    Attributes:
        la: fitted around the best parameters, with their hyperparameters.
        model: the network with these parameters.
        margliks: the log marginal likelihood in nats after each of its updates, one for each that was due.
        losses: for each epoch the mean over samples of the negative log joint probability, in nats.
    """

    la: Laplace
    model: nn.Module
    margliks: list[float]
    losses: list[float]


@dataclass
class _Hyperparameters:
    """What training holds fixed for an epoch."""

    prior_precision: Float[Tensor, " K"]
    sigma_noise: float


def marglik_training(
    model: nn.Module,
    train_loader: Iterable[Any],
    likelihood: str | nn.Module | Likelihood = "classification",
    hessian_structure: StructureChoice = "kron",
    optimizer_cls: Callable[..., torch.optim.Optimizer] = torch.optim.Adam,
    optimizer_kwargs: dict[str, Any] | None = None,
    scheduler_cls: Callable[..., Any] | None = None,
    scheduler_kwargs: dict[str, Any] | None = None,
    n_epochs: int = 300,
    lr_hyp: float = 0.1,
    prior_structure: str = "layerwise",
    n_epochs_burnin: int = 0,
    n_hypersteps: int = 10,
    marglik_frequency: int = 1,
    prior_prec_init: float = 1.0,
    sigma_noise_init: float = 1.0,
    temperature: float = 1.0,
    fix_sigma_noise: bool = False,
    dict_key_y: str = "labels",
    progress_bar: bool = False,
) -> OnlineLaplace:
    """Train a network and its prior precisions (and noise), and keep what had the largest marginal likelihood.

    The loss is the mean over samples of the negative log joint probability times ``sigma_noise^2 * temperature``, which
    keeps the step size of training in proportion to the squared error; the prior counts once for all data, so that its
    precision is the stated one for any number of outputs.

    Hyperparameters move by Newton steps of at most `lr_hyp` in any logarithm, of which every one increases the log
    marginal likelihood (it is concave). They go no further than as many steps of Adam with that rate would, and stop
    where the maximum is nearer; an untrained network cannot throw them far off.

    Args:
        model: the network, which is trained in place; parameters that require a gradient take part.
        train_loader: batches ``(inputs, targets)``, or mappings with targets under `dict_key_y`; gone through
            once to be counted, and for each epoch and update.
        likelihood: as in `Laplace`.
        hessian_structure: as in `Laplace`; over all weights.
        optimizer_cls: of the parameters.
        optimizer_kwargs: its arguments. A weight decay is refused: the prior is one.
        scheduler_cls: of the learning rate, stepped after every batch.
        scheduler_kwargs: its arguments.
        n_epochs: epochs of training.
        lr_hyp: the longest step in the logarithm of a hyperparameter, at most 0.5.
        prior_structure: as in `Laplace.optimize_prior_precision`: ``"scalar"``, ``"layerwise"``, ``"modulewise"`` or
            ``"diag"``, the last for ``"diag"`` and ``"full"`` curvatures.
        n_epochs_burnin: epochs of training before the first update.
        n_hypersteps: steps of an update.
        marglik_frequency: epochs from one update to the next.
        prior_prec_init: the prior precision of the first epochs.
        sigma_noise_init: the noise scale of the first epochs; regression only.
        temperature: T.
        fix_sigma_noise: whether the noise stays at `sigma_noise_init`.
        dict_key_y: the name of the targets in loaders that yield mappings.
        progress_bar: whether to show one over the epochs.

    Returns:
        The fitted posterior, the model, and the course of training.

    Raises:
        UnsupportedError: for options that are not served; nothing was trained.
        DataError: for a loader or batch that cannot be used.
        OutputError: for outputs of the wrong shape, or not finite; the model is at the parameters that have them.
    """
    counts = {"n_epochs": n_epochs, "n_hypersteps": n_hypersteps, "marglik_frequency": marglik_frequency}
    for name, count in counts.items():
        positive_integer(name, count)
    if not 0 < lr_hyp <= 0.5:
        raise ValueError(f"lr_hyp must be above 0 and at most 0.5, found {lr_hyp}")
    if (optimizer_kwargs or {}).get("weight_decay"):
        raise UnsupportedError("optimizer_kwargs sets a weight_decay, but the prior is one; leave it out")
    check_structure(prior_structure)
    train_loader = Labelled(train_loader, dict_key_y)
    family = likelihoods.resolve(likelihood)
    space = ParameterSpace.of(model, "all")
    groups = group_of_coordinate(space, prior_structure).to(device_of(model))
    start = check_precision(prior_prec_init).reshape(-1).double().to(groups.device)
    n_groups = int(groups.max()) + 1
    if len(start) not in (1, n_groups):
        raise ValueError(f"prior_prec_init must have 1 or {n_groups} entries, found {len(start)}")
    if numbers("sigma_noise_init", sigma_noise_init).numel() != 1:
        raise UnsupportedError("sigma_noise_init must be one number, expected no noise scale for each output")
    now = _Hyperparameters(start.expand(n_groups), float(sigma_noise_init))

    def fitted(at: _Hyperparameters) -> Laplace:
        la = Laplace(
            model,
            family,
            "all",
            hessian_structure,
            prior_precision=at.prior_precision.squeeze(),
            prior_structure=prior_structure,
            sigma_noise=at.sigma_noise,
            temperature=temperature,
            dict_key_y=dict_key_y,
        )
        return la.fit(train_loader)

    def climbed(la: Laplace, at: _Hyperparameters, n_steps: int) -> _Hyperparameters:
        found = climb(
            la._evidence(),
            la._start(prior_structure),
            at.sigma_noise,
            optimize_noise=family.has_noise and not fix_sigma_noise,
            n_steps=n_steps,
            max_step=lr_hyp,
        )
        return _Hyperparameters(*found)

    la = fitted(now)
    climbed(la, now, n_steps=0)  # what cannot be served is refused before anything is trained
    training = _Training(model, family, space, groups, la.n_data, temperature)
    optimizer = optimizer_cls([model.get_parameter(name) for name in space.names], **(optimizer_kwargs or {}))
    scheduler = None if scheduler_cls is None else scheduler_cls(optimizer, **(scheduler_kwargs or {}))
    margliks: list[float] = []
    losses: list[float] = []
    best: tuple[dict[str, Any], _Hyperparameters] | None = None
    for epoch in tqdm(range(1, n_epochs + 1), desc="epochs", disable=not progress_bar):
        losses.append(training.epoch(train_loader, optimizer, scheduler, now))
        if epoch <= n_epochs_burnin or epoch % marglik_frequency:
            continue
        la = fitted(now)
        now = climbed(la, now, n_hypersteps)
        evidence = float(la.log_marginal_likelihood(now.prior_precision.squeeze(), now.sigma_noise))
        if not margliks or evidence > max(margliks):
            best = copy.deepcopy(model.state_dict()), now
        margliks.append(evidence)
    optimizer.zero_grad(set_to_none=True)
    if best is not None:
        model.load_state_dict(best[0])
        now = best[1]
    return OnlineLaplace(fitted(now), model, margliks, losses)


@dataclass(frozen=True)
class _Training:
    """Steps on the negative log joint probability.

    Attributes:
        model: the network.
        likelihood: of its outputs.
        space: the parameters with a prior.
        groups: for each coordinate which precision is its own.
        n_data: N.
        temperature: T.
    """

    model: nn.Module
    likelihood: Likelihood
    space: ParameterSpace
    groups: Int[Tensor, " P"]
    n_data: int
    temperature: float

    @outside_inference_mode()
    def epoch(
        self,
        loader: Iterable[Any],
        optimizer: torch.optim.Optimizer,
        scheduler: Any | None,
        at: _Hyperparameters,
    ) -> float:
        """One epoch in training mode; returns the mean loss over samples, in nats."""
        modes = [(module, module.training) for module in self.model.modules()]
        total, count = 0.0, 0
        sigma = torch.tensor(at.sigma_noise, dtype=torch.float64)
        unit = at.sigma_noise**2 * self.temperature
        delta = at.prior_precision[self.groups]
        try:
            self.model.train()
            with torch.enable_grad():
                for index, (x, targets) in enumerate(batches(loader, device_of(self.model))):
                    loss = self._loss(x, targets, sigma, delta, f"batch {index}")
                    optimizer.zero_grad()
                    (unit * loss).backward()
                    optimizer.step()
                    if scheduler is not None:
                        scheduler.step()
                    total, count = total + float(loss.detach()) * len(targets), count + len(targets)
        finally:
            for module, training in modes:
                module.training = training
        if count == 0:
            raise DataError(
                "the loader yielded no batch, expected as many in every epoch; give one to iterate again"
            )
        return total / count

    def _loss(self, x: Any, targets: Tensor, sigma: Tensor, delta: Tensor, where: str) -> Float[Tensor, ""]:
        """``- log p(D | theta) / (N T) + sum_k delta_k |theta_k|^2 / (2 N)``, the first term estimated from a batch."""
        outputs = called(self.model, prepared(self.model, x, where))
        statistics = self.likelihood.statistics(outputs, self.likelihood.check(outputs, targets, where))
        log_likelihood = self.likelihood.log_likelihood(statistics, sigma)
        theta = self.space.flatten({name: self.model.get_parameter(name) for name in self.space.names})
        scatter = (delta * theta.double().square()).sum()
        return scatter / (2 * self.n_data) - log_likelihood / (len(targets) * self.temperature)
