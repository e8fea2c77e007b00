"""No public path of a structured operator makes a tensor of the size of the dense matrix, at 4,096 rows and more."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from draws import randn
from torch import Tensor
from torch.distributions import kl_divergence

from curvlin import (
    BlockDiag,
    BlockFeatures,
    DenseFeatures,
    Diagonal,
    Gaussian,
    Isotropic,
    KhatriRaoFeatures,
    KroneckerSum,
    LowRankPlusDiag,
    SpectralKronecker,
    Woodbury,
)
from curvlin.precision.base import PrecisionOperator
from curvlin.testing import forbid_dense
from curvlin.testing.matrices import eigenvalues, orthogonal, spd_matrix

f64 = torch.float64
SIDE = 64
D = SIDE * SIDE


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def spd(n: int, seed: int) -> Tensor:
    return spd_matrix(eigenvalues(n, "decay", 2.0), generator(seed)).requires_grad_()


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=f64, requires_grad=True)


def features(n: int = 3) -> KhatriRaoFeatures:
    return KhatriRaoFeatures(randn(n, 2, 1, SIDE, seed=5), randn(n, 1, SIDE, seed=6))


def halves() -> BlockDiag:
    """Two Kronecker blocks on interleaved coordinates."""
    order = torch.randperm(D, generator=generator(7))
    return BlockDiag(
        [KroneckerSum.shifted(spd(32, 1), spd(64, 2), scalar(0.1)), KroneckerSum([(spd(32, 3), spd(64, 4))])],
        indices=list(order.split(D // 2)),
    )


def columns() -> Tensor:
    return randn(D, 8, seed=8).requires_grad_()


OPERATORS: dict[str, Callable[[], PrecisionOperator]] = {
    "Isotropic": lambda: Isotropic(scalar(2.0), D),
    "Diagonal": lambda: Diagonal((randn(D).abs() + 0.5).requires_grad_()),
    "one term": lambda: KroneckerSum([(spd(SIDE, 1), spd(SIDE, 2))]),
    "shifted": lambda: KroneckerSum.shifted(spd(SIDE, 1), spd(SIDE, 2), scalar(0.1)),
    "damped": lambda: KroneckerSum.damped(spd(SIDE, 1), spd(SIDE, 2), scalar(0.1)),
    "direct": lambda: KroneckerSum.direct(spd(SIDE, 1), spd(SIDE, 2)),
    "two terms": lambda: KroneckerSum([(spd(SIDE, 1), spd(SIDE, 2)), (spd(SIDE, 3), spd(SIDE, 4))]),
    "repeated": lambda: KroneckerSum([(None, spd(SIDE, 1))], scalar(0.1), sizes=(SIDE, SIDE)),
    "one side": lambda: KroneckerSum([(spd(SIDE, 1), None), (spd(SIDE, 2), None)], sizes=(SIDE, SIDE)),
    "a batch of shifted": lambda: KroneckerSum.shifted(
        torch.stack([spd(SIDE, 1), spd(SIDE, 3)]).detach().requires_grad_(), spd(SIDE, 2), scalar(0.1)
    ),
    "SpectralKronecker": lambda: SpectralKronecker(
        orthogonal(SIDE, generator(1)),
        orthogonal(SIDE, generator(2)),
        (randn(SIDE, SIDE).abs() + 0.1).requires_grad_(),
    ),
    "BlockDiag": halves,
    "LowRankPlusDiag": lambda: LowRankPlusDiag((randn(D).abs() + 0.5).requires_grad_(), columns()),
    "Woodbury over Kronecker": lambda: Woodbury(
        KroneckerSum.shifted(spd(SIDE, 1), spd(SIDE, 2), scalar(0.1)), columns(), core=spd(8, 9)
    ),
    "Woodbury over blocks": lambda: Woodbury(halves(), columns()),
    "downdated": lambda: KroneckerSum.shifted(spd(SIDE, 1), spd(SIDE, 2), scalar(1.0)).downdate(
        1e-3 * columns()
    ),
    "dual of Khatri-Rao features": lambda: Isotropic(scalar(2.0), D).update(features()),
}
ROWS = randn(3, D, seed=11)
HALF = (torch.arange(0, SIDE, 2)[:, None] * SIDE + torch.arange(0, SIDE, 4)).flatten()  # a product set
ISOTROPIC = Isotropic(torch.tensor(1.5, dtype=f64), D)


def gaussian(P: PrecisionOperator) -> Gaussian:
    return Gaussian(torch.zeros(*P.batch_shape, D, dtype=f64), P)


def phi() -> DenseFeatures:
    return DenseFeatures(ROWS[:2].unsqueeze(0))


METHODS: dict[str, Callable[[PrecisionOperator], Any]] = {
    "@": lambda P: P @ ROWS.mT,
    "transposed @": lambda P: ROWS @ P,
    "solve": lambda P: P.solve(ROWS.mT),
    "logdet": lambda P: P.logdet(),
    "inv_quad": lambda P: P.inv_quad(ROWS[0]),
    "inv_congruence": lambda P: P.inv_congruence(ROWS),
    "cross congruence": lambda P: P.inv_congruence(ROWS, ROWS[:2]),
    "inv_congruence_diagonal": lambda P: P.inv_congruence_diagonal(ROWS),
    "congruence of features": lambda P: P.inv_congruence(phi()),
    "joint congruence of features": lambda P: P.inv_congruence(phi(), joint=True),
    "diagonal": lambda P: P.diagonal(),
    "inverse_diagonal": lambda P: P.inverse_diagonal(),
    "trace_solve": lambda P: P.trace_solve(P),
    "trace_solve of a diagonal": lambda P: P.trace_solve(Diagonal(ROWS[0].abs())),
    "sample": lambda P: P.sample((2,)),
    "whiten": lambda P: P.whiten(ROWS[0]),
    "unwhiten": lambda P: P.unwhiten(ROWS[0]),
    "root_matvec": lambda P: P.root_matvec(ROWS[0]),
    "root_solve": lambda P: P.root_solve(ROWS[0]),
    "inverse @": lambda P: P.inverse() @ ROWS.mT,
    "inverse diagonal": lambda P: P.inverse().diagonal(),
    "inverse logdet": lambda P: P.inverse().logdet(),
    "factor": lambda P: P.factor().solve(ROWS[0]),
    "small marginal": lambda P: P.marginal([5, 3, 4000]).logdet(),
    "small conditional": lambda P: P.conditional([5, 3, 4000]).logdet(),
    "scaled": lambda P: (3.0 * P).logdet(),
    "update": lambda P: P.update(1e-2 * ROWS.mT).logdet(),
    "downdate": lambda P: P.downdate(1e-6 * ROWS.mT).solve(ROWS[0]),
    "allclose": lambda P: P.allclose(P),
    "projected to a diagonal": lambda P: P.project(Diagonal),
    "projected to a multiple of I": lambda P: P.project(Isotropic),
    "to float32": lambda P: P.to(torch.float32).solve(ROWS[0].float()),
    "deepcopy": lambda P: copy.deepcopy(P.detach()).logdet(),
    "log_prob": lambda P: gaussian(P).log_prob(ROWS[0]),
    "rsample": lambda P: gaussian(P).rsample(),
    "entropy": lambda P: gaussian(P).entropy(),
    "variance": lambda P: gaussian(P).variance,
    "divergence from a multiple": lambda P: kl_divergence(gaussian(P), gaussian(2.0 * P)),
    "divergence from an update": lambda P: kl_divergence(gaussian(P), gaussian(P.update(1e-2 * ROWS.mT))),
    "divergence from isotropic": lambda P: kl_divergence(gaussian(P), gaussian(ISOTROPIC)),
}


def run(P: PrecisionOperator, call: Callable[[PrecisionOperator], Any], *outputs: Tensor) -> None:
    with forbid_dense(None, P, ROWS, *outputs) as guard:
        call(P)
    assert guard.limit < D * D / 4, "the limit does not tell structure from density"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", OPERATORS)
def test_no_method_forms_the_matrix(name: str, method: str) -> None:
    run(OPERATORS[name]().detach(), METHODS[method])


@pytest.mark.parametrize("name", OPERATORS)
def test_no_backward_pass_forms_the_matrix(name: str) -> None:
    def gradients(P: PrecisionOperator) -> None:
        x = ROWS[0]
        total = (
            P.logdet()
            + P.inv_quad(x)
            + P.solve(x).sum(-1)
            + P.unwhiten(x).sum(-1)
            + P.inv_congruence(ROWS).sum()
        )
        wanted = [t for t, _ in P._tensors() if t.requires_grad]
        assert wanted
        assert all(bool(g.isfinite().all()) for g in torch.autograd.grad(total.sum(), wanted))

    run(OPERATORS[name](), gradients)


VARIANCES: dict[str, Callable[[PrecisionOperator], Tensor]] = {
    "inverse_diagonal": lambda P: P.inverse_diagonal().square(),
    "variance": lambda P: gaussian(P).variance.square(),
    "inverse diagonal": lambda P: P.inverse().diagonal().square(),
    "trace_solve": lambda P: P.trace_solve(2.0 * P.detach()),
    "trace_solve of a diagonal": lambda P: P.trace_solve(Diagonal(ROWS[0].abs())),
    "divergence from a multiple": lambda P: kl_divergence(gaussian(P.detach()), gaussian(2.0 * P)),
    "divergence of a multiple": lambda P: kl_divergence(gaussian(2.0 * P), gaussian(P.detach())),
    "divergence from isotropic": lambda P: kl_divergence(gaussian(P), gaussian(ISOTROPIC)),
}


@pytest.mark.parametrize("question", VARIANCES)
@pytest.mark.parametrize("name", OPERATORS)
def test_no_derivative_of_a_variance_forms_the_matrix(name: str, question: str) -> None:
    """The first of every operator; the second of the Kronecker kinds, on which the others build."""

    def derivatives(P: PrecisionOperator) -> None:
        value = VARIANCES[question](P).sum()
        wanted = [t for t, _ in P._tensors() if t.requires_grad]
        twice = isinstance(P, KroneckerSum) and question in ("inverse_diagonal", "trace_solve")
        first = torch.autograd.grad(value, wanted, create_graph=twice)
        assert all(bool(g.isfinite().all()) for g in first)
        if twice:
            slope = sum((g * g.detach().sin()).sum() for g in first)
            assert all(bool(g.isfinite().all()) for g in torch.autograd.grad(slope, wanted))

    run(OPERATORS[name](), derivatives)


@pytest.mark.parametrize("sides", [(16, 512), (512, 16)])
def test_derivatives_of_variances_between_unequal_sides_form_nothing_larger(sides: tuple[int, int]) -> None:
    P = KroneckerSum.shifted(spd(sides[0], 1), spd(sides[1], 2), scalar(0.1))
    with forbid_dense(None, P):
        value = P.inverse_diagonal().square().sum() + P.trace_solve(P.detach())
        torch.autograd.grad(value, [t for t, _ in P._tensors()])


@pytest.mark.parametrize("name", ["Isotropic", "Diagonal", "one term", "LowRankPlusDiag", "BlockDiag"])
def test_structured_parts_stay_structured(name: str) -> None:
    """Product index sets for a Kronecker product, any for diagonals, low rank and blocks."""
    index = torch.arange(0, D, 2) if name in ("Isotropic", "Diagonal", "LowRankPlusDiag") else HALF
    if name == "BlockDiag":
        index = OPERATORS[name]().indices.blocks[1]  # type: ignore[attr-defined]
    run(OPERATORS[name]().detach(), lambda P: P.conditional(index).logdet())
    run(OPERATORS[name]().detach(), lambda P: P.marginal(index).logdet())


@pytest.mark.parametrize("name", OPERATORS)
def test_sums_stay_structured(name: str) -> None:
    closed = name not in ("two terms", "one side")
    if closed:
        run(OPERATORS[name]().detach(), lambda P: (P + ISOTROPIC).solve(ROWS[0]))


@pytest.mark.parametrize(
    "name", ["Isotropic", "Diagonal", "one term", "shifted", "direct", "two terms", "SpectralKronecker"]
)
@pytest.mark.parametrize("joint", [False, True])
def test_layer_features_are_not_multiplied_out(name: str, joint: bool) -> None:
    """Of a layer's Jacobian only the factors exist, not its rows of 4,096 entries each."""
    Phi = KhatriRaoFeatures(randn(40, 5, 1, SIDE, seed=1), randn(40, 1, SIDE, seed=2))
    P = OPERATORS[name]().detach()
    outputs = 40 * 40 * 25 if joint else 40 * 25
    with forbid_dense(
        4 * (sum(t.numel() for t, _ in P._tensors()) + 40 * 6 * SIDE + outputs) + 4 * D
    ) as guard:
        P.inv_congruence(Phi, joint=joint)
    assert guard.limit < 40 * 5 * D or joint


def test_block_features_meet_blocks() -> None:
    P = BlockDiag([KroneckerSum([(spd(64, 1), spd(32, 2))]), Diagonal(randn(2048).abs() + 0.5)]).detach()
    Phi = BlockFeatures(
        [KhatriRaoFeatures(randn(3, 2, 1, 64), randn(3, 1, 32)), DenseFeatures(randn(3, 2, 2048))],
        indices=P.indices,
    )
    with forbid_dense(None, P, Phi):
        P.inv_congruence(Phi)


def test_to_dense_is_the_one_exception() -> None:
    from curvlin.testing import DenseTensorError

    P = OPERATORS["shifted"]().detach()
    with pytest.raises(DenseTensorError):
        run(P, lambda P: P.to_dense())
