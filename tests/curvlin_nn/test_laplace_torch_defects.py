"""What laplace-torch 0.3 gets wrong, one test for each defect: curvlin_nn passes, and laplace-torch is seen to fail.

Both libraries are asked by the same calls, as far as they have the same names. Where laplace-torch is installed, a test
must fail on it, by the kind of error that is named; where it is not, that half is skipped.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import warnings
from types import ModuleType

import network_oracle as oracle
import pytest
import torch
from laplace_torch_reference import network, sines
from networks import assert_same, state
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import curvlin_nn
from curvlin import NotPositiveDefiniteError

DOUBLE = torch.float64
SKIP = pytest.mark.skipif(
    importlib.util.find_spec("laplace") is None,
    reason="laplace-torch is not installed; that it fails is not shown",
)


def defect(what: str, fails_by: type[BaseException] = AssertionError) -> pytest.MarkDecorator:
    """A test of both libraries, which laplace-torch fails by that error."""
    expected = pytest.mark.xfail(raises=fails_by, strict=True, reason=f"laplace-torch 0.3: {what}")
    theirs = pytest.param("laplace", marks=[SKIP, expected, pytest.mark.filterwarnings("ignore")])
    return pytest.mark.parametrize("library", ["curvlin_nn", theirs], indirect=True)


@pytest.fixture
def library(request: pytest.FixtureRequest) -> ModuleType:
    return importlib.import_module(request.param)


def engine(library: ModuleType, curvature: str) -> dict[str, object]:
    """The option that names another curvature than the GGN."""
    if library is curvlin_nn:
        return {"curvature": curvature}
    curvlinops = importlib.import_module("laplace.curvature.curvlinops")
    return {"backend": {"ef": curvlinops.CurvlinopsEF, "hessian": curvlinops.CurvlinopsHessian}[curvature]}


def loader(x: Tensor, y: Tensor, batch_size: int = 4, **options) -> DataLoader:
    return DataLoader(TensorDataset(x, y), batch_size=batch_size, **options)


def inputs(n: int = 10) -> Tensor:
    return sines(n, 4, pace=0.6, phase=0.2)


def targets(n: int = 10) -> Tensor:
    return 2 * sines(n, 3, pace=0.9, phase=0.5)


def labels(n: int = 10) -> Tensor:
    return targets(n).argmax(1)


def held_out() -> Tensor:
    return 2 * sines(3, 4, pace=0.4, phase=0.9)


def close(found: Tensor, expected: Tensor, rtol: float = 1e-8) -> None:
    assert found.shape == expected.shape
    difference = float((found - expected).norm() / expected.norm())
    assert difference < rtol, f"{difference:.1e} off"


# -- tuning --------------------------------------------------------------------------------------------------


@defect("5.1: one metric sums up over the grid")
def test_grid_search_finds_the_best_of_the_grid(library):
    model = network()
    with torch.no_grad():
        model[-1].weight.mul_(6)  # overconfident
    la = library.Laplace(model, "classification", "all", "kron")
    la.fit(loader(inputs(), labels()))
    x = 2 * sines(12, 4, pace=0.4, phase=0.9)
    y = model(x).argmax(1)
    y[:3] = (y[:3] + 1) % 3  # and sometimes wrong
    la.optimize_prior_precision(
        method="gridsearch",
        pred_type="glm",
        link_approx="probit",
        val_loader=loader(x, y),
        log_prior_prec_min=-3,
        log_prior_prec_max=3,
        grid_size=13,
    )
    chosen = float(la.prior_precision)
    scores = {}
    for precision in torch.logspace(-3, 3, 13, dtype=DOUBLE).tolist():
        la.prior_precision = precision
        scores[precision] = float(nn.functional.nll_loss(la(x).log(), y))
    best = min(scores, key=scores.get)
    assert best == pytest.approx(10)
    assert chosen == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize("start", [1e-6, 1.0, 1e6])
@defect("5.14: a hundred steps of Adam, wherever they end")
def test_the_prior_precision_is_tuned_to_convergence_from_any_start(library, start):
    model = network()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1e-3)  # the optimum is far from one
    la = library.Laplace(model, "regression", "all", "kron", prior_precision=start)
    la.fit(loader(inputs(), targets()))
    la.optimize_prior_precision(method="marglik")
    log_precision = torch.as_tensor(la.prior_precision).detach().double().log().requires_grad_()
    evidence = la.log_marginal_likelihood(prior_precision=log_precision.exp())
    (slope,) = torch.autograd.grad(evidence.sum(), log_precision)
    # The slope is (gamma - scatter) / 2, with gamma the effective number of parameters.
    assert float(slope.abs()) < 1e-6 * float(la.scatter)


@defect("5.8: the loss of training is a mean over outputs, that of the posterior a sum")
def test_online_training_ends_at_the_mode_of_the_posterior_it_returns(library):
    x, y = inputs(20), sines(20, 4, pace=0.9, phase=0.5)
    model = nn.Linear(4, 4, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(sines(4, 4, pace=0.5, phase=0.1))
    la, model, *_ = library.marglik_training(
        model,
        loader(x, y, batch_size=20),
        likelihood="regression",
        hessian_structure="full",
        prior_structure="scalar",
        optimizer_kwargs={"lr": 0.02},
        n_epochs=400,
        n_epochs_burnin=300,
        marglik_frequency=50,
        n_hypersteps=1,
        lr_hyp=1e-6,
        prior_prec_init=3.0,
        fix_sigma_noise=True,
    )
    precision = float(la.prior_precision)
    assert precision == pytest.approx(3.0, rel=1e-3)
    ridge = torch.linalg.solve(x.T @ x + precision * torch.eye(4, dtype=DOUBLE), x.T @ y).T
    close(model.weight.detach(), ridge, rtol=1e-3)


# -- function space ------------------------------------------------------------------------------------------


@defect("5.2: the axes of outputs are mixed up between test and training inputs")
def test_function_space_equals_weight_space_for_several_outputs(library):
    answers = {}
    for structure, options, pred_type in [("full", {}, "glm"), ("gp", {"n_subset": 10}, "gp")]:
        la = library.Laplace(network(), "regression", "all", structure, prior_precision=0.7, **options)
        la.fit(loader(inputs(), targets()))
        answers[structure] = la(held_out(), pred_type=pred_type)
    close(answers["gp"][0], answers["full"][0])
    close(answers["gp"][1], answers["full"][1], rtol=1e-6)


@defect("5.3: only the diagonal of the output curvature counts")
def test_function_space_equals_weight_space_for_classes(library):
    answers = {}
    for structure, options, pred_type in [("full", {}, "glm"), ("gp", {"n_subset": 10}, "gp")]:
        la = library.Laplace(network(), "classification", "all", structure, prior_precision=0.7, **options)
        la.fit(loader(inputs(), labels()))
        answers[structure] = la(held_out(), pred_type=pred_type)
    close(answers["gp"], answers["full"], rtol=1e-6)


@defect("5.3: saturated points become observations of noise variance ten")
def test_function_space_learns_nothing_from_saturated_points(library):
    """The posterior is the prior."""
    model, x = network(), held_out()
    with torch.no_grad():
        model[-1].weight.mul_(1e5)
    la = library.Laplace(model, "classification", "all", "gp", prior_precision=0.7, n_subset=10)
    la.fit(loader(inputs(), model(inputs()).argmax(1)))
    prior_variance = oracle.jacobian(model, x).square().sum(-1) / 0.7
    close(la(x, pred_type="gp"), oracle.probit(model(x).detach(), prior_variance), rtol=1e-6)


@pytest.mark.parametrize("likelihood", ["regression", "classification"])
@defect("5.16: parameters of the whole network are counted", RuntimeError)
def test_function_space_of_the_last_layer_equals_its_weight_space(library, likelihood):
    y = targets() if likelihood == "regression" else labels()
    answers = []
    for structure, options, pred_type in [("full", {}, "glm"), ("gp", {"n_subset": 10}, "gp")]:
        options = {"prior_precision": 0.7, "last_layer_name": "4", **options}
        la = library.Laplace(network(), likelihood, "last_layer", structure, **options)
        la.fit(loader(inputs(), y))
        answers.append(la(held_out(), pred_type=pred_type))
    for found, expected in zip(answers[1], answers[0], strict=True):
        close(found, expected, rtol=1e-6)


class OfDict(nn.Module):
    """Takes a batch as its loader gives it."""

    def __init__(self) -> None:
        super().__init__()
        self.network = network()

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.network(batch["input_ids"])


@defect("5.16: its backend takes no dictionaries, and of others the keys are taken for samples", ValueError)
def test_function_space_takes_batches_that_are_dictionaries(library):
    batches = [
        {"input_ids": x, "labels": y} for x, y in zip(inputs().split(6), labels().split(6), strict=True)
    ]
    model = OfDict()
    la = library.Laplace(model, "classification", "all", "gp", prior_precision=0.7, n_subset=10)
    la.fit(batches)
    expected = library.Laplace(model.network, "classification", "all", "full", prior_precision=0.7)
    expected.fit(loader(inputs(), labels()))
    close(la({"input_ids": held_out()}, pred_type="gp"), expected(held_out()), rtol=1e-6)


# -- the empirical Fisher ------------------------------------------------------------------------------------


def empirical_fisher(model: nn.Module, x: Tensor, y: Tensor, likelihood: str) -> Tensor:
    """The sum of outer products of gradients of the negative log-likelihood of each sample, dense."""
    rows = []
    for sample, target in zip(x, y, strict=True):
        loss = oracle.LOSSES[likelihood](model(sample[None])[0], target)
        rows.append(oracle.flat(dict(enumerate(torch.autograd.grad(loss, list(model.parameters()))))))
    return torch.stack(rows).T @ torch.stack(rows)


@defect("5.4: the curvature of the last layer is zero")
def test_empirical_fisher_of_the_last_layer_is_seen(library):
    la = library.Laplace(
        network(), "classification", "last_layer", "diag", prior_precision=0.7, **engine(library, "ef")
    )
    la.fit(loader(inputs(), labels()))
    model = network()
    F = empirical_fisher(model, inputs(), labels(), "classification").diagonal()[-18:]
    close(la.posterior_variance, 1 / (F + 0.7), rtol=1e-6)


@defect("5.5: gradients are of a squared error, not of a log-likelihood")
def test_empirical_fisher_of_regression_is_that_of_the_log_likelihood(library):
    la = library.Laplace(network(), "regression", "all", "diag", prior_precision=0.7, **engine(library, "ef"))
    la.fit(loader(inputs(), targets()))
    F = empirical_fisher(network(), inputs(), targets(), "regression").diagonal()
    close(la.posterior_variance, 1 / (F + 0.7), rtol=1e-6)


@defect("5.5: its gradients do not know of the noise", pytest.fail.Exception)
def test_empirical_fisher_is_refused_where_it_does_not_know_of_the_noise(library):
    options = {"prior_precision": 0.7, **engine(library, "ef")}
    with pytest.raises(ValueError, match="sigma_noise must be 1 for curvature='ef'"):
        library.Laplace(network(), "regression", "all", "diag", sigma_noise=0.5, **options)
    la = library.Laplace(network(), "regression", "all", "diag", **options)
    la.fit(loader(inputs(), targets()))
    with pytest.raises(ValueError, match="sigma_noise must be 1 for curvature='ef'"):
        la.log_marginal_likelihood(sigma_noise=0.5)
    with pytest.raises(ValueError, match="sigma_noise must be 1 for curvature='ef'"):
        la.optimize_prior_precision(optimize_noise=True)
    assert float(la.sigma_noise) == 1


# -- samples -------------------------------------------------------------------------------------------------


@defect("5.6: one vector of noise serves all inputs")
def test_samples_of_functions_are_correlated_between_inputs_as_the_posterior_is(library):
    y = targets()[:, :1]
    la = library.Laplace(network(1), "regression", "all", "full", prior_precision=0.7)
    la.fit(loader(inputs(), y))
    x, n = held_out()[:2], 20_000
    _, covariance = la(x, joint=True)
    samples = la.functional_samples(x, n_samples=n, generator=torch.Generator().manual_seed(0)).squeeze(-1)
    rho = float(covariance[0, 1] / (covariance[0, 0] * covariance[1, 1]).sqrt())
    assert abs(rho) < 0.9
    # Fisher's transform of a correlation is normal with variance 1 / (n - 3).
    found = float(torch.corrcoef(samples.T)[0, 1])
    assert abs(found) < 0.99
    assert abs(math.atanh(found) - math.atanh(rho)) * math.sqrt(n - 3) < 4


@pytest.mark.parametrize("pred_type", ["glm", "nn"])
@defect("5.7: the generator is taken and not used")
def test_predictions_by_sampling_are_reproducible(library, pred_type):
    la = library.Laplace(network(), "classification", "all", "kron", prior_precision=0.7)
    la.fit(loader(inputs(), labels()))
    first, second, other = (
        la(
            held_out(),
            pred_type=pred_type,
            link_approx="mc",
            n_samples=5,
            generator=torch.Generator().manual_seed(seed),
        )
        for seed in (3, 3, 4)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


@defect("5.12: a Cholesky factor of what may be singular", torch.linalg.LinAlgError)
def test_outputs_without_uncertainty_can_be_sampled(library):
    """Where all inputs are zero and nothing is added to them, the output is known."""
    model = nn.Sequential(nn.Linear(4, 6, bias=False), nn.ReLU(), nn.Linear(6, 3, bias=False)).double()
    la = library.Laplace(model, "classification", "all", "full", prior_precision=0.7)
    la.fit(loader(inputs(), labels()))
    known = la(torch.zeros(2, 4, dtype=DOUBLE), link_approx="mc", n_samples=3)
    torch.testing.assert_close(known, torch.full((2, 3), 1 / 3, dtype=DOUBLE), rtol=1e-12, atol=0)


@pytest.mark.parametrize("link", ["bridge", "bridge_norm"])
@defect("5.11: exponentials overflow, and ones are put in their place")
def test_bridges_give_probabilities_however_large_the_logits(library, link):
    model = network()
    with torch.no_grad():
        model[-1].weight.mul_(2e3)
    x = held_out()
    la = library.Laplace(model, "classification", "last_layer", "diag", prior_precision=1.0)
    la.fit(loader(inputs(), labels()))
    p = la(x, link_approx=link)
    torch.testing.assert_close(p.sum(1), torch.ones(len(x), dtype=DOUBLE), rtol=1e-9, atol=0)
    assert torch.equal(p.argmax(1), model(x).argmax(1))


# -- numerics ------------------------------------------------------------------------------------------------


@defect("5.9: the process is ended where an eigendecomposition fails", SystemExit)
def test_low_precision_does_not_end_the_process(library):
    """Answered to the precision of the outputs."""
    model = network().bfloat16()
    la = library.Laplace(model, "regression", "all", "kron", prior_precision=0.7)
    la.fit(loader(inputs().bfloat16(), targets().bfloat16()))
    _, covariance = la(held_out().bfloat16())
    exact = library.Laplace(model.double(), "regression", "all", "kron", prior_precision=0.7)
    exact.fit(loader(inputs().bfloat16().double(), targets().bfloat16().double()))
    _, expected = exact(held_out().bfloat16().double())
    close(covariance.double(), expected, rtol=0.05)


@pytest.mark.parametrize("precision", [1e-6, 1e-8])
@defect(
    "5.10: factorised in single precision, where a small prior is lost",
    (AssertionError, torch.linalg.LinAlgError),
)
def test_small_priors_count_in_single_precision(library, precision):
    x, y = inputs(4), targets(4)
    single = network().float()
    la = library.Laplace(single, "regression", "all", "full", prior_precision=precision)
    la.fit(loader(x.float(), y.float()))
    model = single.double()
    H = oracle.ggn(model, x.float().double(), y.float().double(), oracle.half_squared_error)
    P = H + precision * torch.eye(len(H), dtype=DOUBLE)
    single.float()
    assert float(la.log_det_posterior_precision) == pytest.approx(float(torch.logdet(P)), abs=1e-2)
    _, covariance = la(held_out().float())
    J = oracle.jacobian(single.double(), held_out().float().double())
    close(covariance.double(), J @ torch.linalg.inv(P) @ J.mT, rtol=1e-3)


@defect("5.10: the evidence takes the logarithm of a negative determinant's size", pytest.fail.Exception)
def test_indefinite_posteriors_have_no_evidence(library):
    la = library.Laplace(
        network(), "regression", "all", "full", prior_precision=1e-3, **engine(library, "hessian")
    )
    with pytest.raises((NotPositiveDefiniteError, torch.linalg.LinAlgError)):
        la.fit(loader(inputs(), 10 * targets()))
        la.log_marginal_likelihood()


# -- data and model ------------------------------------------------------------------------------------------


@defect("5.13: the samples of the data set are counted, not those of the loader")
def test_samples_are_counted_as_they_come(library):
    x, y = inputs(), targets()
    la = library.Laplace(network(), "regression", "all", "kron", prior_precision=0.7)
    la.fit(loader(x, y, batch_size=2, sampler=[7, 1, 4, 2]))
    some = library.Laplace(network(), "regression", "all", "kron", prior_precision=0.7)
    some.fit(loader(x[[7, 1, 4, 2]], y[[7, 1, 4, 2]]))
    assert la.n_data == 4
    assert float(la.log_marginal_likelihood()) == pytest.approx(
        float(some.log_marginal_likelihood()), rel=1e-9
    )


class Stream(IterableDataset):
    def __iter__(self):
        return iter(zip(inputs(), targets(), strict=True))


@defect("5.13: the loader must have a length", TypeError)
def test_loaders_without_a_length_are_taken(library):
    la = library.Laplace(network(), "regression", "all", "kron", prior_precision=0.7)
    la.fit(DataLoader(Stream(), batch_size=4))
    expected = library.Laplace(network(), "regression", "all", "kron", prior_precision=0.7)
    expected.fit(loader(inputs(), targets()))
    assert float(la.log_marginal_likelihood()) == pytest.approx(
        float(expected.log_marginal_likelihood()), rel=1e-9
    )


@defect("5.13: a batch more is drawn than is used")
def test_every_batch_is_drawn_once(library):
    seen = []

    class Counted(TensorDataset):
        def __getitem__(self, index):
            seen.append(index)
            return super().__getitem__(index)

    la = library.Laplace(network(), "regression", "all", "kron")
    la.fit(DataLoader(Counted(inputs(), targets()), batch_size=4))
    assert sorted(seen) == list(range(10))


@defect("5.15: the model is left in another mode, without its gradients and with an attribute more")
def test_the_model_is_left_as_it_was(library):
    model = network().train()
    model(inputs()).sum().backward()
    before = state(model)
    la = library.Laplace(model, "regression", "all", "kron")
    la.fit(loader(inputs(), targets()))
    la(held_out())
    assert_same(before, state(model))


@defect("5.15: predictions are made in whatever mode the model is in")
def test_predictions_are_made_in_evaluation_mode(library):
    model = network()
    model.insert(2, nn.Dropout(0.5))
    la = library.Laplace(model.eval(), "regression", "all", "diag")
    la.fit(loader(inputs(), targets()))
    mean, _ = la(held_out())
    model.train()
    close(la(held_out())[0], mean)


@defect("5.17: warned on every occasion")
def test_what_is_asked_for_correctly_is_not_warned_about(library):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        la = library.Laplace(network(), "classification", "all", "kron")
        la.fit(loader(inputs(), labels()))
        la.optimize_prior_precision(method="marglik")
        la(held_out())
    assert [str(w.message) for w in caught] == []


@defect("5.18: a factor is kept for the bias that has no gradient", RuntimeError)
def test_a_frozen_bias_is_left_out(library):
    model = network()
    model[2].bias.requires_grad_(False)
    la = library.Laplace(model, "regression", "all", "kron", prior_precision=0.7)
    la.fit(loader(inputs(), targets()))
    kept = torch.cat([torch.full((p.numel(),), p.requires_grad) for p in model.parameters()])
    H = oracle.kfac(model, inputs(), targets(), oracle.half_squared_error)[kept][:, kept]
    P = H + 0.7 * torch.eye(len(H), dtype=DOUBLE)
    assert float(la.log_det_posterior_precision) == pytest.approx(float(torch.logdet(P)), rel=1e-10)


def test_low_rank_curvature_is_of_the_parameters_that_require_a_gradient():
    """5.18; laplace-torch's own needs a package that is on no index, so that it is not run here."""
    model = network()
    model[0].weight.requires_grad_(False)
    la = curvlin_nn.Laplace(model, "regression", "all", "lowrank", prior_precision=0.7)
    la.fit(loader(inputs(), targets()))
    assert la.n_params == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert la.posterior_precision.size == la.n_params


