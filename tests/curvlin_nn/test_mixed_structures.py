"""EKFAC, exact blocks, structures mixed by layer, and KFAC-reduce against dense per-sample matrices."""

import functools

import network_oracle as oracle
import pytest
import torch
from networks import Sequences, problem
from torch import nn

from curvlin_nn import Laplace, curvature, likelihoods, structures
from curvlin_nn.curvature import accumulate
from curvlin_nn.errors import UnsupportedError

MIXED = {"0": "full", "2*": "kron", "*": "ekfac"}
CHOICES = ("ekfac", "block", MIXED, functools.partial(structures.Kronecker, approximation="reduce"))


def blocks_of(G, model):
    sizes = [p.numel() for p in model.parameters()]
    return torch.block_diag(*[G[s, s] for s in _slices(sizes)])


def _slices(sizes):
    start = 0
    for size in sizes:
        yield slice(start, start + size)
        start += size


@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_blocks_are_the_diagonal_blocks_of_the_full_matrix(kind):
    p = problem(kind, "classification")
    expected = blocks_of(oracle.curvature(p.model, p.x, p.y, p.likelihood, "full"), p.model)
    H = curvature(p.model, p.likelihood, p.batches(), "block").to_dense()
    torch.testing.assert_close(H, expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_ekfac_keeps_the_trace_and_is_nearer_than_kfac(kind):
    p = problem(kind, "classification")
    exact = oracle.curvature(p.model, p.x, p.y, p.likelihood, "full")
    block = blocks_of(exact, p.model)
    kfac = oracle.kfac(p.model, p.x, p.y, oracle.LOSSES[p.likelihood])
    ekfac = curvature(p.model, p.likelihood, p.batches(), "ekfac").to_dense()
    torch.testing.assert_close(ekfac.trace(), exact.trace(), rtol=1e-12, atol=0)
    assert (block - ekfac).norm() < (block - kfac).norm()


def test_ekfac_has_the_second_moments_in_the_eigenbasis_of_kfac():
    p = problem("mlp", "regression")
    exact = oracle.curvature(p.model, p.x, p.y, p.likelihood, "full")
    H = curvature(p.model, p.likelihood, p.batches(), "ekfac")
    Q = torch.kron(H.blocks[0].QL, H.blocks[0].QR)
    kfac = oracle.kfac(p.model, p.x, p.y, oracle.LOSSES[p.likelihood])
    n = len(Q)
    rotated = Q.T @ kfac[:n, :n] @ Q
    torch.testing.assert_close(
        rotated, torch.diag(rotated.diagonal()), rtol=0, atol=1e-12 * float(kfac.norm())
    )
    moments = (Q.T @ exact[:n, :n] @ Q).diagonal()
    torch.testing.assert_close(H.blocks[0].eigenvalues.flatten(), moments, rtol=1e-9, atol=1e-13)


def test_a_mixed_structure_has_each_structure_on_its_parameters():
    p = problem("mlp", "classification")
    exact = oracle.curvature(p.model, p.x, p.y, p.likelihood, "full")
    kfac = oracle.kfac(p.model, p.x, p.y, oracle.LOSSES[p.likelihood])
    H = curvature(p.model, p.likelihood, p.batches(), {"2": "kron", "*": "full"}).to_dense()
    middle = torch.zeros(len(H), dtype=torch.bool)
    middle[30:65] = True  # 6 * 5 + 5 after 4 * 6 + 6
    outer = middle[:, None] == middle
    expected = torch.where(middle[:, None], kfac, exact) * outer
    torch.testing.assert_close(H, expected, rtol=1e-10, atol=1e-13)


def test_reduce_is_exact_for_a_linear_network_with_mean_pooling():
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Linear(3, 2)

        def forward(self, x):
            return self.embed(x).mean(1)

    model = Pooled().double()
    x, y = torch.randn(5, 4, 3).double(), torch.randn(5, 2).double()
    reduce = functools.partial(structures.Kronecker, approximation="reduce")
    H = curvature(model, "regression", [(x[:3], y[:3]), (x[3:], y[3:])], reduce).to_dense()
    expected = blocks_of(oracle.curvature(model, x, y, "regression", "full"), model)
    torch.testing.assert_close(H, expected, rtol=1e-10, atol=1e-14)
    expand = curvature(model, "regression", [(x, y)], "kron").to_dense()
    assert (expand - expected).norm() > 0.05 * expected.norm()


@pytest.mark.parametrize("choice", CHOICES, ids=["ekfac", "block", "mixed", "reduce"])
def test_curvature_depends_on_neither_batches_nor_order(choice):
    p = problem("mlp", "classification")
    whole = curvature(p.model, p.likelihood, p.batches(8), choice).to_dense()
    order = torch.randperm(8)
    shuffled = [(p.x[order], p.y[order])]
    for data in (p.batches(1), p.batches(5), shuffled):
        H = curvature(p.model, p.likelihood, data, choice).to_dense()
        torch.testing.assert_close(H, whole, rtol=1e-9, atol=1e-12 * float(whole.norm()))


@pytest.mark.parametrize("choice", CHOICES, ids=["ekfac", "block", "mixed", "reduce"])
def test_evidence_is_that_of_the_dense_matrix(choice):
    p = problem("mlp", "classification")
    la = Laplace(p.model, p.likelihood, "all", choice, prior_precision=0.7)
    la.fit(p.batches())
    H = curvature(p.model, p.likelihood, p.batches(), choice).to_dense()
    prior = torch.full((len(H),), 0.7, dtype=torch.float64)
    expected = oracle.log_marginal_likelihood(p.model, p.x, p.y, p.likelihood, H, prior)
    assert float(la.log_marginal_likelihood()) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"0": "kron"}, "no pattern for parameter '2.weight'"),
        ({"*": "kron", "0": "full"}, "pattern '0' takes no parameter"),
        (
            functools.partial(structures.Block, max_block=10),
            "has 24 coordinates, expected at most max_block=10",
        ),
        (
            functools.partial(structures.EKFAC, max_block=4),
            "parameter '0.bias' has no Kronecker factors and 6",
        ),
        (functools.partial(structures.Kronecker, approximation="half"), "approximation='half'"),
    ],
)
def test_choices_that_cannot_be_served_are_refused(choice, message):
    p = problem("mlp", "classification")
    with pytest.raises(UnsupportedError, match=message):
        curvature(p.model, p.likelihood, p.batches(), choice)


