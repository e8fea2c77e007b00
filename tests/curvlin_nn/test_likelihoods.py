"""Every family and weighting against the same loss in torch: Lambda, score, draws, log-likelihood, bad input."""

import mpmath
import pytest
import torch
from likelihood_cases import CASES, DISPERSION, POS_WEIGHT, SIGMA, WEIGHT, generator, ordinal, tensor
from torch import Tensor
from torch.distributions import (
    Bernoulli,
    Categorical,
    MultivariateNormal,
    NegativeBinomial,
    Normal,
    Poisson,
)

from curvlin_nn import likelihoods
from curvlin_nn.columns import EXACT, Columns
from curvlin_nn.errors import DataError, OutputError, UnsupportedError
from curvlin_nn.likelihoods import Custom, Likelihood

UNIT = torch.tensor(1.0, dtype=torch.float64)


def columns(kind: Columns, likelihood: Likelihood, f: Tensor, y: Tensor) -> Tensor:
    """All columns at once, ``(V, N, C)``."""
    found = torch.cat(list(kind(likelihood, f, likelihood.check(f, y, "the data"))))
    return found.reshape(*found.shape[:2], -1)


def gram(S: Tensor) -> Tensor:
    """``(N, C, C)``."""
    return torch.einsum("vnc,vnd->ncd", S, S)


