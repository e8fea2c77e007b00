"""Curvature known by its products: against per-sample autodiff, and against `torch.func.hessian` of the summed loss."""

import functools
import itertools

import network_oracle as oracle
import pytest
import torch
from networks import Problem, Sequences, problem
from torch import nn
from torch.func import functional_call, hessian, jacrev

from curvlin import Isotropic, LowRankPlusDiag
from curvlin.testing import forbid_dense
from curvlin_nn import Laplace, curvature, feature_maps, hessian_eigenpairs, low_rank, matrix_free, structures
from curvlin_nn.capture import Block, Captures
from curvlin_nn.errors import (
    CouplingError,
    DataError,
    IndefiniteHessianError,
    StochasticModelError,
    UnsupportedError,
)
from curvlin_nn.feature_maps.jacobian import features
from curvlin_nn.products import hessian_states

CASES = list(itertools.product(("mlp", "cnn"), ("classification", "regression")))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def dense_hessian(model: nn.Module, x: torch.Tensor, y: torch.Tensor, likelihood: str) -> torch.Tensor:
    parameters = dict(model.named_parameters())
    shapes = [p.shape for p in parameters.values()]

    def loss(theta: torch.Tensor) -> torch.Tensor:
        parts = theta.split([shape.numel() for shape in shapes])
        tensors = {
            name: part.reshape(shape) for name, part, shape in zip(parameters, parts, shapes, strict=True)
        }
        return oracle.LOSSES[likelihood](functional_call(model, tensors, (x,)), y)

    return hessian(loss)(oracle.flat(parameters).detach())


