"""Where Kronecker factors are exact and where not, row by row, against dense per-sample matrices."""

import functools
import itertools

import network_oracle as oracle
import pytest
import torch
from networks import Tied, problem
from torch import nn

from curvlin_nn import curvature, likelihoods, structures

reduce = functools.partial(structures.Kronecker, approximation="reduce")
ekfac_reduce = functools.partial(structures.EKFAC, approximation="reduce")
STRUCTURES = {"expand": "kron", "reduce": reduce, "ekfac": "ekfac", "ekfac-reduce": ekfac_reduce}
EXACT = 1e-12


class Pool(nn.Module):
    """The mean or the sum over positions."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def forward(self, x):
        return x.mean(1) if self.kind == "mean" else x.sum(1)


def linear(*sizes):
    return [nn.Linear(i, o) for i, o in itertools.pairwise(sizes)]


def network(*layers):
    torch.manual_seed(11)
    return nn.Sequential(*layers).double()


def blocks(model, x, output_hessian=None):
    """The diagonal blocks of ``sum_n J_n^T Lambda_n J_n`` by name; squared error unless the output Hessian is given."""
    J = oracle.jacobian_row_by_row(model, [(sample[None],) for sample in x])
    Lambda = (
        torch.eye(J.shape[1]).double().expand(len(J), -1, -1) if output_hessian is None else output_hessian
    )
    G = torch.einsum("ncp,ncd,ndq->pq", J, Lambda, J)
    return cut(G, model)


def cut(G, model):
    found, start = {}, 0
    for name, p in model.named_parameters():
        found[name] = G[start : start + p.numel(), start : start + p.numel()]
        start += p.numel()
    return found


def estimated(model, likelihood, x, y, choice, size=3):
    data = list(zip(x.split(size), y.split(size), strict=True))
    return cut(curvature(model, likelihood, data, STRUCTURES[choice]).to_dense(), model)


def errors(model, x, y, choice, size=3):
    """The relative error of each block under squared error."""
    exact = blocks(model, x)
    found = estimated(model, "regression", x, y, choice, size)
    return {name: float((found[name] - G).norm() / G.norm()) for name, G in exact.items()}


def assert_exact(found, names=None):
    for name in names or found:
        assert found[name] < EXACT, name


def assert_not_exact(found, names):
    for name in names:
        assert found[name] > 0.01, name


@pytest.mark.parametrize("choice", STRUCTURES)
@pytest.mark.parametrize("likelihood", ["classification", "regression"])
def test_one_sample_without_sharing_is_exact(likelihood, choice):
    p = problem("mlp", likelihood, n=1)
    exact = cut(oracle.ggn(p.model, p.x, p.y, oracle.LOSSES[likelihood]), p.model)
    found = estimated(p.model, likelihood, p.x, p.y, choice)
    for name, G in exact.items():
        torch.testing.assert_close(found[name], G, rtol=1e-11, atol=1e-13 * float(G.norm()))


@pytest.mark.parametrize("size", [1, 3, 8])
@pytest.mark.parametrize("choice", STRUCTURES)
def test_layers_behind_the_last_nonlinearity_are_exact_under_squared_error(choice, size):
    model = network(*linear(4, 5), nn.Tanh(), *linear(5, 4, 2))
    found = errors(model, torch.randn(8, 4).double(), torch.randn(8, 2).double(), choice, size)
    assert_exact(found, ["0.bias", "2.weight", "2.bias", "3.weight", "3.bias"])
    assert_not_exact(found, ["0.weight"])


@pytest.mark.parametrize("size", [1, 3, 6])
@pytest.mark.parametrize("choice", STRUCTURES)
def test_a_linear_network_with_a_loss_for_each_token_is_exact_in_the_expand_form(choice, size):
    model = network(*linear(3, 4, 2))
    x, y = torch.randn(6, 5, 3).double(), torch.randn(6, 5, 2).double()
    found = errors(model, x, y, choice, size)
    assert_exact(found, ["0.bias", "1.bias"])
    if choice in ("expand", "ekfac"):
        assert_exact(found)
    elif choice == "reduce":
        assert_not_exact(found, ["0.weight", "1.weight"])


@pytest.mark.parametrize("kind", ["mean", "sum"])
@pytest.mark.parametrize("choice", STRUCTURES)
def test_a_linear_network_with_pooled_positions_is_exact_in_the_reduce_form(choice, kind):
    model = network(*linear(3, 4, 2), Pool(kind))
    found = errors(model, torch.randn(6, 5, 3).double(), torch.randn(6, 2).double(), choice)
    assert_exact(found, ["0.bias", "1.bias"])
    if choice in ("reduce", "ekfac-reduce"):
        assert_exact(found)
    else:
        assert_not_exact(found, ["0.weight", "1.weight"])


@pytest.mark.parametrize("choice", STRUCTURES)
def test_pooling_in_the_middle_divides_the_layers(choice):
    model = network(*linear(3, 4), Pool("sum"), *linear(4, 2))
    found = errors(model, torch.randn(6, 5, 3).double(), torch.randn(6, 2).double(), choice)
    assert_exact(found, ["0.bias", "2.weight", "2.bias"])
    if choice in ("reduce", "ekfac-reduce"):
        assert_exact(found)
    else:
        assert_not_exact(found, ["0.weight"])


@pytest.mark.parametrize("choice", STRUCTURES)
def test_cross_entropy_of_several_samples_is_not_exact(choice):
    p = problem("mlp", "classification")
    exact = cut(oracle.ggn(p.model, p.x, p.y, oracle.cross_entropy), p.model)
    found = estimated(p.model, p.likelihood, p.x, p.y, choice)
    for name, G in exact.items():
        error = float((found[name] - G).norm() / G.norm())
        assert error < EXACT if name.endswith("bias") else error > 1e-3, name


# -- token losses with ignored tokens ------------------------------------------------------------------------


class Mixing(nn.Module):
    """Logits for every token, each of which sees the tokens before it."""

    def __init__(self):
        super().__init__()
        self.embed, self.hidden, self.head = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        h = torch.tanh(self.embed(x)).cumsum(1)
        return self.head(torch.tanh(self.hidden(h)))


def tokens(mixing):
    torch.manual_seed(5)
    model = Mixing().double() if mixing else network(*linear(3, 4), nn.Tanh(), *linear(4, 3))
    x, y = torch.randn(6, 4, 3).double(), torch.randint(3, (6, 4))
    y[torch.rand(6, 4) < 0.4] = -7
    y[2] = -7
    return model, x, y


def token_hessians(model, x, y):
    """``(N, T C, T C)``: the softmax Hessian of each token that is not ignored."""
    with torch.no_grad():
        p = torch.softmax(model(x), -1)
    Lambda = (torch.diag_embed(p) - p[..., :, None] * p[..., None, :]) * (y != -7)[..., None, None]
    return torch.stack([torch.block_diag(*sample) for sample in Lambda])


@pytest.mark.parametrize("choice", STRUCTURES)
def test_biases_are_exact_with_ignored_tokens(choice):
    model, x, y = tokens(mixing=True)
    exact = blocks(model, x, token_hessians(model, x, y))
    found = estimated(model, likelihoods.Categorical(ignore_index=-7), x, y, choice)
    for name in ("embed.bias", "hidden.bias", "head.bias"):
        G = exact[name]
        torch.testing.assert_close(found[name], G, rtol=1e-10, atol=1e-13 * float(G.norm()))


@pytest.mark.parametrize("choice", ["expand", "ekfac"])
def test_a_sequence_is_its_kept_tokens_where_tokens_do_not_meet(choice):
    model, x, y = tokens(mixing=False)
    found = estimated(model, likelihoods.Categorical(ignore_index=-7), x, y, choice)
    kept = y != -7
    alone = estimated(model, "classification", x[kept], y[kept], choice)
    for name, G in alone.items():
        torch.testing.assert_close(found[name], G, rtol=1e-9, atol=1e-12 * float(G.norm()))


def test_ignored_tokens_do_not_exist_for_exact_structures():
    model, x, y = tokens(mixing=True)
    exact = blocks(model, x, token_hessians(model, x, y))
    likelihood = likelihoods.Categorical(ignore_index=-7)
    data = [(x[:4], y[:4]), (x[4:], y[4:])]
    for choice in ("full", "block"):
        found = cut(curvature(model, likelihood, data, choice).to_dense(), model)
        for name, G in exact.items():
            torch.testing.assert_close(found[name], G, rtol=1e-10, atol=1e-13 * float(G.norm()))
    diagonal = torch.cat([G.diagonal() for G in exact.values()])
    found = curvature(model, likelihood, data, "diag").diagonal()
    torch.testing.assert_close(found, diagonal, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("choice", ["ekfac", "ekfac-reduce"])
def test_ekfac_of_token_losses_keeps_the_trace_of_each_block_and_is_nearer_than_kfac(choice):
    model, x, y = tokens(mixing=True)
    likelihood = likelihoods.Categorical(ignore_index=-7)
    exact = blocks(model, x, token_hessians(model, x, y))
    ekfac = estimated(model, likelihood, x, y, choice)
    kfac = estimated(model, likelihood, x, y, "expand" if choice == "ekfac" else "reduce")
    diagonal = cut(curvature(model, likelihood, [(x, y)], "diag").to_dense(), model)
    for name, G in exact.items():
        torch.testing.assert_close(ekfac[name].trace(), G.trace(), rtol=1e-12, atol=0)
        torch.testing.assert_close(ekfac[name].trace(), diagonal[name].trace(), rtol=1e-12, atol=0)
        assert (G - ekfac[name]).norm() <= (G - kfac[name]).norm() * (1 + 1e-12)
        if name.endswith("weight"):
            assert (G - ekfac[name]).norm() < 0.99 * (G - kfac[name]).norm()


class ClassesFirst(nn.Module):
    """The same logits as torch's losses take them: classes along axis 1."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x).movedim(-1, 1)


