"""Metrics: against sums written by hand, their defining integrals, scikit-learn, and torchmetrics where it is right."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import sklearn.metrics
import torch
from networks import Tied, problem
from scipy.integrate import quad
from scipy.stats import multivariate_normal, norm
from torch import nn
from torchmetrics.functional.classification import multiclass_calibration_error

from curvlin_nn import Laplace, likelihoods, metrics
from curvlin_nn.errors import DataError, OutputError, UnsupportedError

close = torch.testing.assert_close
BINS = 15


@pytest.fixture
def predictions():
    generator = torch.Generator().manual_seed(0)
    p = (3 * torch.randn(200, 4, generator=generator, dtype=torch.float64)).softmax(-1)
    return p, torch.multinomial(p, 1, generator=generator).squeeze(-1)


@pytest.fixture
def gaussians():
    generator = torch.Generator().manual_seed(1)
    mean, y = torch.randn(2, 30, 3, generator=generator, dtype=torch.float64)
    root = torch.randn(30, 3, 3, generator=generator, dtype=torch.float64)
    return mean, root @ root.mT + 0.1 * torch.eye(3), y


def exactly(actual: torch.Tensor, expected: float) -> None:
    assert actual.shape == () and actual.dtype == torch.float64
    assert float(actual) == pytest.approx(expected, rel=1e-10, abs=1e-14)


# -- probabilities -------------------------------------------------------------------------------------------------


def test_scores_of_probabilities_are_their_sums(predictions):
    p, y = predictions
    rows = list(zip(p.tolist(), y.tolist(), strict=True))
    exactly(metrics.nll(p, y), -sum(math.log(row[k]) for row, k in rows) / len(rows))
    exactly(metrics.accuracy(p, y), sum(max(row) == row[k] for row, k in rows) / len(rows))
    squares = sum(sum((q - (c == k)) ** 2 for c, q in enumerate(row)) for row, k in rows)
    exactly(metrics.brier(p, y), squares / len(rows))
    close(metrics.entropy(p), torch.tensor([-sum(q * math.log(q) for q in r) for r in p.tolist()]).double())
    close(metrics.max_probability(p), torch.tensor([max(r) for r in p.tolist()], dtype=torch.float64))


def test_scores_of_probabilities_are_those_of_scikit_learn(predictions):
    p, y = predictions
    exactly(metrics.nll(p, y), sklearn.metrics.log_loss(y, p.numpy()))
    exactly(metrics.accuracy(p, y), sklearn.metrics.accuracy_score(y, p.argmax(-1)))
    exactly(metrics.brier(p, y), sklearn.metrics.brier_score_loss(y, p.numpy(), scale_by_half=False))


def test_one_column_is_the_probability_of_a_one():
    p = torch.tensor([[0.9], [0.2], [0.4]], dtype=torch.float64)
    both = torch.cat([1 - p, p], -1)
    y = torch.tensor([1, 0, 1])
    for name in ("nll", "accuracy", "brier", "ece", "adaptive_ece"):
        metric = getattr(metrics, name)
        for targets in (y, y[:, None], y.double(), y.bool()):
            exactly(metric(p, targets), float(metric(both, y)))
    exactly(metrics.nll(p, y), -(math.log(0.9) + math.log(0.8) + math.log(0.4)) / 3)
    close(metrics.entropy(p), metrics.entropy(both))


def test_nll_takes_logarithms_where_probabilities_underflow():
    logits = torch.tensor([[0.0, 200.0, 3.0], [1.0, 0.0, 150.0]])
    y = torch.tensor([0, 1])
    expected = float(nn.functional.cross_entropy(logits.double(), y))
    assert float(metrics.nll(logits.softmax(-1), y)) == math.inf
    assert float(metrics.nll(logits.log_softmax(-1), y, log=True)) == pytest.approx(expected, rel=1e-6)
    f = torch.tensor([[-50.0], [45.0], [-1e-30]], dtype=torch.float64)
    bits = torch.tensor([1, 0, 0])
    log_p = nn.functional.logsigmoid(f)
    losses = nn.functional.binary_cross_entropy_with_logits(f.squeeze(), bits.double())
    exactly(metrics.nll(log_p, bits, log=True), float(losses))


def test_ignored_targets_do_not_count(predictions):
    p, y = predictions
    tokens, labels = p.reshape(20, 10, 4), y.reshape(20, 10).clone()
    kept = torch.rand(20, 10, generator=torch.Generator().manual_seed(3)) < 0.6
    labels[~kept] = -100
    for name in ("nll", "accuracy", "brier", "ece", "adaptive_ece"):
        metric = getattr(metrics, name)
        exactly(metric(tokens, labels, ignore_index=-100), float(metric(tokens[kept], labels[kept])))
        with pytest.raises(DataError, match="ignore_index"):
            metric(tokens, labels)


def hand_ece(confidence, hit, bins) -> float:
    """Over sets of predictions given as index lists."""
    n = len(confidence)
    return sum(abs(sum(hit[i] - confidence[i] for i in members)) / n for members in bins)


def test_ece_is_the_weighted_gap_of_right_closed_bins(predictions):
    p, y = predictions
    confidence, hit = p.max(-1).values.tolist(), (p.argmax(-1) == y).double().tolist()
    bins = [[i for i, c in enumerate(confidence) if b / BINS < c <= (b + 1) / BINS] for b in range(BINS)]
    exactly(metrics.ece(p, y), hand_ece(confidence, hit, bins))
    found = metrics.calibration_bins(p, y)
    assert found.count.tolist() == [len(members) for members in bins]
    for b, members in enumerate(bins):
        if members:
            exactly(found.confidence[b], sum(confidence[i] for i in members) / len(members))
            exactly(found.accuracy[b], sum(hit[i] for i in members) / len(members))
    # torchmetrics agrees, in float32, where no confidence is one.
    referee = multiclass_calibration_error(p, y, 4, n_bins=BINS)
    assert float(metrics.ece(p, y)) == pytest.approx(float(referee), abs=1e-6)


def test_confidence_of_one_shares_the_last_bin():
    p = torch.tensor([[1.0, 0.0]] * 50 + [[0.97, 0.03]] * 50)
    y = torch.tensor([1] * 50 + [0] * 50)
    assert float(metrics.ece(p, y)) == pytest.approx(abs(0.5 - (1 + 0.97) / 2), abs=1e-7)
    # Were torchmetrics to change its mind, the note in `ece` should go.
    assert float(multiclass_calibration_error(p, y, 2, n_bins=15)) == pytest.approx(0.515, abs=1e-6)


@pytest.mark.parametrize("n", [7, 15, 200])
def test_adaptive_ece_has_bins_of_equal_mass(predictions, n):
    p, y = (t[:n] for t in predictions)
    confidence, hit = p.max(-1).values.tolist(), (p.argmax(-1) == y).double().tolist()
    order = sorted(range(n), key=lambda i: confidence[i])
    bins = [[order[i] for i in range(n) if i * min(BINS, n) // n == b] for b in range(min(BINS, n))]
    sizes = [len(members) for members in bins]
    assert max(sizes) - min(sizes) <= 1
    exactly(metrics.adaptive_ece(p, y), hand_ece(confidence, hit, bins))


def test_adaptive_ece_does_not_depend_on_the_order_of_ties():
    generator = torch.Generator().manual_seed(0)
    q = torch.tensor([0.6, 0.7, 0.7, 0.9], dtype=torch.float64)[torch.randint(4, (100,), generator=generator)]
    p, y = torch.stack([q, 1 - q], -1), torch.randint(2, (100,), generator=generator)
    expected = float(metrics.adaptive_ece(p, y))
    for _ in range(5):
        order = torch.randperm(100, generator=generator)
        exactly(metrics.adaptive_ece(p[order], y[order]), expected)
    same = torch.full((100, 2), 0.5, dtype=torch.float64)  # one confidence: one gap, however many bins
    exactly(metrics.adaptive_ece(same, y), abs(0.5 - float((y == 0).double().mean())))


def test_calibration_bins_of_two_data_sets_add_up(predictions):
    p, y = predictions
    together = metrics.calibration_bins(p, y)
    summed = metrics.calibration_bins(p[:50], y[:50]) + metrics.calibration_bins(p[50:], y[50:])
    exactly(summed.ece, float(together.ece))
    with pytest.raises(ValueError, match="same edges"):
        metrics.calibration_bins(p, y) + metrics.calibration_bins(p, y, adaptive=True)


def test_gradients_of_proper_scores(predictions):
    p, y = predictions
    logits = p[:5].log().requires_grad_()
    assert torch.autograd.gradcheck(lambda f: metrics.nll(f.softmax(-1), y[:5]), logits)
    assert torch.autograd.gradcheck(lambda f: metrics.brier(f.softmax(-1), y[:5]), logits)


@pytest.mark.parametrize(
    ("p", "y", "error", "message"),
    [
        (torch.ones(2, 3), [0, 1], OutputError, "sum to one.* found a sum of 3; logits go through softmax"),
        (torch.tensor([[2.0, -1.0]]), [0], OutputError, r"lie in \[0, 1\], found 2"),
        (torch.tensor([[math.nan, 1.0]]), [0], OutputError, "found nan"),
        (torch.tensor([[1, 0]]), [0], OutputError, "floating tensor, found torch.int64"),
        (torch.tensor([0.3, 0.7]), [0, 1], OutputError, r"unsqueeze\(-1\)"),
        (torch.empty(2, 0), [0, 1], OutputError, "classes along the last axis"),
        (torch.eye(3), [0, 1], DataError, r"shape \(3,\).* found shape \(2,\)"),
        (torch.eye(3), [0, 1, 3], DataError, r"labels in 0 .. 2, found 3; name the label"),
        (torch.eye(3), [0.0, 1.0, 2.0], DataError, "integer labels, found dtype torch.float32"),
        (torch.eye(3), torch.eye(3).tolist(), DataError, "labels of shape"),
        (torch.tensor([[0.5], [0.5]]), [0.0, 0.5], DataError, "labels in 0 .. 1, found 0.5"),
        ([[0.5, 0.5]], [0], OutputError, "must be a tensor, found list"),
        (torch.empty(0, 3), torch.empty(0, dtype=torch.long), DataError, "no targets that count"),
    ],
)
def test_probabilities_and_labels_that_do_not_fit_are_refused(p, y, error, message):
    y = torch.as_tensor(y)
    for name in ("nll", "accuracy", "brier", "ece", "adaptive_ece"):
        with pytest.raises(error, match=message) as caught:
            getattr(metrics, name)(p, y)
        assert "\n" not in str(caught.value)


def test_rounding_of_half_precision_is_no_error():
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        p = (3 * torch.randn(50, 100, generator=torch.Generator().manual_seed(0))).softmax(-1).to(dtype)
        assert metrics.nll(p, torch.zeros(50, dtype=torch.long)).dtype == torch.float64
    with pytest.raises(OutputError, match="sum to one"):
        metrics.entropy(torch.full((1, 2), 0.5 + 1e-6, dtype=torch.float64))


# -- Gaussians -----------------------------------------------------------------------------------------------------


def test_gaussian_nll_is_that_of_scipy(gaussians):
    mean, covariance, y = gaussians
    rows = list(zip(y.numpy(), mean.numpy(), covariance.numpy(), strict=True))
    exactly(
        metrics.gaussian_nll(mean, covariance, y),
        -np.mean([multivariate_normal.logpdf(a, m, S) for a, m, S in rows]),
    )
    variance = covariance.diagonal(dim1=-2, dim2=-1)
    densities = norm.logpdf(y.numpy(), mean.numpy(), variance.sqrt().numpy())
    exactly(metrics.gaussian_nll(mean, variance, y), -densities.sum(1).mean())
    exactly(metrics.gaussian_nll(mean[:, 0], variance[:, 0], y[:, 0]), -densities[:, 0].mean())
    images = (t.reshape(5, 6, 3) for t in (mean, variance, y))
    exactly(metrics.gaussian_nll(*images), -densities.sum() / 5)


def test_crps_is_the_integral_of_the_squared_distance_of_distribution_functions(gaussians):
    mean, covariance, y = gaussians
    variance = covariance.diagonal(dim1=-2, dim2=-1)

    def integral(m: float, s: float, target: float) -> float:
        below = quad(lambda t: norm.cdf(t, m, s) ** 2, m - 12 * s, target, epsabs=1e-12)[0]
        above = quad(lambda t: norm.sf(t, m, s) ** 2, target, m + 12 * s, epsabs=1e-12)[0]
        return below + above

    cases = zip(mean[0].tolist(), variance[0].sqrt().tolist(), y[0].tolist(), strict=True)
    expected = np.mean([integral(*case) for case in cases])
    assert float(metrics.crps(mean[:1], variance[:1], y[:1])) == pytest.approx(expected, rel=1e-8)
    exactly(metrics.crps(mean, covariance, y), float(metrics.crps(mean, variance, y)))


def test_crps_far_in_the_tail_is_the_distance():
    one = torch.ones(1, dtype=torch.float64)
    exactly(metrics.crps(0 * one, one, 100 * one), 100 - 1 / math.sqrt(math.pi))


def test_crps_of_samples_is_unbiased():
    """Of three draws only, where the estimator that divides by S^2 is off by 158 standard errors."""
    generator = torch.Generator().manual_seed(0)
    n = 100_000
    y = torch.full((n,), 0.7, dtype=torch.float64)
    draws = torch.randn(3, n, generator=generator, dtype=torch.float64)
    by_pairs = (draws - y).abs().mean(0)
    for s, t in ((0, 1), (0, 2), (1, 2)):
        by_pairs = by_pairs - (draws[s] - draws[t]).abs() / 6
    found = metrics.crps_from_samples(draws, y)
    exactly(found, float(by_pairs.mean()))
    expected = metrics.crps(torch.zeros_like(y), torch.ones_like(y), y)
    assert abs(float((found - expected) / (by_pairs.std() / math.sqrt(n)))) < 4


def test_rmse_and_sharpness_are_roots_of_means(gaussians):
    mean, covariance, y = gaussians
    variance = covariance.diagonal(dim1=-2, dim2=-1)
    exactly(metrics.rmse(mean, y), math.sqrt(sum(d * d for d in (mean - y).flatten().tolist()) / 90))
    exactly(metrics.sharpness(variance), math.sqrt(sum(variance.flatten().tolist()) / 90))


def test_interval_coverage_counts_targets_within_quantiles(gaussians):
    mean, covariance, y = gaussians
    variance = covariance.diagonal(dim1=-2, dim2=-1)
    levels = [0.5, 0.9, 0.95]
    expected = []
    for level in levels:
        low, high = norm.interval(level, mean.numpy(), variance.sqrt().numpy())
        expected.append(((low <= y.numpy()) & (y.numpy() <= high)).mean())
    assert metrics.interval_coverage(mean, variance, y, levels).tolist() == pytest.approx(expected)
    assert float(metrics.interval_coverage(mean, covariance, y, 0.9)) == pytest.approx(expected[1])
    z = torch.randn(4, 20_000, generator=torch.Generator().manual_seed(0)).double()
    found = float(metrics.interval_coverage(0 * z, z * 0 + 1, z, 0.9))
    assert abs(found - 0.9) / math.sqrt(0.9 * 0.1 / z.numel()) < 4


@pytest.mark.parametrize(
    ("mean", "variance", "y", "error", "message"),
    [
        ((5, 1), (5, 1), (5,), DataError, r"shape \(N, ...\) of the mean, \(5, 1\), found \(5,\)"),
        ((5, 2), (5, 1), (5, 2), OutputError, r"variance must have the shape \(5, 2\)"),
        ((5, 2), (5, 2, 3), (5, 2), OutputError, r"or be covariances \(5, 2, 2\)"),
        ((0, 2), (0, 2), (0, 2), DataError, "no samples"),
    ],
)
def test_gaussians_that_do_not_fit_are_refused(mean, variance, y, error, message):
    with pytest.raises(error, match=message):
        metrics.gaussian_nll(torch.zeros(mean), torch.ones(variance), torch.zeros(y))


def test_gaussians_out_of_range_are_refused():
    one = torch.ones(3)
    with pytest.raises(OutputError, match=r"positive and finite, found 0; .* observation_noise=True"):
        metrics.crps(one, torch.tensor([1.0, 0.0, 1.0]), one)
    with pytest.raises(OutputError, match="mean must be real and finite"):
        metrics.rmse(one * math.nan, one)
    with pytest.raises(DataError, match="targets must be real and finite"):
        metrics.rmse(one, one * math.inf)
    with pytest.raises(ValueError, match="not positive definite"):
        metrics.gaussian_nll(torch.zeros(1, 2), torch.tensor([[[1.0, 2.0], [2.0, 1.0]]]), torch.zeros(1, 2))
    with pytest.raises(ValueError, match="level must lie between 0 and 1"):
        metrics.interval_coverage(one, one, one, [0.5, 95])
    with pytest.raises(OutputError, match="S >= 2"):
        metrics.crps_from_samples(one[None], one)
    with pytest.raises(DataError, match="no variances"):
        metrics.sharpness(torch.empty(0))


# -- out of distribution -------------------------------------------------------------------------------------------


def test_auroc_is_the_probability_of_the_right_order_with_ties_halved():
    generator = torch.Generator().manual_seed(0)
    inside = torch.randint(20, 30, (70,), generator=generator).float()  # above one, where a sigmoid saturates
    outside = torch.randint(22, 35, (50,), generator=generator).float()
    difference = outside[:, None].double() - inside
    expected = float(((difference > 0).double() + 0.5 * (difference == 0)).mean())
    exactly(metrics.auroc(inside, outside), expected)


def test_aupr_is_the_sum_over_thresholds():
    generator = torch.Generator().manual_seed(0)
    inside = torch.randint(20, 30, (70,), generator=generator).float()
    outside = torch.randint(22, 35, (50,), generator=generator).float()
    expected, before = 0.0, 0.0
    for threshold in sorted({*inside.tolist(), *outside.tolist()}, reverse=True):
        found, false = int((outside >= threshold).sum()), int((inside >= threshold).sum())
        expected += (found / 50 - before) * found / (found + false)
        before = found / 50
    exactly(metrics.aupr(inside, outside), expected)


def test_scores_that_do_not_fit_are_refused():
    with pytest.raises(DataError, match="no scores outside"):
        metrics.auroc(torch.rand(3), torch.empty(0))
    with pytest.raises(DataError, match="scores inside must be real and finite"):
        metrics.aupr(torch.tensor([math.nan]), torch.rand(3))


def test_missing_scikit_learn_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.metrics", None)
    with pytest.raises(ImportError, match=r"extra 'metrics'.*pip install 'curvlin\[metrics\]'"):
        metrics.auroc(torch.rand(3), torch.rand(3))

    def unread():
        raise AssertionError("the loader was read before the extra was found missing")
        yield

    with pytest.raises(ImportError, match="extra 'metrics'"):
        metrics.evaluate(lambda x: x, unread(), ood_loader=unread())


# -- over a loader -------------------------------------------------------------------------------------------------


def fitted(likelihood: str) -> tuple[Laplace, list, list]:
    p = problem("mlp", likelihood, n=23)
    la = Laplace(
        p.model, p.likelihood, subset_of_weights="all", hessian_structure="kron", prior_precision=0.3
    )
    la.fit(p.batches(10))
    return la, p.batches(4), [(6 * x, y) for x, y in p.batches(5)]


@pytest.mark.parametrize("score", ["entropy", "max_probability"])
def test_evaluate_is_the_metric_of_all_predictions_at_once(score):
    la, loader, outside = fitted("classification")
    found = metrics.evaluate(la, loader, ood_loader=outside, ood_score=score, n_bins=7)
    y = torch.cat([y for _, y in loader])
    p, p_out = (torch.cat([la(x) for x, _ in batches]) for batches in (loader, outside))
    uncertain = metrics.entropy if score == "entropy" else lambda q: -metrics.max_probability(q)
    expected = {
        "nll": metrics.nll(p, y),
        "accuracy": metrics.accuracy(p, y),
        "ece": metrics.ece(p, y, 7),
        "adaptive_ece": metrics.adaptive_ece(p, y, 7),
        "brier": metrics.brier(p, y),
        "auroc": metrics.auroc(uncertain(p), uncertain(p_out)),
        "aupr": metrics.aupr(uncertain(p), uncertain(p_out)),
    }
    assert found == pytest.approx({name: float(value) for name, value in expected.items()}, rel=1e-12)
    assert metrics.evaluate(lambda x: la(x), loader, ["nll", "ece"], n_bins=7) == pytest.approx(
        {"nll": found["nll"], "ece": found["ece"]}
    )


def test_evaluate_of_gaussians_includes_the_noise():
    la, loader, outside = fitted("regression")
    la.sigma_noise = 0.4
    found = metrics.evaluate(la, loader, ood_loader=outside, levels=[0.8])
    y = torch.cat([y for _, y in loader])
    mean, covariance = (
        torch.cat(parts) for parts in zip(*(la(x, observation_noise=True) for x, _ in loader), strict=True)
    )
    variance = covariance.diagonal(dim1=-2, dim2=-1)
    trace = torch.cat([la(x, observation_noise=True, diagonal_output=True)[1].mean(-1) for x, _ in outside])
    expected = {
        "nll": metrics.gaussian_nll(mean, covariance, y),
        "rmse": metrics.rmse(mean, y),
        "crps": metrics.crps(mean, variance, y),
        "coverage_0.8": metrics.interval_coverage(mean, variance, y, 0.8),
        "sharpness": metrics.sharpness(variance),
        "auroc": metrics.auroc(variance.mean(-1), trace),
        "aupr": metrics.aupr(variance.mean(-1), trace),
    }
    assert found == pytest.approx({name: float(value) for name, value in expected.items()}, rel=1e-10)
    by_function = metrics.evaluate(lambda x: la(x, observation_noise=True), loader, ["nll"])
    assert by_function == pytest.approx({"nll": found["nll"]}, rel=1e-10)


def test_evaluate_of_tokens_leaves_out_what_the_likelihood_ignores():
    torch.manual_seed(0)
    model = Tied().double()
    x, y = torch.randint(5, (6, 4)), torch.randint(5, (6, 4))
    y[torch.rand(6, 4) < 0.4] = -100
    y[:2] = -100  # a batch where nothing counts
    la = Laplace(model, likelihoods.Categorical(ignore_index=-100), subset_of_weights="all").fit([(x, y)])
    loader = list(zip(x.split(2), y.split(2), strict=True))
    found = metrics.evaluate(la, loader, ood_loader=loader)
    p, kept = la(x), y != -100
    assert found["nll"] == pytest.approx(float(metrics.nll(p[kept], y[kept])), rel=1e-12)
    assert found["ece"] == pytest.approx(float(metrics.ece(p[kept], y[kept])), rel=1e-12)
    assert found["auroc"] == pytest.approx(0.5, abs=1e-12)


def test_evaluate_of_bits_takes_each_output():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, y = torch.randn(9, 3).double(), torch.randint(2, (9, 2)).double()
    la = Laplace(model, "binary", subset_of_weights="all").fit([(x, y)])
    found = metrics.evaluate(la, [(x, y)], ["nll", "accuracy"])
    p = la(x)
    expected = -(y * p.log() + (1 - y) * (1 - p).log()).mean()
    assert found["nll"] == pytest.approx(float(expected), rel=1e-12)
    assert found["accuracy"] == pytest.approx(float(((p > 0.5) == y.bool()).double().mean()))


def test_evaluate_passes_options_on():
    la, loader, _ = fitted("classification")
    found, again = (
        metrics.evaluate(
            la, loader, ["nll"], link_approx="mc", n_samples=5, generator=torch.Generator().manual_seed(2)
        )
        for _ in range(2)
    )
    assert found == again != metrics.evaluate(la, loader, ["nll"])


def test_evaluate_refuses_what_it_does_not_serve():
    la, loader, _ = fitted("classification")
    cases = [
        (UnsupportedError, "'auroc' compares .* give ood_loader", {"metrics": ["auroc"]}),
        (UnsupportedError, "'f1' is not supported; expected one of 'accuracy'", {"metrics": ["f1"]}),
        (UnsupportedError, "'rmse' does not apply", {"metrics": ["nll", "rmse"]}),
        (UnsupportedError, "list of names, found the string 'nll'", {"metrics": "nll"}),
        (UnsupportedError, "ood_score='margin'", {"ood_score": "margin"}),
        (DataError, "ood_loader yielded no batch", {"ood_loader": []}),
        (ValueError, "n_bins", {"n_bins": 0}),
    ]
    for error, message, options in cases:
        with pytest.raises(error, match=message):
            metrics.evaluate(la, loader, **options)
    with pytest.raises(DataError, match="no target that counts"):
        metrics.evaluate(la, [])
    with pytest.raises(UnsupportedError, match="a function takes no options"):
        metrics.evaluate(lambda x: x, loader, n_samples=3)
    with pytest.raises(OutputError, match="probabilities, or a pair of mean and variance, found list"):
        metrics.evaluate(lambda x: [x], loader)
    counts = [(x, y) for x, y in loader]
    poisson = Laplace(la.model, "poisson", subset_of_weights="all").fit(
        [(x, torch.ones(len(x), 3)) for x, _ in counts]
    )
    with pytest.raises(UnsupportedError, match="metrics of poisson are not supported"):
        metrics.evaluate(poisson, loader)
