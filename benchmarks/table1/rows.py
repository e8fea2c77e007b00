"""The rows of the table, in the order of the paper: each fits a method and returns what predicts."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import table1.mfvi
import table1.sngp
from curvlin import Isotropic
from curvlin_nn import Laplace
from curvlin_nn.feature_maps import JacobianMap, NystromMap, SurrogateMap, surrogate_training
from curvlin_nn.held_out import HeldOutOptimum
from curvlin_nn.predictive import PosteriorPredictive
from curvlin_nn.variational import FMGP, VaLLA
from table1.outputs import CertainLogits, DrawnLogits, GaussianLogits, Logits, Predict
from table1.problem import Problem


@dataclass
class Fit:
    """A fitted row.

    Attributes:
        predict: images to logits.
        options: hyperparameters, chosen or given, to be reported.
        seconds_before: of processor time spent on a part that an earlier row has made and left.
    """

    predict: Predict
    options: dict[str, Any] = field(default_factory=dict)
    seconds_before: float = 0.0


@dataclass(frozen=True)
class Row:
    """One method.

    Attributes:
        name: in the table.
        fit: the method.
        in_published: whether it is run in the published protocol as well.
        draws: whether the published script has draws of its logits, and takes one softmax before the entropy.
    """

    name: str
    fit: Callable[[Problem], Fit]
    in_published: bool = True
    draws: bool = False

    @property
    def n_softmax_as_published(self) -> int:
        return 1 if self.draws else 2


# -- the network, and posteriors of its weights -----------------------------------------------------------------------


def network(problem: Problem) -> Fit:
    model = problem.model

    @torch.no_grad()
    def predict(x: Tensor) -> Logits:
        return CertainLogits(model(x))

    return Fit(predict)


def kronecker(problem: Problem, subset_of_weights: str) -> Fit:
    la = Laplace(problem.model, "classification", subset_of_weights, "kron").fit(problem.train_loader())
    options = _choose_prior(la, problem, by_evidence=True)
    return Fit(_gaussian(la), options)


def ella(problem: Problem, residual: bool) -> Fit:
    """Directions of M rows of the Jacobian; M and K are those of the paper's run, or ours, twice as many."""
    x, y = problem.data.train
    n_samples, rank = (1024, 50) if problem.published else (2000, 100)
    generator = problem.generator()
    features = NystromMap(problem.model, x, n_samples=n_samples, rank=rank, labels=y, generator=generator)
    la = Laplace(problem.model, "classification", feature_map=features, residual=residual)
    options = _choose_prior(la.fit(problem.train_loader()), problem, by_evidence=False)
    return Fit(_gaussian(la), {"M": n_samples, "K": rank} | options)


# -- the surrogate ----------------------------------------------------------------------------------------------------


def scalla(problem: Problem, *, biased: bool = False, residual: bool = False) -> Fit:
    features, found = _surrogate(problem, biased)
    la = Laplace(problem.model, "classification", feature_map=features, residual=residual)
    options = _choose_prior(la.fit(problem.train_loader()), problem, by_evidence=False)
    return Fit(_gaussian(la), found["options"] | options, found["seconds"])


def _surrogate(problem: Problem, biased: bool) -> tuple[SurrogateMap, dict[str, Any]]:
    """Trained, or read where an earlier row has left it."""
    kind = "biased" if biased else "plain"
    name = f"surrogate-{problem.protocol}-{kind}-seed{problem.seed}-{problem.seconds:g}s.pt"
    path = problem.cache / name
    if path.exists():
        found = torch.load(path, weights_only=False)  # our own file, which holds a module
        return SurrogateMap(found["surrogate"], problem.model), found
    begin = surrogate_training.clock()
    features = SurrogateMap.fit(
        problem.model,
        problem.shuffled_loader(),
        problem.context_loader(),
        rank=100,
        protocol=problem.protocol,
        biased=biased,
        max_seconds=problem.seconds,
        pool_size=None if problem.published else problem.size.n_pool,
        generator=problem.generator(),
    )
    history = features.history
    assert history is not None
    seconds = surrogate_training.clock() - begin
    options = {
        "seconds": problem.seconds,
        "K": 100,
        "steps": history.steps[-1],
        "kernel error": history.errors[history.best],
    }
    found = {"surrogate": features.surrogate, "options": options, "seconds": seconds}
    unfinished = path.with_suffix(f".{os.getpid()}.unfinished")
    torch.save(found, unfinished)
    os.replace(unfinished, path)
    return features, found | {"seconds": 0.0}


