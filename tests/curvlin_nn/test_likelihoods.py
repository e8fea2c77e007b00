import mpmath
import pytest
import torch
from network_oracle import LOSSES
from torch.func import hessian

from curvlin_nn import likelihoods
from curvlin_nn.columns import EXACT
from curvlin_nn.errors import DataError, OutputError, UnsupportedError


def columns(name: str, f: torch.Tensor) -> torch.Tensor:
    """The exact columns at outputs f (N, C), which depend on no target."""
    (found,) = EXACT(likelihoods.resolve(name), f, torch.zeros(len(f), 1, dtype=torch.long))
    return found


@pytest.mark.parametrize("n_outputs", [2, 3, 7])
@pytest.mark.parametrize("name", ["classification", "regression"])
def test_columns_are_a_root_of_the_output_hessian(name, n_outputs):
    f = 2 * torch.randn(6, n_outputs, dtype=torch.float64)
    y = torch.randint(n_outputs, (6,)) if name == "classification" else torch.randn(6, n_outputs).double()
    S = columns(name, f)
    assert len(S) == (n_outputs - 1 if name == "classification" else n_outputs)
    expected = torch.stack([hessian(lambda o, t=t: LOSSES[name](o, t))(o) for o, t in zip(f, y, strict=True)])
    torch.testing.assert_close(torch.einsum("vnc,vnd->ncd", S, S), expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_softmax_columns_are_accurate_at_saturation(dtype):
    """Against diag(p) - p p^T in 60 digits, entry (i, j) relative to sqrt(Lambda_ii Lambda_jj).

    The diagonal keeps all its digits where evaluating p (1 - p) has none.
    """
    logits = [[60.0, 20.0, 0.0, -5.0], [0.0, 40.0, 45.0, 80.0], [-30.0, 0.0, 30.0, -1.0]]
    S = columns("classification", torch.tensor(logits, dtype=dtype)).double()
    found = torch.einsum("vnc,vnd->ncd", S, S)
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
    S = columns("classification", torch.tensor([[0.0, 1e4, 0.0], [1e4, 0.0, 0.0], [0.0, 0.0, 1e4]]))
    assert torch.equal(S, torch.zeros_like(S))


def test_log_likelihoods_are_those_of_torch_distributions():
    f = torch.randn(9, 4, dtype=torch.float64)
    labels, targets = torch.randint(4, (9,)), torch.randn(9, 4).double()
    sigma = torch.tensor(0.3, dtype=torch.float64)
    for name, y, expected in [
        ("classification", labels, torch.distributions.Categorical(logits=f).log_prob(labels).sum()),
        ("regression", targets, torch.distributions.Normal(f, sigma).log_prob(targets).sum()),
    ]:
        family = likelihoods.resolve(name)
        y = family.check(f, y, "the data")
        statistics = family.statistics(f[:4], y[:4]) + family.statistics(f[4:], y[4:])
        torch.testing.assert_close(family.log_likelihood(statistics, sigma), expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (torch.tensor([0, 1, 3]), "must lie in 0..2 like the model's 3 outputs, found 3"),
        (torch.tensor([0, -100, 1]), "must lie in 0..2 like the model's 3 outputs, found -100"),
        (torch.tensor([0.0, 1.0, 2.0]), "must be integer class labels, found dtype torch.float32"),
        (torch.tensor([[0], [1], [2]]), r"must have shape \(3,\), found \(3, 1\)"),
        (torch.tensor([0, 1]), r"must have shape \(3,\), found \(2,\)"),
    ],
)
def test_bad_labels_are_refused(targets, message):
    with pytest.raises(DataError, match=f"targets of batch 5 {message}"):
        likelihoods.resolve("classification").check(torch.zeros(3, 3), targets, "batch 5")


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (torch.zeros(3), r"must have the shape \(3, 1\) of the outputs, found \(3,\); nothing is broadcast"),
        (torch.tensor([[0.0], [float("nan")], [1.0]]), "must be finite"),
        (torch.zeros(3, 1, dtype=torch.long), "must be floating numbers, found dtype torch.int64"),
    ],
)
def test_bad_regression_targets_are_refused(targets, message):
    with pytest.raises(DataError, match=f"targets of batch 5 {message}"):
        likelihoods.resolve("regression").check(torch.zeros(3, 1), targets, "batch 5")


def test_one_logit_is_not_silently_a_classifier_without_curvature():
    with pytest.raises(OutputError, match="at least two logits"):
        likelihoods.resolve("classification").check(
            torch.zeros(3, 1), torch.zeros(3, dtype=torch.long), "batch 0"
        )


@pytest.mark.parametrize("name", ["binary", "poisson", "heteroscedastic", "reward_modeling", "nonsense"])
def test_unknown_likelihoods_name_the_known_ones(name):
    with pytest.raises(
        UnsupportedError, match=f"'{name}' is not supported; expected one of 'classification', 'regr"
    ):
        likelihoods.resolve(name)
