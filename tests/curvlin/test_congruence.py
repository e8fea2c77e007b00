"""``Phi P^-1 Psi^T`` against dense inverses, for every closed pair of features and precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from feature_cases import (
    ANY_SIZE,
    BLOCKS,
    IN,
    KRONECKER_KINDS,
    OUT,
    PAIRS,
    close,
    closed_pair,
    features,
    generator,
    precision,
    randn,
    spd,
    tiny_chunks,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from curvlin import (
    BlockDiag,
    BlockFeatures,
    Dense,
    DenseFeatures,
    Diagonal,
    Isotropic,
    KhatriRaoFeatures,
    KroneckerSum,
    NotClosedError,
    NotPositiveDefiniteError,
    PrecisionOperator,
    SpectralKronecker,
)
from curvlin.numerics import contraction
from curvlin.testing import forbid_dense

RTOL = 1e-9
"""Of the largest entry; the precisions have conditions up to a few hundred."""
few = settings(max_examples=max(1, settings.default.max_examples // 5))
each_pair = pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: "-".join(pair))


@each_pair
def test_every_layout_equals_the_dense_inverse(pair: tuple[str, str]) -> None:
    @few
    @given(
        seed=st.integers(0, 2**20),
        N=st.integers(1, 4),
        R=st.integers(1, 3),
        S=st.integers(1, 5),
        chunk=st.sampled_from([None, 1, 3]),
    )
    def holds(seed: int, N: int, R: int, S: int, chunk: int | None) -> None:
        Phi, P = closed_pair(pair, seed, N=N, R=R, S=S)
        Psi = features(pair[0], seed + 7, N=3, R=2, S=1)
        C = torch.linalg.inv(P.matrix)
        per_sample = P.operator.inv_congruence(Phi.operator, chunk=chunk)
        close(per_sample, Phi.rows @ C @ Phi.rows.mT, RTOL)
        assert torch.equal(per_sample, per_sample.mT)
        diagonal = P.operator.inv_congruence_diagonal(Phi.operator, chunk=chunk)
        close(diagonal, ((Phi.rows @ C) * Phi.rows).sum(-1), RTOL)
        joint = P.operator.inv_congruence(Phi.operator, joint=True, chunk=chunk)
        close(joint, torch.einsum("nrd,de,mqe->nrmq", Phi.rows, C, Phi.rows), RTOL)
        assert torch.equal(joint, joint.movedim((0, 1), (2, 3)))
        cross = P.operator.inv_congruence(Phi.operator, Psi.operator, chunk=chunk)
        close(cross, torch.einsum("nrd,de,mqe->nrmq", Phi.rows, C, Psi.rows), RTOL)

    holds()


@each_pair
def test_layouts_agree_with_each_other(pair: tuple[str, str]) -> None:
    Phi, P = closed_pair(pair, 30, N=4, R=3, S=2)
    joint = P.operator.inv_congruence(Phi.operator, joint=True)
    per_sample = P.operator.inv_congruence(Phi.operator)
    close(torch.stack([joint[n, :, n] for n in range(4)]), per_sample, RTOL)
    close(P.operator.inv_congruence_diagonal(Phi.operator), per_sample.diagonal(dim1=-2, dim2=-1), RTOL)
    close(P.operator.inv_congruence(Phi.operator, Phi.operator), joint, RTOL)


@each_pair
def test_a_batch_is_a_stack_of_singles(pair: tuple[str, str]) -> None:
    Phi, P = closed_pair(pair, 31, batch=(2,))
    _, Q = closed_pair(pair, 31)
    for layout in ({}, {"joint": True}):
        batched = Q.operator.inv_congruence(Phi.operator, **layout)
        for b in range(2):
            single, _ = closed_pair(pair, 31 + 1000 * b)
            close(batched[b], P.operator.inv_congruence(single.operator, **layout), RTOL)


BATCHED: dict[str, Any] = {
    "isotropic": lambda g: Isotropic(randn(g, 2).square() + 0.3, 12),
    "diagonal": lambda g: Diagonal(randn(g, 2, 12).square() + 0.1),
    "dense": lambda g: Dense(torch.stack([spd(g, 12), spd(g, 12)])),
    "shifted": lambda g: KroneckerSum.shifted(spd(g, OUT), spd(g, IN), randn(g, 2).square() + 0.1),
    "two": lambda g: KroneckerSum(
        [(torch.stack([spd(g, OUT), spd(g, OUT)]), spd(g, IN)), (spd(g, OUT), spd(g, IN))]
    ),
    "updated": lambda g: Diagonal(randn(g, 2, 12).square() + 0.1).update(randn(g, 12, 2)),
    "dual": lambda g: Isotropic(randn(g, 2).square() + 0.3, 12).update(features("khatri_rao", 3).operator),
}


@pytest.mark.parametrize("kind", BATCHED)
@pytest.mark.parametrize("features_kind", ["khatri_rao", "dense"])
def test_a_batched_precision(kind: str, features_kind: str) -> None:
    P: PrecisionOperator = BATCHED[kind](generator(40))
    Phi = features(features_kind, 41, N=3, R=2, S=3)
    C = torch.linalg.inv(P.to_dense())
    close(P.inv_congruence(Phi.operator), Phi.rows @ C.unsqueeze(1) @ Phi.rows.mT, RTOL)
    close(
        P.inv_congruence(Phi.operator, joint=True),
        torch.einsum("nrd,bde,mqe->bnrmq", Phi.rows, C, Phi.rows),
        RTOL,
    )


@pytest.mark.parametrize("kind", [*ANY_SIZE, *KRONECKER_KINDS])
def test_dense_features_meet_structured_ones(kind: str) -> None:
    P = precision(kind, 50)
    Phi, Psi = features("khatri_rao", 51, N=3, R=2, S=2), features("dense", 52, N=2, R=3)
    expected = torch.einsum("nrd,de,mqe->nrmq", Phi.rows, torch.linalg.inv(P.matrix), Psi.rows)
    close(P.operator.inv_congruence(Phi.operator, Psi.operator), expected, RTOL)
    close(P.operator.inv_congruence(Psi.operator, Phi.operator), expected.movedim((0, 1), (2, 3)), RTOL)


def test_blocks_of_another_partition_meet_through_dense_rows() -> None:
    P = precision("blocks", 53, 15)
    Phi, rows = features("block", 54), randn(generator(55), 2, 2, 15)
    expected = torch.einsum("nrd,de,mqe->nrmq", Phi.rows, torch.linalg.inv(P.matrix), rows)
    close(P.operator.inv_congruence(Phi.operator, DenseFeatures(rows)), expected, RTOL)


# -- derivatives -----------------------------------------------------------------------------------------------

A, B = (spd(generator(60), 2), torch.diag(torch.tensor([2.0, 1.0, 1.0], dtype=torch.float64)))
OF_SHIFT: dict[str, Any] = {
    "isotropic": lambda s: Isotropic(s, 6),
    "diagonal": lambda s: Diagonal(s * torch.arange(1, 7)),
    "dense": lambda s: Dense(s * torch.eye(6, dtype=torch.float64) + 0.1),
    "shifted": lambda s: KroneckerSum.shifted(A, B, s),
    "shifted and scaled": lambda s: KroneckerSum.shifted(A * s, B, s),
    "spectral": lambda s: SpectralKronecker(
        torch.eye(2, dtype=torch.float64),
        torch.eye(3, dtype=torch.float64),
        s * torch.ones(2, 3).double() + A[0, 0],
    ),
    "low rank": lambda s: Isotropic(s, 6).update(torch.linspace(0, 1, 12, dtype=torch.float64).reshape(6, 2)),
    "updated": lambda s: KroneckerSum.shifted(A, B, s).update(torch.ones(6, 1, dtype=torch.float64)),
}


def _check_two_derivatives(covariances: Any, inputs: tuple[Tensor, ...]) -> None:
    """Along random directions (fast mode), which an error in any entry shows up in."""
    assert torch.autograd.gradcheck(covariances, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(covariances, inputs, fast_mode=True)


@pytest.mark.parametrize(
    ("kind", "S", "chunked"),
    [*((kind, S, False) for kind in OF_SHIFT for S in (1, 3)), ("shifted", 1, True), ("updated", 3, True)],
)
def test_two_derivatives_in_features_and_shift(
    kind: str, S: int, chunked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if chunked:
        tiny_chunks(monkeypatch)
    g = generator(61)
    inputs = (randn(g, 2, 2, S, 2), randn(g, 2, S, 3), torch.tensor(0.4, dtype=torch.float64))
    inputs = tuple(t.requires_grad_() for t in inputs)

    def covariances(left: Tensor, right: Tensor, shift: Tensor) -> tuple[Tensor, ...]:
        P, Phi = OF_SHIFT[kind](shift), KhatriRaoFeatures(left, right)
        return (
            P.inv_congruence(Phi),
            P.inv_congruence_diagonal(Phi),
            P.inv_congruence(Phi, joint=True),
            P.inv_congruence(Phi, DenseFeatures(torch.ones(1, 1, 6, dtype=torch.float64))),
        )

    _check_two_derivatives(covariances, inputs)


@pytest.mark.parametrize("kind", ["shifted", "two"])
@pytest.mark.parametrize("S", [1, 2])
def test_two_derivatives_in_the_factors(kind: str, S: int) -> None:
    """Where the factors need a gradient the eigenbasis is not taken for a constant."""
    g = generator(62)
    X, Y, A2, B2 = randn(g, 2, 3), randn(g, 3, 4), spd(g, 2), spd(g, 3)
    Phi = KhatriRaoFeatures(randn(g, 2, 2, S, 2), randn(g, 2, S, 3))

    def covariances(X: Tensor, Y: Tensor) -> tuple[Tensor, ...]:
        first = (X @ X.mT, Y @ Y.mT)
        P = KroneckerSum.shifted(*first, 0.3) if kind == "shifted" else KroneckerSum([first, (A2, B2)])
        return P.inv_congruence(Phi), P.inv_congruence_diagonal(Phi), P.inv_congruence(Phi, joint=True)

    inputs = X.requires_grad_(), Y.requires_grad_()
    _check_two_derivatives(covariances, inputs)


def test_two_derivatives_in_a_feature_update() -> None:
    g = generator(63)
    inputs = (randn(g, 2, 1, 2, 2), randn(g, 2, 2, 3), randn(g, 6).square() + 0.2)
    inputs = tuple(t.requires_grad_() for t in inputs)
    test = KhatriRaoFeatures(randn(g, 2, 2, 1, 2), randn(g, 2, 1, 3))

    def covariances(left: Tensor, right: Tensor, d: Tensor) -> tuple[Tensor, ...]:
        P = Diagonal(d).update(KhatriRaoFeatures(left, right))
        return P.inv_congruence(test), P.inv_congruence_diagonal(test), P.inv_congruence(test, joint=True)

    _check_two_derivatives(covariances, inputs)


@pytest.mark.parametrize("kind", OF_SHIFT)
def test_transforms_agree_with_autograd(kind: str) -> None:
    g = generator(64)
    left, right = randn(g, 2, 2, 2, 2), randn(g, 2, 2, 3)
    shift = torch.tensor(0.4, dtype=torch.float64)

    def total(left: Tensor, right: Tensor, shift: Tensor) -> Tensor:
        return OF_SHIFT[kind](shift).inv_congruence(KhatriRaoFeatures(left, right)).square().sum()

    live = tuple(t.clone().requires_grad_() for t in (left, right, shift))
    expected = torch.autograd.grad(total(*live), live)
    for ours, theirs in zip(
        torch.func.grad(total, argnums=(0, 1, 2))(left, right, shift), expected, strict=True
    ):
        close(ours, theirs, RTOL)
    shifts = shift * torch.tensor([1.0, 2.0], dtype=torch.float64)
    looped = torch.stack([total(left, right, s) for s in shifts])
    close(torch.vmap(lambda s: total(left, right, s))(shifts), looped, RTOL)
    lefts = torch.stack([left, -2 * left])
    close(
        torch.vmap(lambda t: total(t, right, shift))(lefts),
        torch.stack([total(t, right, shift) for t in lefts]),
        RTOL,
    )


# -- cost ------------------------------------------------------------------------------------------------------


LARGE = 4096 * 4096


def _large_precisions(out: int, inputs: int) -> dict[str, PrecisionOperator]:
    X = torch.randn(inputs, inputs + 1, generator=generator(69))
    return {
        "isotropic": Isotropic(2.0, LARGE),
        "diagonal": Diagonal(torch.full((LARGE,), 2.0)),
        # One side an identity, so that the test is not about an eigendecomposition of size 4096.
        "kronecker": KroneckerSum([(None, X @ X.mT / inputs)], 1.0, sizes=(out, inputs)),
    }


@pytest.mark.parametrize("kind", ["isotropic", "diagonal", "kronecker"])
def test_no_row_is_formed_for_a_large_layer(kind: str) -> None:
    """D = 16.8 million. P's eigenvalues have as many entries as one row; six rows would exceed the limit."""
    N, R, inputs = 2, 3, 256
    out = LARGE // inputs
    g = generator(70)
    Phi = KhatriRaoFeatures(torch.randn(N, R, 1, out, generator=g), torch.randn(N, 1, inputs, generator=g))
    P = _large_precisions(out, inputs)[kind]
    with forbid_dense(LARGE):
        per_sample, joint = P.inv_congruence(Phi), P.inv_congruence(Phi, joint=True)
        variance = P.inv_congruence_diagonal(Phi)
    left, right = Phi.left.squeeze(-2).double(), Phi.right.squeeze(-2).double()
    if kind == "kronecker":
        assert isinstance(P, KroneckerSum)
        B = P.terms[0][1]
        assert B is not None
        weight = right @ torch.linalg.solve(B.double() + torch.eye(inputs).double(), right.mT)
    else:
        weight = right @ right.mT / 2
    expected = torch.einsum("nro,mqo,nm->nrmq", left, left, weight)
    close(joint.double(), expected, 1e-5)
    close(per_sample.double(), torch.stack([expected[n, :, n] for n in range(N)]), 1e-5)
    close(variance, per_sample.diagonal(dim1=-2, dim2=-1), 1e-5)


