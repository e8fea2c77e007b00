"""StructuredMVN beside dense normals: densities, draws, moments, parts, divergences; and what gpytorch does with it."""

from __future__ import annotations

import copy
import math
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpytorch
import pytest
import torch
from gpytorch.distributions import MultivariateNormal
from interop_cases import (  # noqa: F401
    F64,
    KINDS,
    MEANINGS,
    Batch,
    close,
    dense,
    each_batch,
    each_kind,
    each_meaning,
    no_approximation,
    positive,
    randn,
    spd,
)
from linear_operator import operators as theirs
from torch import Tensor
from torch.distributions import MultivariateNormal as Dense_
from torch.distributions import kl_divergence

from curvlin import (
    Covariance,
    Dense,
    Diagonal,
    Gaussian,
    InexactPathError,
    Isotropic,
    KroneckerSum,
    LowRankPlusDiag,
    NotClosedError,
    NotPositiveDefiniteError,
    PrecisionOperator,
)
from curvlin.interop.gpytorch import StructuredMVN
from curvlin.testing import forbid_dense

pytestmark = pytest.mark.usefixtures("no_approximation")


def held(P: PrecisionOperator, as_: str) -> PrecisionOperator | Covariance:
    """P as a precision, or as the covariance itself."""
    return P if as_ == "precision" else Covariance.of(P)


def pair(
    kind: str, as_: str, n: int, batch: Batch, mean: Tensor | None = None
) -> tuple[StructuredMVN, Dense_]:
    """Ours, and torch's with a dense Cholesky factor."""
    P = KINDS[kind](n, batch)
    mean = randn(20, *batch, n) if mean is None else mean
    C = torch.linalg.inv(P.to_dense()) if as_ == "precision" else P.to_dense()
    return StructuredMVN(mean, held(P, as_)), Dense_(mean, (C + C.mT) / 2)


# -- densities, draws, moments ----------------------------------------------------------------------------------


@each_kind
@each_meaning
@each_batch
def test_log_prob_is_exact_also_batched_and_expanded(kind: str, as_: str, batch: Batch) -> None:
    ours, right = pair(kind, as_, 12, batch)
    for value in (randn(1, 12), randn(2, *batch, 12), randn(3, 4, *batch, 12), randn(4, 5, 4, *batch, 12)):
        close(ours.log_prob(value), right.log_prob(value))
    more = (5, *batch)
    close(ours.expand(more).log_prob(randn(5, *more, 12)), right.expand(more).log_prob(randn(5, *more, 12)))
    close(ours.unsqueeze(0).log_prob(randn(6, 4, *batch, 12)), right.log_prob(randn(6, 4, *batch, 12)))
    close(ours.entropy(), right.entropy())
    close(ours.variance, right.variance)
    close(ours.stddev, right.stddev)


@each_kind
@each_meaning
def test_log_prob_is_as_exact_beyond_800_rows(kind: str, as_: str) -> None:
    ours, right = pair(kind, as_, 900, ())
    value = randn(1, 2, 900)
    close(ours.log_prob(value), right.log_prob(value))
    close(ours.entropy(), right.entropy())
    close(ours.variance, right.variance)


@each_kind
@each_meaning
@each_batch
def test_gpytorchs_own_normal_is_exact_over_the_adapter(kind: str, as_: Any, batch: Batch) -> None:
    """What a user of gpytorch writes who has never heard of StructuredMVN."""
    ours, right = pair(kind, as_, 12, batch)
    plain = MultivariateNormal(ours.loc, ours.lazy_covariance_matrix)
    for value in (randn(2, *batch, 12), randn(3, 4, *batch, 12)):
        close(plain.log_prob(value), right.log_prob(value))
    base = randn(4, 7, *batch, 12)
    close(plain.rsample(base_samples=base), ours.rsample(base_samples=base))
    close(plain.variance, right.variance)
    close(plain[..., 2:7].variance, right.variance[..., 2:7])
    close((plain * 3.0).log_prob(randn(2, *batch, 12)), (3.0 * ours).log_prob(randn(2, *batch, 12)))
    close(
        plain.expand((5, *batch)).log_prob(randn(2, *batch, 12)),
        right.expand((5, *batch)).log_prob(randn(2, *batch, 12)),
    )
    with pytest.raises(InexactPathError):
        plain.entropy()


