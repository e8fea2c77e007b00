"""One Kronecker product for a weight and its bias, against dense matrices over ``[W b]`` built by hand."""

import functools

import network_oracle as oracle
import pytest
import torch
from networks import problem
from torch import nn

from curvlin_nn import Laplace, curvature, likelihoods, structures
from curvlin_nn.errors import UnsupportedError

kron = functools.partial(structures.Kronecker, joint_bias=True)
reduce = functools.partial(structures.Kronecker, joint_bias=True, approximation="reduce")
ekfac = functools.partial(structures.EKFAC, joint_bias=True)
ekfac_reduce = functools.partial(structures.EKFAC, joint_bias=True, approximation="reduce")
CHOICES = {"expand": kron, "reduce": reduce, "ekfac": ekfac, "ekfac-reduce": ekfac_reduce}


def module_blocks(G, model):
    """G with zeros outside of the diagonal blocks of modules."""
    owner = torch.cat(
        [torch.full((p.numel(),), hash(name.rpartition(".")[0])) for name, p in model.named_parameters()]
    )
    return torch.where(owner[:, None] == owner, G, 0.0)


def exact(model, x):
    J = oracle.jacobian_row_by_row(model, [(sample[None],) for sample in x])
    return module_blocks(torch.einsum("ncp,ncq->pq", J, J), model)


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12 * float(expected.norm()))


class Mean(nn.Module):
    def forward(self, x):
        return x.mean(1)


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("size", [1, 3, 8])
def test_a_linear_network_under_squared_error_is_exact(choice, size):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(3, 2, bias=False)).double()
    x, y = torch.randn(8, 4).double(), torch.randn(8, 2).double()
    data = list(zip(x.split(size), y.split(size), strict=True))
    close(curvature(model, "regression", data, CHOICES[choice]).to_dense(), exact(model, x))


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("pooled", [False, True])
def test_positions_are_exact_in_the_form_that_is_theirs(choice, pooled):
    torch.manual_seed(0)
    layers = [nn.Linear(3, 4), nn.Linear(4, 2), *([Mean()] if pooled else [])]
    model = nn.Sequential(*layers).double()
    x = torch.randn(6, 5, 3).double()
    y = torch.randn(6, 2).double() if pooled else torch.randn(6, 5, 2).double()
    found = curvature(model, "regression", [(x[:4], y[:4]), (x[4:], y[4:])], CHOICES[choice]).to_dense()
    G = exact(model, x)
    if ("reduce" in choice) == pooled:
        close(found, G)
    elif "ekfac" not in choice or pooled:
        assert (found - G).norm() > 0.01 * G.norm()


def test_joint_kfac_is_the_product_of_the_moments_of_inputs_with_a_one():
    p = problem("mlp", "classification")
    found = curvature(p.model, p.likelihood, p.batches(), kron).to_dense()
    Lambda = oracle.output_hessians(p.model, p.x, p.y, oracle.cross_entropy)
    start = 0
    for layer in (p.model[0], p.model[2], p.model[4]):
        out, inputs = layer.weight.shape
        A, B = torch.zeros(inputs + 1, inputs + 1).double(), torch.zeros(out, out).double()
        for sample, Lambda_n in zip(p.x, Lambda, strict=True):
            a, g = oracle._input_and_gradients(p.model, layer, sample)
            a, g = torch.cat([a.reshape(-1), torch.ones(1).double()]), g.detach().reshape(len(g), -1)
            A += torch.outer(a, a) / 8
            B += g.T @ Lambda_n @ g
        weight = [o * (inputs + 1) + i for o in range(out) for i in range(inputs)]
        bias = [o * (inputs + 1) + inputs for o in range(out)]
        order = torch.tensor(weight + bias)
        span = slice(start, start + len(order))
        close(found[span, span], torch.kron(B, A)[order][:, order])
        start += len(order)