def smooth(likelihood: str) -> Problem:
    """A small network of tanh, at parameters where its Hessian is indefinite."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    x, labels, targets = torch.randn(6, 3).double(), torch.randint(2, (6,)), torch.randn(6, 2).double()
    return Problem(model, likelihood, x, labels if likelihood == "classification" else targets, x)


class Tied(nn.Module):
    """Token embeddings that are the output layer too, with outputs (N, T, C); nested input."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(3, 3)
        self.read = nn.Linear(3, 4)

    def forward(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        hidden = torch.tanh(self.mix(inputs["tokens"])) + inputs["more"][0][:, None]
        return self.read(torch.tanh(self.mix(hidden)))


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize(("kind", "likelihood"), CASES)
def test_products_are_those_of_the_dense_matrix(kind, likelihood, cache):
    p = problem(kind, likelihood)
    expected = oracle.ggn(p.model, p.x, p.y, oracle.LOSSES[likelihood])
    X = torch.randn(len(expected), 7, generator=generator()).double()
    H = matrix_free(p.model, likelihood, p.batches(), cache=cache)
    assert relative(H @ X, expected @ X) < 1e-12
    assert relative(H @ X[:, 0], expected @ X[:, 0]) < 1e-12


@pytest.mark.parametrize("cache", [True, False])
def test_the_root_multiplies_to_the_matrix(cache):
    p = problem("mlp", "classification")
    H = matrix_free(p.model, "classification", p.batches(), cache=cache)
    (term,) = H._product.terms
    L = term.colour(torch.eye(term.noise, dtype=torch.float64))
    expected = oracle.ggn(p.model, p.x, p.y, oracle.cross_entropy)
    assert relative(L @ L.mT, expected) < 1e-12


def test_products_with_empirical_columns_are_those_of_the_gradients():
    p = problem("mlp", "classification")
    J = oracle.jacobian(p.model, p.x)
    f = p.model(p.x).detach()
    residual = torch.softmax(f, -1) - nn.functional.one_hot(p.y, f.shape[1])
    gradients = torch.einsum("ncp,nc->np", J, residual)
    X = torch.randn(J.shape[-1], 3).double()
    H = matrix_free(p.model, "classification", p.batches(), "empirical")
    assert relative(H @ X, gradients.mT @ (gradients @ X)) < 1e-12


def test_a_random_matrix_is_the_same_one_in_each_product():
    p = problem("mlp", "classification")
    H = matrix_free(p.model, "classification", p.batches(), "mc", generator=generator())
    x = torch.randn(H.size).double()
    assert torch.equal(H @ x, H @ x)
    with pytest.raises(UnsupportedError, match="expected cache=True"):
        matrix_free(p.model, "classification", p.batches(), "mc", cache=False)


def test_solves_and_determinants_with_a_kfac_preconditioner():
    p = problem("cnn", "classification")
    size = sum(t.numel() for t in p.model.parameters())
    exact = oracle.ggn(p.model, p.x, p.y, oracle.cross_entropy) + 0.3 * torch.eye(size).double()
    prior = Isotropic(torch.tensor(0.3, dtype=torch.float64), size)
    kfac = curvature(p.model, "classification", p.batches(), "kron") + prior
    P = (matrix_free(p.model, "classification", p.batches()) + prior).preconditioned_by(kfac)
    b = torch.randn(size, 2).double()
    assert relative(P.solve(b, rtol=1e-12).require(), torch.linalg.solve(exact, b)) < 1e-10
    found = P.logdet(probes=20, generator=generator())
    z = (found.value - torch.logdet(exact)) / found.standard_error
    assert float(found.standard_error) > 0
    assert abs(float(z)) < 4


def test_jacobians_of_outputs_of_any_shape_and_nested_inputs_multiply_like_dense_ones():
    torch.manual_seed(0)
    model = Tied().double()
    x = {"tokens": torch.randn(3, 5, 3).double(), "more": [torch.randn(3, 3).double()]}
    f, Phi = feature_maps.JacobianMap(model)(x)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    blocks = jacrev(lambda p: functional_call(model, p, (x,)))(parameters)
    J = torch.cat([b.reshape(3, 20, -1) for b in blocks.values()], dim=-1)
    v, u = torch.randn(J.shape[-1], 2).double(), torch.randn(3, 20, 2).double()
    assert torch.equal(f, model(x).detach().flatten(1))
    assert relative(Phi @ v, J @ v) < 1e-12
    assert relative(Phi.T @ u, torch.einsum("nrp,nrk->pk", J, u)) < 1e-12
    assert relative(Phi.gram(), torch.einsum("nrp,mqp->nrmq", J, J)) < 1e-12


def test_products_and_kernels_never_allocate_a_jacobian():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 5))
    x, y = torch.randn(40, 32), torch.randint(5, (40,))
    n_parameters = sum(p.numel() for p in model.parameters())
    limit = 6 * n_parameters  # a Jacobian has 200 times as many
    data = [(x[:20], y[:20]), (x[20:], y[20:])]
    with forbid_dense(limit):
        H = matrix_free(model, "classification", data)
        H @ torch.ones(H.size)
        feature_maps.JacobianMap(model)(x)[1].gram()
    with forbid_dense(10 * n_parameters):
        low_rank(model, "classification", data, 4, oversampling=2)


# -- the Hessian -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("likelihood", ["classification", "regression"])
def test_hessian_products_are_those_of_the_dense_hessian(likelihood):
    p = smooth(likelihood)
    expected = dense_hessian(p.model, p.x, p.y, likelihood)
    H = matrix_free(p.model, likelihood, p.batches(4), kind="hessian")
    X = torch.randn(len(expected), 3).double()
    assert relative(H @ X, expected @ X) < 1e-12


@pytest.mark.parametrize("likelihood", ["classification", "regression"])
@pytest.mark.parametrize("structure", ["full", "block", "diag"])
@pytest.mark.parametrize("indefinite", ["clip", "abs"])
def test_structures_of_the_hessian_are_parts_of_the_dense_hessian(likelihood, structure, indefinite):
    p = smooth(likelihood)
    expected = dense_hessian(p.model, p.x, p.y, likelihood)
    sizes = {"full": [len(expected)], "diag": [1] * len(expected)}.get(
        structure, [t.numel() for t in p.model.parameters()]
    )
    parts = []
    for start, size in zip(itertools.accumulate([0, *sizes]), sizes, strict=False):
        values, vectors = torch.linalg.eigh(expected[start : start + size, start : start + size])
        values = values.clamp(min=0) if indefinite == "clip" else values.abs()
        parts.append(vectors @ torch.diag(values) @ vectors.mT)
    found = curvature(p.model, likelihood, p.batches(4), structure, kind="hessian", indefinite=indefinite)
    assert relative(found.to_dense(), torch.block_diag(*parts)) < 1e-10