@each_kind
@each_meaning
@each_batch
def test_draws_have_the_covariance(kind: str, as_: str, batch: Batch) -> None:
    ours, right = pair(kind, as_, 12, batch)
    eye = torch.eye(12, dtype=F64).reshape(12, *(1,) * len(batch), 12).expand(12, *batch, 12)
    root = (ours.rsample(base_samples=eye) - ours.loc).movedim(0, -1)
    close(root @ root.mT, right.covariance_matrix)
    generator = torch.Generator().manual_seed(0)
    draws = ours.rsample((4, 2), generator=generator)
    noise = torch.randn(4, 2, *batch, 12, dtype=F64, generator=torch.Generator().manual_seed(0))
    close(draws, ours.rsample((4, 2), base_samples=noise))
    torch.manual_seed(3)
    base = ours.get_base_samples(torch.Size((3,)))
    torch.manual_seed(3)
    close(ours.sample(torch.Size((3,))), ours.rsample(base_samples=base))
    assert not ours.sample().requires_grad and ours.sample().shape == (*batch, 12)


@each_meaning
def test_f2_draws_have_all_directions(as_: str) -> None:
    """Upstream: variance 6e-4 in place of 1 outside of the range of U."""
    n, k = 3000, 5
    U = randn(1, n, k)
    P = LowRankPlusDiag(torch.ones(n, dtype=F64), U)
    generator = torch.Generator().manual_seed(0)
    draws = StructuredMVN(torch.zeros(n, dtype=F64), held(P, as_)).rsample((20,), generator=generator)
    Q = torch.linalg.qr(U).Q
    outside = (draws - draws @ Q @ Q.mT).square().sum()
    degrees = 20 * (n - k)
    assert abs(float(outside) - degrees) / math.sqrt(2 * degrees) < 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_f5_variances_are_not_rounded_up(dtype: torch.dtype) -> None:
    """Upstream: 1e-6 in float32, 1e-10 in float64, with a warning."""
    small = torch.tensor([1e-14, 1e-9, 1.0], dtype=dtype)
    for covariance in (Covariance.of(Diagonal(small)), Diagonal(1 / small)):
        ours = StructuredMVN(torch.zeros(3, dtype=dtype), covariance)
        torch.testing.assert_close(ours.variance, small, rtol=1e-6, atol=0.0)
        torch.testing.assert_close(ours.stddev, small.sqrt(), rtol=1e-6, atol=0.0)
        low, high = ours.confidence_region()
        torch.testing.assert_close(high - low, 4 * small.sqrt(), rtol=1e-6, atol=0.0)


@each_kind
@each_meaning
def test_matrices_are_made_where_they_are_named(kind: str, as_: str) -> None:
    ours, right = pair(kind, as_, 12, (2,))
    for whole in (ours, ours.expand((3, 2))):
        shape = whole.batch_shape
        for name in ("covariance_matrix", "precision_matrix", "scale_tril"):
            close(getattr(whole, name), getattr(right.expand(shape), name), 1e-8)
    independent = ours.to_data_independent_dist()
    close(independent.stddev, right.stddev)


# -- the same distribution, in part, scaled, larger -------------------------------------------------------------


@each_kind
@each_meaning
@each_batch
def test_parts_are_marginals(kind: str, as_: str, batch: Batch) -> None:
    ours, right = pair(kind, as_, 12, batch)
    C, mean = right.covariance_matrix, right.mean
    for index in (slice(2, 7), slice(None, None, 3), torch.tensor([5, 0, -1]), [3, 4]):
        i = torch.arange(12)[index]
        part = ours[..., index]
        value = randn(1, *batch, len(i))
        close(part.log_prob(value), Dense_(mean[..., i], C[..., i[:, None], i]).log_prob(value))
        assert isinstance(part, StructuredMVN)
    mask = torch.arange(12) % 2 == 0
    close(ours[..., mask].variance, right.variance[..., mask])
    if batch:
        close(ours[1].log_prob(randn(2, 3, 12)), Dense_(mean[1], C[1]).log_prob(randn(2, 3, 12)))
        close(ours[:, 1:, :4].variance, right.variance[:, 1:, :4])
        close(ours[torch.tensor([1, 0, 1])].mean, mean[torch.tensor([1, 0, 1])])
        one = ours[..., 5]
        close(
            one.log_prob(randn(3, *batch)),
            torch.distributions.Normal(mean[..., 5], C[..., 5, 5].sqrt()).log_prob(randn(3, *batch)).sum(-1),
        )
    else:
        close(ours[2:7].variance, right.variance[2:7])
        with pytest.raises(ValueError, match="slice of length one"):
            ours[5]