@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_joint_ekfac_keeps_the_trace_and_is_nearer_than_joint_kfac(kind):
    p = problem(kind, "classification")
    G = oracle.curvature(p.model, p.x, p.y, p.likelihood, "full")
    block = module_blocks(G, p.model)
    found = {
        name: curvature(p.model, p.likelihood, p.batches(), CHOICES[name]).to_dense() for name in CHOICES
    }
    for kfac, corrected in (("expand", "ekfac"), ("reduce", "ekfac-reduce")):
        torch.testing.assert_close(found[corrected].trace(), G.trace(), rtol=1e-12, atol=0)
        assert (block - found[corrected]).norm() < (block - found[kfac]).norm()


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_evidence_and_predictions_are_those_of_the_dense_matrix(kind, choice):
    p = problem(kind, "regression")
    la = Laplace(p.model, p.likelihood, "all", CHOICES[choice], prior_precision=0.5).fit(p.batches())
    H = la.curvature.to_dense()
    prior = torch.full((len(H),), 0.5).double()
    expected = oracle.log_marginal_likelihood(p.model, p.x, p.y, p.likelihood, H, prior)
    assert float(la.log_marginal_likelihood()) == pytest.approx(expected, rel=1e-10)
    _, joint = la(p.x_test, joint=True)
    close(joint, oracle.covariance(p.model, p.x_test, H + torch.diag(prior)))


@pytest.mark.parametrize("choice", ["expand", "reduce"])
def test_a_prior_of_its_own_for_weight_and_bias_adds_in_closed_form(choice):
    p = problem("mlp", "regression")
    values = torch.linspace(0.3, 1.2, 6).double()
    la = Laplace(p.model, p.likelihood, "all", CHOICES[choice], prior_precision=values).fit(p.batches())
    H = la.curvature.to_dense()
    prior = torch.cat([v.expand(q.numel()) for v, q in zip(values, p.model.parameters(), strict=True)])
    expected = oracle.log_marginal_likelihood(p.model, p.x, p.y, p.likelihood, H, prior)
    assert float(la.log_marginal_likelihood()) == pytest.approx(expected, rel=1e-10)
    _, joint = la(p.x_test, joint=True)
    close(joint, oracle.covariance(p.model, p.x_test, H + torch.diag(prior)))
    with pytest.raises(UnsupportedError, match="cuts through blocks"):
        la.optimize_prior_precision(prior_structure="layerwise")


@pytest.mark.parametrize("choice", CHOICES)
def test_the_best_priors_by_module_are_a_maximum_of_the_dense_evidence(choice):
    p = problem("mlp", "regression")
    la = Laplace(p.model, p.likelihood, "all", CHOICES[choice]).fit(p.batches())
    optimum = la.optimize_prior_precision(prior_structure="modulewise")
    H, sizes = la.curvature.to_dense(), torch.tensor([30, 35, 18])

    def evidence(values):
        prior = values.repeat_interleave(sizes)
        return oracle.log_marginal_likelihood(p.model, p.x, p.y, p.likelihood, H, prior)

    best = optimum.prior_precision.double()
    top = evidence(best)
    assert float(optimum.log_marginal_likelihood) == pytest.approx(top, rel=1e-9)
    for k in range(3):
        for factor in (0.99, 1.01):
            assert evidence(best * torch.where(torch.arange(3) == k, factor, 1.0)) < top


def test_states_of_joint_products_merge():
    p = problem("cnn", "classification")
    whole = Laplace(p.model, p.likelihood, "all", kron).fit(p.batches())
    parts = Laplace(p.model, p.likelihood, "all", kron).fit(p.batches()[:1])
    parts.fit(p.batches()[1:], override=False)
    close(parts.curvature.to_dense(), whole.curvature.to_dense())


def test_transposed_weights_have_joint_products_too():
    class Addmm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(2))

        def forward(self, x):
            return torch.addmm(self.bias, x, self.weight)

    model = Addmm().double()
    x, y = torch.randn(6, 3).double(), torch.randn(6, 2).double()
    la = Laplace(model, "regression", "all", kron, prior_precision=0.5).fit([(x, y)])
    G = exact(model, x)
    close(la.curvature.to_dense(), G)
    close(la(x, joint=True)[1], oracle.covariance(model, x, G + torch.eye(8).double() / 2))


def test_a_bias_of_other_uses_than_its_weight_is_refused():
    class Apart(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x):
            return self.layer(x) + nn.functional.linear(x, self.layer.weight)

    with pytest.raises(
        UnsupportedError, match=r"needs parameter 'layer\.weight' to be used at the same positions"
    ):
        curvature(Apart(), "regression", [(torch.randn(4, 3), torch.randn(4, 3))], kron)


