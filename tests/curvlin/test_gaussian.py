"""Gaussians against `torch.distributions.MultivariateNormal` on dense matrices, and their laws."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from feature_cases import (
    ANY_SIZE,
    BLOCKS,
    KRONECKER_KINDS,
    PAIRS,
    close,
    closed_pair,
    features,
    generator,
    precision,
    randn,
    spd,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import MultivariateNormal, kl_divergence
from torch.utils import _pytree as pytree

from curvlin import (
    BlockDiag,
    Covariance,
    Dense,
    DenseFeatures,
    Diagonal,
    Gaussian,
    Isotropic,
    KhatriRaoFeatures,
    KroneckerSum,
    LowRankPlusDiag,
    NotClosedError,
    NotPositiveDefiniteError,
    PrecisionOperator,
    SpectralKronecker,
    Woodbury,
)

KINDS = (*ANY_SIZE, *KRONECKER_KINDS)
each_kind = pytest.mark.parametrize("kind", KINDS)
few = settings(max_examples=max(1, settings.default.max_examples // 5))
seeds = st.integers(0, 2**20)
RTOL = 1e-9


def pair(kind: str, seed: int, size: int = 12) -> tuple[Gaussian, MultivariateNormal]:
    """The Gaussian of a kind of precision, and torch's of the same dense matrix."""
    P, mean = precision(kind, seed, size), randn(generator(seed + 1), size)
    covariance = torch.linalg.inv(P.matrix)
    return Gaussian(mean, P.operator), MultivariateNormal(mean, (covariance + covariance.mT) / 2)


# -- density, moments, draws -----------------------------------------------------------------------------------


@each_kind
def test_density_and_moments_are_those_of_the_dense_normal(kind: str) -> None:
    q, dense = pair(kind, 1)
    x = randn(generator(2), 4, 12)
    close(q.log_prob(x), dense.log_prob(x), RTOL)
    close(q.log_prob(x[0]), dense.log_prob(x[0]), RTOL)
    close(q.entropy(), dense.entropy(), RTOL)
    close(q.mean, dense.mean)
    close(q.variance, dense.variance, RTOL)
    close(q.stddev, dense.stddev, RTOL)
    assert (q.batch_shape, q.event_shape) == (dense.batch_shape, dense.event_shape)