def test_an_indefinite_hessian_is_refused_with_its_least_eigenvalue():
    p = smooth("classification")
    least = float(torch.linalg.eigvalsh(dense_hessian(p.model, p.x, p.y, "classification")).min())
    assert least < 0
    with pytest.raises(IndefiniteHessianError, match="indefinite='clip'") as caught:
        curvature(p.model, "classification", p.batches(4), "full", kind="hessian")
    assert caught.value.value == pytest.approx(least, rel=1e-10)


def test_the_hessian_of_a_linear_model_is_its_ggn():
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    x, y = torch.randn(9, 3).double(), torch.randint(2, (9,))
    H = curvature(model, "classification", [(x, y)], "full", kind="hessian").to_dense()
    assert relative(H, oracle.ggn(model, x, y, oracle.cross_entropy)) < 1e-12


def test_a_hessian_over_some_parameters_is_that_block():
    p = smooth("regression")
    expected = dense_hessian(p.model, p.x, p.y, "regression")[-8:, -8:]
    H = curvature(p.model, "regression", p.batches(4), "full", subset_of_weights="last_layer", kind="hessian")
    assert relative(H.to_dense(), expected) < 1e-12


def test_attention_has_a_hessian():
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(4, 12)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = self.qkv(x).chunk(3, dim=-1)
            return nn.functional.scaled_dot_product_attention(q, k, v).mean(1)

    torch.manual_seed(0)
    model = Attention().double()
    x, y = torch.randn(3, 5, 4).double(), torch.randn(3, 4).double()

    def by_hand(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        q, k, v = (x @ weight.mT + bias).chunk(3, dim=-1)
        return (torch.softmax(q @ k.mT / 2, dim=-1) @ v).mean(1)

    def loss(theta: torch.Tensor) -> torch.Tensor:
        return oracle.half_squared_error(by_hand(x, theta[:48].reshape(12, 4), theta[48:]), y)

    expected = hessian(loss)(oracle.flat(dict(model.named_parameters())).detach())
    H = matrix_free(model, "regression", [(x, y)], kind="hessian")
    X = torch.randn(60, 2).double()
    assert relative(H @ X, expected @ X) < 1e-12


class Odd(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.layer = kind, nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == "random":
            return nn.functional.dropout(self.layer(x), training=True)
        return self.layer(x - x.mean(0))


@pytest.mark.parametrize(("kind", "error"), [("random", StochasticModelError), ("coupled", CouplingError)])
def test_models_without_a_hessian_are_refused(kind, error):
    with pytest.raises(error):
        matrix_free(Odd(kind), "classification", [(torch.randn(4, 3), torch.zeros(4).long())], kind="hessian")


def test_what_has_no_meaning_for_a_hessian_is_refused_with_the_mend():
    p = smooth("classification")
    for options, words in {
        ("kron", "exact", 10_000): "products have no factors",
        ("full", "mc", 10_000): "has no columns",
        ("full", "exact", 5): "max_parameters=5 is less than the 39 parameters",
    }.items():
        structure, columns, most = options
        with pytest.raises(UnsupportedError, match=words):
            curvature(
                p.model,
                "classification",
                p.batches(),
                structure,
                columns,
                kind="hessian",
                max_parameters=most,
            )


@pytest.mark.parametrize("kind", ["ggn", "hessian"])
def test_a_loader_that_is_spent_after_one_pass_is_refused(kind):
    p = smooth("classification")
    with pytest.raises(DataError, match="yielded no batch"):
        matrix_free(p.model, "classification", iter(p.batches()), kind=kind, cache=False)


@pytest.mark.parametrize("likelihood", ["classification", "regression"])
def test_eigenpairs_of_the_hessian_are_the_largest_of_either_sign(likelihood):
    p = smooth(likelihood)
    exact = dense_hessian(p.model, p.x, p.y, likelihood)
    values = torch.linalg.eigvalsh(exact)
    values = values[values.abs().argsort(descending=True)]
    found = hessian_eigenpairs(
        p.model, likelihood, p.batches(4), 6, passes=30, probes=30, generator=generator()
    )
    assert relative(found.values, values[:6]) < 1e-10
    left = exact - found.vectors @ torch.diag(found.values) @ found.vectors.mT
    z = (found.residual.value - left.square().sum()) / found.residual.standard_error
    assert abs(float(z)) < 4


def test_all_eigenpairs_of_the_hessian_give_it_back_and_its_sign_is_told():
    p = smooth("classification")
    exact = dense_hessian(p.model, p.x, p.y, "classification")
    found = hessian_eigenpairs(p.model, "classification", p.batches(4), 39, passes=1, generator=generator())
    assert relative(found.vectors @ torch.diag(found.values) @ found.vectors.mT, exact) < 1e-10
    values, vectors = torch.linalg.eigh(exact)
    for indefinite, changed in {"clip": values.clamp(min=0), "abs": values.abs()}.items():
        assert (
            relative(found.operator(indefinite).to_dense(), vectors @ torch.diag(changed) @ vectors.mT) < 1e-8
        )
    with pytest.raises(IndefiniteHessianError, match="least eigenvalue"):
        found.operator()


# -- low rank ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "likelihood"), CASES)
def test_low_rank_is_exact_from_the_rank_of_the_matrix_on(kind, likelihood):
    p = problem(kind, likelihood)
    expected = oracle.ggn(p.model, p.x, p.y, oracle.LOSSES[likelihood])
    found = low_rank(p.model, likelihood, p.batches(), 24, generator=generator())
    assert relative(found.U @ found.U.mT, expected) < 1e-10
    assert float(found.residual.value) < 1e-10 * float(expected.trace())


@pytest.mark.parametrize("passes", [1, 3])
def test_what_low_rank_leaves_is_positive_semidefinite_with_the_trace_reported(passes):
    p = problem("cnn", "classification")
    exact = oracle.ggn(p.model, p.x, p.y, oracle.cross_entropy)
    found = low_rank(
        p.model, "classification", p.batches(), 5, passes=passes, oversampling=3, generator=generator()
    )
    left = exact - found.U @ found.U.mT
    assert found.residual.value == pytest.approx(float(left.trace()), rel=1e-10)
    assert float(torch.linalg.eigvalsh(left).min()) > -1e-12 * float(exact.trace())
    best = torch.linalg.eigvalsh(exact)[:-5].sum()
    assert float(left.trace()) >= float(best) * (1 - 1e-10)


@pytest.mark.parametrize("rank", [5, 40])
@pytest.mark.parametrize(("kind", "likelihood"), CASES)
def test_the_dual_gives_the_best_approximation_of_its_rank(kind, likelihood, rank):
    p = problem(kind, likelihood)
    exact = oracle.ggn(p.model, p.x, p.y, oracle.LOSSES[likelihood])
    values, vectors = torch.linalg.eigh(exact)
    best = vectors[:, -rank:] @ torch.diag(values[-rank:]) @ vectors[:, -rank:].mT
    found = low_rank(p.model, likelihood, p.batches(), rank, method="dual")
    assert relative(found.U @ found.U.mT, best) < 1e-10
    left = float(exact.trace() - best.trace())
    assert float(found.residual.value) == pytest.approx(left, rel=1e-10, abs=1e-12 * float(exact.trace()))


@pytest.mark.parametrize("positions", [1, 3])
def test_features_of_a_transposed_block_stand_where_the_flat_vector_has_them(positions):
    """A weight that multiplies from the right is flattened as (in, out)."""
    left = torch.randn(4, 2, positions, 3, generator=generator()).double()
    right = torch.randn(4, positions, 5, generator=generator(1)).double()
    bias = torch.randn(4, 2, 1, 3, generator=generator(2)).double()
    blocks = (Block("weight", 0, left, right, transposed=True), Block("bias", 15, bias, None))
    Phi = features(Captures(4, blocks))
    rows = torch.einsum("nvso,nsi->nvio", left, right).flatten(2)
    J = torch.cat([rows, bias.squeeze(2)], dim=-1)
    v, u = torch.randn(18, 2).double(), torch.randn(4, 2, 2).double()
    assert relative(Phi @ v, J @ v) < 1e-14
    assert relative(Phi.T @ u, torch.einsum("nvp,nvk->pk", J, u)) < 1e-14
    assert relative(Phi.gram(), torch.einsum("nvp,mwp->nvmw", J, J)) < 1e-14


def test_passes_bring_low_rank_to_the_best_of_its_rank():
    p = problem("cnn", "classification")
    exact = oracle.ggn(p.model, p.x, p.y, oracle.cross_entropy)
    best = float(torch.linalg.eigvalsh(exact)[:-5].sum())
    left = [
        float(
            low_rank(
                p.model, "classification", p.batches(), 5, passes=k, generator=generator()
            ).residual.value
        )
        for k in (1, 2, 8)
    ]
    assert left[0] > left[1] > left[2]
    assert left[2] == pytest.approx(best, rel=1e-3)


def test_a_low_rank_curvature_adds_to_the_prior_in_closed_form():
    p = problem("mlp", "classification")
    exact = oracle.ggn(p.model, p.x, p.y, oracle.cross_entropy) + 0.5 * torch.eye(83).double()
    H = curvature(
        p.model,
        "classification",
        p.batches(),
        functools.partial(structures.LowRank, rank=20, generator=generator()),
    )
    P = H + Isotropic(torch.tensor(0.5, dtype=torch.float64), 83)
    assert isinstance(P, LowRankPlusDiag)
    assert float(P.logdet()) == pytest.approx(float(torch.logdet(exact)), rel=1e-10)
    la = Laplace(p.model, "classification", "all", "lowrank", prior_precision=0.5).fit(p.batches())
    expected = oracle.log_marginal_likelihood(
        p.model,
        p.x,
        p.y,
        "classification",
        exact - 0.5 * torch.eye(83).double(),
        torch.full((83,), 0.5).double(),
    )
    assert float(la.log_marginal_likelihood()) == pytest.approx(expected, rel=1e-10)
    full = Laplace(p.model, "classification", "all", "full", prior_precision=0.5).fit(p.batches())
    for posterior in (la, full):
        posterior.optimize_prior_precision()
    assert float(la.prior_precision) == pytest.approx(float(full.prior_precision), rel=1e-8)


def test_rounding_of_a_singular_hessian_in_float32_is_not_taken_for_its_sign():
    torch.manual_seed(0)
    model, x, y = nn.Linear(4, 3), torch.randn(20, 4), torch.randint(3, (20,))
    evidence = [
        Laplace(model, "classification", "all", "full", curvature=kind)
        .fit([(x, y)])
        .log_marginal_likelihood()
        for kind in ("hessian", "ggn")
    ]
    assert float(evidence[0]) == pytest.approx(float(evidence[1]), rel=1e-5)


# -- posteriors --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", ["full", "diag"])
def test_a_posterior_of_the_hessian_has_its_evidence(structure):
    p = smooth("regression")
    H = dense_hessian(p.model, p.x, p.y, "regression")
    H = H if structure == "full" else torch.diag(H.diagonal())
    values, vectors = torch.linalg.eigh(H)
    H = vectors @ torch.diag(values.clamp(min=0)) @ vectors.mT
    la = Laplace(p.model, "regression", "all", structure, curvature="hessian", indefinite="clip")
    la.fit(p.batches(4)[:1]).fit(p.batches(4)[1:], override=False)
    if structure == "diag":  # the diagonal of a sum, clipped once
        expected = oracle.log_marginal_likelihood(
            p.model, p.x, p.y, "regression", H, torch.ones(len(H)).double()
        )
        assert float(la.log_marginal_likelihood()) == pytest.approx(expected, rel=1e-10)
    assert relative(la.curvature.to_dense(), H) < 1e-10
    assert la.n_data == 6


def test_a_posterior_of_the_leading_eigenpairs_of_the_hessian(monkeypatch):
    p = smooth("regression")
    exact = dense_hessian(p.model, p.x, p.y, "regression")
    values, vectors = torch.linalg.eigh(exact)
    found = curvature(p.model, "regression", p.batches(4), "lowrank", kind="hessian", indefinite="abs")
    H = vectors @ torch.diag(values.abs()) @ vectors.mT
    assert relative(found.to_dense(), H) < 1e-8  # 39 parameters have no more eigenpairs than are kept
    monkeypatch.setattr(hessian_states, "RANK", 6)
    la = Laplace(
        p.model, "regression", "all", "lowrank",
        curvature="hessian", indefinite="clip", generator=generator(), prior_precision=0.5,
    ).fit(p.batches(4))  # fmt: skip
    pairs = hessian_eigenpairs(p.model, "regression", p.batches(4), 6, generator=generator())
    H = pairs.vectors @ torch.diag(pairs.values.clamp(min=0)) @ pairs.vectors.mT
    assert relative(la.curvature.to_dense(), H) < 1e-10
    prior = torch.full((len(H),), 0.5).double()
    expected = oracle.log_marginal_likelihood(p.model, p.x, p.y, "regression", la.curvature.to_dense(), prior)
    assert float(la.log_marginal_likelihood()) == pytest.approx(expected, rel=1e-10)
    _, joint = la(p.x_test, joint=True)
    dense = oracle.covariance(p.model, p.x_test, la.curvature.to_dense() + torch.diag(prior))
    assert relative(joint, dense) < 1e-9
    before = la.curvature.to_dense()
    with pytest.raises(UnsupportedError, match="cannot continue with other data"):
        la.fit(p.batches(4), override=False)
    assert torch.equal(la.curvature.to_dense(), before)
    with pytest.raises(IndefiniteHessianError, match="low-rank Hessian"):
        curvature(p.model, "regression", p.batches(4), "lowrank", kind="hessian")


def test_a_posterior_of_the_empirical_fisher_is_that_of_its_columns():
    p = problem("mlp", "classification")
    la = Laplace(p.model, "classification", "all", "full", curvature="ef").fit(p.batches())
    gradients = torch.einsum(
        "ncp,nc->np",
        oracle.jacobian(p.model, p.x),
        torch.softmax(p.model(p.x).detach(), -1) - nn.functional.one_hot(p.y, 3),
    )
    assert relative(la.curvature.to_dense(), gradients.mT @ gradients) < 1e-12


def test_a_posterior_of_drawn_targets_has_the_ggn_on_average():
    p = problem("mlp", "classification")
    exact = oracle.ggn(p.model, p.x, p.y, oracle.cross_entropy)
    g = generator()
    traces = torch.stack(
        [
            Laplace(p.model, "classification", "all", "diag", curvature="fisher_mc", generator=g)
            .fit(p.batches(8))
            .curvature.diagonal()
            .sum()
            for _ in range(60)
        ]
    )
    z = (traces.mean() - exact.trace()) / (traces.std() / 60**0.5)
    assert abs(float(z)) < 4


def test_sequences_have_products_under_weight_sharing():
    torch.manual_seed(0)
    model = Sequences().double()
    x, y = torch.randn(6, 3, 4).double(), torch.randint(2, (6,))
    expected = oracle.ggn(model, x, y, oracle.cross_entropy)
    found = low_rank(model, "classification", [(x[:4], y[:4]), (x[4:], y[4:])], 12)
    assert relative(found.U @ found.U.mT, expected) < 1e-10
