"""VaLLA against dense formulas: every Jacobian by `torch.func.jacrev`, every Gaussian by `torch.distributions`."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, kl_divergence
from torch.func import functional_call, jacrev

from curvlin import Woodbury
from curvlin_nn import Laplace, likelihoods
from curvlin_nn.capture import Recorder
from curvlin_nn.errors import (
    DataError,
    NotFittedError,
    StaleModelError,
    StorageError,
    TrainingDivergedError,
    UnsupportedError,
)
from curvlin_nn.feature_maps import JacobianMap
from curvlin_nn.metrics import evaluate
from curvlin_nn.parameters import ParameterSpace
from curvlin_nn.variational import InducingPoints, VaLLA
from curvlin_nn.variational.bound import Sparse, Variables

F64 = torch.float64
N_IN, N = 3, 24


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=generator(seed))


def network(n_outputs: int, seed: int = 0, dtype: torch.dtype = F64) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(N_IN, 5), nn.Tanh(), nn.Linear(5, n_outputs)).to(dtype)
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(randn(seed + i, *p.shape))
    return model


def targets(kind: str, n_outputs: int, seed: int = 9) -> Tensor:
    if kind == "classification":
        return torch.randint(n_outputs, (N,), generator=generator(seed))
    y = randn(seed, N, n_outputs)
    return (y > 0).to(F64) if kind == "binary" else y


X = randn(100, N, N_IN)
AT = randn(101, 4, N_IN)
"""Where predictions are asked for."""


def batched(x: Any, y: Tensor, size: int = 10) -> list[tuple[Any, Tensor]]:
    return list(zip(x.split(size), y.split(size), strict=True))


PROBLEMS = {
    "classification": ("classification", 3),
    "binary": ("binary", 1),
    "two bits": ("binary", 2),
    "regression": ("regression", 1),
    "two outputs": ("regression", 2),
}


def fitted(kind: str, **options: Any) -> tuple[VaLLA, nn.Module, list[tuple[Any, Tensor]]]:
    """A few steps, so that nothing is at its first value any more."""
    likelihood, n_outputs = PROBLEMS[kind]
    model, data = network(n_outputs), batched(X, targets(likelihood, n_outputs))
    noise = [0.5, 0.9] if kind == "two outputs" else 0.7 if likelihood == "regression" else 1.0
    va = VaLLA(model, likelihood, 7, "random", prior_precision=2.0, sigma_noise=noise, generator=generator())
    return va.fit(data, **{"n_steps": 8, "lr": 0.05, **options}), model, data


# -- dense ---------------------------------------------------------------------------------------------------


def dense_jacobian(model: nn.Module, x: Tensor) -> Tensor:
    """``(N, C, P)``."""
    parameters = dict(model.named_parameters())
    J = jacrev(lambda p: functional_call(model, p, (x,)).flatten(1))(
        {k: v.detach() for k, v in parameters.items()}
    )
    return torch.cat([J[name].flatten(2) for name in parameters], dim=2)


def dense_rows(model: nn.Module, points: InducingPoints) -> Tensor:
    J = dense_jacobian(model, points.inputs)
    return J[torch.arange(len(points)), points.outputs]


def dense_precision(va: VaLLA, model: nn.Module) -> Tensor:
    J_Z, L = dense_rows(model, va.inducing_points), va._fit.sparse.root
    return va.prior_precision * torch.eye(J_Z.shape[1], dtype=F64) + J_Z.mT @ L @ L.mT @ J_Z


def dense_covariance(va: VaLLA, model: nn.Module, x: Tensor) -> Tensor:
    J = dense_jacobian(model, x)
    return torch.einsum("ncp,pq,mdq->ncmd", J, torch.linalg.inv(dense_precision(va, model)), J)


def own_covariance(va: VaLLA, model: nn.Module, x: Tensor) -> Tensor:
    return torch.einsum("ncnd->ncd", dense_covariance(va, model, x))


@torch.no_grad()
def dense_log_likelihood(va: VaLLA, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    f, V = model(x), own_covariance(va, model, x)
    if va.likelihood.name == "regression":
        noise = torch.diag(va.sigma_noise.square().expand(f.shape[1]))
        return MultivariateNormal(f, V + noise).log_prob(y)
    shrunk = f / torch.sqrt(1 + math.pi / 8 * V.diagonal(dim1=1, dim2=2))
    if va.likelihood.name == "classification":
        return -nn.functional.cross_entropy(shrunk, y, reduction="none")
    return -nn.functional.binary_cross_entropy_with_logits(shrunk, y, reduction="none").sum(1)


def close(actual: Tensor, expected: Tensor, rtol: float = 1e-10) -> None:
    assert actual.shape == expected.shape
    assert float((actual - expected).abs().max()) <= rtol * float(expected.abs().max())


def with_root(va: VaLLA, root: Tensor) -> VaLLA:
    """The same with another core ``A = L L^T``."""
    fit = va._fit
    va._fitted = replace(fit, sparse=replace(fit.sparse, root=root))
    return va


# -- what it is ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PROBLEMS)
def test_predictive_covariance_is_that_of_the_dense_precision(kind: str) -> None:
    va, model, _ = fitted(kind)
    _, Phi = JacobianMap(model)(AT)
    assert isinstance(va.posterior_precision, Woodbury) and va.posterior_precision.core is not None
    close(va.posterior_precision.to_dense(), dense_precision(va, model))
    close(va.predict(AT).output_covariance, own_covariance(va, model, AT))
    assert torch.equal(va.predict(AT).output_covariance, va.posterior_precision.inv_congruence(Phi))
    assert torch.equal(va.predict(AT).output_mean, model(AT).detach())


def test_joint_covariance_and_draws_are_those_of_functions() -> None:
    va, model, _ = fitted("two outputs")
    mean, covariance = va(AT, joint=True)
    expected = dense_covariance(va, model, AT).reshape(8, 8)
    close(covariance, expected)
    n = 20_000
    draws = va.functional_samples(AT, n, generator()).flatten(1) - mean
    # A product of two Gaussian entries has variance S_ii S_jj + S_ij^2.
    spread = (expected.diagonal()[:, None] * expected.diagonal() + expected.square()).sqrt() / math.sqrt(n)
    assert float(((draws.mT @ draws / n - expected) / spread).abs().max()) < 4
    alone = va.functional_samples(AT[1:2], 5, generator())
    close(alone, va.functional_samples(AT, 5, generator())[:, 1:2])


@pytest.mark.parametrize("kind", PROBLEMS)
def test_divergence_is_that_of_gaussians_over_all_weights(kind: str) -> None:
    va, model, _ = fitted(kind)
    P = dense_precision(va, model)
    zero, eye = torch.zeros(len(P), dtype=F64), torch.eye(len(P), dtype=F64)
    q, p = (MultivariateNormal(zero, precision_matrix=M) for M in (P, va.prior_precision * eye))
    close(va.kl_divergence, kl_divergence(q, p))


@pytest.mark.parametrize("kind", PROBLEMS)
def test_the_objective_is_the_dense_one(kind: str) -> None:
    va, model, data = fitted(kind)
    y = torch.cat([y for _, y in data])
    close(va.elbo(data), dense_log_likelihood(va, model, X, y).sum() - va.kl_divergence)


def test_class_weights_ignored_labels_and_soft_targets_count_as_they_do_in_the_loss() -> None:
    weight = torch.tensor([1.0, 2.0, 0.5], dtype=F64)
    likelihood = likelihoods.Categorical(weight=weight, label_smoothing=0.2, ignore_index=-100)
    model, y = network(3), targets("classification", 3)
    y[::5] = -100
    va = VaLLA(model, likelihood, 6, "random", generator=generator()).fit(batched(X, y), n_steps=2)
    shrunk = model(X).detach() / torch.sqrt(
        1 + math.pi / 8 * own_covariance(va, model, X).diagonal(dim1=1, dim2=2)
    )
    loss = nn.CrossEntropyLoss(weight, ignore_index=-100, label_smoothing=0.2, reduction="sum")
    close(va.elbo(batched(X, y)), -loss(shrunk, y) - va.kl_divergence)


@pytest.mark.parametrize("kind", ["classification", "two outputs"])
def test_inducing_points_at_all_data_with_the_curvature_for_a_core_are_full_laplace(kind: str) -> None:
    likelihood, C = PROBLEMS[kind]
    model, data = network(C), batched(X, targets(likelihood, C))
    everywhere = X.repeat_interleave(C, 0), torch.arange(C).repeat(N)
    va = VaLLA(model, likelihood, inducing=everywhere, prior_precision=2.0).fit(
        data, n_steps=1, optimize_inducing=False, optimize_prior_precision=False, optimize_noise=False
    )
    if likelihood == "classification":
        p = model(X).detach().softmax(-1)
        values, vectors = torch.linalg.eigh(torch.diag_embed(p) - p[:, :, None] * p[:, None])
        root = torch.block_diag(*(vectors * values.clamp(min=0).sqrt()[:, None, :]))
    else:
        root = torch.eye(N * C, dtype=F64)
    la = Laplace(model, likelihood, "all", "full", prior_precision=2.0).fit(data)
    va = with_root(va, root)
    close(va.predict(AT).output_covariance, la.predict(AT).output_covariance)
    found, expected = (q(AT) if likelihood == "classification" else q(AT)[1] for q in (va, la))
    close(found, expected)


def test_with_gaussian_noise_the_optimum_is_not_the_curvature_but_weighs_by_residuals() -> None:
    """``dO/dA = V (diag(1 / s_n - r_n^2 / s_n^2) - A) V / 2`` with the covariance V and ``s_n = V_nn + sigma^2``."""
    model, sigma2 = network(1), 0.5
    f, J = model(X).detach(), dense_jacobian(model, X)[:, 0]
    y = f + 0.25 * randn(5, N, 1)
    r2 = (y - f).square().squeeze(1)
    a = torch.full((N,), 0.5, dtype=F64)
    for _ in range(500):
        P = 2 * torch.eye(J.shape[1], dtype=F64) + J.mT @ (a[:, None] * J)
        s = (J * torch.linalg.solve(P, J.mT).mT).sum(1) + sigma2
        a = (a + 1 / s - r2 / s.square()) / 2
    rows = InducingPoints(X, torch.zeros(N, dtype=torch.long)).rows(Recorder(model, ParameterSpace.of(model)))

    def slope(precision: Tensor) -> float:
        root = precision.sqrt().diag().requires_grad_()
        q = Sparse(rows, root, torch.tensor(2.0).double(), torch.tensor(sigma2).double().sqrt())
        recorder = Recorder(model, ParameterSpace.of(model))
        fit = q.expected_likelihood(recorder, likelihoods.Gaussian(), X, y, "here").sum()
        (fit - q.dual.divergence()).backward()
        assert root.grad is not None
        return float(root.grad.abs().max())

    assert float(a.min()) > 0.1 and float(a.max()) < 0.9 / sigma2
    assert slope(a) < 1e-10
    assert slope(torch.full((N,), 1 / sigma2, dtype=F64)) > 1e-2


# -- how it is trained ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_gradients_by_finite_differences_in_all_that_is_trained(kind: str) -> None:
    likelihood, C = PROBLEMS[kind]
    model, y = network(C), targets(likelihood, C)
    recorder = Recorder(model, ParameterSpace.of(model))
    points = InducingPoints(randn(3, 4, N_IN), torch.arange(4) % C)
    one = torch.ones((), dtype=F64)
    variables = Variables(recorder, points, 2 * one, 0.7 * one, 3 * one)
    family = likelihoods.resolve(likelihood)

    def loss(*values: Tensor) -> Tensor:
        names = ("inputs", "log_precision", "log_noise", "log_diagonal", "below")
        for name, value in zip(names, values, strict=True):
            setattr(variables, name, value)
        q = variables.sparse()
        return q.dual.divergence() - q.expected_likelihood(recorder, family, X[:5], y[:5], "here").sum()

    start = (points.inputs, one * 0.3, one * -0.2, randn(4, 4), randn(5, 4, 4))
    assert torch.autograd.gradcheck(loss, tuple(t.clone().requires_grad_() for t in start), fast_mode=True)


@pytest.mark.parametrize("kind", PROBLEMS)
def test_a_fit_raises_its_objective(kind: str) -> None:
    before, _, data = fitted(kind, n_steps=1, lr=1e-9)
    after, _, _ = fitted(kind, n_steps=40)
    assert float(after.elbo(data)) > float(before.elbo(data)) + 0.5
    assert float(after.history.losses[-1]) == pytest.approx(-float(after.elbo(data)), rel=0.2)


def test_what_is_not_to_be_learned_stays() -> None:
    still = {"optimize_prior_precision": False, "optimize_noise": False, "optimize_inducing": False}
    va, _, _ = fitted("regression", **still)
    moved, _, _ = fitted("regression")
    assert float(va.prior_precision) == pytest.approx(2.0, rel=1e-14)
    assert float(va.sigma_noise) == pytest.approx(0.7, rel=1e-14)
    rows = {tuple(row) for row in X.tolist()}
    assert {tuple(z) for z in va.inducing_points.inputs.tolist()} <= rows
    assert float(moved.prior_precision) != 2.0 and float(moved.sigma_noise) != 0.7
    assert not {tuple(z) for z in moved.inducing_points.inputs.tolist()} & rows
    assert va.n_data == N


def test_the_best_held_out_state_stays() -> None:
    model, data = network(3), batched(X, targets("classification", 3))
    held_out = [(AT, torch.tensor([0, 1, 2, 0]))]
    va = VaLLA(model, "classification", 6, "random", generator=generator())
    va.fit(data, n_steps=60, lr=0.5, validation_loader=held_out, every=2, patience=3)
    scores = va.history.scores
    assert evaluate(va, held_out, ["nll"])["nll"] == pytest.approx(min(scores), rel=1e-12)
    best = scores.index(min(scores))
    assert va.history.best_step == va.history.steps[best] and len(scores) - 1 - best == 3


def test_one_generator_gives_one_posterior_and_the_default_one_stays() -> None:
    def fit() -> Tensor:
        va = VaLLA(model, "classification", 7, "random", generator=generator())
        return va.fit(data, n_steps=3)(AT)

    model, data = network(3), batched(X, targets("classification", 3))
    state = torch.get_rng_state()
    assert torch.equal(fit(), fit())
    assert torch.equal(state, torch.get_rng_state())
    other = VaLLA(network(3), "classification", 7, "random", generator=generator(1))
    other.fit(batched(X, targets("classification", 3)), n_steps=1, optimize_inducing=False)
    mine, _, _ = fitted("classification", optimize_inducing=False)
    assert not torch.equal(other.inducing_points.inputs, mine.inducing_points.inputs)


def test_without_a_generator_the_default_one_decides() -> None:
    def inputs(seed: int) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            va = VaLLA(network(3), "classification", 6, "random")
            va.fit(batched(X, targets("classification", 3)), n_steps=1, optimize_inducing=False)
            return va.inducing_points.inputs

    assert torch.equal(inputs(0), inputs(0)) and not torch.equal(inputs(0), inputs(1))


# -- placement -----------------------------------------------------------------------------------------------


def test_random_points_of_classes_are_samples_of_their_own_class() -> None:
    """The published code failed here, by a misspelt attribute and by a list where a tensor was needed."""
    y = targets("classification", 3)
    va = VaLLA(network(3), "classification", 8, "random", generator=generator())
    va.fit(batched(X, y), n_steps=1, optimize_inducing=False)
    points = va.inducing_points
    for z, c in zip(points.inputs, points.outputs, strict=True):
        (place,) = (z == X).all(1).nonzero().squeeze(1)
        assert y[place] == c
    assert sorted(torch.bincount(points.outputs).tolist()) == [2, 3, 3]
    assert len({tuple(z) for z in points.inputs.tolist()}) == 8


def test_a_rare_class_gives_what_it_has() -> None:
    y = torch.zeros(N, dtype=torch.long)
    y[3], y[10:] = 2, 1
    va = VaLLA(network(4), "classification", 9, "random", generator=generator())
    va.fit(batched(X, y), n_steps=1)
    assert torch.bincount(va.inducing_points.outputs, minlength=4).tolist() == [4, 4, 1, 0]


@pytest.mark.parametrize("kind", ["classification", "two outputs"])
def test_centres_are_means_of_the_samples_nearest_to_them(kind: str) -> None:
    pytest.importorskip("sklearn")
    likelihood, C = PROBLEMS[kind]
    y = targets(likelihood, C)
    va = VaLLA(network(C), likelihood, 2 * C, generator=generator())
    va.fit(batched(X, y), n_steps=1, optimize_inducing=False)
    points = va.inducing_points
    assert torch.bincount(points.outputs).tolist() == [2] * C
    groups = [X[y == c] for c in range(C)] if likelihood == "classification" else [X]
    for samples, centres in zip(groups, points.inputs.split(2 * C // len(groups)), strict=True):
        nearest = torch.cdist(samples, centres).argmin(1)
        for k, centre in enumerate(centres):
            close(centre, samples[nearest == k].mean(0), 1e-9)


def test_without_scikit_learn_centres_are_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    with pytest.raises(ImportError, match=r"inducing='kmeans' needs the extra 'metrics'"):
        VaLLA(network(3), "classification")
    VaLLA(network(3), "classification", inducing="random")


# -- other models and data -----------------------------------------------------------------------------------


class OfMapping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = network(3)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.net(a + b)


def test_inputs_that_are_no_tensor_have_inducing_points_that_stay() -> None:
    model, y = OfMapping(), targets("classification", 3)
    data = [{"a": x, "b": x.flip(1), "labels": y} for x, y in batched(X, y)]
    va = VaLLA(model, "classification", 6, "random", generator=generator())
    with pytest.raises(UnsupportedError, match="optimize_inducing=False"):
        va.fit(data, n_steps=1)
    va.fit(data, n_steps=2, optimize_inducing=False, validation_loader=data)
    assert va({"a": AT, "b": AT}).shape == (4, 3)
    if "sklearn" in sys.modules:
        with pytest.raises(UnsupportedError, match="inducing='random'"):
            VaLLA(model, "classification", 6).fit(data, optimize_inducing=False)


@pytest.mark.parametrize("shape", [(2, 3), (3,)])
def test_outputs_of_several_axes(shape: tuple[int, ...]) -> None:
    C = math.prod(shape)
    model = nn.Sequential(network(C), nn.Unflatten(1, shape))
    y = randn(3, N, *shape)
    va = VaLLA(model, "regression", 7, "random", generator=generator()).fit(batched(X, y), n_steps=2)
    mean, covariance = va(AT)
    close(covariance, own_covariance(va, model, AT))
    assert torch.equal(mean, model(AT).detach().flatten(1))


def test_tokens_of_a_sequence_are_terms() -> None:
    model = nn.Sequential(network(6), nn.Unflatten(1, (2, 3)))
    y = torch.randint(3, (N, 2), generator=generator())
    va = VaLLA(model, "classification", 7, "random", generator=generator()).fit(batched(X, y), n_steps=2)
    assert va(AT).shape == (4, 2, 3) and va.inducing_points.outputs.tolist() == [0, 1, 2, 3, 4, 5, 0]
    shrunk = model(X).detach() / torch.sqrt(
        1 + math.pi / 8 * own_covariance(va, model, X).diagonal(dim1=1, dim2=2).unflatten(1, (2, 3))
    )
    expected = -nn.functional.cross_entropy(shrunk.flatten(0, 1), y.flatten(), reduction="sum")
    close(va.elbo(batched(X, y)), expected - va.kl_divergence)


def test_one_sample_one_point_and_float32() -> None:
    model, y = network(1, dtype=torch.float32), targets("regression", 1).float()
    data = [(X[:1].float(), y[:1])]
    va = VaLLA(model, "regression", 1, "random", generator=generator()).fit(data, n_steps=3)
    mean, covariance = va(AT.float())
    assert mean.dtype == covariance.dtype == torch.float32
    exact = network(1)
    exact.load_state_dict({k: v.double() for k, v in model.state_dict().items()})
    J_Z = dense_rows(exact, replace(va.inducing_points, inputs=va.inducing_points.inputs.double()))
    P = va.prior_precision * torch.eye(J_Z.shape[1], dtype=F64)
    P = P + J_Z.mT @ va._fit.sparse.root.square() @ J_Z
    J = dense_jacobian(exact, AT.float().double())
    close(covariance.double(), J @ torch.linalg.solve(P, J.mT), 1e-5)


@pytest.mark.parametrize("kind", ["regression", "classification"])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float16, 2e-3), (torch.bfloat16, 1e-2)])
def test_a_model_of_half_precision_is_trained_as_one_of_double(
    kind: str, dtype: torch.dtype, rtol: float
) -> None:
    """Inputs move by less than such a dtype tells apart, and some of their squared gradients are zero in it."""
    likelihood, n_outputs = PROBLEMS[kind]
    model, x, y = network(n_outputs, dtype=dtype), X.to(dtype), targets(likelihood, n_outputs)
    found = []
    for own in (dtype, F64):
        va = VaLLA(model.to(own), likelihood, 6, "random", generator=generator())
        y_own = y.to(own) if y.is_floating_point() else y
        found.append(va.fit(batched(x.to(own), y_own), n_steps=60, lr=1e-3))
    half, double = found
    close(half._fit.sparse.prior_precision, double._fit.sparse.prior_precision, rtol)
    moved = double.inducing_points.inputs.to(dtype)
    assert half.inducing_points.inputs.dtype == dtype
    close(half.inducing_points.inputs.double(), moved.double(), rtol)


def test_some_of_the_weights() -> None:
    model, data = network(3), batched(X, targets("classification", 3))
    va = VaLLA(model, "classification", 6, "random", subset_of_weights="last_layer", generator=generator())
    va.fit(data, n_steps=2)
    assert va.posterior_precision.size == 5 * 3 + 3
    J = dense_jacobian(model, AT)[..., -18:]
    J_Z = dense_rows(model, va.inducing_points)[:, -18:]
    L = va._fit.sparse.root
    P = va.prior_precision * torch.eye(18, dtype=F64) + J_Z.mT @ L @ L.mT @ J_Z
    close(va.predict(AT).output_covariance, J @ torch.linalg.solve(P, J.mT))


@pytest.mark.parametrize("kind", ["classification", "two outputs"])
def test_a_file_gives_the_posterior_back(kind: str, tmp_path: Path) -> None:
    va, model, data = fitted(kind)
    va.save(tmp_path / "va.safetensors")
    again = VaLLA.load(tmp_path / "va.safetensors", model)
    assert torch.equal(again.predict(AT).output_covariance, va.predict(AT).output_covariance)
    assert torch.equal(again.elbo(data), va.elbo(data)) and str(again.history) == str(va.history)
    with torch.no_grad():
        model[0].weight.mul_(2)
    with pytest.raises(StaleModelError, match=r"0\.weight"):
        VaLLA.load(tmp_path / "va.safetensors", model)
    with pytest.raises(StorageError, match=r"curvlin_nn\.Laplace"):
        Laplace.load(tmp_path / "va.safetensors", model)


# -- what may go wrong ---------------------------------------------------------------------------------------


def test_the_model_is_untouched_whatever_happens() -> None:
    model = nn.Sequential(network(3), nn.Dropout(0.5)).train()
    model[0][0].bias.requires_grad_(False)
    model[0][2].weight.grad = torch.ones_like(model[0][2].weight)
    held = {name: t.clone() for name, t in model.state_dict().items()}
    data = batched(X, targets("classification", 3))
    va = VaLLA(model, "classification", 6, "random", generator=generator()).fit(data, n_steps=3)
    before = va(AT)

    class Interrupted:
        passes = 0

        def __iter__(self) -> Any:
            self.passes += 1
            yield data[0]
            if self.passes > 3:
                raise KeyboardInterrupt
            yield data[1]

    with pytest.raises(KeyboardInterrupt):
        va.fit(Interrupted(), n_steps=100)
    assert model.training and all(module.training for module in model.modules())
    assert all(torch.equal(t, held[name]) for name, t in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == [True, False, True, True]
    assert [p.grad is None for p in model.parameters()] == [True, True, False, True]
    assert not any(m._forward_hooks or m._backward_hooks for m in model.modules())
    assert va.model is model and torch.equal(va(AT), before)


def test_divergence_names_its_step_and_gives_the_best_state() -> None:
    model, data = network(3), batched(X, targets("classification", 3))
    va = VaLLA(model, "classification", 6, "random", generator=generator())
    with pytest.raises(TrainingDivergedError, match="at step") as found:
        va.fit(data, n_steps=50, lr=1e4, every=1, validation_loader=data)
    best = found.value.best
    assert isinstance(best, VaLLA) and bool(torch.isfinite(best(AT)).all())
    assert found.value.step > best.history.best_step
    assert evaluate(best, data, ["nll"])["nll"] == pytest.approx(min(best.history.scores))
    with pytest.raises(NotFittedError):
        va(AT)


def test_targets_that_are_no_numbers_name_their_batch() -> None:
    model, y = network(1), targets("regression", 1)
    y[15] = torch.nan
    with pytest.raises(DataError, match="batch 1"):
        VaLLA(model, "regression", 5, "random", generator=generator()).fit(batched(X, y), n_steps=5)


def test_a_model_that_changed_is_refused() -> None:
    va, model, data = fitted("classification")
    with torch.no_grad():
        model[0].weight[0, 0] += 1
    for ask in (lambda: va(AT), lambda: va.elbo(data)):
        with pytest.raises(StaleModelError, match=r"0\.weight"):
            ask()


POINTS = (X[:2], torch.tensor([0, 1]))

CONSTRUCTED = [
    ({"likelihood": "poisson"}, UnsupportedError, "poisson"),
    ({"likelihood": "heteroscedastic"}, UnsupportedError, "heteroscedastic"),
    ({"inducing": "kmean"}, UnsupportedError, "kmean"),
    ({"inducing": X}, TypeError, "pair"),
    ({"inducing": (X[:2], torch.tensor([0.0, 1.0]))}, TypeError, "LongTensor"),
    ({"inducing": (X[:3], torch.tensor([0, 1]))}, ValueError, "2 inputs"),
    ({"inducing": POINTS, "n_inducing": 3}, ValueError, "n_inducing"),
    ({"n_inducing": 0}, ValueError, "n_inducing"),
    ({"n_inducing": 2.5}, TypeError, "n_inducing"),
    ({"prior_precision": -1.0}, ValueError, "prior_precision"),
    ({"prior_precision": torch.ones(3)}, UnsupportedError, "prior_precision"),
    ({"sigma_noise": 0.5}, ValueError, "sigma_noise"),
    ({"generator": 3}, TypeError, "generator"),
]


@pytest.mark.parametrize(("arguments", "kind", "match"), CONSTRUCTED)
def test_arguments_are_checked(arguments: dict[str, Any], kind: type[Exception], match: str) -> None:
    with pytest.raises(kind, match=match):
        VaLLA(network(3), **{"likelihood": "classification", "inducing": "random", **arguments})


FITS = [
    ({"train_loader": []}, DataError, "no batch"),
    ({"train_loader": iter(batched(X, targets("classification", 3)))}, DataError, "several times"),
    ({"train_loader": iter(batched(X, targets("classification", 3), N))}, DataError, "no batch again"),
    ({"validation_loader": []}, DataError, "no"),
    ({"lr": 0.0}, ValueError, "lr"),
    ({"lr": "fast"}, TypeError, "lr"),
    ({"n_steps": 0}, ValueError, "n_steps"),
    ({"every": 0}, ValueError, "every"),
    ({"patience": 0}, ValueError, "patience"),
    ({"max_seconds": -1.0}, ValueError, "max_seconds"),
    ({"train_loader": batched(X[:4], torch.tensor([0, 1, 2, 0]))}, DataError, "n_inducing"),
    ({"train_loader": batched(X, torch.full((N,), 7))}, DataError, "batch 0|n_inducing"),
]


@pytest.mark.parametrize(("arguments", "kind", "match"), FITS)
def test_fits_are_checked_and_leave_the_object_as_it_was(
    arguments: dict[str, Any], kind: type[Exception], match: str
) -> None:
    va = VaLLA(network(3), "classification", 6, "random", generator=generator())
    data = {"train_loader": batched(X, targets("classification", 3)), **arguments}
    with pytest.raises(kind, match=match):
        va.fit(data.pop("train_loader"), **{"n_steps": 20, **data})
    with pytest.raises(NotFittedError):
        _ = va.posterior_precision


def test_given_outputs_out_of_range_are_refused() -> None:
    va = VaLLA(network(1), "regression", inducing=POINTS)
    with pytest.raises(ValueError, match=r"0 \.\. 0"):
        va.fit(batched(X, targets("regression", 1)))


def test_given_inputs_that_the_model_does_not_take_are_refused() -> None:
    va = VaLLA(network(3), "classification", inducing=(randn(0, 2, 5), torch.tensor([0, 1])))
    with pytest.raises(DataError, match="the inducing points"):
        va.fit(batched(X, targets("classification", 3)))


def test_draws_of_weights_and_other_kinds_of_prediction_are_refused() -> None:
    va, _, _ = fitted("classification")
    for kind in ("nn", "gp", "map"):
        with pytest.raises(UnsupportedError, match=kind):
            va(AT, pred_type=kind)
