"""SurrogateMap: kernels by probes and products, the distance in feature space, its optimum, and trainings."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap
from torch.utils.data import DataLoader, TensorDataset

from curvlin_nn import Laplace
from curvlin_nn.errors import (
    DataError,
    NotFittedError,
    OutputError,
    StaleModelError,
    StorageError,
    TrainingDivergedError,
    UnsupportedError,
)
from curvlin_nn.feature_maps import JacobianMap, SurrogateMap, kernel_error, surrogate_training
from curvlin_nn.feature_maps.jacobian import rows_of_outputs
from curvlin_nn.feature_maps.kernel_loss import (
    distance_to_factors,
    distance_to_gram,
    least_error,
    relative_error,
)
from curvlin_nn.feature_maps.leading import leading_directions
from curvlin_nn.feature_maps.pool import Pool
from curvlin_nn.feature_maps.probes import gram_by_products, probed, tangents
from curvlin_nn.feature_maps.surrogate_head import WidenedHead, solve_heads
from curvlin_nn.feature_maps.surrogate_network import tangents_of, widened
from curvlin_nn.feature_maps.surrogate_tangents import Tangents, WithTangents
from curvlin_nn.parameters import ParameterSpace


def mlp(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).to(dtype)


class Unserved(nn.Module):
    """A parameter that no layer rule covers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(2, 3, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sinh(torch.cumsum(self.weight, 1) @ x.mT).mT


def data(n: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(n, 3, dtype=dtype, generator=torch.Generator().manual_seed(1))


def loader(x: Tensor, batch_size: int = 7) -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(TensorDataset(x, torch.zeros(len(x))), batch_size)


def jacobian(model: nn.Module, x: Tensor) -> Tensor:
    """The rows of all outputs ``(N C, P)``, sample by sample."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def of_one(x: Tensor) -> dict[str, Tensor]:
        return jacrev(lambda p: functional_call(model, p, (x[None],))[0])(parameters)

    rows = vmap(of_one)(x)
    return torch.cat([rows[name].flatten(2) for name in parameters], 2).flatten(0, 1).detach()


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


# -- kernels -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [mlp(), Unserved()], ids=["layers", "no layer"])
def test_kernels_by_layers_and_by_products_are_that_of_autodiff(model: nn.Module) -> None:
    x = data(4)
    J = jacobian(model, x)
    exact = J @ J.mT
    by_layers = JacobianMap(model)(x)[1].gram().flatten(2).flatten(0, 1)
    by_products = gram_by_products(model, ParameterSpace.of(model), x)
    torch.testing.assert_close(by_layers, exact, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(by_products, exact, rtol=1e-10, atol=1e-12)


def test_products_through_attention_are_those_of_its_layers() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Unflatten(1, (3, 1)),
        nn.Linear(1, 4),
        nn.TransformerEncoderLayer(4, 2, 8, batch_first=True),
        nn.Flatten(),
        nn.Linear(12, 2),
    ).double()
    x = data(3)
    by_layers = JacobianMap(model)(x)[1].gram().flatten(2).flatten(0, 1)
    by_products = gram_by_products(model, ParameterSpace.of(model), x)
    torch.testing.assert_close(by_products, by_layers, rtol=1e-9, atol=1e-11)


def test_tangents_are_products_with_the_jacobian() -> None:
    model, x = mlp(), data(4)
    V = torch.randn(32, 3, dtype=torch.float64, generator=seeded())
    found = tangents(model, ParameterSpace.of(model), x, V.unbind(1))
    torch.testing.assert_close(found, jacobian(model, x) @ V, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
def test_one_probe_has_the_mean_and_the_variance_of_the_paper(distribution: str) -> None:
    """Eqs. 4 to 6: z-scores of the mean and of the mean square deviation, for every pair of rows."""
    model, x, n = mlp(), data(2), 1500
    space, J = ParameterSpace.of(model), jacobian(model, data(2))
    if distribution == "rademacher":
        Y = probed(model, space, x, n, seeded()) * n**0.5
    else:
        draws = torch.randn(n, space.size, dtype=torch.float64, generator=seeded())
        Y = tangents(model, space, x, draws)
    estimates = Y.mT[:, :, None] * Y.mT[:, None, :]
    kernel = J @ J.mT
    variance = kernel.diagonal()[:, None] * kernel.diagonal() + kernel.square()
    if distribution == "rademacher":
        variance = variance - 2 * J.square() @ J.square().mT
    z = (estimates.mean(0) - kernel) / (variance / n).sqrt()
    assert z.abs().max() < 4
    squares = (estimates - kernel).square()
    z = (squares.mean(0) - variance) / (squares.std(0) / n**0.5)
    assert z.abs().max() < 4


# -- distances ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [(), (6, 4)], ids=["unbiased", "biased"])
def test_the_distance_in_feature_space_is_that_of_pairs(groups: tuple[int, ...]) -> None:
    g = seeded()
    F = torch.randn(10, 3, dtype=torch.float64, generator=g, requires_grad=True)
    Y = torch.randn(10, 4, dtype=torch.float64, generator=g)
    mask = torch.block_diag(*(torch.ones(n, n, dtype=torch.float64) for n in groups or (10,)))
    pairs = ((mask * (Y @ Y.mT)) - F @ F.mT).square().sum()
    (expected,) = torch.autograd.grad(pairs, F)
    for found in (distance_to_factors(F, Y, groups), distance_to_gram(F, Y @ Y.mT, groups)):
        torch.testing.assert_close(found, pairs, rtol=1e-12, atol=0)
        torch.testing.assert_close(torch.autograd.grad(found, F)[0], expected, rtol=1e-10, atol=1e-10)


def test_features_linear_in_the_jacobian_reach_the_optimum_of_eckart_and_young() -> None:
    model, x, rank = mlp(), data(8), 3
    J = jacobian(model, x)
    gram = J @ J.mT
    W = torch.randn(J.shape[1], rank, dtype=torch.float64, generator=seeded()).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [W], max_iter=500, tolerance_grad=1e-10, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = distance_to_gram(J @ W, gram) / gram.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert relative_error(J @ W, gram) == pytest.approx(least_error(gram, rank), rel=1e-6)


def test_leading_directions_are_the_singular_vectors_of_all_rows() -> None:
    model, x, rank = mlp(), data(30), 4
    J = jacobian(model, x)
    recorded = JacobianMap(model)
    found = leading_directions(
        lambda: (rows_of_outputs(recorded.record(part)) for part in x.split(8)),
        rank,
        n_passes=10,
        generator=seeded(),
    )
    V = torch.linalg.svd(J).Vh[:rank].mT
    torch.testing.assert_close(found.V @ found.V.mT, V @ V.mT, rtol=1e-8, atol=1e-8)
    assert relative_error(J @ found.V, J @ J.mT) == pytest.approx(least_error(J @ J.mT, rank), rel=1e-8)


def test_leading_directions_are_near_the_optimum_without_being_asked_for_more_passes() -> None:
    """A spectrum that falls by 1e4 within the rank: what the first passes miss of its end is as large as the end."""
    generator, rank = seeded(), 40
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = (nn.Linear(10, 60), nn.Tanh(), nn.Linear(60, 60), nn.Tanh(), nn.Linear(60, 3))
    model = nn.Sequential(*layers).double()
    x = torch.randn(100, 10, dtype=torch.float64, generator=generator)
    J, recorded = jacobian(model, x), JacobianMap(model)
    parts = [rows_of_outputs(recorded.record(part)) for part in x.split(20)]
    found = leading_directions(lambda: iter(parts), rank, generator=generator)
    gram = J @ J.mT
    assert least_error(gram, rank) < 0.01
    assert relative_error(J @ found.V, gram) < 1.1 * least_error(gram, rank)


# -- trainings ---------------------------------------------------------------------------------------------------

KINDS = [
    {"targets": "distilled"},
    {"targets": "exact", "biased": True},
    {"targets": "jvp", "n_probes": 3},
    {"protocol": "published", "lr": 1e-3},
]
NAMES = ["distilled", "exact", "jvp", "published"]


@pytest.mark.parametrize("options", KINDS, ids=NAMES)
def test_a_training_that_goes_on_is_the_one_that_was_not_interrupted(
    options: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x, path = mlp(), data(40), tmp_path / "training"
    common: dict[str, object] = {"rank": 3, "n_steps": 12, "evaluate_every": 10, **options}
    whole = SurrogateMap.fit(model, loader(x), generator=seeded(), **common)  # type: ignore[arg-type]

    evaluate = surrogate_training.SurrogateTraining._evaluate

    def interrupted(self: surrogate_training.SurrogateTraining) -> None:
        if self.step == 10:
            raise KeyboardInterrupt
        evaluate(self)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(surrogate_training.SurrogateTraining, "_evaluate", interrupted)
        SurrogateMap.fit(model, loader(x), generator=seeded(), checkpoint=path, every=4, **common)  # type: ignore[arg-type]
    with pytest.raises(StorageError, match="another rank"):
        SurrogateMap.fit(model, loader(x), checkpoint=path, **{**common, "rank": 2})  # type: ignore[arg-type]
    with pytest.raises(StorageError, match="other samples"):
        SurrogateMap.fit(model, loader(x + 1), checkpoint=path, **common)  # type: ignore[arg-type]
    with pytest.raises(StaleModelError):
        SurrogateMap.fit(
            nn.Sequential(*mlp()[:2], nn.Linear(5, 2).double()), loader(x), checkpoint=path, **common
        )  # type: ignore[arg-type]
    resumed = SurrogateMap.fit(model, loader(x), checkpoint=path, **common)  # type: ignore[arg-type]
    for a, b in zip(whole.tensors().values(), resumed.tensors().values(), strict=True):
        assert torch.equal(a, b)
    assert whole.history is not None and resumed.history is not None
    assert whole.history.errors == resumed.history.errors
    assert whole.history.steps == resumed.history.steps == [0, 10, 12]
    assert not path.exists()


@pytest.mark.parametrize("options", KINDS, ids=NAMES)
def test_nothing_of_the_caller_changes(options: dict[str, object]) -> None:
    model, x = mlp(), data(40)
    model[0].weight.requires_grad_(False)
    model[0].bias.requires_grad_(False)
    own = nn.Sequential(nn.Linear(3, 6), nn.Unflatten(1, (2, 3))).double()
    before = copy.deepcopy(model.state_dict()), copy.deepcopy(own.state_dict()), torch.get_rng_state()
    SurrogateMap.fit(
        model,
        [(x, x)],
        rank=3,
        n_steps=3,
        surrogate=own,
        generator=seeded(),
        **options,  # type: ignore[arg-type]
    )(x[:2])
    assert all(map(torch.equal, before[0].values(), model.state_dict().values()))
    assert all(map(torch.equal, before[1].values(), own.state_dict().values()))
    assert torch.equal(before[2], torch.get_rng_state())
    assert model.training and own.training and not model[0].weight.requires_grad
    assert all(p.grad is None for p in (*model.parameters(), *own.parameters()))


def test_training_brings_the_kernel_nearer_and_keeps_the_best_state() -> None:
    model, x = mlp(), data(200)
    fitted = SurrogateMap.fit(model, loader(x), rank=8, n_steps=200, targets="exact", generator=seeded())
    history = fitted.history
    assert history is not None
    assert history.errors[history.best] < 0.8 * history.errors[0]
    held_out = Pool.of(loader(x), "train_loader", None)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(_seed()))
    outputs, Phi = fitted(held_out[order][:20])
    J = jacobian(model, held_out[order][:20])
    assert relative_error(Phi.matrix.flatten(0, 1), J @ J.mT) == pytest.approx(
        history.errors[history.best], rel=1e-10
    )
    torch.testing.assert_close(outputs, model(held_out[order][:20]).detach(), rtol=1e-12, atol=1e-12)
    assert history.optimum == pytest.approx(least_error(J @ J.mT, 8), rel=1e-8)


def test_a_posterior_on_the_features_is_that_of_dense_algebra() -> None:
    """K x K, with the residual of each sample from the exact kernel alone."""
    model, x = mlp(), data(40)
    targets = torch.randn(40, 2, dtype=torch.float64, generator=seeded())
    fitted = SurrogateMap.fit(model, [(x, targets)], rank=4, n_steps=20, generator=seeded())
    la = Laplace(model, "regression", feature_map=fitted, prior_precision=2.0, sigma_noise=0.5)
    la.fit([(x[:25], targets[:25]), (x[25:], targets[25:])])
    Phi = fitted(x)[1].matrix
    P = torch.einsum("nck,ncl->kl", Phi, Phi) / 0.25 + 2 * torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(la.posterior_precision.to_dense(), P, rtol=1e-10, atol=1e-10)
    new = data(5) + 1
    Phi, J = fitted(new)[1].matrix, jacobian(model, new).unflatten(0, (5, 2))
    left_out = torch.linalg.eigh((J @ J.mT - Phi @ Phi.mT) / 2)
    residual = (left_out.eigenvectors * left_out.eigenvalues.clamp(min=0)[:, None]) @ left_out.eigenvectors.mT
    _, covariance = la(new)
    torch.testing.assert_close(covariance, Phi @ P.inverse() @ Phi.mT + residual, rtol=1e-9, atol=1e-10)


def test_the_kernel_error_of_a_map() -> None:
    model, x = mlp(), data(12)
    J = jacobian(model, x)
    exact = kernel_error(JacobianMap(model), x)
    assert exact.relative < 1e-12 and exact.optimum < 1e-12 and exact.trace == pytest.approx(1)
    own = nn.Sequential(nn.Linear(3, 6), nn.Unflatten(1, (2, 3))).double()
    F = own(x).detach().flatten(0, 1)
    found = kernel_error(SurrogateMap(own, model), x)
    assert found.relative == pytest.approx(relative_error(F, J @ J.mT), rel=1e-10)
    assert found.optimum == pytest.approx(least_error(J @ J.mT, 3), rel=1e-8)
    assert found.trace == pytest.approx(float(F.square().sum() / J.square().sum()), rel=1e-10)


def _seed() -> int:
    return int(torch.randint(2**62, (), generator=seeded()))


def test_the_published_protocol_begins_at_random_at_the_published_scale() -> None:
    model, x = mlp(), data(40)
    fitted = SurrogateMap.fit(model, loader(x), rank=3, n_steps=1, protocol="published", generator=seeded())
    assert float(fitted.surrogate.scale) == pytest.approx(math.sqrt(32 / 3))
    first = fitted.surrogate.network[0].weight
    assert (first - model[0].weight).abs().max() > 0.01
    ours = SurrogateMap.fit(model, loader(x), rank=3, n_steps=1, lr=1e-12, n_tangents=0, generator=seeded())
    torch.testing.assert_close(ours.surrogate.network[0].weight, model[0].weight, rtol=1e-8, atol=1e-8)


def test_the_default_surrogate_of_outputs_at_several_positions() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Unflatten(1, (3, 2)), nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x = torch.randn(60, 6, dtype=torch.float64)
    fitted = SurrogateMap.fit(model, loader(x), rank=5, n_steps=3, generator=seeded())
    _, Phi = fitted(x[:7])
    assert Phi.shape == (7, 6, 5)
    _, alone = fitted(x[3:4])
    torch.testing.assert_close(alone.matrix[0], Phi.matrix[3], rtol=1e-12, atol=1e-12)
    assert fitted.output_shape == (3, 2)
    torch.testing.assert_close(fitted.record(x[:7]).outputs, model(x[:7]).detach(), rtol=1e-12, atol=1e-12)


def test_the_head_begins_at_the_ridge_regression_of_the_features() -> None:
    model, x = mlp(), data(40)
    network = widened(model, x, 2, 3, fresh=False, seed=0)
    wanted = torch.randn(40, 2, 3, dtype=torch.float64, generator=seeded())
    weights = torch.tensor([1.0, 0.5, 2.0, 1.0, 3.0], dtype=torch.float64)
    solve_heads(network, zip(x.split(9), wanted.split(9), weights.tolist(), strict=True), ridge=0.1)
    (head,) = (module for module in network.modules() if isinstance(module, WidenedHead))
    with torch.no_grad():
        h = model[:2](x)
        inputs = torch.cat(
            [h, torch.relu(h @ head.hidden.weight.mT + head.hidden.bias), torch.ones_like(h[:, :1])], 1
        )
    weighted = weights.repeat_interleave(9)[:40].square() * inputs.mT
    gram = weighted @ inputs
    gram += 0.1 * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    expected = inputs @ torch.linalg.solve(gram, weighted @ wanted.flatten(1))
    torch.testing.assert_close(network(x).flatten(1), expected, rtol=1e-9, atol=1e-10)
    assert not head._forward_pre_hooks


def wide_mlp() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        layers = (nn.Linear(3, 7), nn.Tanh(), nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 2))
    return nn.Sequential(*layers).double()


def test_tangents_are_derivatives_of_what_the_last_layer_sees() -> None:
    """Three directions: of all layers, of the last one alone, and one that is a thousand times as long."""
    model, x = wide_mlp(), data(9)
    space = ParameterSpace.of(model)
    V = torch.randn(3, space.size, dtype=torch.float64, generator=seeded())
    V[1, : -2 * 5 - 2] = 0
    V[2] *= 1e3
    directions = [space.unflatten(v) for v in V]
    tangents = Tangents(nn.Sequential(*model[:4], nn.Identity()), 3)
    assert not tangents(x).any()
    tangents.point(directions, x)
    found = tangents(x).unflatten(-1, (3, 5))
    values = {name: p.detach() for name, p in model.named_parameters()}
    trunk = model[:4]
    names = [name for name in values if not name.startswith("4.")]
    for k in (0, 2):
        h, expected = torch.func.jvp(
            lambda p: torch.func.functional_call(trunk, p, (x,)),
            ({name: values[name] for name in names},),
            ({name: directions[k][name] for name in names},),
        )
        expected *= h.norm() / expected.norm()
        torch.testing.assert_close(found[:, k], expected, rtol=0, atol=1e-6 * float(expected.abs().max()))
    assert not found[:, 1].any()
    assert not any(p.requires_grad for p in tangents.parameters())


def test_the_features_of_leading_directions_are_linear_in_tangents_and_the_last_inputs() -> None:
    """Without a ridge the regression on both is ``J v``; without tangents it is not."""
    model, x = wide_mlp(), data(60)
    J = jacobian(model, x)
    V = torch.linalg.svd(J).Vh[:2].mT
    wanted = (J @ V).unflatten(0, (60, 2))
    space = ParameterSpace.of(model)
    errors = []
    for n_tangents in (0, 2):
        network = widened(model, x[:4], 2, 2, fresh=False, seed=0, n_tangents=n_tangents)
        if (tangents := tangents_of(network)) is not None:
            tangents.point([space.unflatten(v) for v in V.mT], x)
        solve_heads(network, [(x[:25], wanted[:25], 1.0), (x[25:], wanted[25:], 1.0)], ridge=1e-12)
        errors.append(float((network(x).detach() - wanted).norm() / wanted.norm()))
    assert errors[1] < 1e-5 < 1e-3 < errors[0]


def test_tangents_are_kept_as_they_are_in_training_and_come_with_the_default_surrogate() -> None:
    model, x = wide_mlp(), data(60)
    fitted = SurrogateMap.fit(model, loader(x), rank=6, n_steps=5, generator=seeded())
    network = fitted.surrogate.network
    assert isinstance(network, WithTangents) and len(network.tangents.scales) == 4
    base = {name: p for name, p in network.tangents.copies[0].named_parameters()}
    for name, p in model[:4].named_parameters():
        assert torch.equal(base[name], p)
    assert network.network[0].weight.requires_grad
    assert network.tangents.scales.all()


@pytest.mark.parametrize("model", [nn.Linear(3, 2).double(), nn.Sequential(nn.Linear(3, 2)).double()])
def test_a_model_of_one_layer_has_no_tangents(model: nn.Module) -> None:
    fitted = SurrogateMap.fit(model, loader(data(40)), rank=8, n_steps=2, generator=seeded())
    assert tangents_of(fitted.surrogate.network) is None
    assert fitted.history is not None and fitted.history.errors[0] < 0.05


def test_layers_that_cannot_be_captured_are_probed() -> None:
    model, x = Unserved(), data(60)
    own = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Unflatten(1, (2, 2))).double()
    fitted = SurrogateMap.fit(model, loader(x), rank=2, n_steps=3, surrogate=own, generator=seeded())
    assert fitted.history is not None and fitted.history.targets == "jvp"
    assert len(fitted.history.errors) == 2


def test_context_is_taken_from_where_it_is_given_and_made_within_the_range_of_the_data() -> None:
    x = data(50)
    mixed = Pool.of(loader(x), "train_loader").mixed(20, seeded())
    assert mixed.x.shape == (20, 3)
    for column in range(3):
        assert torch.isin(mixed.x[:, column], x[:, column]).all()
    for context, n_errors in ((None, 2), (loader(x + 3), 2), ([x[:30] - 1], 2)):
        fitted = SurrogateMap.fit(mlp(), loader(x), context, rank=2, n_steps=1, generator=seeded())
        assert fitted.history is not None and len(fitted.history.context_errors) == n_errors
    without = SurrogateMap.fit(mlp(), loader(x), rank=2, n_steps=1, context_size=0, generator=seeded())
    assert without.history is not None and without.history.context_errors == []


def test_the_state_that_is_kept_has_the_least_error_of_both_kinds_of_samples() -> None:
    """Context counts by its weight, in the start's regression and in what is kept."""
    model, x = wide_mlp(), data(80)
    errors = []
    for weight in (1e-3, 1.0):
        fitted = SurrogateMap.fit(
            model, loader(x), loader(3 * x), rank=6, n_steps=30, evaluate_every=5, lr=1e-2,
            context_weight=weight, generator=seeded(),
        )  # fmt: skip
        history = fitted.history
        assert history is not None
        scores = [
            math.sqrt(e**2 + (weight * c) ** 2)
            for e, c in zip(history.errors, history.context_errors, strict=True)
        ]
        assert history.best == scores.index(min(scores))
        errors.append((history.errors[0], history.context_errors[0]))
    assert errors[0][0] < errors[1][0] and errors[0][1] > errors[1][1]


def test_the_picture_of_a_training_shows_its_errors_and_the_optimum() -> None:
    pytest.importorskip("matplotlib")
    from curvlin_nn.plots import surrogate_training as plot

    fitted = SurrogateMap.fit(
        mlp(), loader(data(40)), rank=2, n_steps=4, evaluate_every=2, generator=seeded()
    )
    history = fitted.history
    assert history is not None
    held_out, context, optimum = plot(fitted).lines
    assert list(held_out.get_xdata()) == [0, 2, 4] and list(held_out.get_ydata()) == history.errors
    assert list(context.get_ydata()) == history.context_errors
    assert set(optimum.get_ydata()) == {history.optimum}
    with pytest.raises(NotFittedError, match="history"):
        plot(SurrogateMap(fitted.surrogate, mlp()))


# -- what is refused ---------------------------------------------------------------------------------------------


def test_a_training_that_diverges_says_at_which_step_and_keeps_the_best_state() -> None:
    model, x = mlp(), data(40)
    with pytest.raises(TrainingDivergedError, match="step") as caught:
        SurrogateMap.fit(model, loader(x), rank=3, n_steps=500, lr=1e12, generator=seeded())
    best = caught.value.best
    assert isinstance(best, SurrogateMap) and 0 < caught.value.step <= 500
    assert torch.isfinite(best(x)[1].to_dense()).all()


@pytest.mark.parametrize(
    ("surrogate", "found"),
    [
        (nn.Linear(3, 6), r"\(4, 6\)"),
        (nn.Sequential(nn.Linear(3, 6), nn.Unflatten(1, (3, 2))), r"\(4, 3, 2\)"),
        (nn.Sequential(nn.Linear(3, 8), nn.Unflatten(1, (2, 4))), r"\(4, 2, 4\)"),
    ],
)
def test_features_of_another_shape_are_refused(surrogate: nn.Module, found: str) -> None:
    with pytest.raises(OutputError, match=found):
        SurrogateMap.fit(
            mlp(), loader(data(40)), rank=3, n_steps=1, surrogate=surrogate.double(), n_held_out=4
        )


class Partial(nn.Module):
    """A network whose derivative is not finite on some samples, or whose outputs are not."""

    def __init__(self, outputs: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.outputs = nn.Linear(3, 2).double(), outputs

    def forward(self, x: Tensor) -> Tensor:
        h, good = self.layer(x), x[:, :1] < 1.5
        return h + torch.where(good, 0.0, math.inf) if self.outputs else (h * good).square().sqrt()


@pytest.mark.parametrize("outputs", [True, False], ids=["outputs", "derivatives"])
@pytest.mark.parametrize("targets", ["distilled", "exact", "jvp"])
def test_targets_that_are_not_finite_are_named_and_the_best_state_is_kept(
    targets: str, outputs: bool
) -> None:
    good, bad = data(40).clamp(max=1), data(40).clone()
    bad[:, 0] = torch.where(torch.arange(40) == 39, 2.0, bad[:, 0].clamp(max=1))
    own = nn.Sequential(nn.Linear(3, 6), nn.Unflatten(1, (2, 3))).double()
    common: dict[str, object] = {
        "rank": 3,
        "n_held_out": 2,
        "context_size": 0,
        "surrogate": own,
        "n_steps": 200,
    }
    SurrogateMap.fit(Partial(outputs), loader(good), targets=targets, **{**common, "n_steps": 1})  # type: ignore[arg-type]
    with pytest.raises(OutputError, match="must be finite, found NaN or Inf") as caught:
        SurrogateMap.fit(Partial(outputs), loader(bad), targets=targets, generator=seeded(), **common)  # type: ignore[arg-type]
    if targets == "distilled":  # seen before anything is trained
        assert caught.value.best is None
    else:
        assert "on the batch of step" in str(caught.value)
        best = caught.value.best
        assert isinstance(best, SurrogateMap) and best.history is not None
        x = data(5)
        torch.testing.assert_close(best.surrogate.network(x), own(x), rtol=1e-12, atol=0)  # that of step 0
        assert not best.surrogate.training


@pytest.mark.parametrize(
    ("surrogate", "message"),
    [
        (
            nn.Sequential(nn.Linear(3, 6), nn.Unflatten(1, (2, 3))),
            "in the model's dtype; on the held-out samples",
        ),
        (nn.Sequential(nn.Linear(4, 6), nn.Unflatten(1, (2, 3))).double(), "must take what the model takes"),
        (torch.tanh, "surrogate must be a torch.nn.Module, found builtin_function_or_method"),
        (nn.Unflatten(1, (3, 1)), "has no parameter that requires a gradient"),
    ],
    ids=["dtype", "input", "function", "no parameter"],
)
def test_surrogates_that_cannot_be_trained_are_refused(surrogate: nn.Module, message: str) -> None:
    with pytest.raises(UnsupportedError, match=message) as caught:
        SurrogateMap.fit(mlp(), loader(data(40)), rank=3, n_steps=1, surrogate=surrogate)
    assert "\n" not in str(caught.value)


class Empty(nn.Module):
    """Features of which there are none."""

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(len(x), 2, 0)


def test_a_map_of_a_network_that_does_not_fit_is_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"must be a torch\.nn\.Module, found function"):
        SurrogateMap(lambda x: x, mlp())  # type: ignore[arg-type]
    with pytest.raises(UnsupportedError, match="must take what the model takes"):
        SurrogateMap(nn.Sequential(nn.Linear(3, 6), nn.Unflatten(1, (2, 3))), mlp())(data(4))
    with pytest.raises(OutputError, match=r"found \(4, 2, 0\)"):
        SurrogateMap(Empty(), mlp())(data(4))


def test_options_that_contradict_each_other_are_refused() -> None:
    x = data(40)
    with pytest.raises(UnsupportedError, match="context_loader is given, and context_size=0 leaves it out"):
        SurrogateMap.fit(mlp(), loader(x), loader(x), rank=2, context_size=0)
    with pytest.raises(UnsupportedError, match="biased=True needs context"):
        SurrogateMap.fit(mlp(), loader(x), rank=2, context_size=0, biased=True)


def test_bad_data_is_refused() -> None:
    model, x = mlp(), data(40)
    with pytest.raises(DataError, match="train_loader yielded no sample"):
        SurrogateMap.fit(model, [], rank=2)
    with pytest.raises(DataError, match="context_loader yielded no sample"):
        SurrogateMap.fit(model, loader(x), [], rank=2)
    with pytest.raises(DataError, match="context_loader yields samples of shape"):
        SurrogateMap.fit(model, loader(x), [x[:, :2]], rank=2)
    with pytest.raises(DataError, match="context_loader yielded no sample"):
        SurrogateMap.fit(model, loader(x), [x[:0]], rank=2)
    with pytest.raises(DataError, match=r"yields samples of shape \(3,\) of torch.float32, expected shape"):
        SurrogateMap.fit(model, loader(x), [x.float()], rank=2)
    with pytest.raises(
        DataError, match=r"yields \{'a': a tensor\} as inputs, expected a tensor as train_loader does"
    ):
        SurrogateMap.fit(model, loader(x), [{"a": x, "labels": x}], rank=2)
    with pytest.raises(DataError, match="train_loader must yield batches of inputs, found a tensor"):
        SurrogateMap.fit(model, x, rank=2)
    with pytest.raises(DataError, match="held-out samples of context_loader must hold numbers, found NaN"):
        SurrogateMap.fit(model, loader(x), [x * math.nan], rank=2)
    with pytest.raises(DataError, match="rank must be at most 32"):
        SurrogateMap.fit(model, loader(x), rank=33)
    with pytest.raises(DataError, match="rank must be at most 8"):
        SurrogateMap.fit(model, loader(x[:5]), rank=9)
    with pytest.raises(DataError, match="train_loader must have at least 2 samples"):
        SurrogateMap.fit(model, loader(x[:1]), rank=1)
    with pytest.raises(DataError, match="train_loader must have at least 41 samples"):
        SurrogateMap.fit(model, loader(x), rank=1, n_held_out=40)
    with pytest.raises(DataError, match="context_loader must have at least 2 samples"):
        SurrogateMap.fit(model, loader(x), [x[:1]], rank=1)
    with pytest.raises(DataError, match="NaN"):
        SurrogateMap.fit(model, loader(x * math.nan), rank=2)
    huge = mlp(torch.float32)
    with torch.no_grad():
        huge[2].weight *= 1e25
    with pytest.raises(OutputError, match="kernel"):
        SurrogateMap.fit(huge, loader(x.float()), rank=2)
    with torch.no_grad():
        model[2].bias[0] = math.inf
    with pytest.raises(OutputError, match="finite"):
        SurrogateMap.fit(model, loader(x), rank=2)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"protocol": "theirs"}, UnsupportedError, "'ours', 'published'"),
        ({"targets": "ntk"}, UnsupportedError, "'distilled', 'exact', 'jvp'"),
        ({"protocol": "published", "targets": "exact"}, UnsupportedError, "targets='jvp'"),
        ({"rank": 0}, ValueError, "rank"),
        ({"lr": -1.0}, ValueError, "lr"),
        ({"lr": "large"}, ValueError, "lr must be a positive number, found 'large'"),
        ({"max_seconds": math.nan}, ValueError, "max_seconds"),
        ({"context_size": -1}, ValueError, "context_size"),
        ({"n_tangents": -1}, ValueError, "n_tangents"),
        ({"n_tangents": 3}, UnsupportedError, "n_tangents=3 is at most rank=2"),
        ({"n_tangents": 1, "targets": "exact"}, UnsupportedError, "found targets='exact'; leave it out"),
        ({"n_tangents": 1, "protocol": "published"}, UnsupportedError, "found targets='jvp'"),
        (
            {"n_tangents": 1, "surrogate": nn.Sequential(nn.Linear(3, 4), nn.Unflatten(1, (2, 2))).double()},
            UnsupportedError,
            "a surrogate of your own; leave it out",
        ),
        ({"every": 0}, ValueError, "every"),
    ],
)
def test_bad_options_are_refused(options: dict[str, object], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        SurrogateMap.fit(mlp(), loader(data(40)), **{"rank": 2, "n_steps": 1, **options})  # type: ignore[arg-type]


def test_models_without_a_linear_layer_at_the_end_need_a_surrogate_of_the_user() -> None:
    torch.manual_seed(0)
    convolutional = nn.Sequential(nn.Conv1d(1, 2, 3), nn.Flatten()).double()
    with pytest.raises(UnsupportedError, match="surrogate="):
        widened(convolutional, data(4)[:, None], 2, 3, fresh=False, seed=0)
    squared = nn.Sequential(nn.Linear(3, 4), nn.Unflatten(1, (2, 2))).double()
    with pytest.raises(UnsupportedError, match="surrogate="):
        widened(squared, data(4), 4, 3, fresh=False, seed=0)
    with pytest.raises(UnsupportedError, match=r"its last layer 'layer'.*widened, it fails"):
        widened(Partial(outputs=False), data(4), 2, 3, fresh=False, seed=0)


def test_operations_without_forward_mode_are_named() -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2))
    with pytest.raises(UnsupportedError, match="targets='exact'"):
        SurrogateMap.fit(model, loader(data(40, torch.float32)), rank=2, n_steps=1, targets="jvp")