@each_kind
def test_draws_are_the_mean_plus_noise_of_the_covariance(kind: str) -> None:
    q, dense = pair(kind, 3)
    draws = q.rsample((5, 2), torch.Generator().manual_seed(4))
    noise = torch.randn((5, 2, 12), dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    F = q.covariance.colour(torch.eye(12, dtype=torch.float64)).mT
    close(F @ F.mT, dense.covariance_matrix, RTOL)
    close(draws, q.mean + noise @ F.mT, RTOL)


def test_batches_of_mean_and_precision_broadcast() -> None:
    g = generator(5)
    mean, d = randn(g, 3, 1, 4), randn(g, 2, 4).square() + 0.2
    q, dense = Gaussian(mean, Diagonal(d)), MultivariateNormal(mean, torch.diag_embed(1 / d))
    assert q.batch_shape == (3, 2) and q.event_shape == (4,)
    x = randn(g, 5, 3, 2, 4)
    close(q.log_prob(x), dense.log_prob(x), RTOL)
    close(q.log_prob(x[0, 0, 0]), dense.log_prob(x[0, 0, 0]), RTOL)
    close(q.entropy(), dense.entropy(), RTOL)
    close(q.variance, dense.variance, RTOL)
    draws = q.rsample((7,))
    assert draws.shape == (7, 3, 2, 4)
    # Elements of a batch are independent even where they share a precision.
    assert not torch.equal(draws[:, 0] - q.mean[0], draws[:, 1] - q.mean[1])


def test_expanding_repeats_the_distribution() -> None:
    q, dense = pair("shifted", 6)
    x = randn(generator(7), 3, 2, 12)
    expanded = q.expand((2,))
    assert expanded.batch_shape == (2,)
    close(expanded.log_prob(x), dense.expand((2,)).log_prob(x), RTOL)
    draws = expanded.sample()
    assert not torch.equal(draws[0], draws[1])


def test_draws_use_the_given_generator_only() -> None:
    q, _ = pair("updated", 8)
    state = torch.get_rng_state()
    first, second = (q.sample((3,), torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(first, second) and torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert torch.equal(q.sample((3,)), first)


def test_samples_carry_no_gradient_and_rsamples_do() -> None:
    mean = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    q = Gaussian(mean, Isotropic(torch.ones((), dtype=torch.float64, requires_grad=True), 3))
    assert not q.sample().requires_grad and q.rsample().requires_grad


def test_a_gaussian_is_a_pytree_and_copies() -> None:
    q, dense = pair("shifted", 9)
    x = randn(generator(10), 12)
    leaves, structure = pytree.tree_flatten(q)
    again = pytree.tree_unflatten(leaves, structure)
    assert isinstance(again, Gaussian) and again.event_shape == (12,)
    close(again.log_prob(x), dense.log_prob(x), RTOL)
    close(copy.deepcopy(q).log_prob(x), dense.log_prob(x), RTOL)


@pytest.mark.parametrize("kind", ["diagonal", "dense", "shifted", "low_rank"])
def test_vmap_over_values_and_means_is_a_loop(kind: str) -> None:
    P = precision(kind, 11).operator
    means, x = randn(generator(12), 3, 12), randn(generator(13), 12)
    looped = torch.stack([Gaussian(m, P).log_prob(x) for m in means])
    close(torch.vmap(lambda m: Gaussian(m, P).log_prob(x))(means), looped, RTOL)
    gradients = torch.vmap(torch.func.grad(lambda m: Gaussian(m, P).log_prob(x)))(means)
    close(gradients, torch.stack([P @ (x - m) for m in means]), RTOL)


# -- parts -----------------------------------------------------------------------------------------------------

INDICES = ([2], [7, 2, 5], list(range(12)), [4, 5, 6, 7])


@each_kind
@pytest.mark.parametrize("index", INDICES, ids=str)
def test_marginals(kind: str, index: list[int]) -> None:
    q, dense = pair(kind, 14)
    part = q.marginal(index)
    close(part.mean, dense.mean[index])
    close(part.covariance.to_dense(), dense.covariance_matrix[index][:, index], RTOL)


@each_kind
@pytest.mark.parametrize("index", INDICES, ids=str)
def test_conditionals(kind: str, index: list[int]) -> None:
    q, dense = pair(kind, 15)
    rest = [i for i in range(12) if i not in index]
    value = randn(generator(16), len(rest))
    given_rest = q.conditional(index, value)
    C = dense.covariance_matrix
    gain = C[index][:, rest] @ torch.linalg.inv(C[rest][:, rest])
    close(given_rest.mean, dense.mean[index] + gain @ (value - dense.mean[rest]), RTOL)
    close(given_rest.covariance.to_dense(), C[index][:, index] - gain @ C[rest][:, index], RTOL)


@each_kind
def test_marginal_times_conditional_is_the_joint_density(kind: str) -> None:
    q, _ = pair(kind, 17)
    index, rest = [3, 0, 9], [1, 2, 4, 5, 6, 7, 8, 10, 11]
    x = randn(generator(18), 12)
    split = q.marginal(rest).log_prob(x[rest]) + q.conditional(index, x[rest]).log_prob(x[index])
    close(split, q.log_prob(x), RTOL)


def test_a_batch_of_held_values() -> None:
    q, _ = pair("shifted", 19)
    values = randn(generator(20), 4, 10)
    batched = q.conditional([3, 8], values)
    close(batched.mean, torch.stack([q.conditional([3, 8], v).mean for v in values]), RTOL)


# -- linear maps -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kinds", PAIRS, ids=lambda kinds: "-".join(kinds))
def test_push_forward_through_features(kinds: tuple[str, str]) -> None:
    Phi, P = closed_pair(kinds, 21, N=3, R=2, S=2)
    g = generator(22)
    mean, center, offset = randn(g, P.operator.size), randn(g, P.operator.size), randn(g, 3, 2)
    q, C = Gaussian(mean, P.operator), torch.linalg.inv(P.matrix)
    per_sample = q.push_forward(Phi.operator, offset, center)
    close(per_sample.mean, offset + Phi.rows @ (mean - center), RTOL)
    close(per_sample.covariance.to_dense(), Phi.rows @ C @ Phi.rows.mT, RTOL)
    joint = q.push_forward(Phi.operator, offset, center, joint=True)
    rows = Phi.rows.flatten(0, 1)
    assert joint.batch_shape == () and joint.event_shape == (6,)
    close(joint.mean, per_sample.mean.flatten(), RTOL)
    close(joint.covariance.to_dense(), rows @ C @ rows.mT, RTOL)


@each_kind
def test_push_forward_through_a_matrix(kind: str) -> None:
    q, dense = pair(kind, 23)
    M, b = randn(generator(24), 5, 12), randn(generator(25), 5)
    image = q.push_forward(M, b)
    close(image.mean, b + M @ dense.mean, RTOL)
    close(image.covariance.to_dense(), M @ dense.covariance_matrix @ M.mT, RTOL)
    x = randn(generator(26), 5)
    expected = MultivariateNormal(b + M @ dense.mean, M @ dense.covariance_matrix @ M.mT).log_prob(x)
    close(image.log_prob(x), expected, 1e-8)


def test_more_rows_than_directions_is_degenerate() -> None:
    q = Gaussian(torch.zeros(2, dtype=torch.float64), Isotropic(torch.tensor(4.0).double(), 2))
    M = randn(generator(27), 5, 2)
    image = q.push_forward(M)
    draws = image.sample((3,))
    # Draws lie in the range of M.
    residual = draws.mT - M @ torch.linalg.lstsq(M, draws.mT).solution
    assert float(residual.abs().max()) < 1e-12 * float(draws.abs().max())
    close(image.variance, (M @ M.mT).diagonal() / 4, RTOL)
    for question in (lambda: image.log_prob(draws), image.entropy, lambda: image.precision):
        with pytest.raises(NotPositiveDefiniteError, match="Covariance"):
            question()


def test_push_forwards_compose() -> None:
    q, _ = pair("shifted", 28)
    A, B = randn(generator(29), 6, 12), randn(generator(30), 3, 6)
    twice, once = q.push_forward(A).push_forward(B), q.push_forward(B @ A)
    close(twice.mean, once.mean, RTOL)
    close(twice.covariance.to_dense(), once.covariance.to_dense(), RTOL)
    rows = DenseFeatures(randn(generator(31), 2, 2, 6))
    close(
        q.push_forward(A).push_forward(rows, joint=True).covariance.to_dense(),
        q.push_forward(DenseFeatures(rows.matrix @ A), joint=True).covariance.to_dense(),
        RTOL,
    )


def test_from_covariance_keeps_what_it_is_given() -> None:
    _, dense = pair("shifted", 32)
    x = randn(generator(33), 3, 12)
    q = Gaussian.from_covariance(dense.mean, dense.covariance_matrix)
    close(q.log_prob(x), dense.log_prob(x), RTOL)
    close(q.entropy(), dense.entropy(), RTOL)
    close(q.precision.to_dense(), torch.linalg.inv(dense.covariance_matrix), RTOL)
    P = precision("shifted", 32).operator
    assert Gaussian.from_covariance(dense.mean, P.inverse()).precision is P


# -- conditioning on observations ------------------------------------------------------------------------------


def _noises(rows: torch.Size, g: torch.Generator) -> dict[str, tuple[Any, Tensor]]:
    """Noise precisions in every accepted form, with the matrix over all rows."""
    R, n = rows[-1], rows.numel()
    numbers, one = randn(g, *rows).square() + 0.2, spd(g, R)
    many = torch.stack([spd(g, R) for _ in range(n // R)])
    forms: dict[str, tuple[Any, Tensor]] = {
        "number": (2.5, 2.5 * torch.eye(n, dtype=torch.float64)),
        "0-dim": (torch.tensor(0.5).double(), 0.5 * torch.eye(n, dtype=torch.float64)),
        "per row": (numbers, torch.diag(numbers.flatten())),
        "per output": (numbers.flatten()[:R], torch.diag(numbers.flatten()[:R].repeat(n // R))),
        "operator": (Dense(one), torch.block_diag(*[one] * (n // R))),
        "diagonal operator": (Diagonal(one.diagonal()), torch.diag(one.diagonal().repeat(n // R))),
    }
    if len(rows) == 1 or rows[0] != R:
        forms["matrix"] = (one, torch.block_diag(*[one] * (n // R)))
    if len(rows) == 2:
        forms["matrix per sample"] = (many, torch.block_diag(*many))
        forms["operator per sample"] = (Dense(many), torch.block_diag(*many))
    return forms


def _check_condition(P: PrecisionOperator, matrix: Tensor, Phi: Any, rows: Tensor, seed: int) -> None:
    """The posterior of Bayes' formula, and the evidence as the density of y, both dense."""
    g = generator(seed)
    mean, offset, y = randn(g, matrix.shape[-1]), randn(g, *rows.shape[:-1]), randn(g, *rows.shape[:-1])
    flat = rows.reshape(-1, rows.shape[-1])
    for noise, Lambda in _noises(rows.shape[:-1], g).values():
        posterior, evidence = Gaussian(mean, P).condition(Phi, y, noise, offset)
        after = matrix + flat.mT @ Lambda @ flat
        close(posterior.precision.to_dense(), after, RTOL)
        residual = (y - offset).flatten() - flat @ mean
        close(posterior.mean, mean + torch.linalg.solve(after, flat.mT @ Lambda @ residual), RTOL)
        predictive = torch.linalg.inv(Lambda) + flat @ torch.linalg.solve(matrix, flat.mT)
        dense = MultivariateNormal(
            torch.zeros(len(flat), dtype=torch.float64), (predictive + predictive.mT) / 2
        )
        close(evidence, dense.log_prob(residual), RTOL)


@pytest.mark.parametrize("kinds", PAIRS, ids=lambda kinds: "-".join(kinds))
def test_condition_on_features_is_bayes(kinds: tuple[str, str]) -> None:
    Phi, P = closed_pair(kinds, 34, N=3, R=2, S=2)
    _check_condition(P.operator, P.matrix, Phi.operator, Phi.rows, 35)


@each_kind
def test_condition_on_rows_is_bayes(kind: str) -> None:
    P, rows = precision(kind, 36), randn(generator(37), 3, 12)
    _check_condition(P.operator, P.matrix, rows, rows, 38)


def test_conditioning_in_two_steps_is_conditioning_once() -> None:
    q, _ = pair("shifted", 39)
    Phi = features("khatri_rao", 40, N=4, R=2, S=2).operator
    y = randn(generator(41), 4, 2)
    first, evidence_1 = q.condition(Phi[:2], y[:2], 3.0)
    second, evidence_2 = first.condition(Phi[2:], y[2:], 3.0)
    once, evidence = q.condition(Phi, y, 3.0)
    close(second.mean, once.mean, RTOL)
    close(second.precision.to_dense(), once.precision.to_dense(), RTOL)
    close(evidence_1 + evidence_2, evidence, RTOL)


def test_condition_of_a_batch_of_observations() -> None:
    q, _ = pair("diagonal", 42)
    rows, y = randn(generator(43), 3, 12), randn(generator(44), 5, 3)
    batched, evidence = q.condition(rows, y, 2.0)
    singles = [q.condition(rows, row, 2.0) for row in y]
    close(batched.mean, torch.stack([p.mean for p, _ in singles]), RTOL)
    close(evidence, torch.stack([e for _, e in singles]), RTOL)


def test_the_evidence_of_a_precise_observation_keeps_its_digits() -> None:
    """Noise of 1e-12 of the signal: y^T y - y^T (...) y would be all rounding."""
    q = Gaussian(torch.zeros(3, dtype=torch.float64), Isotropic(torch.tensor(1.0).double(), 3))
    rows = torch.eye(3, dtype=torch.float64)
    y = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    _, evidence = q.condition(rows, y, 1e12)
    variance = torch.full((3,), 1 + 1e-12, dtype=torch.float64)
    expected = -0.5 * (y.square() / variance + variance.log() + math.log(2 * math.pi)).sum()
    close(evidence, expected, 1e-12)


# -- divergence ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("second", KINDS)
@pytest.mark.parametrize("first", KINDS)
def test_divergence_of_any_two_structures(first: str, second: str) -> None:
    (p, dense_p), (q, dense_q) = pair(first, 45), pair(second, 46)
    close(kl_divergence(p, q), kl_divergence(dense_p, dense_q), 1e-8)


def test_divergence_of_blocks_goes_block_by_block() -> None:
    (p, dense_p), (q, dense_q) = pair("blocks", 47, 15), pair("blocks", 48, 15)
    close(kl_divergence(p, q), kl_divergence(dense_p, dense_q), 1e-8)
    for kind in ("isotropic", "diagonal", "dense", "low_rank"):
        r, dense_r = pair(kind, 49, 15)
        close(kl_divergence(p, r), kl_divergence(dense_p, dense_r), 1e-8)
        close(kl_divergence(r, p), kl_divergence(dense_r, dense_p), 1e-8)


def test_divergence_without_a_closed_form_is_refused() -> None:
    P = precision("two", 50).operator
    Q = BlockDiag([precision("dense", 51, 5).operator, precision("dense", 52, 7).operator])
    zero = torch.zeros(12, dtype=torch.float64)
    with pytest.raises(NotClosedError, match="a KroneckerSum and a BlockDiag"):
        kl_divergence(Gaussian(zero, P), Gaussian(zero, Q))


@pytest.mark.parametrize("kind", [*KINDS, "blocks"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_divergence_from_itself_is_exactly_zero(kind: str, dtype: torch.dtype) -> None:
    size = 15 if kind == "blocks" else 12
    first, second = (
        Gaussian(torch.ones(size, dtype=dtype), precision(kind, 53, size).operator.to(dtype))
        for _ in range(2)
    )
    assert float(kl_divergence(first, first)) == 0.0
    assert float(kl_divergence(first, second)) == 0.0


@given(seed=seeds, kind=st.sampled_from(KINDS), exponent=st.integers(-30, 0))
def test_divergence_is_never_negative_and_vanishes_smoothly(seed: int, kind: str, exponent: int) -> None:
    """``Q = (1 + r) P``: the divergence is ``D (r - log(1 + r)) / 2``, with all its digits however small r is."""
    P = precision(kind, seed).operator
    r = 2.0**exponent
    zero = torch.zeros(12, dtype=torch.float64)
    value = float(kl_divergence(Gaussian(zero, P), Gaussian(zero, (1 + r) * P)))
    series = sum((-1) ** k * r**k / k for k in range(2, 40)) if r < 0.5 else r - math.log1p(r)
    # Scaling P by 1 + r rounds its tensors, which moves r itself by eps, times the condition of P.
    condition = float(torch.linalg.cond(precision(kind, seed).matrix))
    assert value == pytest.approx(6 * series, rel=1e-13 + 64 * condition * 2.0**-52 / r)
    assert value >= 0


@given(seed=seeds)
def test_divergence_of_equal_matrices_in_two_structures(seed: int) -> None:
    """Where only the textbook form is left, rounding may not make it negative."""
    g = generator(seed)
    a, b = randn(g, 3).square() + 0.1, randn(g, 4).square() + 0.1
    zero = torch.zeros(12, dtype=torch.float64)
    P, Q = Diagonal(torch.kron(a, b)), KroneckerSum([(torch.diag(a), torch.diag(b))])
    for first, second in ((P, Q), (Q, P)):
        assert 0 <= float(kl_divergence(Gaussian(zero, first), Gaussian(zero, second))) < 1e-13


SHARED: dict[str, Any] = {
    "shifts": lambda g, e: (
        lambda A, B: (KroneckerSum.shifted(A, B, 0.5), KroneckerSum.shifted(A, B, 0.5 + e))
    )(spd(g, 3), spd(g, 4)),
    "shift of an isotropic": lambda g, e: (
        KroneckerSum.shifted(e * spd(g, 3), spd(g, 4), 0.5),
        Isotropic(torch.tensor(0.5).double(), 12),
    ),
    "spectra": lambda g, e: (
        lambda Q, R, d: (SpectralKronecker(Q, R, d), SpectralKronecker(Q, R, d * (1 + e * d)))
    )(torch.linalg.qr(randn(g, 3, 3)).Q, torch.linalg.qr(randn(g, 4, 4)).Q, randn(g, 3, 4).square() + 0.2),
    "low-rank update": lambda g, e: (lambda d, U: (Diagonal(d), LowRankPlusDiag(d, math.sqrt(e) * U)))(
        randn(g, 12).square() + 0.2, randn(g, 12, 2)
    ),
    "low-rank update undone": lambda g, e: (lambda d, U: (LowRankPlusDiag(d, math.sqrt(e) * U), Diagonal(d)))(
        randn(g, 12).square() + 0.2, randn(g, 12, 2)
    ),
    "two updates of one base": lambda g, e: (
        lambda d, U: (LowRankPlusDiag(d, U), LowRankPlusDiag(d, (1 + e) * U))
    )(randn(g, 12).square() + 0.2, randn(g, 12, 2)),
    "two feature updates": lambda g, e: (lambda P, Phi: (P.update(Phi), P.update((1 + e) * Phi)))(
        Isotropic(torch.tensor(0.5).double(), 12), features("khatri_rao", 54).operator
    ),
    "feature updates, one with a core": lambda g, e: (
        lambda P, Phi: (P.update(Phi), Woodbury(P, Phi, core=(1 + e) * torch.eye(6, dtype=torch.float64)))
    )(Isotropic(torch.tensor(0.5).double(), 12), features("khatri_rao", 54).operator),
    "matrices": lambda g, e: (lambda A, B: (Dense(A), Dense(A + e * B)))(spd(g, 12), spd(g, 12)),
    "blocks": lambda g, e: (
        lambda A, d: (
            BlockDiag([Dense(A), Diagonal(d)], BLOCKS),
            BlockDiag([Dense(A * (1 + e)), Diagonal(d + e)], BLOCKS),
        )
    )(spd(g, 12), randn(g, 3).square() + 0.2),
}


@pytest.mark.parametrize("name", SHARED)
@pytest.mark.parametrize("e", [1e-2, 1e-4, 1e-6])
def test_a_small_divergence_keeps_its_digits(name: str, e: float) -> None:
    """Against ``sum r^2/2 - r^3/3 + ...`` of the dense pencil, where r is an eigenvalue of ``P^-1 (Q - P)``."""
    P, Q = SHARED[name](generator(55), e)
    lower = torch.linalg.cholesky(P.to_dense())
    half = torch.linalg.solve_triangular(lower, Q.to_dense() - P.to_dense(), upper=False)
    r = torch.linalg.eigvalsh(torch.linalg.solve_triangular(lower, half.mT, upper=False))
    expected = 0.5 * sum((-1) ** k * r**k / k for k in range(2, 60)).sum()
    zero = torch.zeros(P.size, dtype=torch.float64)
    # Q - P, of the size of e, is known here to an eps of P only.
    close(kl_divergence(Gaussian(zero, P), Gaussian(zero, Q)), expected, 1e-12 / e)


@each_kind
def test_divergence_does_not_see_units(kind: str) -> None:
    (p, _), (q, _) = pair(kind, 56), pair("diagonal", 57)
    value = kl_divergence(p, q)
    scaled = [Gaussian(g.mean / 8, 64 * g.precision) for g in (p, q)]
    close(kl_divergence(*scaled), value, 1e-12)


def test_divergence_of_degenerate_gaussians_is_refused() -> None:
    flat = Gaussian.from_covariance(torch.zeros(2), torch.ones(2, 2))
    round_ = Gaussian(torch.zeros(2), Isotropic(1.0, 2))
    for p, q in ((flat, round_), (round_, flat), (flat, flat)):
        with pytest.raises(NotPositiveDefiniteError):
            kl_divergence(p, q)


def test_divergence_between_covariances() -> None:
    (_, p), (_, q) = pair("shifted", 58), pair("dense", 59)
    ours = [Gaussian.from_covariance(d.mean, d.covariance_matrix) for d in (p, q)]
    close(kl_divergence(*ours), kl_divergence(p, q), RTOL)
    close(kl_divergence(ours[0], Gaussian(q.mean, Dense(q.precision_matrix))), kl_divergence(p, q), RTOL)
    assert float(kl_divergence(ours[0], ours[0])) == 0.0


# -- derivatives -----------------------------------------------------------------------------------------------

MAKERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "isotropic": (lambda t: Isotropic(t.square().sum() + 0.1, 6), (1,)),
    "diagonal": (lambda t: Diagonal(t.square() + 0.1), (6,)),
    "dense": (lambda t: Dense(t @ t.mT + 0.3 * torch.eye(6, dtype=torch.float64)), (6, 6)),
    "shifted": (lambda t: KroneckerSum.shifted(t @ t.mT, A3, 0.4), (2, 2)),
    "shift": (lambda t: KroneckerSum.shifted(A2, A3, t.square().sum() + 0.1), (1,)),
    "low_rank": (lambda t: LowRankPlusDiag(torch.ones(6, dtype=torch.float64), t), (6, 2)),
    "dual": (
        lambda t: Isotropic(torch.ones((), dtype=torch.float64), 6).update(KhatriRaoFeatures(t, PHI.right)),
        (2, 2, 2, 2),
    ),
}
A2, A3 = spd(generator(60), 2), spd(generator(61), 3)
PHI = KhatriRaoFeatures(randn(generator(62), 2, 2, 2, 2), randn(generator(63), 2, 2, 3))
X6 = randn(generator(64), 3, 6)
QUESTIONS: dict[str, Any] = {
    "log_prob": lambda q: q.log_prob(X6),
    "entropy": lambda q: q.entropy(),
    "variance": lambda q: q.variance,
    "rsample": lambda q: q.rsample((2,), torch.Generator().manual_seed(0)),
    "conditional": lambda q: q.conditional([4, 1], X6[0, :4]).mean,
    "push_forward": lambda q: q.push_forward(PHI).log_prob(torch.ones(2, dtype=torch.float64)),
    "evidence": lambda q: q.condition(PHI, X6[0, :4].reshape(2, 2), q.mean[0].square() + 0.2)[1],
    "posterior mean": lambda q: q.condition(PHI, X6[0, :4].reshape(2, 2), 2.0)[0].mean,
    "KL to dense": lambda q: kl_divergence(q, Gaussian(X6[1], Dense(torch.kron(A2, A3)))),
    "KL from dense": lambda q: kl_divergence(Gaussian(X6[1], Dense(torch.kron(A2, A3))), q),
}


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("kind", MAKERS)
def test_two_derivatives(kind: str, question: str) -> None:
    make, shape = MAKERS[kind]
    g = generator(65)
    inputs = tuple(t.requires_grad_() for t in (randn(g, 6), randn(g, *shape)))

    def answer(mean: Tensor, tensor: Tensor) -> Tensor:
        result: Tensor = QUESTIONS[question](Gaussian(mean, make(tensor)))
        return result

    assert torch.autograd.gradcheck(answer, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(answer, inputs, fast_mode=True)


@pytest.mark.parametrize("question", [q for q in QUESTIONS if q != "rsample"])
@pytest.mark.parametrize("kind", ["diagonal", "shift", "dual"])
def test_transforms_agree_with_autograd(kind: str, question: str) -> None:
    make, shape = MAKERS[kind]
    g = generator(66)
    mean, tensors = randn(g, 6), randn(g, 2, *shape)

    def answer(tensor: Tensor) -> Tensor:
        return QUESTIONS[question](Gaussian(mean, make(tensor))).sum()

    looped = []
    for tensor in tensors:
        live = tensor.clone().requires_grad_()
        looped.append(torch.autograd.grad(answer(live), live)[0])
    close(torch.vmap(torch.func.grad(answer))(tensors), torch.stack(looped), RTOL)


@pytest.mark.parametrize("question", ["log_prob", "conditional", "push_forward", "evidence", "KL to dense"])
def test_compiled_code_gives_the_same_answers(question: str) -> None:
    make, shape = MAKERS["shift"]
    g = generator(67)
    mean, tensor = randn(g, 6), randn(g, *shape)

    def answer(mean: Tensor, tensor: Tensor) -> Tensor:
        return QUESTIONS[question](Gaussian(mean, make(tensor))).sum()

    torch.compiler.reset()
    close(torch.compile(answer, backend="eager")(mean, tensor), answer(mean, tensor), RTOL)


@pytest.mark.parametrize("kind", ["diagonal", "dense", "low_rank"])
def test_the_divergence_from_itself_has_gradient_zero_and_fisher_curvature(kind: str) -> None:
    """The Hessian of KL(p_t | p_s) in s at s = t is the Fisher information, although the value there is a shortcut."""
    make, shape = MAKERS[kind]
    t = randn(generator(66), *shape)
    zero = torch.zeros(6, dtype=torch.float64)

    def divergence(s: Tensor) -> Tensor:
        return kl_divergence(Gaussian(zero, make(t)), Gaussian(zero, make(s)))

    live = t.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(divergence(live), live)
    assert float(gradient.abs().max()) < 1e-12
    hessian = torch.autograd.functional.hessian(divergence, t).reshape(t.numel(), t.numel())
    # 1/2 tr(P^-1 dP P^-1 dP) by hand.
    jacobian = torch.autograd.functional.jacobian(lambda s: make(s).to_dense(), t).reshape(36, -1)
    inverse = torch.linalg.inv(make(t).to_dense())
    close(hessian, jacobian.mT @ torch.kron(inverse, inverse) @ jacobian / 2, 1e-8)


# -- gpytorch --------------------------------------------------------------------------------------------------


@each_kind
def test_the_gpytorch_normal_is_exact(kind: str) -> None:
    q, dense = pair(kind, 67)
    theirs = q.to_gpytorch()
    x = randn(generator(68), 3, 12)
    close(theirs.log_prob(x[0]), dense.log_prob(x[0]), 1e-8)
    close(theirs.log_prob(x), dense.log_prob(x), 1e-8)
    close(theirs.mean, dense.mean)


def test_the_gpytorch_normal_is_exact_beyond_800_rows() -> None:
    """Where gpytorch's own handling of a matrix turns stochastic."""
    n = 900
    U = randn(generator(69), n, 3)
    q = Gaussian(torch.zeros(n, dtype=torch.float64), LowRankPlusDiag(torch.ones(n, dtype=torch.float64), U))
    x = randn(generator(70), n)
    dense = torch.distributions.MultivariateNormal(q.mean, precision_matrix=q.precision.to_dense())
    close(q.to_gpytorch().log_prob(x), dense.log_prob(x), 1e-9)


# -- bad input -------------------------------------------------------------------------------------------------

Q4 = Gaussian(torch.zeros(4), Isotropic(1.0, 4))
PHI4 = DenseFeatures(torch.ones(3, 2, 4))
Y = torch.zeros(3, 2)
BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "a matrix as precision": (
        lambda: Gaussian(torch.zeros(2), torch.eye(2)),
        TypeError,
        "wrap a matrix in Dense",
    ),  # type: ignore[arg-type]
    "a covariance as precision": (
        lambda: Gaussian(torch.zeros(2), Covariance.of(torch.eye(2))),  # type: ignore[arg-type]
        TypeError,
        "from_covariance",
    ),
    "a precision as covariance": (
        lambda: Gaussian.from_covariance(torch.zeros(2), Isotropic(1.0, 2)),  # type: ignore[arg-type]
        TypeError,
        r"Gaussian\(mean, precision\)",
    ),
    "mean of another size": (
        lambda: Gaussian(torch.zeros(3), Isotropic(1.0, 2)),
        ValueError,
        "mean must have 2",
    ),
    "mean of another dtype": (
        lambda: Gaussian(torch.zeros(2).double(), Isotropic(1.0, 2)),
        TypeError,
        "dtype",
    ),
    "mean of integers": (lambda: Gaussian(torch.zeros(2).long(), Isotropic(1.0, 2)), TypeError, "floating"),
    "mean with NaN": (lambda: Gaussian(torch.full((2,), torch.nan), Isotropic(1.0, 2)), ValueError, "finite"),
    "batches that do not meet": (
        lambda: Gaussian(torch.zeros(3, 2), Diagonal(torch.ones(4, 2))),
        ValueError,
        "batch",
    ),
    "value of another size": (
        lambda: Q4.log_prob(torch.zeros(3)),
        ValueError,
        r"value must have shape \(..., 4\)",
    ),
    "value of another dtype": (
        lambda: Q4.log_prob(torch.zeros(4).double()),
        TypeError,
        "value must have dtype",
    ),
    "value of another batch": (
        lambda: Q4.expand((3,)).log_prob(torch.zeros(2, 4)),
        ValueError,
        r"value must have shape \(..., 3, 4\)",
    ),
    "index out of range": (lambda: Q4.marginal([4]), ValueError, "index must lie"),
    "held values of another size": (
        lambda: Q4.conditional([0], torch.zeros(2)),
        ValueError,
        "value must have shape",
    ),
    "map of another size": (lambda: Q4.push_forward(torch.ones(2, 3)), ValueError, "Phi must have shape"),
    "features of another size": (
        lambda: Q4.push_forward(DenseFeatures(torch.ones(1, 1, 3))),
        ValueError,
        "4 features per row",
    ),
    "offset of another size": (
        lambda: Q4.push_forward(PHI4, torch.zeros(3)),
        ValueError,
        "offset must have shape",
    ),
    "observations of another shape": (
        lambda: Q4.condition(PHI4, torch.zeros(2), 1.0),
        ValueError,
        "y must have",
    ),
    "negative noise": (lambda: Q4.condition(PHI4, Y, -1.0), ValueError, "noise_precision must be positive"),
    "zero noise precision in a row": (
        lambda: Q4.condition(PHI4, Y, torch.tensor([1.0, 0.0])),
        ValueError,
        "noise_precision must be positive",
    ),
    "noise of another shape": (
        lambda: Q4.condition(PHI4, Y, torch.ones(5)),
        ValueError,
        "noise_precision must be",
    ),
    "noise of unclear meaning": (
        lambda: Q4.condition(PHI4[:2], Y[:2], torch.eye(2)),
        ValueError,
        "a matrix or one number per row",
    ),
    "noise across samples": (
        lambda: Q4.condition(PHI4, Y, Isotropic(1.0, 6)),
        NotClosedError,
        "between samples",
    ),
    "singular noise": (lambda: Q4.condition(PHI4, Y, torch.ones(2, 2)), NotPositiveDefiniteError, "Dense"),
    "noise of another dtype": (lambda: Q4.condition(PHI4, Y, torch.ones(3, 2).double()), TypeError, "dtype"),
    "noise of another type": (
        lambda: Q4.condition(PHI4, Y, "loud"),
        TypeError,
        "noise_precision must be a number",
    ),  # type: ignore[arg-type]
    "divergence of other sizes": (
        lambda: kl_divergence(Q4, Gaussian(torch.zeros(2), Isotropic(1.0, 2))),
        ValueError,
        "event shape",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named_in_one_line(name: str) -> None:
    call, error, message = BAD[name]
    with pytest.raises(error, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