def test_ekfac_in_different_bases_does_not_merge():
    p = problem("mlp", "classification")
    la = Laplace(p.model, p.likelihood, "all", "ekfac")
    la.fit(p.batches())
    with pytest.raises(UnsupportedError, match="cannot merge eigenvalues in different bases"):
        la.fit(p.batches(), override=False)


def fitted_state(p, choice, data):
    (state,) = accumulate(p.model, likelihoods.resolve(p.likelihood), data, "all", [choice]).states
    return state


@pytest.mark.parametrize("choice", [{"0": "full", "2*": "diag", "*": "ekfac"}, {"0": "diag", "*": "lowrank"}])
def test_a_mixed_structure_of_which_one_part_cannot_merge_stays_as_it_is(choice):
    p = problem("mlp", "classification")
    factory = structures.resolve(choice)
    mine, theirs = (fitted_state(p, factory, data) for data in (p.batches()[:2], p.batches()[2:]))
    before = [state.finish().to_dense() for state in (mine, theirs)]
    with pytest.raises(UnsupportedError, match="cannot"):
        mine.merge(theirs)
    for state, expected in zip((mine, theirs), before, strict=True):
        assert torch.equal(state.finish().to_dense(), expected)


def test_mixed_structures_of_different_groups_do_not_merge():
    p = problem("mlp", "classification")
    mine, theirs = (
        fitted_state(p, structures.resolve({first: "full", "*": "full"}), p.batches()) for first in ("0", "2")
    )
    before = mine.finish().to_dense()
    with pytest.raises(UnsupportedError, match="group the parameters in different ways"):
        mine.merge(theirs)
    assert torch.equal(mine.finish().to_dense(), before)


def test_a_fit_that_cannot_continue_leaves_the_posterior_as_it_was():
    p = problem("mlp", "classification")
    la = Laplace(p.model, p.likelihood, "all", {"0": "full", "*": "ekfac"}, prior_precision=0.3)
    la.fit(p.batches())

    def facts():
        noise = torch.Generator().manual_seed(0)
        return la.curvature.to_dense(), la.log_marginal_likelihood(), la(p.x_test), la.sample(3, noise)

    before = facts()
    with pytest.raises(UnsupportedError, match="cannot merge eigenvalues in different bases"):
        la.fit(p.batches()[:1], override=False)
    assert all(map(torch.equal, before, facts()))
    assert la.n_data == 8


def test_ekfac_keeps_the_trace_where_a_layer_is_used_several_times():
    model = Sequences().double()
    x, y = torch.randn(6, 3, 4).double(), torch.randint(2, (6,))
    H = curvature(model, "classification", [(x, y)], "ekfac")
    exact = oracle.curvature(model, x, y, "classification", "full")
    torch.testing.assert_close(H.to_dense().trace(), exact.trace(), rtol=1e-12, atol=0)