def test_the_head_of_tied_weights_is_widened_and_the_embedding_kept() -> None:
    torch.manual_seed(0)
    tied = nn.Sequential(nn.Embedding(5, 3), nn.Tanh(), nn.Linear(3, 5, bias=False)).double()
    tied[2].weight = tied[0].weight
    network = widened(tied, torch.tensor([[0, 1], [2, 3]]), 10, 4, fresh=False, seed=0)
    assert isinstance(network[2], WidenedHead) and torch.equal(network[0].weight, tied[0].weight)


def test_a_trained_network_is_a_map_without_training() -> None:
    model, x = mlp(), data(4)
    own = nn.Sequential(nn.Linear(3, 6), nn.Dropout(), nn.Unflatten(1, (2, 3))).double()
    fitted = SurrogateMap(own, model)
    with pytest.raises(NotFittedError, match="K is not known"):
        _ = fitted.size
    outputs, Phi = fitted(x)
    assert fitted.size == 3 and not fitted.orthonormal and own.training
    torch.testing.assert_close(Phi.matrix, own[2](own[0](x)).detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(outputs, model(x).detach(), rtol=1e-12, atol=0)
    with pytest.raises(OutputError, match=r"\(4, 2, K\)"):
        SurrogateMap(nn.Linear(3, 6).double(), model)(x)