@pytest.mark.parametrize("choice", STRUCTURES)
def test_the_loss_of_torch_has_the_curvature_of_the_likelihood(choice):
    model, x, y = tokens(mixing=True)
    expected = estimated(model, likelihoods.Categorical(ignore_index=-7), x, y, choice)
    loss = nn.CrossEntropyLoss(ignore_index=-7, reduction="mean")
    found = estimated(ClassesFirst(model), loss, x, y, choice)
    for name, G in expected.items():
        torch.testing.assert_close(found[f"model.{name}"], G, rtol=1e-10, atol=1e-12 * float(G.norm()))


# -- an embedding tied to the output layer -------------------------------------------------------------------


class FlatTied(Tied):
    """All logits of a sample in one row."""

    def forward(self, x):
        return super().forward(x).flatten(1)


@pytest.fixture
def tied():
    torch.manual_seed(2)
    return FlatTied().double(), torch.randint(5, (6, 2)), torch.randn(6, 10).double()


def test_a_tied_model_has_exact_blocks_and_diagonals(tied):
    model, x, y = tied
    data = [(x[:4], y[:4]), (x[4:], y[4:])]
    exact = blocks(model, x)
    found = {
        name: cut(curvature(model, "regression", data, name).to_dense(), model)
        for name in ("full", "block", "diag", "ekfac", "kron")
    }
    for name, G in exact.items():
        close = functools.partial(torch.testing.assert_close, rtol=1e-10, atol=1e-13 * float(G.norm()))
        close(found["full"][name], G)
        close(found["block"][name], G)
        close(found["diag"][name], torch.diag(G.diagonal()))
        close(found["ekfac"][name].trace(), G.trace())
        if name != "mix.weight":
            assert (G - found["ekfac"][name]).norm() <= (G - found["kron"][name]).norm() * (1 + 1e-12)
        if name.endswith("bias"):
            close(found["kron"][name], G)


def test_kfac_of_a_tied_weight_is_the_nearest_product_to_those_of_both_uses(tied):
    model, x, y = tied
    found = cut(curvature(model, "regression", [(x[:4], y[:4]), (x[4:], y[4:])], "kron").to_dense(), model)
    count = x.numel()
    total = torch.zeros(15, 15).double()
    for sample in x:
        h, _ = oracle._input_and_gradients(model, model.head, sample)
        g = oracle._input_and_gradients(model, model.embed, sample)[1].detach().reshape(-1, 3)
        total += torch.kron(torch.eye(5) * count, h[0].T @ h[0] / count)
        for other in x:  # the products of sums over all data
            one_hot = torch.nn.functional.one_hot(other, 5).double()
            total += torch.kron(one_hot.T @ one_hot / count, g.T @ g)
    rearranged = total.view(5, 3, 5, 3).permute(0, 2, 1, 3).reshape(25, 9)
    U, s, Vh = torch.linalg.svd(rearranged)
    nearest = s[0] * torch.kron(U[:, 0].view(5, 5), Vh[0].view(3, 3))
    torch.testing.assert_close(found["embed.weight"], nearest, rtol=1e-9, atol=1e-11 * float(nearest.norm()))