@each_kind
@each_meaning
@each_batch
def test_multiples_and_shifts_are_laws_of_multiples_and_shifts(kind: str, as_: str, batch: Batch) -> None:
    ours, right = pair(kind, as_, 12, batch)
    value, C = randn(1, *batch, 12), right.covariance_matrix
    for found, mean, covariance in (
        (2 * ours, 2 * right.mean, 4 * C),
        (ours * -0.5, -0.5 * right.mean, C / 4),
        (ours / 3, right.mean / 3, C / 9),
        (ours + 1.5, right.mean + 1.5, C),
        (1.5 + ours, right.mean + 1.5, C),
        (sum([ours]), right.mean, C),
    ):
        close(found.log_prob(value), Dense_(mean, covariance).log_prob(value))
        assert isinstance(found, StructuredMVN)


@each_kind
@each_meaning
def test_independent_noise_is_added_where_that_is_closed(kind: str, as_: str) -> None:
    ours, right = pair(kind, as_, 12, (2,))
    value, eye = randn(1, 2, 12), torch.eye(12, dtype=F64)
    if kind == "two terms":
        with pytest.raises(NotClosedError):
            ours.add_jitter(0.3)
        return
    close(
        ours.add_jitter(0.3).log_prob(value),
        Dense_(right.mean, right.covariance_matrix + 0.3 * eye).log_prob(value),
    )
    noise = StructuredMVN(torch.ones(12, dtype=F64), Isotropic(torch.tensor(0.5, dtype=F64), 12))
    total = Dense_(right.mean + 1, right.covariance_matrix + 2 * eye)
    close((ours + noise).log_prob(value), total.log_prob(value))
    likelihood = gpytorch.likelihoods.GaussianLikelihood().to(F64)
    marginal = likelihood(ours)
    assert isinstance(marginal, StructuredMVN)
    noisy = Dense_(right.mean, right.covariance_matrix + likelihood.noise.detach() * eye)
    close(marginal.log_prob(value).detach(), noisy.log_prob(value))


def test_copies_and_pickles_are_the_same_distribution() -> None:
    ours, _ = pair("shifted", "precision", 12, (2,))
    value = randn(1, 2, 12)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        close(other.log_prob(value), ours.log_prob(value))


# -- divergences ------------------------------------------------------------------------------------------------


def exact_kl(p: Any, q: Any) -> Tensor:
    """By torch's dense rule, on detached copies."""
    return kl_divergence(*(Dense_(d.mean, covariance_matrix=d.covariance_matrix) for d in (p, q)))


@each_kind
@each_meaning
def test_kl_is_exact_in_all_pairings(kind: str, as_: str) -> None:
    ours, _ = pair(kind, as_, 12, (2,))
    other = held((2.0 * KINDS[kind](12, (2,))), as_)
    q = StructuredMVN(randn(21, 2, 12), other)
    close(kl_divergence(ours, q), exact_kl(ours, q), 1e-8)
    matrix = spd(30, 12)
    for plain in (
        MultivariateNormal(randn(22, 2, 12), matrix.expand(2, 12, 12)),
        MultivariateNormal(randn(22, 12), theirs.DenseLinearOperator(matrix)),
        MultivariateNormal(randn(22, 12), theirs.DiagLinearOperator(positive(1, 12))),
        Dense_(randn(22, 12), matrix),
    ):
        for p, r in ((ours, plain), (plain, ours)):
            close(kl_divergence(p, r), exact_kl(p, r), 1e-8)


