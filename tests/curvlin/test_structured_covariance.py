"""Structured operators as the covariance itself, and inverses that are operators of their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from interop_cases import F64, KINDS, close, each_kind, positive, randn, spd
from torch.distributions import MultivariateNormal, kl_divergence

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
    NotClosedError,
    NotPositiveDefiniteError,
    Woodbury,
)
from curvlin.algebra.inverses import inverse_operator
from curvlin.testing import forbid_dense


@each_kind
def test_an_operator_is_the_covariance_itself(kind: str) -> None:
    K = KINDS[kind](12, (2,))
    C, M = Covariance.of(K), K.to_dense()
    assert C.operator is K and not C.inverted
    x, X = randn(1, 3, 2, 12), randn(2, 2, 12, 4)
    solved = torch.linalg.solve(M, x.unsqueeze(-1)).squeeze(-1)
    close(C @ X, M @ X)
    close(C.solve(X), torch.linalg.solve(M, X))
    close(C.logdet(), torch.logdet(M))
    close(C.quad(x), (x * (M @ x.unsqueeze(-1)).squeeze(-1)).sum(-1))
    close(C.inv_quad(x), (x * solved).sum(-1))
    close(C.diagonal(), M.diagonal(dim1=-2, dim2=-1))
    close(C.marginal([3, 1]).to_dense(), M[:, [3, 1]][..., [3, 1]])
    eye = torch.eye(12, dtype=F64)[:, None].expand(12, 2, 12)
    root = C.colour(eye).movedim(0, -1)
    close(root @ root.mT, M)
    q, right = Gaussian.from_covariance(x[0], C), MultivariateNormal(x[0], M)
    close(q.log_prob(x[1]), right.log_prob(x[1]))
    close(q.entropy(), right.entropy())
    close(q.variance, right.variance)


@each_kind
@pytest.mark.parametrize("joint", [False, True])
def test_features_meet_a_covariance_as_rows_do(kind: str, joint: bool) -> None:
    K = KINDS[kind](12, ())
    C, M = Covariance.of(K), K.to_dense()
    for Phi in (
        DenseFeatures(randn(1, 5, 2, 12)),
        KhatriRaoFeatures(randn(2, 5, 2, 3, 3), randn(3, 5, 3, 4)),
    ):
        rows = Phi.to_dense()
        expected = torch.einsum("nrd,de,mqe->nrmq", rows, M, rows)
        if not joint:
            expected = torch.stack([expected[n, :, n] for n in range(5)])
        close(C.congruence(Phi, joint=joint), expected)


def test_two_structured_covariances_diverge_exactly_at_900_rows() -> None:
    A, B = spd(1, 30), spd(2, 30)
    C1, C2 = KroneckerSum.shifted(A, B, 0.5), KroneckerSum.shifted(A, B, 0.7)
    M1, M2 = C1.to_dense(), C2.to_dense()
    m1, m2 = randn(3, 900), randn(4, 900)
    expected = kl_divergence(MultivariateNormal(m1, M1), MultivariateNormal(m2, M2))
    with forbid_dense(900 * 900 // 4):
        p, q = (Gaussian.from_covariance(m, Covariance.of(C)) for m, C in ((m1, C1), (m2, C2)))
        close(kl_divergence(p, q), expected)


def test_a_structured_covariance_that_is_singular_says_so_where_it_is_drawn_from() -> None:
    C = Covariance.of(KroneckerSum([(torch.diag(torch.tensor([1.0, 0.0])), torch.eye(2))]))
    assert C.diagonal().tolist() == [1.0, 1.0, 0.0, 0.0]
    for call in (C.sample, C.logdet, lambda: C.solve(torch.ones(4)), C.inverse):
        with pytest.raises(NotPositiveDefiniteError):
            call()


def test_an_operator_in_the_place_of_a_covariance_is_told_apart() -> None:
    with pytest.raises(TypeError, match=r"Covariance.of\(operator\)"):
        Gaussian.from_covariance(torch.zeros(2), Isotropic(torch.ones(()), 2))


# -- inverses ---------------------------------------------------------------------------------------------------

CLOSED = [kind for kind in KINDS if kind != "two terms"]


@pytest.mark.parametrize("kind", CLOSED)
@pytest.mark.parametrize("batch", [(), (2,)], ids=str)
def test_an_inverse_is_an_operator_of_its_own(kind: str, batch: tuple[int, ...]) -> None:
    P = KINDS[kind](12, batch)
    Q = inverse_operator(P)
    close(Q.to_dense(), torch.linalg.inv(P.to_dense()))
    close(Q.logdet(), -torch.logdet(P.to_dense()))
    x = randn(1, *batch, 12, 2)
    close(Q.solve(x), P.to_dense() @ x)
    close(inverse_operator(Q).to_dense(), P.to_dense(), 1e-8)
    close(Covariance.of(P).inverse().to_dense(), torch.linalg.inv(P.to_dense()))


def test_changes_with_a_weight_and_downdates_are_inverted() -> None:
    base, U = KINDS["shifted"](12, ()), randn(9, 12, 3)
    for P in (3.0 * Woodbury(base, U), base.downdate(0.1 * U), (2.0 * base.downdate(0.1 * U)).to(F64)):
        close(inverse_operator(P).to_dense(), torch.linalg.inv(P.to_dense()))


@pytest.mark.parametrize("kind", ["isotropic", "diagonal", "dense", "kronecker", "blocks", "low rank"])
def test_inverses_are_differentiable_twice(kind: str) -> None:
    U = randn(9, 12, 3)
    makers: dict[str, Any] = {
        "isotropic": lambda t: Isotropic(t[0].exp(), 12),
        "diagonal": lambda t: Diagonal(positive(1, 12) * t[0] + t[1]),
        "dense": lambda t: Dense(spd(1, 12) * t[0] + t[1] * torch.eye(12, dtype=F64)),
        "kronecker": lambda t: KroneckerSum([(spd(1, 3) * t[0], spd(2, 4) + t[1] * torch.eye(4, dtype=F64))]),
        "blocks": lambda t: BlockDiag([Diagonal(positive(1, 4) * t[0]), Dense(spd(1, 8) * t[1])]),
        "low rank": lambda t: Diagonal(positive(1, 12) * t[0]).update(U * t[1]),
    }
    x = randn(3, 12)

    def ours(t: torch.Tensor) -> torch.Tensor:
        return x @ (inverse_operator(makers[kind](t)) @ x)

    def right(t: torch.Tensor) -> torch.Tensor:
        return x @ torch.linalg.solve(makers[kind](t).to_dense(), x)

    t = torch.tensor([1.3, 0.7], dtype=F64)
    close(torch.autograd.functional.jacobian(ours, t), torch.autograd.functional.jacobian(right, t))
    close(torch.autograd.functional.hessian(ours, t), torch.autograd.functional.hessian(right, t), 1e-8)


def test_inverses_of_other_operators_are_refused() -> None:
    trained = spd(1, 3).requires_grad_()
    for P, message in (
        (KINDS["two terms"](12, ()), "not orthogonal"),
        (KroneckerSum.shifted(trained, spd(2, 4), 0.5), "derivatives flow into its factors"),
        (Woodbury(KINDS["shifted"](12, ()), randn(1, 12, 2), core=torch.eye(2, dtype=F64)), "a core"),
    ):
        with pytest.raises(NotClosedError, match=message):
            inverse_operator(P)


def test_a_batch_of_one_broadcasts_over_vectors() -> None:
    P = Dense(spd(1, 4, (1,)))
    x, M = randn(2, 3, 4), spd(1, 4)
    close(P.inv_quad(x), (x * torch.linalg.solve(M, x.mT).mT).sum(-1))
    z = P.unwhiten(x)
    close(P.whiten(z), x)
    close(P.unwhiten(randn(3, 5, 3, 4)), torch.stack([P.unwhiten(v) for v in randn(3, 5, 3, 4)]))