def test_no_row_is_formed_for_a_kronecker_precision() -> None:
    """The budget is that of P's own factors: rows would be 6 times the limit, a dense P 40,000 times."""
    out, inputs, N, R = 256, 384, 4, 6
    g = generator(71)
    factors = [torch.randn(n, n + 1, generator=g) for n in (out, inputs)]
    P = KroneckerSum.shifted(
        *(X @ X.mT / n for X, n in zip(factors, (out, inputs), strict=True)), 1.0
    ).factor()
    Phi = KhatriRaoFeatures(torch.randn(N, R, 1, out, generator=g), torch.randn(N, 1, inputs, generator=g))
    limit = 4 * inputs**2  # a factor in float64 and its rotations
    assert N * R * out * inputs > 3 * limit
    with forbid_dense(limit):
        per_sample, joint = P.inv_congruence(Phi), P.inv_congruence(Phi, joint=True)
    rows = Phi.to(torch.float64).to_dense().flatten(0, 1)
    expected = rows @ P.to(torch.float64).solve(rows.mT)
    close(joint.reshape(N * R, N * R).double(), expected, 1e-4)
    close(per_sample.double(), torch.stack([expected.reshape(N, R, N, R)[n, :, n] for n in range(N)]), 1e-4)


def test_shared_positions_stay_within_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """S > 1: no more than a chunk of rows, even where one sample alone exceeds the budget; backward included."""
    tiny_chunks(monkeypatch, 2**18)  # 32,768 numbers
    g = generator(72)
    N, R, S, out, inputs = 3, 8, 20, 64, 80  # a sample has 40,960 numbers
    left, right = randn(g, N, R, S, out).requires_grad_(), randn(g, N, S, inputs)
    d = randn(g, out * inputs).square() + 0.5
    Phi = KhatriRaoFeatures(left, right)
    rows = Phi.detach().to_dense()
    with forbid_dense(40_000):  # less than the rows of one sample
        K = Diagonal(d).inv_congruence(Phi)
        joint = Diagonal(d).inv_congruence(Phi, joint=True)
        (K.sum() + joint.sum()).backward()
    close(K.detach(), (rows / d) @ rows.mT, RTOL)
    close(joint.detach(), torch.einsum("nrd,mqd->nrmq", rows / d, rows), RTOL)