def test_kl_reads_the_structure_of_gpytorchs_normal() -> None:
    A, B = spd(1, 30), spd(2, 30)
    covariance = theirs.KroneckerProductLinearOperator(A, B) + theirs.ConstantDiagLinearOperator(
        torch.tensor([0.5], dtype=F64), 900
    )
    plain = MultivariateNormal(randn(3, 900), covariance)
    ours = StructuredMVN(randn(4, 900), Covariance.of(KroneckerSum.shifted(A, B, 1.5)))
    expected = exact_kl(ours, Dense_(plain.mean, torch.kron(A, B) + 0.5 * torch.eye(900, dtype=F64)))
    with forbid_dense(900 * 900 // 2):
        close(kl_divergence(ours, plain), expected, 1e-8)
        as_precision = StructuredMVN(plain.mean, KroneckerSum.shifted(A, B, 0.5).inverse())
        mixed = kl_divergence(as_precision, plain)
    assert float(mixed) >= 0


def test_f3_kl_of_low_rank_covariances_is_positive_and_exact() -> None:
    """Upstream: -223.8 where 149.7 is right."""
    n = 1500
    C = LowRankPlusDiag(torch.ones(n, dtype=F64), randn(1, n, 5))
    shift = 0.1 * torch.ones(n, dtype=F64)
    p = StructuredMVN(torch.zeros(n, dtype=F64), Covariance.of(C))
    q = StructuredMVN(shift, Covariance.of(2.0 * C))
    quad = shift @ torch.linalg.solve(2 * C.to_dense(), shift)
    close(kl_divergence(p, q), 0.5 * (n / 2 - n + n * math.log(2.0) + quad))
    assert float(kl_divergence(p, p)) == 0.0


def test_a_divergence_without_an_exact_form_is_refused() -> None:
    P, Q = (KINDS[k](12, ()) for k in ("shifted", "two terms"))
    zero = torch.zeros(12, dtype=F64)
    toeplitz = MultivariateNormal(zero, theirs.ToeplitzLinearOperator(torch.arange(12.0, 0, -1, dtype=F64)))
    for p, q in (
        (StructuredMVN(zero, P), StructuredMVN(zero, Covariance.of(Q))),
        (StructuredMVN(zero, P), toeplitz),
        (toeplitz, StructuredMVN(zero, P)),
    ):
        with pytest.raises(NotClosedError):
            kl_divergence(p, q)


# -- derivatives ------------------------------------------------------------------------------------------------


@each_meaning
def test_two_orders_of_derivatives_reach_the_tensors_of_the_operator(as_: str) -> None:
    A, B, x, z = spd(1, 3), spd(2, 4), randn(4, 12), randn(5, 12)

    def parts(t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return A * t[0].exp() + t[1] * torch.eye(3, dtype=F64), B * t[2], 0.5 + t[3]

    def ours(t: Tensor) -> Tensor:
        q = StructuredMVN(t[4] * x, held(KroneckerSum.shifted(*parts(t)), as_))
        p = StructuredMVN(torch.zeros(12, dtype=F64), held(Isotropic(1 + t[3], 12), as_))
        draw = q.rsample(base_samples=z).square().sum()
        return (
            q.log_prob(x)
            + q[..., 2:6].log_prob(x[:4])
            + q.entropy()
            + kl_divergence(q, p)
            + draw
            + q.variance.sum()
        )

    def right(t: Tensor) -> Tensor:
        L, R, delta = parts(t)
        M = torch.kron(L, R) + delta * torch.eye(12, dtype=F64)
        C = M if as_ == "covariance" else torch.linalg.inv(M)
        q = Dense_(t[4] * x, C)
        part = Dense_(t[4] * x[2:6], C[2:6, 2:6])
        scale = 1 + t[3] if as_ == "covariance" else 1 / (1 + t[3])
        p = Dense_(torch.zeros(12, dtype=F64), scale * torch.eye(12, dtype=F64))
        values, V = torch.linalg.eigh(C)  # the symmetric root, as ours
        draw = (t[4] * x + V @ (values.sqrt() * (V.mT @ z))).square().sum()
        return (
            q.log_prob(x) + part.log_prob(x[:4]) + q.entropy() + kl_divergence(q, p) + draw + q.variance.sum()
        )

    t = torch.tensor([0.1, 0.2, 0.9, 0.3, 0.7], dtype=F64)
    functional = torch.autograd.functional
    close(ours(t), right(t))
    close(functional.jacobian(ours, t), functional.jacobian(right, t))
    close(functional.hessian(ours, t), functional.hessian(right, t), 1e-7)


# -- to and from gpytorch ---------------------------------------------------------------------------------------


@each_kind
@each_meaning
def test_a_gaussian_goes_to_gpytorch_and_comes_back(kind: str, as_: str) -> None:
    P = KINDS[kind](12, (2,))
    mean = randn(20, 2, 12)
    q = Gaussian(mean, P) if as_ == "precision" else Gaussian.from_covariance(mean, Covariance.of(P))
    ours = q.to_gpytorch()
    assert isinstance(ours, MultivariateNormal) and ours.gaussian is q
    assert Gaussian.from_gpytorch(ours) is q
    close(ours.log_prob(mean + 1), q.log_prob(mean + 1))
    plain = MultivariateNormal(mean, ours.lazy_covariance_matrix)
    back = Gaussian.from_gpytorch(plain)
    assert type(back.covariance.operator) is type(P) and back.covariance.inverted == (as_ == "precision")
    close(back.log_prob(mean + 1), q.log_prob(mean + 1))


def test_a_factored_operator_is_factored_once(monkeypatch: pytest.MonkeyPatch) -> None:
    P = KINDS["dense"](12, ()).factor()
    ours = Gaussian(randn(1, 12), P).to_gpytorch()
    expected = ours.log_prob(randn(2, 12)), ours.variance

    def again(self: Dense) -> None:
        raise AssertionError("factorised again")

    monkeypatch.setattr(Dense, "_factorize", again)
    close(ours.log_prob(randn(2, 12)), expected[0])
    close(ours.expand((4,)).log_prob(randn(2, 12)), expected[0].expand(4))
    close(ours.variance, expected[1])
    ours.rsample((3,)), ours.entropy()


def test_gpytorchs_normals_of_a_known_structure_are_read() -> None:
    A, B = spd(1, 3), spd(2, 4)
    plain = MultivariateNormal(
        torch.zeros(12, dtype=F64), theirs.KroneckerProductLinearOperator(A, B).add_jitter(0.5)
    )
    q = Gaussian.from_gpytorch(plain)
    assert isinstance(q.covariance.operator, KroneckerSum)
    right = Dense_(torch.zeros(12, dtype=F64), torch.kron(A, B) + 0.5 * torch.eye(12, dtype=F64))
    close(q.log_prob(randn(3, 12)), right.log_prob(randn(3, 12)))
    close(Gaussian.from_gpytorch(right).log_prob(randn(3, 12)), right.log_prob(randn(3, 12)))
    multitask = gpytorch.distributions.MultitaskMultivariateNormal(torch.zeros(3, 4), torch.eye(12))
    with pytest.raises(TypeError, match="over vectors, found MultitaskMultivariateNormal"):
        Gaussian.from_gpytorch(multitask)


MEAN, P = torch.zeros(12, dtype=F64), KINDS["shifted"](12, ())
OURS = StructuredMVN(MEAN, P)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    {
        "a mean of another size": (
            lambda: StructuredMVN(MEAN[:5], P),
            ValueError,
            "mean must have 12 entries",
        ),
        "a number": (lambda: StructuredMVN(MEAN, 3.0), TypeError, "covariance_matrix must be .* found float"),
        "another structure": (
            lambda: StructuredMVN(MEAN, theirs.ToeplitzLinearOperator(torch.arange(12.0))),
            NotClosedError,
            "Toeplitz",
        ),
        "base samples of another size": (
            lambda: OURS.rsample(base_samples=MEAN[:5]),
            ValueError,
            r"base_samples must have shape \(..., 12\), found \(5,\)",
        ),
        "base samples of another number": (
            lambda: OURS.rsample((3,), base_samples=MEAN.expand(2, 12)),
            ValueError,
            r"shape \(3, 12\), found \(2, 12\)",
        ),
        "two sources of noise": (
            lambda: OURS.rsample(base_samples=MEAN, generator=torch.Generator()),
            ValueError,
            "generator must be None",
        ),
        "nothing": (lambda: 0 * OURS, ValueError, "factor 0"),
        "a tensor of factors": (lambda: OURS * MEAN, TypeError, "unsupported|multiply"),
        "too many indices": (lambda: OURS[1, 2], IndexError, "at most 1 entries"),
        "a new axis": (lambda: OURS[None], IndexError, "unsqueeze"),
        "a dimension too far": (lambda: OURS.unsqueeze(3), IndexError, "dim must lie in -1 .. 0"),
        "a coordinate too far": (lambda: OURS[[-13]], IndexError, r"lie in -12 \.\. 11, found -13"),
        "a mask of another size": (lambda: OURS[MEAN[:5] == 0], IndexError, r"shape \(12,\), found \(5,\)"),
        "pairs of batch and event": (
            lambda: OURS.expand([3])[torch.tensor([0, 1]), torch.tensor([2, 3])],
            IndexError,
            "one after the other",
        ),
        "another mean": (lambda: setattr(OURS, "loc", MEAN + 1), AttributeError, "make StructuredMVN"),
        "negative noise": (lambda: OURS.add_jitter(-1.0), ValueError, "at least 0, found -1.0"),
        "noise that is no number": (lambda: OURS.add_jitter(math.nan), ValueError, "found nan"),
        "a repeated coordinate": (lambda: OURS[[1, 1]], ValueError, "each coordinate once"),
        "a value of another size": (lambda: OURS.log_prob(MEAN[:5]), ValueError, "value must have shape"),
        "torch's own methods": (lambda: OURS._unbroadcasted_scale_tril, InexactPathError, "scale_tril"),
        "singular": (
            lambda: StructuredMVN(MEAN, Covariance.of(Diagonal(MEAN))).log_prob(MEAN),
            NotPositiveDefiniteError,
            "Diagonal",
        ),
    }.values(),
)
def test_bad_input_is_refused_in_one_line(
    call: Callable[[], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as info:
        call()
    assert "\n" not in str(info.value)


def test_validate_args_is_kept() -> None:
    mvn = StructuredMVN(MEAN.expand(2, 12), Covariance.of(P), validate_args=True)
    bad = torch.full((12,), math.nan, dtype=F64)
    made = [mvn, mvn[0], mvn[..., 0:3], mvn * 2, mvn / 2, mvn + 1.0, mvn.unsqueeze(0), mvn.add_jitter(0.1)]
    for law in (*made, mvn.expand([4, 2]), copy.deepcopy(mvn)):
        with pytest.raises(ValueError, match="within the support"):
            law.log_prob(bad[: law.event_shape[0]])
    with pytest.raises(ValueError, match="value must be finite"):  # which is asked with or without
        StructuredMVN(MEAN, P).log_prob(bad)


def test_a_mean_that_cannot_be_assigned_stays_the_mean() -> None:
    mvn = StructuredMVN(MEAN, P)
    with pytest.raises(AttributeError):
        mvn.loc = MEAN + 1
    assert mvn.loc is mvn.mean is mvn.gaussian.mean
    close(mvn.loc, MEAN)


def test_no_noise_is_the_same_law() -> None:
    mvn = StructuredMVN(MEAN, KINDS["two terms"](12, ()))  # of which no other noise is closed
    close(mvn.add_jitter(0.0).variance, mvn.variance)


class AdapterKernel(gpytorch.kernels.RBFKernel):  # type: ignore[misc]
    """A kernel that returns our adapter where gpytorch expects its own matrices."""

    def forward(self, x1: Tensor, x2: Tensor, **kwargs: Any) -> Any:
        return Dense(super().forward(x1, x2, **kwargs)).to_linear_operator("precision")


class Regression(gpytorch.models.ExactGP):  # type: ignore[misc]
    def __init__(self, x: Tensor, y: Tensor, ours: str) -> None:
        super().__init__(x, y, gpytorch.likelihoods.GaussianLikelihood().to(F64))
        kernel = AdapterKernel() if ours == "kernel" else gpytorch.kernels.RBFKernel()
        self.kernel, self.ours = kernel.to(F64), ours

    def forward(self, x: Tensor) -> MultivariateNormal:
        mean = torch.zeros_like(x[:, 0])
        if self.ours == "kernel":
            return MultivariateNormal(mean, self.kernel(x))
        return StructuredMVN(mean, Covariance.of(self.kernel(x).to_dense()))


def test_an_exact_gp_trains_on_our_distribution_and_not_on_a_kernel_that_is_our_adapter() -> None:
    x = torch.linspace(0, 1, 20, dtype=F64)[:, None]
    y = torch.sin(6 * x[:, 0])

    def gradient(ours: str) -> Tensor:
        model = Regression(x, y, ours).train()
        evidence = gpytorch.mlls.ExactMarginalLogLikelihood(model.likelihood, model)(model(x), y)
        evidence.backward()
        return torch.stack([p.grad.squeeze() for p in model.parameters()])

    raw = torch.zeros(2, dtype=F64, requires_grad=True)  # of the noise and the lengthscale
    scale = torch.nn.functional.softplus(raw)
    C = torch.exp(-((x - x.mT) ** 2) / (2 * scale[1] ** 2)) + (scale[0] + 1e-4) * torch.eye(20, dtype=F64)
    (Dense_(torch.zeros(20, dtype=F64), C).log_prob(y) / 20).backward()
    close(gradient("distribution"), raw.grad)
    with pytest.raises(InexactPathError, match="on the left of"):
        gradient("kernel")


# -- no matrix of D x D -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in ("dense", "blocks")])
@each_meaning
def test_nothing_of_the_size_of_the_matrix_is_made(kind: str, as_: str) -> None:
    P = KINDS[kind](900, ())
    mean = randn(1, 900)
    with forbid_dense(900 * 900 // 4):
        q = StructuredMVN(mean, held(P, as_))
        for each in (q, q.expand((7,)), 2 * q, q / 3, q + 1.0):
            each.log_prob(mean), each.rsample(torch.Size((3,))), each.entropy(), each.variance, each[..., :50]
            kl_divergence(each, q)
        if kind != "two terms":
            q.add_jitter(0.1).log_prob(mean)


# -- a BoTorch-style posterior ----------------------------------------------------------------------------------


class Posterior:
    """What BoTorch's GPyTorchPosterior asks of the distribution inside it, for one output."""

    def __init__(self, distribution: MultivariateNormal) -> None:
        self.distribution = distribution

    @property
    def mean(self) -> Tensor:
        return self.distribution.mean.unsqueeze(-1)

    @property
    def variance(self) -> Tensor:
        return self.distribution.variance.unsqueeze(-1)

    @property
    def base_sample_shape(self) -> torch.Size:
        return self.distribution.batch_shape + self.distribution.base_sample_shape

    def _extended_shape(self, sample_shape: torch.Size) -> torch.Size:
        return self.distribution._extended_shape(sample_shape) + torch.Size([1])

    def rsample(self, sample_shape: torch.Size) -> Tensor:
        return self.distribution.rsample(sample_shape=sample_shape).unsqueeze(-1)

    def rsample_from_base_samples(self, sample_shape: torch.Size, base_samples: Tensor) -> Tensor:
        assert base_samples.shape[: len(sample_shape)] == sample_shape
        draws = self.distribution.rsample(sample_shape=sample_shape, base_samples=base_samples)
        return draws.unsqueeze(-1)


def check_posterior(make: Callable[[MultivariateNormal], Any]) -> None:
    for batch in ((), (3,)):
        q, right = pair("shifted", "precision", 900, batch)
        posterior = make(q)
        close(posterior.mean, right.mean.unsqueeze(-1))
        close(posterior.variance, right.variance.unsqueeze(-1))
        assert posterior._extended_shape(torch.Size((5,))) == (5, *batch, 900, 1)
        assert posterior.base_sample_shape == (*batch, 900)
        torch.manual_seed(0)
        draws = posterior.rsample(torch.Size((5,)))
        torch.manual_seed(0)
        close(draws, q.rsample((5,)).unsqueeze(-1))
        base = randn(1, 5, *batch, 900)
        close(
            posterior.rsample_from_base_samples(torch.Size((5,)), base),
            q.rsample(base_samples=base).unsqueeze(-1),
        )
        near = make(q[..., :20])  # candidates among the points: the joint marginal, not the independent one
        close(near.distribution.covariance_matrix, right.covariance_matrix[..., :20, :20])


def test_it_is_the_inside_of_a_botorch_style_posterior() -> None:
    check_posterior(Posterior)


@pytest.mark.filterwarnings("ignore")
def test_it_is_the_inside_of_botorchs_posterior() -> None:
    posteriors = pytest.importorskip("botorch.posteriors", reason="BoTorch is not needed by curvlin")
    check_posterior(posteriors.GPyTorchPosterior)


# -- the example ------------------------------------------------------------------------------------------------


def test_the_kronecker_gp_learns_and_predicts_as_the_dense_computation(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "examples")
    import kronecker_gp

    result = kronecker_gp.main(["--grid", "32", "27", "--steps", "60"])
    sys.modules.pop("kronecker_gp")
    assert "relative difference from the dense computation" in capsys.readouterr().out
    assert result.errors is not None and max(result.errors) < 1e-9
    assert result.trace[-1] > result.trace[0] + 1
    assert result.rmse < 0.03 and result.coverage > 0.8