@pytest.mark.parametrize("name", CASES)
def test_exact_columns_are_a_root_of_the_hessian_of_the_torch_loss(name):
    case = CASES[name]
    f, y = case.outputs(6), case.targets(6)
    found = gram(columns(EXACT, case.make(), f, y))
    torch.testing.assert_close(found, case.hessians(f, y), rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("name", CASES)
def test_empirical_columns_are_the_gradient_of_the_torch_loss(name):
    """The weighted one: the empirical Fisher holds the square of a term's weight."""
    case = CASES[name]
    f, y = case.outputs(6), case.targets(6)
    (found,) = columns(Columns("empirical"), case.make(), f, y)
    torch.testing.assert_close(found, case.gradients(f, y).reshape(len(f), -1), rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("name", [name for name in CASES if name != "negative binomial"])
def test_scores_of_draws_have_mean_zero_and_the_fisher_information_as_second_moment(name):
    """z-scores of every entry over 4,000 draws at each of two samples; terms of a sample are uncorrelated.

    For the ordinal model the Fisher information is a sum over levels, its Hessian being another matrix.
    """
    case, n = CASES[name], 4000
    f, y = case.outputs(2), case.targets(2)
    repeated = f.repeat_interleave(n, 0), y.repeat_interleave(n, 0)
    (scores,) = columns(Columns("mc", 1, generator()), case.make(), *repeated)
    expected = ordinal_fisher(f) if name == "ordinal" else case.hessians(f, y)
    for s, Lambda in zip(scores.split(n), expected, strict=True):
        assert_mean(s, torch.zeros_like(s[0]))
        assert_mean(s[:, :, None] * s[:, None, :], Lambda)


def assert_mean(draws: Tensor, expected: Tensor) -> None:
    """|z| < 4 for every entry of the mean; entries without spread are equal."""
    deviation = draws.std(0) / len(draws) ** 0.5
    gap = (draws.mean(0) - expected).abs()
    assert bool((gap <= 4 * deviation + 1e-12 * expected.abs().max()).all())


def ordinal_fisher(f: Tensor) -> Tensor:
    """``sum_y p(y) (d log p(y) / df)^2``, terms being independent."""
    levels = torch.arange(4)
    rows = []
    for value in f.flatten():
        slopes = torch.func.jacrev(lambda v: torch.stack([ordinal(v, k) for k in levels]))(value)
        p = torch.stack([ordinal(value, k) for k in levels]).exp()
        rows.append((p * slopes.square()).sum())
    return torch.diag_embed(torch.stack(rows).reshape(f.shape))


def weight_of(y: Tensor) -> Tensor:
    return torch.where(y >= 0, WEIGHT[y.clamp(min=0)], 0.0)


LOG_LIKELIHOODS = {
    "labels": lambda f, y: Categorical(logits=f).log_prob(y),
    "class weight": lambda f, y: WEIGHT[y] * Categorical(logits=f).log_prob(y),
    "tokens": lambda f, y: weight_of(y) * Categorical(logits=f).log_prob(y.clamp(min=0)),
    "pixels": lambda f, y: weight_of(y) * Categorical(logits=f.mT).log_prob(y.clamp(min=0)),
    "soft": lambda f, y: y * torch.log_softmax(f, -1),
    "smoothing": lambda f, y: (0.8 * torch.eye(3).double()[y] + 0.2 / 3) * torch.log_softmax(f, -1),
    "bits": lambda f, y: Bernoulli(logits=f).log_prob(y),
    "one bit": lambda f, y: Bernoulli(logits=f).log_prob(y),
    "pos_weight": lambda f, y: torch.where(y == 1, POS_WEIGHT, 1.0) * Bernoulli(logits=f).log_prob(y),
    "regression": lambda f, y: Normal(f, 0.3).log_prob(y),
    "variances": lambda f, y: Normal(f, 0.3 * WEIGHT.sqrt()).log_prob(y),
    "covariance": lambda f, y: MultivariateNormal(f, 0.09 * SIGMA).log_prob(y),
    "heteroscedastic": lambda f, y: Normal(f[:, :2] / f[:, 2:].exp(), (-f[:, 2:] / 2).exp()).log_prob(y),
    "counts": lambda f, y: Poisson(f.exp()).log_prob(y.double()),
    "rewards": lambda f, y: Categorical(logits=f).log_prob(y),
    "reward difference": lambda f, y: Bernoulli(logits=f[:, 0]).log_prob(1 - y.double()),
    "negative binomial": lambda f, y: NegativeBinomial(
        DISPERSION, logits=f - tensor(DISPERSION).log()
    ).log_prob(y.double()),
    "custom covariance": lambda f, y: MultivariateNormal(f, SIGMA).log_prob(y),
}


@pytest.mark.parametrize("name", LOG_LIKELIHOODS)
def test_log_likelihoods_are_those_of_torch_distributions_weighted_and_normalised(name):
    case = CASES[name]
    family, f, y = case.make(), case.outputs(9), case.targets(9)
    checked = family.check(f, y, "the data")
    statistics = family.statistics(f[:4], checked[:4]) + family.statistics(f[4:], checked[4:])
    found = family.log_likelihood(statistics, 0.3 * UNIT)
    torch.testing.assert_close(found, LOG_LIKELIHOODS[name](f, y).sum(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", CASES)
def test_log_prob_adds_up_to_the_statistics(name):
    case = CASES[name]
    family, f, y = case.make(), case.outputs(5), case.targets(5)
    y, terms = family.check(f, y, "the data"), family.terms(f)
    weights = family.weights(terms, y)
    log_p = family.log_prob(terms, y)
    expected = (log_p if weights is None else weights * log_p).sum()
    found = family.log_likelihood(family.statistics(f, y), UNIT)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", [EXACT, Columns("mc", 2), Columns("sketch", 2), Columns("empirical")])
@pytest.mark.parametrize("name", ["tokens", "pixels", "tokens, smoothing"])
def test_an_ignored_term_does_not_exist(name, kind):
    """Whatever its logits are, the other terms get the columns they get anyway, and itself none."""
    case = CASES[name]
    family, f, y = case.make(), case.outputs(4), case.targets(4)
    last = f if name != "pixels" else f.mT
    extreme = torch.where(y[..., None] == -100, tensor(1e300, -1e300, 0.0), last)
    extreme = extreme if name != "pixels" else extreme.mT
    found = [columns(Columns(kind.kind, kind.n_columns, generator()), family, o, y) for o in (f, extreme)]
    assert torch.equal(*found)
    statistics = [family.statistics(o, family.check(o, y, "the data")) for o in (f, extreme)]
    assert torch.equal(*statistics)
    by_place = found[1].reshape(-1, *f.shape) if name != "pixels" else found[1].reshape(-1, *f.shape).mT
    assert not by_place[:, y == -100].any()
    assert by_place[:, y != -100].any()


class Masked(likelihoods.Poisson):
    """Counts of which the zeros do not exist."""

    def weights(self, terms, targets):
        return (targets > 0).to(terms)


@pytest.mark.parametrize("kind", [EXACT, Columns("mc"), Columns("sketch"), Columns("empirical")])
def test_a_term_of_weight_zero_may_overflow(kind):
    """Its rate is infinite in float32, and infinity times zero is not zero."""
    f, y = torch.tensor([[0.5, 400.0]]), torch.tensor([[2.0, 0.0]])
    family = Masked()
    (found,) = kind(family, f, y)
    assert bool(torch.isfinite(found).all())
    assert not found[..., 1].any()
    assert torch.equal(family.statistics(f, y), likelihoods.Poisson().statistics(f[:, :1], y[:, :1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_softmax_columns_are_accurate_at_saturation(dtype):
    """Against diag(p) - p p^T in 60 digits, entry (i, j) relative to sqrt(Lambda_ii Lambda_jj).

    The diagonal keeps all its digits where evaluating p (1 - p) has none.
    """
    logits = [[60.0, 20.0, 0.0, -5.0], [0.0, 40.0, 45.0, 80.0], [-30.0, 0.0, 30.0, -1.0]]
    f = torch.tensor(logits, dtype=dtype)
    found = gram(columns(EXACT, likelihoods.Categorical(), f, torch.zeros(3, dtype=torch.long)).double())
    for n, row in enumerate(logits):
        exact = exact_softmax_hessian(row)
        scale = exact.diagonal().sqrt()
        error = (found[n] - exact).abs() / torch.outer(scale, scale)
        assert error.max() <= 40 * torch.finfo(dtype).eps


def exact_softmax_hessian(logits: list[float]) -> torch.Tensor:
    size = len(logits)
    with mpmath.workdps(60):
        e = [mpmath.exp(v) for v in logits]
        p = [v / sum(e) for v in e]
        rows = [
            [float(p[i] * sum(p[:i] + p[i + 1 :]) if i == j else -p[i] * p[j]) for j in range(size)]
            for i in range(size)
        ]
    return torch.tensor(rows, dtype=torch.float64)


def test_softmax_columns_vanish_where_all_probability_is_on_one_class():
    f = torch.tensor([[0.0, 1e4, 0.0], [1e4, 0.0, 0.0], [0.0, 0.0, 1e4]])
    S = columns(EXACT, likelihoods.Categorical(), f, torch.zeros(3, dtype=torch.long))
    assert torch.equal(S, torch.zeros_like(S))


@pytest.mark.parametrize("logit", [-30.0, 0.5, 30.0])
def test_the_root_of_a_bernoulli_and_of_a_preference_is_accurate_at_saturation(logit):
    """p (1 - p) evaluated as it stands has no digit at a logit of 40."""
    with mpmath.workdps(60):
        p = 1 / (1 + mpmath.exp(-mpmath.mpf(logit)))
        expected = float(p * (1 - p))
    f = torch.tensor([[logit]], dtype=torch.float64)
    for family in (likelihoods.Bernoulli(), likelihoods.Preference()):
        found = float(family.root(family.terms(f), f).square())
        assert found == pytest.approx(expected, rel=1e-13)


# -- indefinite Hessians --------------------------------------------------------------------------------------


def student(f: Tensor, y: Tensor) -> Tensor:
    """Student's t with three degrees of freedom: its negative logarithm is concave in the tails."""
    return torch.distributions.StudentT(3.0, f, 1.0, validate_args=False).log_prob(y)


def test_an_indefinite_hessian_is_refused_or_clipped_and_counted():
    f, y = torch.zeros(4, 1, dtype=torch.float64), tensor(0.0, 0.5, 3.0, -5.0)[:, None]
    with pytest.raises(
        UnsupportedError, match=r"has the eigenvalue -.*expected none below zero; use indefinite='clip'"
    ):
        columns(EXACT, Custom(student, event_ndim=0), f, y)
    clipping = Custom(student, event_ndim=0, indefinite="clip")
    assert clipping.clipped_share == 0
    found = gram(columns(EXACT, clipping, f, y)).flatten()
    truth = 4 * (3 - y.square()) / (3 + y.square()).square()  # the second derivative of 2 log(1 + y^2 / 3)
    torch.testing.assert_close(found, truth.clamp(min=0).flatten(), rtol=1e-10, atol=1e-15)
    share = -truth.clamp(max=0).sum() / truth.abs().sum()
    assert clipping.clipped_share == pytest.approx(float(share), rel=1e-10)


def test_clipping_takes_the_nearest_positive_semidefinite_matrix_of_a_term():
    """The quadratic form with matrix ``[[1, 2], [2, 1]]`` has the eigenvalues 3 and -1."""
    A = torch.tensor([[1.0, 2.0], [2.0, 1.0]], dtype=torch.float64)
    family = Custom(lambda f, y: -f @ A @ f / 2 + y, indefinite="clip")
    found = gram(columns(EXACT, family, torch.randn(1, 2).double(), torch.zeros(1).double()))
    torch.testing.assert_close(found[0], torch.full((2, 2), 1.5, dtype=torch.float64), rtol=1e-12, atol=0)
    assert family.clipped_share == pytest.approx(0.25, rel=1e-12)


def test_rounding_is_not_indefiniteness():
    """At saturation the second derivative is the difference of equal numbers, sometimes below zero."""
    f = torch.linspace(-45, 45, 181, dtype=torch.float64)[:, None]
    family = Custom(lambda f, y: y * f - torch.logaddexp(f, torch.zeros_like(f)), event_ndim=0)
    found = gram(columns(EXACT, family, f, torch.ones_like(f))).flatten()
    p = torch.sigmoid(f).flatten()
    torch.testing.assert_close(found, p * torch.sigmoid(-f).flatten(), rtol=0, atol=1e-15)


def test_monte_carlo_columns_need_a_sampler():
    case = CASES["negative binomial"]
    with pytest.raises(
        UnsupportedError, match="columns='mc' needs draws of a custom likelihood; give it sample="
    ):
        columns(Columns("mc"), case.make(), case.outputs(3), case.targets(3))


# -- bad input ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (torch.tensor([0, 1, 3]), "must lie in 0..2 like the model's 3 outputs, found 3"),
        (torch.tensor([0, -100, 1]), "must lie in 0..2 like the model's 3 outputs, found -100"),
        (torch.tensor([0.0, 1.0, 2.0]), "must be integer class labels, found dtype torch.float32"),
        (torch.tensor([True, False, True]), "must be integer class labels, found dtype torch.bool"),
        (torch.tensor([[0], [1], [2]]), r"must have shape \(3,\), found \(3, 1\)"),
        (torch.tensor([0, 1]), r"must have shape \(3,\), found \(2,\)"),
    ],
)
def test_bad_labels_are_refused(targets, message):
    with pytest.raises(DataError, match=f"targets of batch 5 {message}"):
        likelihoods.resolve("classification").check(torch.zeros(3, 3), targets, "batch 5")


FAMILIES = {
    "binary": likelihoods.Bernoulli,
    "poisson": likelihoods.Poisson,
    "regression": likelihoods.Gaussian,
    "heteroscedastic": likelihoods.HeteroscedasticGaussian,
    "reward_modeling": likelihoods.Preference,
}

NAN = float("nan")


@pytest.mark.parametrize(
    "family",
    [
        likelihoods.Categorical(),
        likelihoods.Categorical(weight=torch.ones(4)),
        likelihoods.Categorical(class_dim=3),
    ],
)
def test_labels_that_fit_another_axis_of_classes_say_which(family):
    pictures, labels = torch.zeros(2, 4, 3, 5), torch.full((2, 3, 5), 3)
    with pytest.raises(DataError, match=r"found \(2, 3, 5\); take likelihoods.Categorical\(class_dim=1\)"):
        family.check(pictures, labels, "batch 0")
    assert likelihoods.Categorical(class_dim=1).check(pictures, labels, "batch 0").shape == (2, 15)


@pytest.mark.parametrize(
    ("family", "shape", "targets", "message"),
    [
        (
            "regression",
            (3, 1),
            torch.zeros(3),
            r"must have shape \(3, 1\), found \(3,\); nothing is broadcast",
        ),
        ("regression", (3, 1), torch.tensor([[0.0], [NAN], [1.0]]), "must be finite"),
        (
            "regression",
            (3, 1),
            torch.zeros(3, 1, dtype=torch.long),
            "must be floating numbers, found dtype torch.int64",
        ),
        ("binary", (3, 1), torch.zeros(3), r"must have shape \(3, 1\), found \(3,\); nothing is broadcast"),
        ("binary", (3,), torch.tensor([0, 2, 1]), "must lie between 0 and 1, found 2.0"),
        ("binary", (3,), torch.tensor([0.0, NAN, 1.0]), "must lie between 0 and 1, found nan"),
        ("binary", (3,), torch.zeros(3, dtype=torch.complex64), "must be real, found dtype torch.complex64"),
        ("poisson", (3,), torch.tensor([0.0, 0.5, 1.0]), r"must be counts 0, 1, 2, \.\.\., found 0.5"),
        ("poisson", (3,), torch.tensor([0, -1, 2]), r"must be counts 0, 1, 2, \.\.\., found -1.0"),
        (
            "poisson",
            (3,),
            torch.zeros(3, dtype=torch.complex64),
            "must be counts, found dtype torch.complex64",
        ),
        ("poisson", (3, 1), torch.zeros(3), r"must have shape \(3, 1\), found \(3,\)"),
        ("heteroscedastic", (3, 2), torch.zeros(3), r"must have shape \(3, 1\), found \(3,\)"),
        (
            "heteroscedastic",
            (3, 2),
            torch.zeros(3, 1).long(),
            "must be floating numbers, found dtype torch.int64",
        ),
        (
            "reward_modeling",
            (3, 2),
            torch.tensor([0, 1, 2]),
            "must lie in 0..1 like the model's 2 outputs, found 2",
        ),
        (
            "reward_modeling",
            (3, 1),
            torch.tensor([0.0, 1.0, 1.0]),
            "must be integer class labels, found dtype torch.f",
        ),
        ("reward_modeling", (3, 1), torch.tensor([[0], [1], [1]]), r"must have shape \(3,\), found \(3, 1\)"),
    ],
)
def test_bad_targets_are_refused(family, shape, targets, message):
    with pytest.raises(DataError, match=f"targets of batch 5 {message}"):
        FAMILIES[family]().check(torch.zeros(shape), targets, "batch 5")


@pytest.mark.parametrize(
    ("make", "outputs", "targets", "message"),
    [
        (
            likelihoods.Categorical,
            torch.zeros(3, 1),
            torch.zeros(3).long(),
            "at least two logits.*likelihood='binary'",
        ),
        (
            likelihoods.Categorical,
            torch.zeros(3),
            torch.zeros(3).long(),
            r"classes along axis -1, found shape \(3,\)",
        ),
        (
            lambda: likelihoods.Categorical(class_dim=2),
            torch.zeros(3, 2),
            torch.zeros(3).long(),
            r"classes along axis 2, found shape \(3, 2\)",
        ),
        (
            lambda: likelihoods.Categorical(WEIGHT),
            torch.zeros(3, 4),
            torch.zeros(3).long(),
            "must have 3 classes like weight, found 4",
        ),
        (
            lambda: likelihoods.Bernoulli(POS_WEIGHT),
            torch.zeros(3),
            torch.zeros(3),
            r"a shape that weight \(3,\) broadcasts to, found \(\)",
        ),
        (
            lambda: likelihoods.Bernoulli(pos_weight=torch.ones(4, 1)),
            torch.zeros(4, 2),
            torch.zeros(4, 2),
            r"a shape that pos_weight \(4, 1\) broadcasts to, found \(2,\)",
        ),
        (
            lambda: likelihoods.Gaussian(covariance=SIGMA),
            torch.zeros(3, 2),
            torch.zeros(3, 2),
            "must have 3 numbers along their last axis like the noise covariance, found 2",
        ),
        (
            likelihoods.Poisson,
            torch.tensor([[0.0, 90.0]]),
            torch.ones(1, 2),
            "logarithms of rates in the range of torch.float32, found 90",
        ),
        (
            likelihoods.HeteroscedasticGaussian,
            torch.zeros(3, 3),
            torch.zeros(3, 1),
            r"two numbers for each target.*found shape \(3, 3\)",
        ),
        (
            likelihoods.HeteroscedasticGaussian,
            torch.tensor([[0.0, -90.0]]),
            torch.zeros(1, 1),
            "logarithms of precisions in the range of torch.float32, found -90",
        ),
        (
            likelihoods.Preference,
            torch.zeros(3, 3),
            torch.zeros(3).long(),
            r"rewards of a pair or their difference, found shape \(3, 3\)",
        ),
        (
            lambda: Custom(lambda f, y: f - y),
            torch.zeros(3, 2),
            torch.zeros(3),
            r"log_prob must be a single number for each term, found shape \(2,\)",
        ),
    ],
)
def test_outputs_that_do_not_fit_are_refused(make, outputs, targets, message):
    with pytest.raises(OutputError, match=message) as caught:
        make().check(outputs, targets, "batch 5")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("log_prob", "targets", "error", "message"),
    [
        (lambda f, y: -f.sum() * y, torch.zeros(3, 2), DataError, r"must have shape \(3,\), found \(3, 2\)"),
        (
            lambda f, y: torch.log(y) - f.sum(),
            torch.zeros(3),
            DataError,
            "must be finite at the targets of batch 5",
        ),
        (
            lambda f, y: f.sum() if y > 0 else y,
            torch.zeros(3),
            UnsupportedError,
            "cannot be mapped over terms by torch",
        ),
    ],
)
def test_a_log_probability_that_cannot_be_used_is_refused(log_prob, targets, error, message):
    with pytest.raises(error, match=message):
        Custom(log_prob).check(torch.zeros(3, 2), targets, "batch 5")


def test_draws_of_the_wrong_shape_are_refused():
    family = Custom(lambda f, y: -f.sum() * y, sample=lambda f, n, g: torch.zeros(len(f)))
    with pytest.raises(UnsupportedError, match=r"sample must return shape \(2, 3, 1\), found \(3,\)"):
        columns(Columns("mc", 2), family, torch.zeros(3, 2), torch.zeros(3))


def test_bad_probabilities_are_refused():
    for value in (-0.1, NAN, float("inf")):
        with pytest.raises(DataError, match="probabilities of batch 5 must be finite and not negative"):
            likelihoods.Categorical().check(torch.zeros(1, 2), torch.tensor([[0.5, value]]), "batch 5")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: likelihoods.Categorical(tensor(1.0, -1.0)),
            "weight must be finite and not negative, found -1.0",
        ),
        (
            lambda: likelihoods.Categorical(tensor(1.0, NAN)),
            "weight must be finite and not negative, found nan",
        ),
        (
            lambda: likelihoods.Categorical(WEIGHT[None]),
            r"weight must hold a number for each class, found shape \(1, 3\)",
        ),
        (
            lambda: likelihoods.Categorical(label_smoothing=1.5),
            r"label_smoothing must lie in \[0, 1\], found 1.5",
        ),
        (lambda: likelihoods.Categorical(class_dim=0), "class_dim must not be 0, the axis of samples"),
        (
            lambda: likelihoods.Bernoulli(pos_weight=-2.0),
            "pos_weight must be finite and not negative, found -2.0",
        ),
        (lambda: likelihoods.Gaussian(variances=0.0), "variances must be finite and positive, found 0.0"),
        (
            lambda: likelihoods.Gaussian(variances=SIGMA.exp()),
            "variances must be a number or one for each output",
        ),
        (
            lambda: likelihoods.Gaussian(WEIGHT, SIGMA),
            "variances and covariance exclude each other; give one",
        ),
        (
            lambda: likelihoods.Gaussian(covariance=SIGMA[:2]),
            r"covariance must be a symmetric matrix, found shape \(2, 3\)",
        ),
        (lambda: likelihoods.Gaussian(covariance=SIGMA.triu()), "covariance must be a symmetric matrix"),
        (
            lambda: likelihoods.Gaussian(covariance=-SIGMA),
            "covariance must be positive definite, found the eigenvalue -",
        ),
        (lambda: Custom(student, event_ndim=2), "event_ndim must be 0 or 1, found 2"),
        (
            lambda: Custom(student, indefinite="abs"),
            "indefinite='abs' is not supported; expected one of 'raise', 'clip'",
        ),
    ],
)
def test_bad_options_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("name", ["nonsense", "categorical", ["binary"]])
def test_unknown_likelihoods_name_the_known_ones(name):
    known = "'binary', 'classification', 'heteroscedastic', 'poisson', 'regression', 'reward_modeling'"
    with pytest.raises(
        UnsupportedError, match=f"is not supported; expected one of {known}, a loss of torch or a"
    ):
        likelihoods.resolve(name)


def test_one_logit_is_binary_with_the_other_logit_at_zero():
    """The same model twice: a logit, and two of which the first is zero."""
    f, y = torch.randn(5, 1).double(), torch.randint(2, (5,))
    pair = torch.cat([torch.zeros_like(f), f], dim=1)
    binary, two = likelihoods.Bernoulli(), likelihoods.Categorical()
    one = columns(EXACT, binary, f, y[:, None])
    torch.testing.assert_close(gram(one), gram(columns(EXACT, two, pair, y))[:, 1:, 1:], rtol=1e-12, atol=0)
    torch.testing.assert_close(
        binary.statistics(f, binary.check(f, y[:, None], "")), two.statistics(pair, two.check(pair, y, ""))
    )
