"""The Kronecker-damped posterior against dense Kronecker products of factors that the referee makes."""

import functools

import network_oracle as oracle
import pytest
import torch
from networks import problem
from torch import nn

from curvlin import Isotropic
from curvlin_nn import Laplace, structures
from curvlin_nn.errors import UnsupportedError

SIGMA, TEMPERATURE = 0.7, 1.5


def damped(p, deltas, sigma=1.0, temperature=1.0):
    """``(sqrt(s) B + sqrt(delta) I) (x) (sqrt(s) A + sqrt(delta) I)`` per weight, ``s G + delta I`` per bias."""
    loss, s = oracle.LOSSES[p.likelihood], 1 / (sigma**2 * temperature)
    exact, Lambda = oracle.ggn(p.model, p.x, p.y, loss), oracle.output_hessians(p.model, p.x, p.y, loss)
    blocks, start = [], 0
    for delta, (name, parameter) in zip(deltas, p.model.named_parameters(), strict=True):
        owner, _, kind = name.rpartition(".")
        span = slice(start, start + parameter.numel())
        start += parameter.numel()
        if kind == "bias":
            blocks.append(s * exact[span, span] + delta * torch.eye(parameter.numel()).double())
            continue
        for A, B in oracle._layer_factors(p.model, p.model.get_submodule(owner), p.x, Lambda):
            L, R = (s**0.5 * M + delta**0.5 * torch.eye(len(M)).double() for M in (B, A))
            blocks.append(torch.kron(L, R))
    return torch.block_diag(*blocks).detach()


def evidence(p, deltas, sigma=1.0, temperature=1.0):
    prior = torch.cat(
        [
            torch.full((q.numel(),), float(d), dtype=torch.float64)
            for d, q in zip(deltas, p.model.parameters(), strict=True)
        ]
    )
    H = (damped(p, deltas, sigma, temperature) - torch.diag(prior)) * sigma**2 * temperature
    return oracle.log_marginal_likelihood(p.model, p.x, p.y, p.likelihood, H, prior, sigma, temperature)


@pytest.mark.parametrize("kind", ["mlp", "cnn"])
@pytest.mark.parametrize("by_layer", [False, True])
def test_predictions_samples_and_evidence_are_those_of_the_dense_product(kind, by_layer):
    p = problem(kind, "regression")
    n = len(list(p.model.parameters()))
    deltas = torch.linspace(0.3, 1.2, n).double() if by_layer else torch.tensor(0.5).double()
    la = Laplace(
        p.model, "regression", "all", "kron",
        prior_precision=deltas, sigma_noise=SIGMA, temperature=TEMPERATURE, damping=True,
    ).fit(p.batches())  # fmt: skip
    deltas = [float(d) for d in deltas.expand(n)]
    P = damped(p, deltas, SIGMA, TEMPERATURE)
    torch.testing.assert_close(la.posterior_precision.to_dense(), P, rtol=1e-10, atol=1e-10 * float(P.norm()))
    _, joint = la(p.x_test, joint=True)
    expected = oracle.covariance(p.model, p.x_test, P)
    torch.testing.assert_close(joint, expected, rtol=1e-9, atol=1e-11 * float(expected.norm()))
    expected = evidence(p, deltas, SIGMA, TEMPERATURE)
    assert float(la.log_marginal_likelihood()) == pytest.approx(expected, rel=1e-10)
    draws = la.sample(4000, generator=torch.Generator().manual_seed(0)) - la.mean
    chi_square = torch.einsum("sp,pq,sq->s", draws, P, draws)  # P of mean, 2 P of variance
    z = (chi_square.mean() - len(P)) / (2 * len(P) / len(draws)) ** 0.5
    assert abs(float(z)) < 4


def test_it_is_not_the_sum_with_the_prior():
    p = problem("mlp", "classification")
    plain, other = (
        Laplace(p.model, p.likelihood, "all", "kron", damping=damping).fit(p.batches())
        for damping in (False, True)
    )
    assert float(other.log_marginal_likelihood()) < float(plain.log_marginal_likelihood()) - 0.1
    torch.testing.assert_close(plain.curvature.to_dense(), other.curvature.to_dense(), rtol=0, atol=0)


@pytest.mark.parametrize("structure", ["scalar", "layerwise"])
def test_the_optimum_is_a_stationary_point_of_the_dense_evidence(structure):
    p = problem("mlp", "regression")
    la = Laplace(p.model, "regression", "all", "kron", damping=True).fit(p.batches())
    found = la.optimize_prior_precision(prior_structure=structure, optimize_noise=True)
    n = len(list(p.model.parameters()))
    logs = found.prior_precision.log().expand(n)
    log_noise = torch.tensor(found.sigma_noise).double().log()

    def value(step, noise_step):
        deltas = [float(d) for d in (logs + step).exp()]
        return evidence(p, deltas, float((log_noise + noise_step).exp()))

    assert value(0, 0) == pytest.approx(found.log_marginal_likelihood, rel=1e-10)
    steps = [torch.ones(n)] if structure == "scalar" else list(torch.eye(n).double())
    for step, noise_step in [*((step, 0.0) for step in steps), (torch.zeros(n), 1.0)]:
        slope = (value(1e-4 * step, 1e-4 * noise_step) - value(-1e-4 * step, -1e-4 * noise_step)) / 2e-4
        bend = sum(value(h * step, h * noise_step) for h in (-1e-2, 1e-2)) - 2 * value(0, 0)
        assert bend < 0
        assert abs(slope) < 1e-6 * abs(bend / 1e-4)  # within 1e-6 of the maximum, in log precision


