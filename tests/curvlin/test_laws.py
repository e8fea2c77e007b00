"""The 18 law groups over every kind of operator.

Three ways to choose cases: by hypothesis (small), at the corners of condition, scale, dtype and batch (fixed), and
on both sides of 800 rows, where other libraries change the algorithm.
"""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given, settings

from curvlin import NotClosedError, NotPositiveDefiniteError
from curvlin.testing import KINDS, LAWS, Case, LawViolation, Spec, make_case, operator_pairs, operators
from curvlin.testing.laws import addition, closed_sum
from curvlin.testing.strategies import MAX_LOG10COND

# 18 laws times as many kinds: a few examples each find what there is to find over many runs.
few = settings(max_examples=max(1, settings.default.max_examples // 6))

CORNERS = {
    "cond 1e12, large": Spec(size=9, log10cond=12.0, log10scale=8.0, seed=1),
    "cond 1e10, small, clustered": Spec(
        size=6, log10cond=10.0, log10scale=-8.0, spectrum="clustered", seed=2
    ),
    "one eigenvalue": Spec(size=6, log10cond=0.0, spectrum="repeated", seed=3),
    "rank-deficient parts": Spec(size=9, log10cond=6.0, spectrum="rank-deficient", seed=4),
    "float32 at 1e5": Spec(
        size=6, dtype=torch.float32, log10cond=5.0, log10scale=-4.0, spectrum="step", batch=(2,), seed=5
    ),
    "mixed batch": Spec(size=6, batch=(2, 3), mixed=True, log10cond=3.0, log10scale=3.0, seed=6),
}


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("kind", KINDS)
def test_law(kind: str, law: str) -> None:
    @few
    @given(case=operators(kinds=[kind], singular=not LAWS[law].invertible))
    def holds(case: Case) -> None:
        LAWS[law](case)

    holds()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("corner", CORNERS)
def test_laws_at_the_corners(kind: str, corner: str) -> None:
    case = make_case(kind, CORNERS[corner])
    violated = []
    for law in LAWS.values():
        try:
            law(case)
        except LawViolation as violation:
            violated.append(str(violation))
    assert not violated, "\n".join(violated)


# -- both sides of 800 rows ---------------------------------------------------------------------------------------

LARGE = {
    "798 rows": Spec(size=798, log10cond=4.0, seed=8),
    "800 rows, float32": Spec(size=800, dtype=torch.float32, log10cond=4.0, seed=8),
    "806 rows, cond 1e10": Spec(size=806, log10cond=10.0, seed=8),
}


@functools.lru_cache(maxsize=1)
def _large(kind: str, spec: str) -> Case:
    return make_case(kind, LARGE[spec])


@pytest.mark.parametrize("spec", LARGE)
@pytest.mark.parametrize(
    "kind", ["kronecker_shifted", "kronecker_two", "block_diag", "low_rank_plus_diag", "woodbury"]
)
def test_answers_do_not_change_at_800_rows(kind: str, spec: str) -> None:
    for law in ("solve", "log_determinant", "congruence", "determinism", "no_dense"):
        LAWS[law](_large(kind, spec))


@pytest.mark.slow
@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("spec", LARGE)
@pytest.mark.parametrize("kind", KINDS)
def test_laws_around_800_rows(kind: str, spec: str, law: str) -> None:
    LAWS[law](_large(kind, spec))


# -- float32 beyond what it can hold ------------------------------------------------------------------------------


@pytest.mark.parametrize("log10cond", [6.0, 7.0, 8.0, 10.0])
@pytest.mark.parametrize("kind", KINDS)
def test_float32_beyond_1e5_is_right_or_refused(kind: str, log10cond: float) -> None:
    """Rounding the factors may make the matrix indefinite; then the operator says so, and never answers wrongly."""
    case = make_case(kind, Spec(size=12, dtype=torch.float32, log10cond=log10cond, seed=9))
    b = case.matrix @ torch.ones(12, dtype=torch.float64)
    b = b.float()
    try:
        x = case.operator.solve(b).double()
    except NotPositiveDefiniteError:
        smallest = float((case.eigen[0][0] / case.norm).min())
        # The matrix as stored is indefinite, or so close to singular that float32 cannot tell.
        assert smallest < 12 * torch.finfo(torch.float32).eps
        return
    residual = torch.linalg.vector_norm(case.matrix @ x - b.double())
    scale = case.norm * torch.linalg.vector_norm(x) + torch.linalg.vector_norm(b.double())
    roundings = 1 + case.recipe.storage_roundings
    assert float(residual / scale) < 10 * roundings * torch.finfo(torch.float32).eps


def test_the_promised_conditions_are_those_of_the_targets() -> None:
    assert {torch.float64: 12.0, torch.float32: 5.0} == MAX_LOG10COND


# -- sums ---------------------------------------------------------------------------------------------------------


@given(pair=operator_pairs(singular=True))
def test_sum_is_order_independent(pair: tuple[Case, Case]) -> None:
    left, right = pair
    X = torch.randn(*left.batch_shape, left.size, 2, dtype=left.dtype)
    for measurement in addition(left, right.operator, right.kind, X):
        assert measurement.holds, str(measurement)


@given(pair=operator_pairs())
def test_sum_is_the_dense_sum(pair: tuple[Case, Case]) -> None:
    left, right = pair
    total = closed_sum(left.operator, right.operator)
    if total is None:
        return
    exact = left.matrix + right.matrix
    gap = torch.linalg.matrix_norm(total.to_dense().double() - exact)
    assert bool((gap <= 10 * left.size * torch.finfo(left.dtype).eps * torch.linalg.matrix_norm(exact)).all())


# The table of closed sums: kind, kind -> the type of the sum, or None where it is refused.
ISOTROPIC, DIAGONAL, DENSE = "isotropic", "diagonal", "dense"
ONE, SHIFTED, DIRECT, TWO = "kronecker", "kronecker_shifted", "kronecker_direct", "kronecker_two"
SPECTRAL, BLOCKS, LOW, WOODBURY = "spectral_kronecker", "block_diag", "low_rank_plus_diag", "woodbury"
CLOSURE = {
    (ISOTROPIC, ISOTROPIC): "Isotropic",
    (ISOTROPIC, DIAGONAL): "Diagonal",
    (DIAGONAL, DIAGONAL): "Diagonal",
    (ISOTROPIC, ONE): "KroneckerSum",
    (ISOTROPIC, SHIFTED): "KroneckerSum",
    (ISOTROPIC, DIRECT): "KroneckerSum",
    (ISOTROPIC, TWO): None,
    (ISOTROPIC, SPECTRAL): "SpectralKronecker",
    (ISOTROPIC, BLOCKS): "BlockDiag",
    (ISOTROPIC, LOW): "LowRankPlusDiag",
    (ISOTROPIC, WOODBURY): "Woodbury",
    (DIAGONAL, ONE): None,
    (DIAGONAL, SHIFTED): None,
    (DIAGONAL, DIRECT): None,
    (DIAGONAL, SPECTRAL): None,
    (DIAGONAL, LOW): "LowRankPlusDiag",
    (DIAGONAL, WOODBURY): None,
    (ONE, ONE): "KroneckerSum",
    (ONE, SHIFTED): None,
    (ONE, DIRECT): None,
    (ONE, TWO): None,
    (ONE, LOW): None,
    (ONE, BLOCKS): None,
    (ONE, WOODBURY): None,
    (DIRECT, DIRECT): "KroneckerSum",
    (LOW, LOW): "LowRankPlusDiag",
    (LOW, SHIFTED): None,
    (SHIFTED, WOODBURY): None,
    **{(DENSE, other): "Dense" for other in KINDS},
}


@pytest.mark.parametrize("pair", CLOSURE, ids="+".join)
def test_closure_follows_the_table(pair: tuple[str, str]) -> None:
    P, Q = (make_case(kind, Spec(size=6, seed=i)).operator for i, kind in enumerate(pair))
    expected = CLOSURE[pair]
    for left, right in ((P, Q), (Q, P)):
        if expected is None:
            with pytest.raises(NotClosedError, match="project") as refusal:
                left + right
            assert "\n" not in str(refusal.value)
        else:
            assert type(left + right).__name__ == expected


def test_closure_does_not_depend_on_values() -> None:
    """A shift of zero is a shift, a factor that happens to be the identity is a factor."""
    from curvlin import KroneckerSum

    A = torch.eye(2, dtype=torch.float64)
    B = torch.diag(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    two = KroneckerSum([(A, B), (A, B)])
    zero = make_case("isotropic", Spec(size=6)).operator * 1e-300
    with pytest.raises(NotClosedError):
        two + zero
    shifted = KroneckerSum.shifted(A, B, torch.zeros((), dtype=torch.float64))
    with pytest.raises(NotClosedError):
        shifted + KroneckerSum([(A, B)])


# -- E7: roots, exactly -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [12, 60])
def test_covariance_of_samples_is_the_inverse(kind: str, size: int) -> None:
    """The identity pushed through the sampler: F F^T = P^-1 and R R^T = P to 1e-10, no Monte Carlo."""
    case = make_case(kind, Spec(size=size, log10cond=3.0, log10scale=1.0, seed=10))
    eye = torch.eye(size, dtype=torch.float64)
    F, R = case.operator.unwhiten(eye), case.operator.root_matvec(eye)
    exact = torch.linalg.inv(case.matrix)
    assert float((F.mT @ F - exact).norm() / exact.norm()) < 1e-10
    assert float((R.mT @ R - case.matrix).norm() / case.matrix.norm()) < 1e-10
    noise = torch.randn(3, size, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(
        case.operator.sample((3,), generator=torch.Generator().manual_seed(4)),
        noise @ F,
        rtol=1e-10,
        atol=1e-10,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_factors_for_another_dtype_are_those_before_rounding(kind: str) -> None:
    case = make_case(kind, Spec(size=12, log10cond=9.0, seed=11))
    P, kept = case.operator, case.operator.factor(torch.float32)
    x = torch.randn(12)
    assert type(kept) is type(P) and kept.dtype == kept.solve(x).dtype == kept.sample().dtype == torch.float32
    for ask in (
        lambda P, x: P.solve(x),
        lambda P, x: P.logdet(),
        lambda P, x: P.inv_quad(x),
        lambda P, x: P.inverse_diagonal(),
    ):
        assert torch.equal(ask(kept, x), ask(P, x.double()).float())


@pytest.mark.parametrize("kind", KINDS)
def test_draws_in_another_dtype_have_its_accuracy(kind: str) -> None:
    """Products of an orthogonal root are made in that dtype, from factors that are not rounded to it."""
    case = make_case(kind, Spec(size=12, log10cond=9.0, seed=11))
    P, kept = case.operator, case.operator.factor(torch.float32)
    z = torch.randn(5, 12, generator=torch.Generator().manual_seed(2))
    exact, drawn = P.unwhiten(z.double()), kept.unwhiten(z)
    gap = torch.linalg.vector_norm(drawn.double() - exact, dim=-1)
    unit = torch.finfo(torch.float32).eps * torch.linalg.vector_norm(exact, dim=-1)
    assert bool((gap < 16 * unit).all())
    assert torch.equal(kept.sample((5,), torch.Generator().manual_seed(2)), drawn)
    for exponent in (-9, 4):
        scaled = (P * 4.0**exponent).factor(torch.float32)
        assert torch.equal(scaled.unwhiten(z), drawn / 2.0**exponent)


@pytest.mark.parametrize("kind", KINDS)
def test_factored_equals_unfactored(kind: str) -> None:
    case = make_case(kind, Spec(size=12, log10cond=5.0, seed=11))
    P, kept = case.operator, case.operator.factor()
    X = torch.randn(12, 2, dtype=torch.float64)
    assert type(kept) is type(P)
    for ask in (
        lambda P: P.solve(X),
        lambda P: P.logdet(),
        lambda P: P.inv_quad(X.mT),
        lambda P: P.inverse_diagonal(),
        lambda P: P.unwhiten(X.mT),
        lambda P: P.inv_congruence(X.mT),
        lambda P: P.trace_solve(P),
        lambda P: P.marginal([3, 1]).to_dense(),
    ):
        assert torch.equal(ask(kept), ask(P))