@pytest.mark.parametrize("choice", ["expand", "ekfac"])
def test_a_sequence_is_its_kept_tokens_where_tokens_do_not_meet(choice):
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x, y = torch.randn(6, 4, 3).double(), torch.randint(3, (6, 4))
    y[torch.rand(6, 4) < 0.4] = -7
    likelihood = likelihoods.Categorical(ignore_index=-7)
    found = curvature(model, likelihood, [(x[:4], y[:4]), (x[4:], y[4:])], CHOICES[choice]).to_dense()
    kept = y != -7
    close(found, curvature(model, "classification", [(x[kept], y[kept])], CHOICES[choice]).to_dense())


@pytest.mark.parametrize("choice", CHOICES)
def test_joint_products_stand_beside_other_structures(choice):
    p = problem("cnn", "regression")
    mixed = {"0": CHOICES[choice], "*.weight": "diag", "*": "full"}
    la = Laplace(p.model, p.likelihood, "all", mixed, prior_precision=0.5).fit(p.batches())
    H = la.curvature.to_dense()
    alone = curvature(p.model, p.likelihood, p.batches(), CHOICES[choice], subset_of_weights=["0"])
    n = alone.size
    close(H[:n, :n], alone.to_dense())
    assert bool((H[:n, n:] == 0).all())
    _, joint = la(p.x_test, joint=True)
    close(joint, oracle.covariance(p.model, p.x_test, H + torch.eye(len(H)).double() / 2))


@pytest.mark.parametrize("choice", CHOICES)
def test_the_last_layer_alone_has_a_joint_product(choice):
    p = problem("mlp", "regression")
    la = Laplace(p.model, p.likelihood, "last_layer", CHOICES[choice], prior_precision=0.5).fit(p.batches())
    J = oracle.jacobian(p.model, p.x, ["4.weight", "4.bias"]).detach()
    close(la.curvature.to_dense(), torch.einsum("ncp,ncq->pq", J, J))
    J = oracle.jacobian(p.model, p.x_test, ["4.weight", "4.bias"]).detach().flatten(0, 1)
    P = la.curvature.to_dense() + torch.eye(18).double() / 2
    close(la(p.x_test, joint=True)[1], J @ torch.linalg.inv(P) @ J.T)


def test_a_transposed_convolution_has_no_joint_product():
    model = nn.Sequential(nn.ConvTranspose1d(2, 2, 2), nn.Flatten())
    with pytest.raises(UnsupportedError, match="or a transposed convolution"):
        curvature(model, "regression", [(torch.randn(4, 2, 3), torch.randn(4, 8))], kron)


def test_attention_and_grouped_convolutions_have_joint_products_and_norms_stay_as_they_are():

    class Many(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
            self.norm = nn.LayerNorm(4)
            self.conv = nn.Conv1d(4, 4, 2, groups=2)

        def forward(self, x):
            h = self.norm(self.attention(x, x, x, need_weights=False)[0])
            return self.conv(h.mT).mean(2)

    torch.manual_seed(0)
    model = Many().double()
    x, y = torch.randn(5, 3, 4).double(), torch.randn(5, 4).double()
    la = Laplace(model, "regression", "all", ekfac, prior_precision=0.5).fit([(x, y)])
    H, J = la.curvature.to_dense(), oracle.jacobian_row_by_row(model, [(sample[None],) for sample in x])
    torch.testing.assert_close(H.trace(), J.square().sum(), rtol=1e-11, atol=0)
    names = [name for name, _ in model.named_parameters()]
    sizes = [p.numel() for p in model.parameters()]
    for weight, bias in (("in_proj_weight", "in_proj_bias"), ("out_proj.weight", "out_proj.bias")):
        rows, columns = (
            slice(sum(sizes[: (i := names.index(f"attention.{name}"))]), sum(sizes[: i + 1]))
            for name in (weight, bias)
        )
        assert bool((H[rows, columns] != 0).any())
    J = J.flatten(0, 1)
    close(la(x, joint=True)[1], J @ torch.linalg.inv(H + torch.eye(len(H)).double() / 2) @ J.T)
