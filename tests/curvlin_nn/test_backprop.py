"""``enable_backprop=True``: predictions have the gradients with respect to inputs that finite differences have."""

import pytest
import torch
from networks import Problem, assert_same, problem, state
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from curvlin_nn import Laplace, feature_maps
from curvlin_nn.errors import UnsupportedError

STRUCTURES = ["full", "kron", "diag", "gp"]


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


ANSWERS = {
    "moments": ("regression", lambda la, x: la(x)),
    "joint": ("regression", lambda la, x: la(x, joint=True)),
    "variance": ("regression", lambda la, x: la(x, diagonal_output=True)),
    "functions": ("regression", lambda la, x: la.functional_samples(x, 2, generator())),
    "nn": ("regression", lambda la, x: la(x, "nn", n_samples=3, generator=generator())),
    "probit": ("classification", lambda la, x: la(x)),
    "bridge": ("classification", lambda la, x: la(x, link_approx="bridge")),
    "mc": ("classification", lambda la, x: la(x, link_approx="mc", n_samples=3, generator=generator())),
    "information": (
        "classification",
        lambda la, x: la.predict(x, n_samples=4, generator=generator()).mutual_information,
    ),
}


@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("subset", ["all", "last_layer"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_gradients_are_those_of_finite_differences(structure, subset, answer):
    likelihood, ask = ANSWERS[answer]
    p = problem("mlp", likelihood)
    la = Laplace(p.model, likelihood, subset, structure, prior_precision=0.5, enable_backprop=True)
    la.fit(p.batches())
    x = p.x_test[:2].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ask(la, x), (x,), fast_mode=True)
    found = ask(la, x)
    spread = found[-1] if isinstance(found, tuple) else found
    (gradient,) = torch.autograd.grad(spread.square().sum(), x)
    assert gradient.abs().max() > 1e-6  # there is one to get wrong


@pytest.mark.parametrize("structure", STRUCTURES)
def test_convolutions_and_what_is_served_sample_by_sample(structure):
    p = problem("cnn", "regression")
    la = Laplace(p.model, "regression", "all", structure, enable_backprop=True).fit(p.batches())
    x = p.x_test[:2].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: la(x), (x,), fast_mode=True)


class Everything(nn.Module):
    """Attention by a fused kernel, normalisation, a position embedding, a scale, and a parameter without a rule."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.place = nn.Parameter(torch.randn(5, 4))
        self.power = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x) + self.place
        h = self.norm(h + self.attention(h, h, h, need_weights=False)[0])
        return self.head((h.sigmoid() ** self.power).mean(1))


def test_attention_normalisation_and_autodiff_rows_are_differentiated_too():
    torch.manual_seed(0)
    p = Problem(
        Everything().double(), "regression", torch.randn(4, 5, 3).double(), torch.randn(4, 2).double(), None
    )
    la = Laplace(p.model, "regression", "all", "full", enable_backprop=True).fit(p.batches(2))
    assert set(la._fit.accumulated.recorder.served.values()) > {"rule"}  # what it is here for
    x = p.x[:2].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: la(x), (x,), fast_mode=True)
    with torch.no_grad():
        plain = Laplace(p.model, "regression", "all", "full").fit(p.batches(2))(p.x[:2])
    torch.testing.assert_close(la(x), plain, rtol=1e-9, atol=1e-12)


def test_the_jacobian_itself_is_differentiable():
    p = problem("mlp", "regression")
    Phi = feature_maps.JacobianMap(p.model, differentiable=True)
    x = p.x_test[:2].clone().requires_grad_()

    def dense(x: Tensor) -> Tensor:
        return Phi(x)[1].to_dense()

    assert torch.autograd.gradcheck(dense, (x,))


def test_outputs_are_detached_without_it_and_where_nothing_is_recorded():
    p = problem("mlp", "regression")
    x = p.x_test.clone().requires_grad_()
    la = Laplace(p.model, "regression", "all", "kron").fit(p.batches())
    asked = [lambda: la(x), lambda: la(x, "nn", n_samples=2), lambda: la(x, joint=True)]
    assert not any(t.requires_grad for ask in asked for t in ask())
    la = Laplace(p.model, "regression", "all", "kron", enable_backprop=True).fit(p.batches())
    assert all(t.requires_grad for ask in asked for t in ask())
    with torch.no_grad():
        assert not any(t.requires_grad for ask in asked for t in ask())
    x = p.x_test
    assert not any(t.requires_grad for ask in asked for t in ask())


def test_the_model_and_what_came_before_x_are_left_alone():
    """No gradient reaches the model's parameters; another way to compute x is no reason to verify the model again."""
    p = problem("mlp", "regression")
    la = Laplace(p.model, "regression", "all", "kron", enable_backprop=True).fit(p.batches())
    for parameter in p.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = state(p.model)
    z = p.x_test.clone().requires_grad_()
    la(z * 1)[1].sum().backward()
    known = len(la._fit.accumulated.recorder._verified)
    for way in (torch.tanh, lambda z: z[torch.arange(5)], lambda z: (z * 2).exp().cumsum(0)):
        sum(t.sum() for t in la(way(z))).backward()
    assert len(la._fit.accumulated.recorder._verified) == known
    assert_same(before, state(p.model))
    assert z.grad.abs().sum() > 0


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.exp()

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return gradient * ctx.saved_tensors[0].exp()


class Distances(nn.Module):
    """An operation whose gradient torch cannot differentiate."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cdist(x[:, None], torch.eye(4)[None].to(x)).flatten(1)


class Applied(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Once.apply(x)


@pytest.mark.parametrize(
    ("module", "name"), [(Applied(), "OnceBackward"), (Distances(), "one of which torch says: .*cdist")]
)
def test_operations_without_a_second_derivative_are_refused_by_name(module, name):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), module, nn.Linear(4, 2)).double()
    x, y = torch.randn(4, 4).double(), torch.randn(4, 2).double()
    la = Laplace(model, "regression", "all", "full", enable_backprop=True).fit([(x, y)])
    la(x)
    before = state(model)
    for _ in range(2):
        with pytest.raises(UnsupportedError, match=f"enable_backprop=True needs operations .*, found {name}"):
            la(x.clone().requires_grad_())
    assert_same(before, state(model))
