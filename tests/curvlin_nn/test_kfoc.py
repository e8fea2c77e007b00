"""KFOC against dense per-sample blocks and the singular value decomposition of their rearrangement."""

import functools
import itertools

import network_oracle as oracle
import pytest
import torch
from networks import Sequences, problem
from torch import nn

from curvlin_nn import Laplace, curvature, structures
from curvlin_nn.errors import UnsupportedError


def kfoc(iterations, **options):
    return functools.partial(structures.KFOC, iterations=iterations, **options)


def data_of(kind):
    if kind == "sequences":
        torch.manual_seed(1)
        model = Sequences().double()
        return model, [(torch.randn(3, 3, 4).double(), torch.randint(2, (3,))) for _ in range(2)]
    p = problem(kind, "classification")
    return p.model, p.batches()


def exact_weights(model, data):
    """The exact block of each weight, or of each group of a convolution, with its shape."""
    x, y = (torch.cat(part) for part in zip(*data, strict=True))
    G, start = oracle.ggn(model, x, y, oracle.cross_entropy), 0
    for name, p in model.named_parameters():
        groups = getattr(model.get_submodule(name.rpartition(".")[0]), "groups", 1)
        for _ in range(groups if p.ndim > 1 else 1):
            size = p.numel() // groups if p.ndim > 1 else p.numel()
            span = slice(start, start + size)
            if p.ndim > 1:
                yield span, G[span, span], (len(p) // groups, p[0].numel())
            start += size


def nearest(G, shape):
    """The Kronecker product nearest to G."""
    out, inputs = shape
    U, s, Vh = torch.linalg.svd(
        G.view(out, inputs, out, inputs).permute(0, 2, 1, 3).reshape(out**2, inputs**2)
    )
    return s[0] * torch.kron(U[:, 0].view(out, out), Vh[0].view(inputs, inputs))


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
@pytest.mark.parametrize("kind", ["mlp", "cnn", "sequences"])
def test_the_error_never_grows_and_ends_at_that_of_the_nearest_product(kind, approximation):
    model, data = data_of(kind)
    start = functools.partial(structures.Kronecker, approximation=approximation)
    choices = [start, *(kfoc(k, approximation=approximation) for k in (1, 2, 40))]
    found = [curvature(model, "classification", data, choice).to_dense() for choice in choices]
    gained = False
    for span, G, shape in exact_weights(model, data):
        least = (G - nearest(G, shape)).norm()
        errors = [(G - H[span, span]).norm() for H in found]
        assert all(after <= before + 1e-12 * G.norm() for before, after in itertools.pairwise(errors))
        assert (nearest(G, shape) - found[-1][span, span]).norm() < 1e-6 * G.norm()
        assert errors[-1] - least < 1e-10 * G.norm()
        gained |= bool(errors[1] < 0.99 * errors[0])
    assert gained


@pytest.mark.parametrize("kind", ["mlp", "cnn", "sequences"])
def test_one_iteration_is_one_step_of_least_squares_for_each_factor(kind):
    model, data = data_of(kind)
    kron, found = (curvature(model, "classification", data, s).to_dense() for s in ("kron", "kfoc"))
    for span, G, (out, inputs) in exact_weights(model, data):
        tensor = G.view(out, inputs, out, inputs)
        A = torch.einsum(
            "oipi->op", kron[span, span].view(out, inputs, out, inputs)
        )  # up to scale, of outputs
        A = torch.einsum("oipj,op->ij", kron[span, span].view(out, inputs, out, inputs), A)  # of inputs
        B = torch.einsum("oipj,ij->op", tensor, A / A.norm())
        A = torch.einsum("oipj,op->ij", tensor, B / B.norm())
        expected = torch.kron(B / B.norm(), A)
        torch.testing.assert_close(
            found[span, span], expected, rtol=1e-9, atol=1e-11 * float(expected.norm())
        )


@pytest.mark.parametrize("kind", ["mlp", "cnn", "sequences"])
def test_factors_are_positive_semidefinite(kind):
    model, data = data_of(kind)
    H = curvature(model, "classification", data, "kfoc")
    for block in H.blocks:
        eigenvalues = torch.linalg.eigvalsh(block.to_dense())
        assert eigenvalues.min() >= -1e-13 * eigenvalues.max()


def test_biases_are_exact():
    p = problem("cnn", "classification")
    H = curvature(p.model, p.likelihood, p.batches(), "kfoc").to_dense()
    exact = oracle.ggn(p.model, p.x, p.y, oracle.cross_entropy)
    start = 0
    for q in p.model.parameters():
        if q.ndim == 1:
            span = slice(start, start + len(q))
            torch.testing.assert_close(H[span, span], exact[span, span], rtol=1e-11, atol=1e-14)
        start += q.numel()


def test_a_product_is_found_as_it_is():
    """One sample without sharing: KFAC is exact, and stays."""
    p = problem("mlp", "classification", n=1)
    kron, found = (curvature(p.model, p.likelihood, p.batches(), s).to_dense() for s in ("kron", "kfoc"))
    torch.testing.assert_close(found, kron, rtol=1e-9, atol=1e-13 * float(kron.norm()))


@pytest.mark.parametrize("joint_bias", [False, True])
def test_evidence_and_predictions_are_those_of_the_dense_matrix(joint_bias):
    p = problem("mlp", "regression")
    la = Laplace(p.model, p.likelihood, "all", kfoc(1, joint_bias=joint_bias), prior_precision=0.5)
    H = la.fit(p.batches()).curvature.to_dense()
    prior = torch.full((len(H),), 0.5).double()
    expected = oracle.log_marginal_likelihood(p.model, p.x, p.y, p.likelihood, H, prior)
    assert float(la.log_marginal_likelihood()) == pytest.approx(expected, rel=1e-10)
    covariance = oracle.covariance(p.model, p.x_test, H + torch.diag(prior))
    _, joint = la(p.x_test, joint=True)
    torch.testing.assert_close(joint, covariance, rtol=1e-9, atol=1e-11 * float(covariance.norm()))


def test_curvature_depends_on_neither_batches_nor_multiplicity():
    p = problem("cnn", "classification")
    whole = curvature(p.model, p.likelihood, p.batches(8), "kfoc").to_dense()
    close = functools.partial(torch.testing.assert_close, rtol=1e-9, atol=1e-11 * float(whole.norm()))
    close(curvature(p.model, p.likelihood, p.batches(1), "kfoc").to_dense(), whole)
    close(curvature(p.model, p.likelihood, p.batches() * 2, "kfoc").to_dense(), 2 * whole)


def test_a_parameter_without_influence_has_no_curvature():
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x):
            return self.used(x)

    H = curvature(Unused(), "regression", [(torch.randn(4, 3), torch.randn(4, 2))], "kfoc").to_dense()
    assert bool((H[8:] == 0).all()) and bool(torch.isfinite(H).all())


def test_sums_beside_different_factors_do_not_merge():
    p = problem("mlp", "classification")
    la = Laplace(p.model, p.likelihood, "all", "kfoc").fit(p.batches())
    with pytest.raises(UnsupportedError, match="cannot merge sums beside different factors"):
        la.fit(p.batches(), override=False)


def test_iterations_are_counted_from_one():
    p = problem("mlp", "classification")
    with pytest.raises(ValueError, match="iterations"):
        curvature(p.model, p.likelihood, p.batches(), kfoc(0))
