"""What the published code of ScaLLA and ELLA gets wrong, one test for each defect that concerns posteriors on features.

Each test asks for the right answer by an independent formula, and shows that the wrong one would be noticed. Others
have theirs elsewhere: Gram matrices with empty diagonal blocks in test_feature_maps, entropies of doubled softmaxes in
test_prediction, mutated models and generators in test_surrogate and test_feature_posterior.
"""

from __future__ import annotations

import network_oracle as oracle
import pytest
import torch
from networks import Problem, problem
from torch import Tensor, nn
from torch.distributions import Categorical

from curvlin.testing import forbid_dense
from curvlin_nn import Laplace
from curvlin_nn.feature_maps import FeatureMap, JacobianMap, NystromMap, SurrogateMap, nystrom
from curvlin_nn.feature_maps import surrogate_targets as targets
from curvlin_nn.feature_maps.kernel_loss import distance_to_factors, distance_to_gram
from curvlin_nn.feature_maps.probes import probed
from curvlin_nn.parameters import ParameterSpace
from curvlin_nn.predictive import links
from curvlin_nn.products.dual import kernel

MAPS = ["nystrom", "surrogate"]


def seeded(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def surrogate(p: Problem, rank: int = 4, **options) -> SurrogateMap:
    return SurrogateMap.fit(p.model, p.batches(), rank=rank, n_steps=5, generator=seeded(), **options)


def map_of(kind: str, p: Problem) -> FeatureMap:
    if kind == "nystrom":
        return NystromMap(p.model, p.x, rank=4, outputs="all", generator=seeded())
    return surrogate(p)


def curvature(p: Problem, feature_map: FeatureMap) -> Tensor:
    """``sum_n Phi_n^T Lambda_n Phi_n`` at sigma = 1."""
    Phi = feature_map(p.x)[1].to_dense()
    Lambda = oracle.output_hessians(p.model, p.x, p.y, oracle.LOSSES[p.likelihood])
    return torch.einsum("nck,ncd,ndl->kl", Phi, Lambda, Phi)


# -- predictions -----------------------------------------------------------------------------------------------------


def test_draws_have_the_covariance_and_not_that_of_the_transposed_root(monkeypatch):
    """Theirs multiply noise by L from the right: the covariance of draws is ``L^T L``. Ours, as a linear map."""
    p = problem("mlp", "classification")
    la = Laplace(p.model, p.likelihood, feature_map=map_of("nystrom", p)).fit(p.batches())
    mean, covariance = la._predictive().mean_and_covariance(p.x_test)
    eye = torch.eye(3).double()
    monkeypatch.setattr(links, "standard_normal", lambda *_: eye[:, None].expand(3, 5, 3))
    root = links.draw(mean, covariance, 3) - mean
    torch.testing.assert_close(torch.einsum("snc,snd->ncd", root, root), covariance, rtol=1e-9, atol=1e-12)
    L = torch.linalg.cholesky(covariance)
    assert ((L.mT @ L - covariance).norm() / covariance.norm()) > 0.1


@pytest.mark.parametrize("kind", MAPS)
def test_draws_of_coordinates_have_the_posterior_covariance(kind):
    p = problem("mlp", "classification")
    la = Laplace(p.model, p.likelihood, feature_map=map_of(kind, p)).fit(p.batches())
    root = la.posterior_precision.unwhiten(torch.eye(4).double())
    expected = torch.linalg.inv(curvature(p, la.feature_map) + torch.eye(4).double())
    torch.testing.assert_close(root.mT @ root, expected, rtol=1e-9, atol=1e-12)


def test_the_entropy_is_that_of_the_mean_softmax():
    """Theirs takes a softmax of the mean probabilities again."""
    p = problem("mlp", "classification")
    la = Laplace(p.model, p.likelihood, feature_map=map_of("nystrom", p), prior_precision=0.1)
    found = la.fit(p.batches()).predict(p.x_test, n_samples=40, generator=seeded())
    probabilities = found.outputs.softmax(-1).mean(0)
    torch.testing.assert_close(found.entropy, Categorical(probabilities).entropy(), rtol=1e-10, atol=0)
    assert (found.entropy - Categorical(probabilities.softmax(-1)).entropy()).abs().min() > 1e-4


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("kind", MAPS)
def test_predictions_never_couple_the_samples_of_a_batch(kind, residual):
    """Theirs forms ``(B, B, C, C)`` for the sake of its diagonal."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 4))
    x, y = torch.randn(500, 6), torch.randint(4, (500,))
    p = Problem(model, "classification", x[:40], y[:40], x)
    la = Laplace(model, "classification", feature_map=map_of(kind, p), residual=residual).fit(p.batches(20))
    joint = (500 * 4) ** 2
    with forbid_dense(joint // 10):
        la(x), la(x, link_approx="mc", n_samples=2), la.functional_samples(x, 2, seeded())
    with forbid_dense(10**9) as guard:
        la._predictive().joint(x)
    assert guard.largest >= joint  # the guard sees what it is here to see


# -- the posterior and its evidence ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MAPS)
def test_the_noise_is_in_the_posterior(kind):
    """Theirs computes it and then overwrites it."""
    p = problem("mlp", "regression")
    la = Laplace(p.model, p.likelihood, feature_map=map_of(kind, p), prior_precision=0.7).fit(p.batches())
    H = curvature(p, la.feature_map)
    for sigma in (1.0, 0.2):
        la.sigma_noise = sigma
        expected = H / sigma**2 + 0.7 * torch.eye(4).double()
        torch.testing.assert_close(la.posterior_precision.to_dense(), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("likelihood", ["classification", "regression"])
@pytest.mark.parametrize("kind", MAPS)
def test_the_evidence_does_not_depend_on_how_the_data_are_cut(kind, likelihood):
    """Theirs adds means of batches up: log p(D) is too small by the batch size, and the noise wrong with it."""
    p = problem("mlp", likelihood)
    feature_map = map_of(kind, p)
    with torch.no_grad():
        f = p.model(p.x)
    if likelihood == "classification":
        expected = Categorical(logits=f).log_prob(p.y).sum()
    else:
        expected = torch.distributions.Normal(f, 1.0).log_prob(p.y).sum()
    found = []
    for size in (1, 3, 8):
        la = Laplace(p.model, likelihood, feature_map=feature_map).fit(p.batches(size))
        torch.testing.assert_close(la.log_likelihood, expected, rtol=1e-11, atol=0)
        evidence = la.log_marginal_likelihood()
        optimum = la.optimize_prior_precision(optimize_noise=likelihood == "regression")
        found.append(
            torch.stack([evidence, la.prior_precision, torch.as_tensor(optimum.sigma_noise)]).double()
        )
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-7, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", MAPS)
def test_the_prior_precision_loses_no_digits(kind, dtype):
    """Theirs is float32 whatever the model is; ours is kept in float64, and answers are those of the model."""
    p = problem("mlp", "regression")
    p = Problem(p.model.to(dtype), p.likelihood, p.x.to(dtype), p.y.to(dtype), p.x_test.to(dtype))
    delta = torch.tensor(1 / 3, dtype=torch.float64)
    la = Laplace(p.model, p.likelihood, feature_map=map_of(kind, p), prior_precision=delta).fit(p.batches())
    assert float(la.prior_precision) == 1 / 3
    assert {t.dtype for t in (*la(p.x_test), la.functional_samples(p.x_test, 2, seeded()))} == {dtype}
    if dtype == torch.float64:
        found = la.posterior_precision.to_dense() - curvature(p, la.feature_map)
        torch.testing.assert_close(found, delta * torch.eye(4).double(), rtol=1e-10, atol=1e-11)
        assert found.dtype == la.prior_precision_diag.dtype == dtype


# -- features --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 2, 3, 4])
def test_the_gram_matrix_is_exact_for_parts_that_do_not_divide_the_data(chunk, monkeypatch):
    """Theirs leaves the blocks on the diagonal at zero, and makes the matrix definite by jitter."""
    p = problem("mlp", "classification", n=8)
    _, Psi = JacobianMap(p.model)(p.x[:1])
    per_sample = sum(t.numel() for t, _ in Psi._tensors())
    monkeypatch.setattr(nystrom, "ROW_BUDGET", chunk * per_sample)
    rows = list(nystrom._rows(JacobianMap(p.model), p.x, torch.arange(8), "all", None))
    sizes = [part.n_samples for part in rows]
    assert sizes[:2] == [1, chunk] and sum(sizes) == 8
    J = oracle.jacobian(p.model, p.x).flatten(0, 1)
    torch.testing.assert_close(kernel(rows), J @ J.mT, rtol=1e-9, atol=1e-11)
    rows = NystromMap(p.model, p.x, outputs="all")(p.x)[1].to_dense().flatten(0, 1)
    torch.testing.assert_close(rows @ rows.mT, J @ J.mT, rtol=1e-8, atol=1e-9)


def test_one_probe_gives_an_unbiased_gradient_of_the_squared_distance():
    """Theirs was once of the distance itself, whose gradient is that of no fixed target."""
    p, n = problem("mlp", "regression", n=3, n_outputs=2), 1500
    J = oracle.jacobian(p.model, p.x).flatten(0, 1)
    F = torch.randn(6, 2, dtype=torch.float64, generator=seeded()) * J.norm() / 6**0.5
    Y = probed(p.model, ParameterSpace.of(p.model), p.x, n, seeded()) * n**0.5

    def score(power: float) -> Tensor:
        def distance(F: Tensor, y: Tensor) -> Tensor:
            return distance_to_factors(F, y[:, None]) ** power

        exact = torch.func.grad(lambda F: distance_to_gram(F, J @ J.mT) ** power)(F)
        found = torch.func.vmap(torch.func.grad(distance), in_dims=(None, 1))(F, Y)
        return ((found.mean(0) - exact) / (found.std(0) / n**0.5)).abs().max()

    assert score(1.0) < 4
    assert score(0.5) > 10


def test_the_kernel_between_samples_and_context_is_zero_however_many_there_are_of_each(monkeypatch):
    """Theirs cuts a batch in halves, which mixes the two where they are not as many."""
    p = problem("mlp", "regression", n=20, n_outputs=2)
    J, seen = oracle.jacobian, []
    distance = targets.ExactTargets.distance

    def spied(self, F, weights, batch, groups, where):
        found = distance(self, F, weights, batch, groups, where)
        x, n = targets.inputs(batch), 2 * len(batch[0][1])
        rows = J(p.model, x).flatten(0, 1)
        gram = rows @ rows.mT
        gram[:n, n:] = gram[n:, :n] = 0
        expected = (weights[:, None] * (gram - F @ F.mT) * weights).square().sum()
        seen.append((n, len(F), found.detach(), expected.detach()))
        return found

    monkeypatch.setattr(targets.ExactTargets, "distance", spied)
    sizes = {"batch_size": 5, "context_size": 2}
    surrogate(p, targets="exact", biased=True, **sizes)
    assert len(seen) == 5 and all((n, total) == (10, 14) for n, total, _, _ in seen)
    for _, _, found, expected in seen:
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("options", [{"targets": "jvp", "n_probes": 2}, {"protocol": "published"}], ids=str)
def test_probes_come_from_the_generator(options):
    """Theirs takes a seed, and draws from the default generator."""
    p = problem("mlp", "regression", n=20)
    found = []
    for seed, default in ((3, 0), (3, 1), (4, 0)):
        torch.manual_seed(default)
        before = torch.get_rng_state()
        fitted = SurrogateMap.fit(p.model, p.batches(), rank=3, n_steps=3, generator=seeded(seed), **options)
        assert torch.equal(torch.get_rng_state(), before)
        found.append(fitted(p.x_test)[1].to_dense())
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_a_surrogate_shares_no_memory_with_the_model_and_says_nothing(capfd):
    """Theirs moves and aliases the user's weights, and prints."""
    p = problem("mlp", "regression", n=20)
    own = nn.Sequential(nn.Linear(4, 9), nn.Unflatten(1, (3, 3))).double()
    for fitted in (surrogate(p), surrogate(p, rank=3, surrogate=own)):
        storages = {t.untyped_storage().data_ptr() for t in fitted.tensors().values()}
        theirs = {t.untyped_storage().data_ptr() for m in (p.model, own) for t in m.state_dict().values()}
        assert not storages & theirs
    Laplace(p.model, p.likelihood, feature_map=fitted).fit(p.batches())(p.x_test)
    assert capfd.readouterr() == ("", "")