# -- methods that are trained -----------------------------------------------------------------------------------------


def valla(problem: Problem) -> Fit:
    start, lr = (1.0, 1e-3) if problem.published else (_mean_kernel(problem), 1e-2)
    generator = problem.generator()
    posterior = VaLLA(
        problem.model, "classification", n_inducing=100, prior_precision=start, generator=generator
    )
    return _variational(posterior, problem, n_steps=15_000, lr=lr)


def _mean_kernel(problem: Problem) -> float:
    """The prior precision at which logits have a prior variance of one, on average over some training images."""
    _, J = JacobianMap(problem.model)(problem.data.train[0][:200])
    return float(Isotropic(torch.ones(()), J.size).inv_congruence_diagonal(J).mean())


def fmgp(problem: Problem) -> Fit:
    posterior = FMGP(problem.model, "classification", n_inducing=200, generator=problem.generator())
    return _variational(posterior, problem, n_steps=50_000, lr=1e-4 if problem.published else 1e-3)


def _variational(posterior: VaLLA | FMGP, problem: Problem, **options: Any) -> Fit:
    """As many steps as in the paper's run, if the time is enough."""
    batches = DataLoader(TensorDataset(*problem.data.train), 100, shuffle=True, generator=problem.generator())
    validation = problem.validation_loader()
    posterior.fit(batches, validation_loader=validation, every=500, max_seconds=problem.seconds, **options)
    found = {"steps": posterior.history.steps[-1], "best step": posterior.history.best_step}
    return Fit(_gaussian(posterior), {"seconds": problem.seconds} | options | found)


def mfvi(problem: Problem) -> Fit:
    optimizer = {"momentum": 0.9, "lr_log_std": 1e-3} if problem.published else {}
    draw = table1.mfvi.fit(problem.model, *problem.data.train, **optimizer, **_training(problem))
    return Fit(lambda x: DrawnLogits(draw(x)), {"seconds": problem.seconds})


def sngp(problem: Problem) -> Fit:
    moments = table1.sngp.fit(*problem.data.train, **_training(problem))
    return Fit(lambda x: GaussianLogits(*moments(x)), {"seconds": problem.seconds})


def _training(problem: Problem) -> dict[str, Any]:
    x_val, y_val = (None, None) if problem.published else problem.data.validation
    return {"seed": problem.seed, "seconds": problem.seconds, "x_val": x_val, "y_val": y_val}


# -- what they share --------------------------------------------------------------------------------------------------


def _gaussian(posterior: PosteriorPredictive) -> Predict:
    def predict(x: Tensor) -> Logits:
        found = posterior.predict(x)
        return GaussianLogits(found.output_mean, found.output_covariance)

    return predict


def _choose_prior(la: Laplace, problem: Problem, *, by_evidence: bool) -> dict[str, Any]:
    """By the likelihood of what is held out; in the published protocol by evidence, or left at one."""
    at_edge = False
    if not problem.published:
        optimum = la.optimize_prior_precision(
            method="gridsearch",
            val_loader=problem.validation_loader(),
            log_prior_prec_min=0,
            log_prior_prec_max=6,
            grid_size=61,
        )
        assert isinstance(optimum, HeldOutOptimum)
        at_edge = optimum.at_edge
    elif by_evidence:
        la.optimize_prior_precision()
    precision = la.prior_precision
    assert isinstance(precision, Tensor)
    found = {"prior precision": float(precision)}
    return found | ({"at the edge of the grid": True} if at_edge else {})


ROWS = (
    Row("MAP", network),
    Row("LLA", lambda problem: kronecker(problem, "all")),
    Row("LLLA", lambda problem: kronecker(problem, "last_layer")),
    Row("ELLA", lambda problem: ella(problem, residual=False)),
    Row("ELLA with residual", lambda problem: ella(problem, residual=True), in_published=False),
    Row("VaLLA", valla),
    Row("FMGP", fmgp),
    Row("MFVI", mfvi, draws=True),
    Row("SNGP", sngp, draws=True),
    Row("ScaLLA", scalla),
    Row("ScaLLA biased", lambda problem: scalla(problem, biased=True)),
    Row("ScaLLA with residual", lambda problem: scalla(problem, residual=True), in_published=False),
)