def test_the_evidence_is_differentiable_in_precisions_and_noise():
    p = problem("mlp", "regression")
    la = Laplace(p.model, "regression", "all", "kron", damping=True).fit(p.batches())
    inputs = (
        torch.linspace(0.3, 1.2, 6).double().requires_grad_(),
        torch.tensor(0.8).double().requires_grad_(),
    )
    assert torch.autograd.gradcheck(la.log_marginal_likelihood, inputs)


def test_weight_and_bias_as_one_matrix_are_damped_together():
    p = problem("mlp", "classification")
    joint = functools.partial(structures.Kronecker, joint_bias=True)
    la = Laplace(p.model, p.likelihood, "all", joint, damping=True, prior_precision=2.0).fit(p.batches())
    block, coordinates = la.curvature.blocks[0], la.curvature.indices.blocks[0]
    ((B, A),) = block.terms
    L, R = (M + 2**0.5 * torch.eye(len(M)).double() for M in (B, A))
    found = la.posterior_precision.to_dense()[coordinates[:, None], coordinates]
    torch.testing.assert_close(found, torch.kron(L, R), rtol=1e-10, atol=1e-10)
    with pytest.raises(
        UnsupportedError, match="one prior precision for all of a Kronecker block, found several"
    ):
        la.prior_precision = torch.linspace(1, 2, 6)


def test_blocks_beside_the_products_get_their_prior_added():
    p = problem("mlp", "classification")
    choice = {"0.weight": "kron", "2": "diag", "*": "full"}
    la = Laplace(p.model, p.likelihood, "all", choice, damping=True, prior_precision=0.5).fit(p.batches())
    H, P = la.curvature.to_dense(), la.posterior_precision.to_dense()
    rest = torch.ones(len(H)).bool()
    rest[:24] = False
    torch.testing.assert_close(
        (P - H)[rest][:, rest], 0.5 * torch.eye(int(rest.sum())).double(), rtol=0, atol=1e-12
    )
    ((B, A),) = la.curvature.blocks[0].terms
    L, R = (M + 0.5**0.5 * torch.eye(len(M)).double() for M in (B, A))
    torch.testing.assert_close(P[:24, :24], torch.kron(L, R), rtol=1e-10, atol=1e-10)


def test_a_model_in_float32_and_one_of_one_output():
    torch.manual_seed(0)
    model, x, y = nn.Linear(3, 1), torch.randn(6, 3), torch.randn(6, 1)
    la = Laplace(model, "regression", "all", "kron", damping=True).fit([(x, y)])
    P = la.posterior_precision
    assert P.dtype == torch.float32
    A = x.double().T @ x.double() / 6
    expected = torch.kron((torch.tensor([[6.0]]) + 1).double(), A + torch.eye(3).double())
    torch.testing.assert_close(P.to_dense()[:3, :3].double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("full", "hessian_structure='full'"),
        ("ekfac", "hessian_structure='ekfac'"),
        ("kron-lowrank", "hessian_structure='kron-lowrank'"),
    ],
)
def test_structures_without_products_are_refused_at_once(choice, message):
    p = problem("mlp", "classification")
    with pytest.raises(UnsupportedError, match=message):
        Laplace(p.model, p.likelihood, "all", choice, damping=True)


@pytest.mark.parametrize(
    ("choice", "found"),
    [
        ({"0": "kron", "*": "ekfac"}, "SpectralKronecker"),
        ({"*": "diag"}, "found none"),
        (structures.KroneckerLowRank, "Woodbury"),
    ],
)
def test_others_are_refused_when_they_are_known(choice, found):
    p = problem("mlp", "classification")
    la = Laplace(p.model, p.likelihood, "all", choice, damping=True)
    with pytest.raises(UnsupportedError, match=found):
        la.fit(p.batches())


def test_what_has_no_meaning_is_refused():
    p = problem("mlp", "classification")
    with pytest.raises(UnsupportedError, match="curvature='hessian'"):
        Laplace(p.model, p.likelihood, "all", "full", curvature="hessian", damping=True)
    with pytest.raises(TypeError, match="damping must be True or False"):
        Laplace(p.model, p.likelihood, "all", "kron", damping=0.1)
    la = Laplace(p.model, p.likelihood, "all", "kron", damping=True).fit(p.batches())
    before = float(la.log_marginal_likelihood())
    with pytest.raises(UnsupportedError, match="found several for coordinate 0"):
        la.prior_precision = torch.ones(la.n_params)
    with pytest.raises(UnsupportedError, match="found an operator"):
        la.log_marginal_likelihood(Isotropic(torch.tensor(1.0), la.n_params))
    with pytest.raises(UnsupportedError, match="cuts through blocks"):
        la.optimize_prior_precision(prior_structure="diag")
    assert float(la.log_marginal_likelihood()) == before