def test_backward_keeps_no_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """What autograd saves grows with the inputs and the result, not with the rows that the chunks multiply out."""
    g = generator(75)
    N, R, S, out, inputs = 8, 4, 10, 32, 48  # N R D is 49,152
    left, right = randn(g, N, R, S, out).requires_grad_(), randn(g, N, S, inputs)
    d = (randn(g, out * inputs).square() + 0.5).requires_grad_()
    saved = {}

    def keep(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    def total() -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            return Diagonal(d).inv_congruence(KhatriRaoFeatures(left, right)).sum()

    tiny_chunks(monkeypatch, 2**26)
    whole = torch.autograd.grad(total(), (left, d))
    assert sum(saved.values()) > N * R * out * inputs  # one chunk holds all rows
    saved.clear()
    tiny_chunks(monkeypatch, 2 * 8 * R * out * inputs)  # one sample
    pieces = torch.autograd.grad(total(), (left, d))
    assert sum(saved.values()) < N * R * out * inputs / 2
    for ours, theirs in zip(pieces, whole, strict=True):
        close(ours, theirs)


@pytest.mark.parametrize("S", [1, 2, 6])
@pytest.mark.parametrize("R", [1, 4])
def test_routes_agree(S: int, R: int) -> None:
    """Rows multiplied out and token products are two ways to one result; the cost model may take either."""
    g = generator(73)
    left, right, w = randn(g, 3, R, S, OUT), randn(g, 3, S, IN), randn(g, OUT, IN).square()
    if S > 1:
        close(contraction._tokens(left, right, w), contraction._rows(left, right, w), RTOL)
        close(contraction._tokens(left, right, None), contraction._rows(left, right, None), RTOL)
        close(contraction._tokens_diagonal(left, right, w), contraction._rows_diagonal(left, right, w), RTOL)
    rows = contraction._pairs_rows(left, right, contraction._prepared_rows(left, right, w))
    close(contraction._pairs_tokens(left, right, (left, right, w)), rows, RTOL)
    rows = contraction._pairs_rows(left, right, contraction._prepared_rows(left, right, None))
    close(contraction._pairs_tokens(left, right, (left, right, None)), rows, RTOL)


@pytest.mark.parametrize("batch", [(7,), (2, 3), (1,)])
@pytest.mark.parametrize("S", [1, 4, 12])
def test_many_weights_share_the_rows(S: int, batch: tuple[int, ...]) -> None:
    """A batch of weights with features of none, by each route, is each weight by itself; so are two derivatives."""
    g = generator(76)
    left, right = randn(g, 3, 4, S, OUT), randn(g, 3, S, IN)
    w = randn(g, *batch, OUT, IN).square()
    rows = contraction.multiplied(left, right)
    expected = (rows * w.flatten(-2)[..., None, None, :]) @ rows.mT
    close(contraction.per_sample(left, right, w), expected, RTOL)
    close(contraction.per_sample_diagonal(left, right, w), expected.diagonal(dim1=-2, dim2=-1), RTOL)
    if S > 1:
        close(contraction._rows_of_pairs(left, right, w), expected, RTOL)
    args = [left[:1, :2].clone().requires_grad_(), right[:1].clone().requires_grad_()]
    for contract in (contraction.per_sample, contraction.per_sample_diagonal):
        assert torch.autograd.gradgradcheck(contract, (*args, w.clone().requires_grad_()))


def test_many_weights_multiply_rows_out_once() -> None:
    """100 weights cost what their one product of matrices does, not 100 times the rows."""
    g = generator(77)
    left, right, w = randn(g, 2, 3, 50, OUT), randn(g, 2, 50, IN), randn(g, 100, OUT, IN).square()
    with FlopCounterMode(display=False) as one:
        contraction.per_sample_diagonal(left, right, w[0])
    with FlopCounterMode(display=False) as many:
        contraction.per_sample_diagonal(left, right, w)
    products = 2 * 100 * 2 * 3 * OUT * IN
    assert many.get_total_flops() == one.get_total_flops() + products


# -- accuracy and scale ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["khatri_rao", "dense"])
def test_float32_is_accurate_to_float32(kind: str) -> None:
    for other in (*KRONECKER_KINDS, "diagonal", "isotropic", "updated", "dual"):
        Phi, P = closed_pair((kind, other), 80, N=3, R=2, S=3)
        single = P.operator.to(torch.float32).inv_congruence(Phi.operator.to(torch.float32))
        assert single.dtype == torch.float32
        close(single.double(), P.operator.inv_congruence(Phi.operator), 2e-4)


@pytest.mark.parametrize("kind", ["isotropic", "diagonal", "shifted", "spectral"])
@pytest.mark.parametrize("exponent", [-40, 40])
def test_powers_of_two_pass_through_exactly(kind: str, exponent: int) -> None:
    Phi, P = closed_pair(("khatri_rao", kind), 81, N=3, R=2, S=2)
    Phi32, P32 = Phi.operator.to(torch.float32), P.operator.to(torch.float32)
    scaled = (2.0**exponent * P32).inv_congruence(Phi32)
    assert torch.equal(scaled * 2.0**exponent, P32.inv_congruence(Phi32))


@pytest.mark.parametrize("S", [1, 3])
def test_weights_beyond_the_range_of_float32(S: int) -> None:
    """Eigenvalues of 2^-140 have no inverse in float32, but the covariance of small features has its value."""
    g = generator(76)
    A, B = (2.0**-70 * spd(g, n).float() for n in (OUT, IN))
    left, right = randn(g, 2, 2, S, OUT).float(), randn(g, 2, S, IN).float()
    tiny = KroneckerSum([(A, B)]).inv_congruence(KhatriRaoFeatures(2.0**-20 * left, 2.0**-20 * right))
    plain = KroneckerSum([(2.0**70 * A, 2.0**70 * B)]).inv_congruence(KhatriRaoFeatures(left, right))
    assert torch.equal(tiny, 2.0**60 * plain)


def test_a_strong_update_leaves_a_positive_covariance() -> None:
    """Rows in the range of an update of condition 1e12: the textbook difference would be noise."""
    g = generator(82)
    U = 1e6 * randn(g, 12, 3)
    P = Isotropic(torch.tensor(1.0, dtype=torch.float64), 12).update(U)
    rows = (U.mT + 1e-3 * randn(g, 3, 12)).unsqueeze(0)
    K = P.inv_congruence(DenseFeatures(rows))
    # In the eigenbasis of U U^T, by hand.
    Q, sigma, _ = torch.linalg.svd(U, full_matrices=True)
    inverse = torch.ones(12, dtype=torch.float64)
    inverse[:3] = 1 / (1 + sigma.square())
    half = (rows[0] @ Q) * inverse.sqrt()
    close(K[0], half @ half.mT, 1e-9)
    assert bool((torch.linalg.eigvalsh(K) > -1e-14 * K.abs().max()).all())


# -- refusals --------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[Any, type[Exception], str]] = {
    "khatri_rao and blocks": (
        lambda: BlockDiag([Isotropic(1.0, 12)]).inv_congruence(
            KhatriRaoFeatures(torch.ones(1, 1, 1, 3), torch.ones(1, 1, 4))
        ),
        NotClosedError,
        "no exact rule for KhatriRaoFeatures",
    ),
    "blocks and a kronecker": (
        lambda: precision("shifted", 0).operator.inv_congruence(
            BlockFeatures([features("khatri_rao", 0).operator])
        ),
        NotClosedError,
        "no exact rule for BlockFeatures",
    ),
    "another partition": (
        lambda: precision("blocks", 0).operator.inv_congruence(
            BlockFeatures(features("block", 0).operator.parts)  # type: ignore[attr-defined]
        ),
        NotClosedError,
        "cut into the blocks of P",
    ),
    "a block without a rule": (
        lambda: BlockDiag(
            [precision("blocks", 0).operator, Isotropic(torch.tensor(1.0).double(), 1)]
        ).inv_congruence(
            BlockFeatures(
                [
                    KhatriRaoFeatures(torch.ones(1, 1, 1, 3).double(), torch.ones(1, 1, 5).double()),
                    DenseFeatures(torch.ones(1, 1, 1).double()),
                ]
            )
        ),
        NotClosedError,
        "block 0",
    ),
    "two structured kinds": (
        lambda: Isotropic(torch.tensor(1.0).double(), 12).inv_congruence(
            BlockFeatures([features("khatri_rao", 0).operator]), features("khatri_rao", 1).operator
        ),
        NotClosedError,
        "features of one kind",
    ),
    "layers of another shape": (
        lambda: precision("shifted", 0).operator.inv_congruence(
            KhatriRaoFeatures(torch.ones(1, 1, 1, 4).double(), torch.ones(1, 1, 3).double())
        ),
        ValueError,
        "out and in sizes",
    ),
    "another size": (
        lambda: Isotropic(1.0, 5).inv_congruence(DenseFeatures(torch.ones(1, 1, 4))),
        ValueError,
        "5 columns",
    ),
    "another dtype": (
        lambda: Isotropic(1.0, 4).inv_congruence(DenseFeatures(torch.ones(1, 1, 4).double())),
        TypeError,
        "dtype",
    ),
    "singular precision": (
        lambda: Diagonal(torch.tensor([1.0, 0.0])).inv_congruence(DenseFeatures(torch.ones(1, 1, 2))),
        NotPositiveDefiniteError,
        "Diagonal",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_closed_is_refused_in_one_line(name: str) -> None:
    call, error, message = REFUSED[name]
    with pytest.raises(error, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_block_order_matters_only_together() -> None:
    """Parts and blocks listed in another order, with their indices, are the same operators."""
    P, Phi = precision("blocks", 90, 15), features("block", 91)
    assert isinstance(P.operator, BlockDiag) and isinstance(Phi.operator, BlockFeatures)
    swapped = BlockDiag(P.operator.blocks[::-1], BLOCKS[::-1])
    parts = BlockFeatures(Phi.operator.parts[::-1], BLOCKS[::-1])
    close(swapped.inv_congruence(parts), P.operator.inv_congruence(Phi.operator), RTOL)


@pytest.mark.parametrize("delta", [1e-4, 1e-8, 1e-12])
def test_variances_where_the_update_is_known_keep_their_digits(delta: float) -> None:
    """``J (J^T J + delta I)^-1 J^T = G (G + delta I)^-1`` with ``G = J J^T``: near 1, of terms of size |G| / delta."""
    N, R, S, out, inputs = 5, 2, 3, 4, 6
    g = generator(71)
    Phi = KhatriRaoFeatures(randn(g, N, R, S, out), randn(g, N, S, inputs))
    P = Isotropic(torch.tensor(delta, dtype=torch.float64), out * inputs).update(Phi)
    rows = Phi.to_dense().flatten(0, 1)
    spectrum, E = torch.linalg.eigh(rows @ rows.mT)
    exact = (E * (spectrum / (spectrum + delta))) @ E.mT
    joint = P.inv_congruence(Phi, joint=True).reshape(N * R, N * R)
    torch.testing.assert_close(joint, exact, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(
        P.inv_congruence_diagonal(Phi).flatten(), exact.diagonal(), rtol=1e-11, atol=0.0
    )
    blocks = torch.stack([exact[R * n : R * (n + 1), R * n : R * (n + 1)] for n in range(N)])
    torch.testing.assert_close(P.inv_congruence(Phi), blocks, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("delta", [1e-4, 1e-8, 1e-12])
@pytest.mark.parametrize("others", ["the same", "negated", "reversed", "some"])
def test_cross_covariances_where_the_update_is_known_keep_their_digits(others: str, delta: float) -> None:
    """As above, whatever the signs and the order of the samples that Phi meets."""
    N, out, inputs = 4, 4, 6
    g = generator(72)
    left, right = randn(g, N, 1, 1, out), randn(g, N, 1, inputs)
    Phi = KhatriRaoFeatures(left, right)
    P = Isotropic(torch.tensor(delta, dtype=torch.float64), out * inputs).update(Phi)
    rows = Phi.to_dense().flatten(0, 1)
    spectrum, E = torch.linalg.eigh(rows @ rows.mT)
    exact = (E * (spectrum / (spectrum + delta))) @ E.mT
    sign = -1.0 if others == "negated" else 1.0
    chosen = {"reversed": [3, 2, 1, 0], "some": [2, 0]}.get(others, [0, 1, 2, 3])
    Psi = KhatriRaoFeatures(sign * left[chosen], right[chosen])
    K = P.inv_congruence(Phi, Psi).flatten(-2).flatten(-3, -2)
    torch.testing.assert_close(K, sign * exact[:, chosen], rtol=1e-10, atol=1e-10)