# -- found on the way ----------------------------------------------------------------------------------------


@defect("the normaliser of the log-likelihood is not tempered")
def test_data_seen_twice_are_data_at_temperature_two(library):
    x, y, options = inputs(), targets(), {"prior_precision": 0.7, "sigma_noise": 0.6}
    once = library.Laplace(network(), "regression", "all", "diag", **options)
    once.fit(loader(x, y))
    twice = library.Laplace(network(), "regression", "all", "diag", temperature=2.0, **options)
    twice.fit(loader(torch.cat([x, x]), torch.cat([y, y])))
    expected = float(once.log_marginal_likelihood())
    assert float(twice.log_marginal_likelihood()) == pytest.approx(expected, rel=1e-10)


@defect("what the evidence is asked at is kept")
def test_asking_for_an_evidence_changes_nothing(library):
    la = library.Laplace(network(), "regression", "all", "diag", prior_precision=0.7, sigma_noise=0.6)
    la.fit(loader(inputs(), targets()))
    before = float(la.log_marginal_likelihood())
    la.log_marginal_likelihood(
        prior_precision=torch.tensor(3.0, dtype=DOUBLE), sigma_noise=torch.tensor(2.0, dtype=DOUBLE)
    )
    assert float(la.log_marginal_likelihood()) == before


@defect("products with the curvature pass through float32")
def test_the_full_structure_has_the_precision_of_the_network(library):
    la = library.Laplace(network(), "regression", "all", "full", prior_precision=0.7)
    la.fit(loader(inputs(), targets()))
    H = oracle.ggn(network(), inputs(), targets(), oracle.half_squared_error)
    P = H + 0.7 * torch.eye(len(H), dtype=DOUBLE)
    assert float(la.log_det_posterior_precision) == pytest.approx(float(torch.logdet(P)), rel=1e-11)
