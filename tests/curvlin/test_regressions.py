"""Thirteen ways in which structured linear algebra fails silently elsewhere, each as a test that ours must pass.

F1 to F13 were found in linear_operator 0.6.1; comments quote what it answered. The truth is always a dense float64
computation or a closed form.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from draws import randn
from scipy.sparse.linalg import aslinearoperator, cg
from torch import Tensor
from torch.autograd import gradgradcheck
from torch.distributions import kl_divergence

from curvlin import (
    BlockDiag,
    Dense,
    Diagonal,
    Gaussian,
    Isotropic,
    KroneckerSum,
    LowRankPlusDiag,
    NotClosedError,
    NotPositiveDefiniteError,
    Woodbury,
)
from curvlin.testing import KINDS, Reference, Spec, make_case
from curvlin.testing.matrices import eigenvalues, spd_matrix

f64 = torch.float64


def spd(n: int, seed: int, log10cond: float = 2.0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return spd_matrix(scale * eigenvalues(n, "decay", log10cond), generator)


# -- F1: the answer depends on the order of the operands ------------------------------------------------------------


def test_f1_kronecker_plus_isotropic_in_either_order() -> None:
    """1200 rows: `ConstantDiag + Kron` was off by 4 in logdet and 4e-4 in solve, `Kron + ConstantDiag` was right."""
    A, B, s = spd(30, 1), spd(40, 2), torch.tensor(0.1, dtype=f64)
    K, D = KroneckerSum([(A, B)]), Isotropic(s, 1200)
    matrix = torch.kron(A, B) + s * torch.eye(1200, dtype=f64)
    lower = torch.linalg.cholesky(matrix)
    b = randn(1200, 1)
    for P in (K + D, D + K):
        assert isinstance(P, KroneckerSum)
        assert float(P.logdet()) == pytest.approx(float(2 * lower.diagonal().log().sum()), abs=1e-9)
        torch.testing.assert_close(P.solve(b), torch.cholesky_solve(b, lower), rtol=1e-10, atol=1e-10)
        z = randn(2, 1200, seed=3)
        torch.testing.assert_close(P.whiten(P.unwhiten(z)), z, rtol=1e-11, atol=1e-11)
    assert torch.equal((K + D).logdet(), (D + K).logdet())


def test_f1_low_rank_plus_diagonal_in_either_order() -> None:
    """`Diag + LowRankRoot` was off by 0.39 in solve at 1200 rows, and by -64 in logdet at 200,000."""
    d, U = torch.rand(1200, dtype=f64) + 0.5, randn(1200, 40)
    plus = Diagonal(d / 2)
    low = LowRankPlusDiag(d / 2, U)
    matrix = torch.diag(d) + U @ U.mT
    b = randn(1200, 1, seed=1)
    for P in (plus + low, low + plus, Diagonal(d).update(U)):
        assert isinstance(P, LowRankPlusDiag)
        assert float(P.logdet()) == pytest.approx(float(torch.linalg.slogdet(matrix)[1]), abs=1e-9)
        torch.testing.assert_close(P.solve(b), torch.linalg.solve(matrix, b), rtol=1e-9, atol=1e-11)


def test_f1_an_updated_multiple_of_the_identity_adds_like_one() -> None:
    """`Iso.update(U)` was a diagonal matrix underneath, to which no Kronecker product adds."""
    K, U, value = KroneckerSum([(spd(3, 1), spd(4, 2))]), randn(12, 2), torch.tensor(0.7, dtype=f64)
    iso = Isotropic(value, 12)
    matrix = K.to_dense() + value * torch.eye(12, dtype=f64) + U @ U.mT
    for P in (K + iso.update(U), iso.update(U) + K, (K + iso).update(U), K.update(U) + iso):
        assert type(P) is Woodbury
        torch.testing.assert_close(P.to_dense(), matrix)
        assert float(P.logdet()) == pytest.approx(float(torch.linalg.slogdet(matrix)[1]), rel=1e-12)
    twice = (K + iso.update(U)) + Isotropic(value, 12).update(U)
    torch.testing.assert_close(twice.to_dense(), matrix + value * torch.eye(12, dtype=f64) + U @ U.mT)


@pytest.mark.parametrize("strength", [1e-3, 1.0, 1e6])
def test_f1_an_updated_multiple_of_the_identity_is_a_low_rank_plus_diagonal(strength: float) -> None:
    """Of the same type and values, and with the gradient of one number in the place of D."""
    U, x = randn(12, 2) * strength, randn(12, seed=1)
    value = torch.tensor(0.7, dtype=f64)

    def answers(low: LowRankPlusDiag) -> list[Tensor]:
        parts = (low.marginal([3, 1]).logdet(), low.conditional([3, 1]).logdet(), (2.0 * low).logdet())
        return [low.logdet(), low.solve(x), low.inv_quad(x), low.inverse_diagonal(), low.whiten(x), *parts]

    iso = [t.clone().requires_grad_() for t in (value, U)]
    diagonal = [t.clone().requires_grad_() for t in (value.expand(12), U)]
    P, Q = Isotropic(iso[0], 12).update(iso[1]), LowRankPlusDiag(*diagonal)
    for made in (P, 2.0 * P, P + Isotropic(value, 12), P + Q, P.update(U), P.conditional([1, 2]), P.to(f64)):
        assert type(made) is LowRankPlusDiag
    for a, b in zip(answers(P), answers(Q), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
        ours = torch.autograd.grad(a.sum(), iso, retain_graph=True)
        theirs = torch.autograd.grad(b.sum(), diagonal, retain_graph=True)
        torch.testing.assert_close(ours[0], theirs[0].sum(), rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(ours[1], theirs[1], rtol=1e-8, atol=1e-8)


# -- F2: samples of low rank ----------------------------------------------------------------------------------------


def test_f2_samples_have_variance_outside_the_low_rank_part() -> None:
    """`LowRankRoot(3000 x 5) + Diag(1)`: variance 6e-4 in the complement of U, where it must be 1."""
    U = randn(1500, 5)
    P = LowRankPlusDiag(torch.ones(1500, dtype=f64), U)
    outside = randn(1500, 3, seed=1)
    Q = torch.linalg.qr(U)[0]
    outside = torch.linalg.qr(outside - Q @ (Q.mT @ outside))[0]
    eye = torch.eye(1500, dtype=f64)
    for through in (P.unwhiten(eye), P.root_matvec(eye)):
        # v^T (F F^T) v for directions v outside of the range of U.
        variance = (through @ outside).square().sum(0)
        torch.testing.assert_close(variance, torch.ones(3, dtype=f64), rtol=1e-11, atol=0.0)


# -- F3: a negative divergence --------------------------------------------------------------------------------------


def test_f3_divergence_of_low_rank_gaussians() -> None:
    """`kl(MVN(0, lrd), MVN(.1, 2 lrd))` at 1500 rows: -223.8, where +149.7 is right."""
    n = 1500
    d, U = torch.rand(n, dtype=f64) + 0.5, randn(n, 5)
    P = LowRankPlusDiag(d, U)
    shift = torch.full((n,), 0.1, dtype=f64)
    value = kl_divergence(Gaussian(torch.zeros(n, dtype=f64), P), Gaussian(shift, P / 2))
    # Covariance of q is twice that of p: tr = n / 2, log det ratio = n log 2.
    quadratic = (d * shift**2).sum() + (U.mT @ shift).square().sum()
    exact = (n * (0.5 - 1 + math.log(2)) + quadratic / 2) / 2
    assert float(value) == pytest.approx(float(exact), rel=1e-12)


# -- F4: wrong sub-matrices -----------------------------------------------------------------------------------------


def test_f4_marginal_that_cuts_a_block() -> None:
    """`BlockDiag(4 blocks 3 x 3)[:8, :8]` was wrong by 76 %, and so was the log density of the marginal."""
    blocks = [spd(3, i) for i in range(4)]
    P = BlockDiag([Dense(b) for b in blocks])
    covariance = torch.linalg.inv(torch.block_diag(*blocks))[:8, :8]
    marginal = P.marginal(slice(0, 8))
    torch.testing.assert_close(torch.linalg.inv(marginal.to_dense()), covariance, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(P.conditional(slice(0, 8)).to_dense(), torch.block_diag(*blocks)[:8, :8])
    mean, x = randn(12), randn(8, seed=1)
    exact = torch.distributions.MultivariateNormal(mean[:8], covariance_matrix=covariance).log_prob(x)
    found = Gaussian(mean, P).marginal(list(range(8))).log_prob(x)
    assert float(found) == pytest.approx(float(exact), rel=1e-12)


# -- F5: absolute constants -----------------------------------------------------------------------------------------


def test_f5_logdet_and_gradient_of_small_factors() -> None:
    """Factors of scale 1e-4: -322 instead of -414 (eigenvalues clamped at 1e-7), gradient 60 % wrong."""
    A, B = spd(5, 1, scale=1e-4).requires_grad_(), spd(6, 2, scale=1e-4).requires_grad_()
    value = KroneckerSum([(A, B)]).logdet()
    exact = 6 * torch.linalg.slogdet(A)[1] + 5 * torch.linalg.slogdet(B)[1]
    assert float(value.detach()) == pytest.approx(float(exact.detach()), rel=1e-13)
    found = torch.autograd.grad(value, (A, B))
    torch.testing.assert_close(found, torch.autograd.grad(exact, (A, B)), rtol=1e-11, atol=0.0)


@pytest.mark.parametrize("scale", [1e-11, 1e-9, 1e9])
@pytest.mark.parametrize("kind", KINDS)
def test_f5_roots_and_solves_do_not_depend_on_units(kind: str, scale: float) -> None:
    """A matrix of scale 1e-9 had a root 99.9 % wrong, one of 1e-11 a solve 29 % wrong."""
    case = make_case(kind, Spec(size=6, log10cond=3.0, log10scale=math.log10(scale), seed=1))
    b = randn(6)
    x = torch.linalg.solve(case.matrix, b)
    assert float((case.operator.solve(b) - x).norm() / x.norm()) < 1e-11
    F = case.operator.unwhiten(torch.eye(6, dtype=f64))
    exact = torch.linalg.inv(case.matrix)
    assert float((F.mT @ F - exact).norm() / exact.norm()) < 1e-11


def test_f5_float32_of_scale_1e_minus_6_gets_no_jitter() -> None:
    """Condition 1e15 at scale 1e-6 in float32: logdet -689 where -1554 is right; jitter was the whole matrix."""
    values = 1e-6 * eigenvalues(60, "decay", 15.0)
    singular = Dense(spd_matrix(values, torch.Generator().manual_seed(0)).float())
    with pytest.raises(NotPositiveDefiniteError):
        singular.logdet()
    # In diagonal form float32 holds it, and then the answer is right.
    assert float(Diagonal(values.float()).logdet()) == pytest.approx(float(values.log().sum()), rel=1e-6)


def test_f5_variance_of_a_precise_posterior_in_float32() -> None:
    """Variances below 1e-6 were reported as 1e-6."""
    precision = torch.tensor([1e6, 1e9, 1e12])
    variance = Gaussian(torch.zeros(3), Diagonal(precision)).variance
    torch.testing.assert_close(variance, 1 / precision, rtol=1e-6, atol=0.0)


# -- F6: sums of Kronecker products ---------------------------------------------------------------------------------


def test_f6_sums_of_different_factor_sizes_are_refused_by_name() -> None:
    """3 x 3 (x) 4 x 4 plus 4 x 4 (x) 3 x 3: RuntimeError from inside a solve."""
    P, Q = KroneckerSum([(spd(3, 1), spd(4, 2))]), KroneckerSum([(spd(4, 3), spd(3, 4))])
    for left, right in ((P, Q), (Q, P)):
        with pytest.raises(NotClosedError, match="KroneckerSum \\+ KroneckerSum"):
            left + right


def test_f6_scaled_sum_of_products() -> None:
    """`2 * (Kron + Kron)`: AttributeError."""
    A, B, C, D = spd(3, 1), spd(4, 2), spd(3, 3), spd(4, 4)
    P = 2.0 * (KroneckerSum([(A, B)]) + KroneckerSum([(C, D)]))
    exact = 2 * (torch.kron(A, B) + torch.kron(C, D))
    assert float(P.logdet()) == pytest.approx(float(torch.linalg.slogdet(exact)[1]), rel=1e-13)


def test_f6_sum_of_shifted_products_with_one_factor_in_common_size() -> None:
    """`Kron + sI` plus another one: RuntimeError; there is no joint basis, so ours refuses."""
    P, Q = (KroneckerSum.shifted(spd(3, i), spd(4, i), torch.ones((), dtype=f64)) for i in (1, 2))
    with pytest.raises(NotClosedError):
        P + Q


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("log10cond", [6.0, 10.0, 12.0])
def test_f6_an_ill_conditioned_second_term(log10cond: float, swap: bool) -> None:
    """logdet off by 50 at 1e6 and 400 at 1e12, in one order of the terms only, though the sum is well conditioned."""
    good, bad = (spd(6, 1), spd(5, 2)), (spd(6, 3, log10cond), spd(5, 4, log10cond))
    terms = [bad, good] if swap else [good, bad]
    exact = Reference(sum(torch.kron(*t) for t in terms))
    P = KroneckerSum(terms)
    assert float(P.logdet()) == pytest.approx(float(exact.logdet()), abs=1e-12)
    b = randn(30)
    assert float((P.solve(b) - exact.solve(b)).norm() / exact.solve(b).norm()) < 1e-11


@pytest.mark.parametrize("log10cond", [8.0, 10.0, 12.0])
def test_f6_product_of_ill_conditioned_factors(log10cond: float) -> None:
    """logdet off by 3, 20, 50 at total condition 1e8, 1e10, 1e12."""
    A, B = spd(6, 1, log10cond / 2), spd(5, 2, log10cond / 2)
    with_truth = 5 * Reference(A).logdet() + 6 * Reference(B).logdet()
    assert float(KroneckerSum([(A, B)]).logdet()) == pytest.approx(float(with_truth), abs=1e-8)


# -- F7: multiples and roots of shifted products --------------------------------------------------------------------


def test_f7_twice_a_shifted_product_above_800_rows() -> None:
    """RuntimeError (size 100 against 2000) in solve."""
    A, B, s = spd(30, 1), spd(31, 2), torch.tensor(0.1, dtype=f64)
    P = 2.0 * KroneckerSum.shifted(A, B, s)
    matrix = 2 * (torch.kron(A, B) + s * torch.eye(930, dtype=f64))
    b = randn(930)
    torch.testing.assert_close(P.solve(b), torch.linalg.solve(matrix, b), rtol=1e-9, atol=1e-10)
    assert float(P.logdet()) == pytest.approx(float(torch.linalg.slogdet(matrix)[1]), abs=1e-9)


def test_f7_inverse_root_of_a_product_plus_a_product() -> None:
    """`Kron + (DiagA kron DiagB)`: inverse root wrong by 69 %, because D^(1/2) stood for D^(-1/2)."""
    A, B = spd(3, 1), spd(4, 2)
    a, b = torch.rand(3, dtype=f64) + 0.5, torch.rand(4, dtype=f64) + 0.5
    P = KroneckerSum([(A, B), (torch.diag(a), torch.diag(b))])
    F = P.unwhiten(torch.eye(12, dtype=f64))
    exact = torch.linalg.inv(torch.kron(A, B) + torch.kron(torch.diag(a), torch.diag(b)))
    torch.testing.assert_close(F.mT @ F, exact, rtol=1e-11, atol=1e-12)


# -- F8: caches -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "kronecker_damped" and not k.endswith("_roots")])
def test_f8_a_value_without_gradient_does_not_spoil_the_next(kind: str) -> None:
    """`with no_grad(): op.logdet()`, then `op.logdet().backward()`: gradient None, or RuntimeError."""
    case = make_case(kind, Spec(size=4, seed=1))

    def leaves() -> list[Tensor]:
        return [
            t.clone().requires_grad_(p.differentiable)
            for t, p in zip(case.tensors, case.recipe.parameters, strict=True)
        ]

    used, fresh = leaves(), leaves()
    P = case.recipe.build(*used)
    with torch.no_grad():
        P.logdet()
    P.logdet().backward()
    P.logdet().backward()  # "trying to backward through the graph a second time"
    case.recipe.build(*fresh).logdet().backward()
    for twice, once in zip(used, fresh, strict=True):
        if twice.requires_grad:
            torch.testing.assert_close(twice.grad, 2 * once.grad, rtol=1e-12, atol=0.0)


def test_f8_an_edit_in_place_is_seen() -> None:
    """`A.mul_(2)` after a cached logdet returned the stale value."""
    A = spd(3, 1)
    P = KroneckerSum([(A, torch.eye(2, dtype=f64))])
    before = P.logdet()
    P.terms[0][0].mul_(2.0)
    assert float(P.logdet() - before) == pytest.approx(6 * math.log(2), rel=1e-12)


# -- F9: conventions ------------------------------------------------------------------------------------------------


def test_f9_a_scale_per_batch_element() -> None:
    """`batch_scalar * (LowRank + Diag)`: "Boolean value of Tensor is ambiguous"."""
    case = make_case("low_rank_plus_diag", Spec(size=6, batch=(2,), seed=1))
    c = torch.tensor([2.0, 5.0], dtype=f64)
    torch.testing.assert_close(
        (c * case.operator).to_dense(), c[:, None, None] * case.matrix, rtol=1e-13, atol=0.0
    )
    expected = case.operator.logdet() + 6 * c.log()
    torch.testing.assert_close((c * case.operator).logdet(), expected, rtol=1e-12, atol=0.0)


def test_f9_adding_zero() -> None:
    """`Diag + Zero`: RuntimeError in solve."""
    d = torch.tensor([1.0, 2.0], dtype=f64)
    P = Diagonal(d) + Isotropic(torch.zeros((), dtype=f64), 2)
    torch.testing.assert_close(P.solve(d), torch.ones(2, dtype=f64))


@pytest.mark.parametrize("kind", KINDS)
def test_f9_every_operator_has_the_same_shapes(kind: str) -> None:
    """Empty tensors, None or zeros([]) were returned for the same question by different classes."""
    for batch in ((), (2,)):
        P = make_case(kind, Spec(size=6, batch=batch, seed=1)).operator
        x = torch.ones(6, dtype=f64)
        assert P.logdet().shape == batch
        assert P.inv_quad(x).shape == batch
        assert P.inverse_diagonal().shape == P.diagonal().shape == (*batch, 6)
        assert P.solve(x).shape == (*batch, 6)
        assert P.sample().shape == (*batch, 6)
        assert P.sample((3, 1)).shape == (3, 1, *batch, 6)
        assert P.trace_solve(P).shape == batch


# -- F10: second derivatives ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dense", "kronecker_shifted", "low_rank_plus_diag", "kronecker_two"])
def test_f10_hessian_through_a_quadratic_form(kind: str) -> None:
    """Relative error 1.6, without an exception; `gradgradcheck` failed."""
    case = make_case(kind, Spec(size=4, seed=1))
    b = randn(4)

    def fn(t: Tensor) -> Tensor:
        return case.rebuilt([t, *case.tensors[1:]]).inv_quad(b)

    def exact(t: Tensor) -> Tensor:
        return b @ torch.linalg.solve(case.dense([t, *case.tensors[1:]]), b)

    x = case.tensors[0]
    found, truth = (torch.autograd.functional.hessian(f, x) for f in (fn, exact))
    assert float((found - truth).norm() / truth.norm()) < 1e-10
    assert gradgradcheck(fn, x.clone().requires_grad_(), fast_mode=True)


# -- F11: blocks of different sizes ---------------------------------------------------------------------------------


def test_f11_blocks_of_different_sizes_and_types_on_any_coordinates() -> None:
    """A list of blocks was an AttributeError; there was no way to name coordinates."""
    blocks = [
        Dense(spd(2, 1)),
        Diagonal(torch.rand(3, dtype=f64) + 0.5),
        KroneckerSum([(spd(2, 2), spd(2, 3))]),
    ]
    order = torch.tensor([7, 0, 3, 8, 1, 2, 6, 4, 5])
    P = BlockDiag(blocks, indices=list(order.split([2, 3, 4])))
    exact = torch.zeros(9, 9, dtype=f64)
    exact[order[:, None], order] = torch.block_diag(*(b.to_dense() for b in blocks))
    assert torch.equal(P.to_dense(), exact)
    b = randn(9)
    torch.testing.assert_close(P.solve(b), torch.linalg.solve(exact, b), rtol=1e-12, atol=1e-13)
    # `inv_quad_logdet(vector)` was a ValueError.
    assert float(P.inv_quad(b)) == pytest.approx(float(b @ torch.linalg.solve(exact, b)), rel=1e-12)


def test_f11_many_small_blocks_are_solved_exactly_in_float32() -> None:
    """Blocks of 20 x 20 were solved by conjugate gradients once the total exceeded 800 rows: 3e-3 error."""
    matrices = [spd(20, i).float() for i in range(45)]
    P = BlockDiag([Dense(m) for m in matrices])
    b = randn(900).float()
    exact = torch.cat(
        [torch.linalg.solve(m.double(), x.double()) for m, x in zip(matrices, b.split(20), strict=True)]
    )
    assert float((P.solve(b).double() - exact).norm() / exact.norm()) < 1e-6


# -- F12: what did not exist ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_f12_inverse_traces_variances_and_schur_complements_exist(kind: str) -> None:
    """`inverse()` raised for most classes; there was no trace, inverse diagonal, Schur complement or congruence."""
    case = make_case(kind, Spec(size=6, log10cond=2.0, seed=1))
    P, inverse = case.operator, torch.linalg.inv(case.matrix)
    X = randn(6, 2)
    torch.testing.assert_close(P.inverse() @ X, inverse @ X, rtol=1e-10, atol=1e-11)
    assert float(P.inverse().logdet()) == pytest.approx(
        -float(torch.linalg.slogdet(case.matrix)[1]), rel=1e-10
    )
    torch.testing.assert_close(P.inverse_diagonal(), inverse.diagonal(), rtol=1e-10, atol=0.0)
    torch.testing.assert_close(P.inv_congruence(X.mT), X.mT @ inverse @ X, rtol=1e-10, atol=1e-11)
    schur = torch.linalg.inv(inverse[:2, :2])
    torch.testing.assert_close(P.marginal([0, 1]).to_dense(), schur, rtol=1e-10, atol=1e-11)
    D = Diagonal(torch.rand(6, dtype=f64))
    assert float(P.trace_solve(D)) == pytest.approx(float((inverse.diagonal() * D.values).sum()), rel=1e-10)


# -- F13: other libraries -------------------------------------------------------------------------------------------


def test_f13_scipy_takes_the_adapter() -> None:
    """`aslinearoperator(op)`: TypeError."""
    case = make_case("kronecker_shifted", Spec(size=12, log10cond=4.0, seed=1))
    A = aslinearoperator(case.operator.to_scipy())
    b = randn(12).numpy()
    np.testing.assert_allclose(A @ b, case.matrix.numpy() @ b, rtol=1e-12, atol=1e-13)
    x, info = cg(A, b, M=case.operator.inverse().to_scipy(), rtol=1e-10, maxiter=3)
    assert info == 0
    np.testing.assert_allclose(case.matrix.numpy() @ x, b, rtol=1e-8, atol=1e-9)


def test_f13_an_operator_is_no_array() -> None:
    """`np.asarray(op)` gave a 0-dimensional array of objects, silently."""
    P = make_case("kronecker_shifted", Spec(size=6)).operator
    for op in (P, P.inverse()):
        with pytest.raises(TypeError, match="to_dense"):
            np.asarray(op)


@pytest.mark.parametrize("size", [300, 1000])
def test_float32_factors_keep_their_small_eigenvalues(size: int) -> None:
    """An eigenvalue 1e-4 of the largest is no rounding of 600 float32 entries, though it is less than 600 eps."""
    values = torch.logspace(0, -4, size, dtype=f64)
    A = spd_matrix(values, torch.Generator().manual_seed(5)).float()
    stored = torch.linalg.eigvalsh(A.double())
    plain = KroneckerSum([(A, None)], sizes=(size, 2))
    assert abs(float(plain.logdet()) / float(2 * stored.log().sum()) - 1) < 1e-6
    shifted = KroneckerSum.shifted(A, torch.eye(2), 1e-5)
    assert abs(float(shifted.logdet()) / float(2 * (stored + 1e-5).log().sum()) - 1) < 1e-6
    assert abs(float(shifted.inverse_diagonal().sum()) / float(2 * (1 / (stored + 1e-5)).sum()) - 1) < 1e-5


@pytest.mark.parametrize("name", KINDS)
def test_a_sum_is_refused_where_it_is_made_or_can_be_solved(name: str) -> None:
    """Blocks + rows of one layer: `+` returned an operator of which every solve raised `NotClosedError`."""
    P = make_case(name, Spec(size=4)).operator
    for other in KINDS:
        Q = make_case(other, Spec(size=4, seed=1)).operator
        try:
            total = P + Q
        except NotClosedError:
            continue
        b = randn(total.size)
        x = total.solve(b)
        torch.testing.assert_close(P @ x + Q @ x, b.to(x), rtol=1e-8, atol=1e-10)
