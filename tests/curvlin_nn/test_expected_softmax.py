"""Closed forms of the expected softmax: the formulas of the papers, and what overflowed or changed its arguments."""

import math

import pytest
import torch
from networks import problem
from torch import Tensor

from curvlin_nn import Laplace
from curvlin_nn.errors import UnsupportedError
from curvlin_nn.likelihoods.bernoulli import scalar_probit
from curvlin_nn.likelihoods.expected_softmax import bridge, bridge_norm, mean_field

FORMS = {"mean_field": mean_field, "bridge": bridge, "bridge_norm": bridge_norm}


def gaussian(*shape: int, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    torch.manual_seed(2)
    K = shape[-1]
    root = torch.randn(*shape, K).double()
    return scale * torch.randn(*shape).double(), root @ root.mT


def textbook_bridge(mean: Tensor, V: Tensor, *, norm: bool) -> Tensor:
    """One distribution, as the paper writes it (Hobbhahn et al., 2022, equation 9 and appendix)."""
    K, one = len(mean), torch.ones(len(mean)).double()
    m = mean - V @ one * (one @ mean) / (one @ V @ one)
    variance = (V - torch.outer(V @ one, V @ one) / (one @ V @ one)).diagonal()
    if norm:
        c = variance.mean() / math.sqrt(K / 2)
        m, variance = m / c.sqrt(), variance / c
    alpha = (1 - 2 / K + m.exp() / K**2 * torch.exp(-m).sum()) / variance
    return alpha / alpha.sum()


@pytest.mark.parametrize("K", [2, 3, 7])
@pytest.mark.parametrize("norm", [False, True])
def test_bridges_are_those_of_the_paper(norm, K):
    mean, V = gaussian(4, 3, K)
    expected = torch.stack(
        [textbook_bridge(m, v, norm=norm) for m, v in zip(mean.view(-1, K), V.view(-1, K, K), strict=True)]
    )
    found = (bridge_norm if norm else bridge)(mean, V)
    torch.testing.assert_close(found.view(-1, K), expected, rtol=1e-10, atol=1e-14)


def test_the_mean_field_formula_is_that_of_the_paper():
    """``[2 - K + sum_{i != k} 1 / E sigmoid(f_k - f_i)]^-1`` (Lu, Ie & Sha, 2020, equation 13), normalised."""
    mean, V = gaussian(5, 4)
    p = torch.empty_like(mean)
    for n in range(5):
        for k in range(4):
            gaps = [
                scalar_probit(mean[n, k] - mean[n, i], V[n, k, k] + V[n, i, i] - 2 * V[n, k, i])
                for i in range(4)
                if i != k
            ]
            p[n, k] = 1 / (2 - 4 + sum(1 / s for s in gaps))
    torch.testing.assert_close(mean_field(mean, V), p / p.sum(-1, keepdim=True), rtol=1e-11, atol=0)


def test_two_classes_by_mean_field_are_the_probit_of_their_difference():
    mean, V = gaussian(6, 2)
    expected = scalar_probit(mean[:, 0] - mean[:, 1], V[:, 0, 0] + V[:, 1, 1] - 2 * V[:, 0, 1])
    torch.testing.assert_close(mean_field(mean, V)[:, 0], expected, rtol=1e-12, atol=0)


def test_a_shift_of_all_logits_does_not_count():
    mean, V = gaussian(6, 4)
    together = 50 * torch.ones(4, 4).double()
    torch.testing.assert_close(mean_field(mean + 3, V + together), mean_field(mean, V), rtol=1e-10, atol=0)
    isotropic = 0.7 * torch.eye(4).double().expand(6, 4, 4)
    for form in (bridge, bridge_norm):
        torch.testing.assert_close(
            form(mean + 3, isotropic + together), form(mean, isotropic), rtol=1e-10, atol=0
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("K", [2, 3, 10])
def test_large_logits_do_not_overflow(K, name, dtype):
    """A probability for each class, of sum one, the largest where the logit is; arguments stay."""
    mean = torch.zeros(3, K, dtype=dtype)
    mean[0, 1], mean[1], mean[2, 0] = 1e3, torch.linspace(-1e3, 1e3, K), -1e3
    V = torch.eye(K, dtype=dtype).expand(3, K, K) * torch.tensor([1e-3, 1.0, 1e3], dtype=dtype)[:, None, None]
    given = mean.clone(), V.clone()
    p = FORMS[name](mean, V)
    assert torch.equal(mean, given[0]) and torch.equal(V, given[1])
    assert bool(torch.isfinite(p).all()) and bool((p >= 0).all())
    torch.testing.assert_close(p.sum(-1), torch.ones(3, dtype=dtype), rtol=1e-6, atol=0)
    assert p[:2].argmax(-1).tolist() == mean[:2].argmax(-1).tolist()
    assert int(p[2].argmin()) == 0


@pytest.mark.parametrize("name", ["mean_field", "bridge"])
def test_without_uncertainty_the_prediction_tends_to_the_softmax(name):
    """A bridge's does for two classes of equal variance: elsewhere its Dirichlet distribution has another mean."""
    mean, V = gaussian(4, 2 if name == "bridge" else 5)
    V = torch.eye(2).double().expand(4, 2, 2) if name == "bridge" else V
    for scale in (1e-14, 0.0):
        torch.testing.assert_close(FORMS[name](mean, scale * V), torch.softmax(mean, -1), rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", FORMS)
def test_singular_covariances_of_two_classes(name):
    """Both logits known but for a common shift, or their sum known: neither divides zero by zero."""
    mean = torch.tensor([[0.4, -0.3]]).double()
    one = torch.ones(2).double()
    for V in (torch.outer(one, one), torch.outer(one * torch.tensor([1, -1]), one * torch.tensor([1, -1]))):
        p = FORMS[name](mean, V.double()[None])
        assert bool(torch.isfinite(p).all()) and float(p.sum()) == pytest.approx(1) and p[0, 0] > p[0, 1]


@pytest.mark.parametrize("name", FORMS)
def test_gradients(name):
    mean, V = gaussian(2, 3)
    root = torch.linalg.cholesky(V).requires_grad_()
    assert torch.autograd.gradcheck(lambda m, L: FORMS[name](m, L @ L.mT), (mean.requires_grad_(), root))


@pytest.mark.parametrize("name", FORMS)
def test_predictions_use_the_covariances_of_each_term(name):
    p = problem("mlp", "classification")
    la = Laplace(p.model, "classification", "all", "full").fit(p.batches())
    f, V = la._predictive().mean_and_covariance(p.x_test)
    torch.testing.assert_close(la(p.x_test, link_approx=name), FORMS[name](f, V), rtol=1e-12, atol=0)


@pytest.mark.parametrize("class_dim", [-1, 1])
def test_terms_of_an_image_have_covariances_of_their_own(class_dim):
    from curvlin_nn.likelihoods import Categorical

    class Tokens(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = torch.nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x) if class_dim == -1 else self.head(x).movedim(-1, 1)

    torch.manual_seed(0)
    x, y = torch.randn(5, 2, 3).double(), torch.randint(4, (5, 2))
    la = Laplace(Tokens().double(), Categorical(class_dim=class_dim), "all", "full").fit([(x, y)])
    found = la(x, link_approx="mean_field")
    f, V = la._predictive().mean_and_covariance(x)
    for t in range(2):
        places = slice(4 * t, 4 * t + 4) if class_dim == -1 else slice(t, None, 2)
        expected = mean_field(f[:, places], V[:, places, places])
        torch.testing.assert_close(
            found[:, t] if class_dim == -1 else found[..., t], expected, rtol=1e-12, atol=0
        )


def test_bits_have_no_bridge():
    model = torch.nn.Linear(3, 1)
    la = Laplace(model, "binary").fit([(torch.randn(4, 3), torch.ones(4, 1))])
    with pytest.raises(
        UnsupportedError, match="'bridge' is not supported for binary; expected one of 'probit', 'mc'"
    ):
        la(torch.randn(2, 3), link_approx="bridge")
