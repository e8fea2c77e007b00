"""The linear_operator adapter: every allowed path exact at every size, every other path refused."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from typing import Any

import linear_operator
import numpy as np
import pytest
import torch
from interop_cases import (  # noqa: F401
    F64,
    KINDS,
    MEANINGS,
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
from linear_operator.operators import (
    ConstantDiagLinearOperator,
    DenseLinearOperator,
    DiagLinearOperator,
    LinearOperator,
    RootLinearOperator,
    ZeroLinearOperator,
)
from torch import Tensor

from curvlin import (
    BlockDiag,
    Covariance,
    Dense,
    Diagonal,
    InexactPathError,
    Isotropic,
    KroneckerSum,
    LowRankPlusDiag,
    NotClosedError,
    NotPositiveDefiniteError,
)
from curvlin.interop.fail_closed import STRUCTURAL
from curvlin.interop.indexing import Rectangle
from curvlin.interop.linear_operator import CurvlinLinearOperator
from curvlin.interop.root_factor import RootFactor
from curvlin.testing import forbid_dense

pytestmark = pytest.mark.usefixtures("no_approximation")

# -- conformance ------------------------------------------------------------------------------------------------
# Every attribute of LinearOperator is in one of these lists. A new one fails `test_every_attribute_is_classified`;
# read what it does, then override it, prove it structural, or leave it refused.

_OVERRIDDEN = """
    __add__ __getitem__ __torch_function__ _diagonal _expand_batch _get_indices _getitem _matmul _mul_constant _size
    _solve _t_matmul _transpose_nonbatch add_diagonal add_low_rank diagonal evaluate_kernel inv_quad inv_quad_logdet
    inverse logdet matmul mul repeat root_decomposition root_inv_decomposition solve sqrt_inv_matmul to to_dense type
    zero_mean_mvn_samples
"""
_TAKEN_AS_THEY_ARE = """
    T __dict__ __matmul__ __module__ __mul__ __radd__ __rmatmul__ __rmul__ __truediv__ __weakref__
    _approx_diagonal _args _check_args _check_size _kwargs _permute_batch _set_requires_grad _unsqueeze_batch add
    add_jitter batch_dim batch_shape clone cpu cuda detach detach_ device dim div double dtype expand float half
    is_square mT matrix_shape ndim ndimension numel numpy permute requires_grad requires_grad_ reshape rmatmul shape
    size squeeze sum t transpose unsqueeze
"""
_REFUSED = """
    __rsub__ __sub__ _bilinear_derivative _cholesky _cholesky_solve _choose_root_method _isclose _mul_matrix
    _preconditioner _probe_vectors_and_norms _prod_batch _root_decomposition _root_decomposition_size
    _root_inv_decomposition _solve_preconditioner _sum_batch _svd _symeig _torch_linalg_svd abs cat_rows cholesky
    diagonalization eigh eigvalsh exp inv_quad_log_det isclose log log_det pivoted_cholesky prod representation
    representation_tree solve_triangular sqrt sub svd
"""
OVERRIDDEN, TAKEN_AS_THEY_ARE, REFUSED = (t.split() for t in (_OVERRIDDEN, _TAKEN_AS_THEY_ARE, _REFUSED))
ATTRIBUTES = set(dir(LinearOperator)) - set(dir(object))


def test_every_attribute_is_classified() -> None:
    listed = [*OVERRIDDEN, *TAKEN_AS_THEY_ARE, *REFUSED]
    assert len(listed) == len(set(listed))
    assert set(listed) == ATTRIBUTES, set(listed) ^ ATTRIBUTES
    assert set(TAKEN_AS_THEY_ARE) == STRUCTURAL


@pytest.mark.parametrize("cls", [CurvlinLinearOperator, RootFactor, Rectangle])
def test_an_attribute_is_own_or_structural_or_refused(cls: type) -> None:
    own = {n for b in cls.__mro__ if b not in LinearOperator.__mro__ for n in vars(b)}
    for name in ATTRIBUTES:
        inherited = inspect.getattr_static(cls, name) is inspect.getattr_static(LinearOperator, name)
        assert inherited == (name in STRUCTURAL and name not in own), name


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_exact_is_refused_by_name(name: str) -> None:
    op = KINDS["shifted"](12, ()).to_linear_operator("precision")
    with pytest.raises(
        InexactPathError, match=rf"CurvlinLinearOperator.{name} has no exact structured form.*; \w+"
    ):
        getattr(op, name)()


def test_what_is_overridden_is_not_a_refusal() -> None:
    for name in OVERRIDDEN:
        assert vars(CurvlinLinearOperator).get(name, getattr(CurvlinLinearOperator, name)).__doc__ != (
            "Refused: no exact structured form."
        ), name


def test_a_new_method_upstream_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LinearOperator, "stochastic_trace", lambda self: 0.0, raising=False)
    grown = type("Grown", (CurvlinLinearOperator,), {})
    op = grown.of(Covariance(Isotropic(torch.ones(()), 3)))
    with pytest.raises(InexactPathError, match="stochastic_trace"):
        op.stochastic_trace()


# -- values -----------------------------------------------------------------------------------------------------


def views(op: Any, M: Tensor) -> list[tuple[Any, Tensor]]:
    """The ways in which gpytorch reshapes, copies and moves an operator, each beside the matrix."""
    more = (2, *op.batch_shape)
    return [
        (op, M),
        (op.unsqueeze(0), M.unsqueeze(0)),
        (op.expand(*more, *M.shape[-2:]), M.expand(*more, *M.shape[-2:])),
        (op.repeat(2, *(1,) * op.dim()), M.repeat(2, *(1,) * M.ndim)),
        (op.mT, M.mT),
        (op.clone(), M),
        (op.detach(), M),
        (copy.deepcopy(op), M),
        (pickle.loads(pickle.dumps(op)), M),
        (op.to(dtype=F64), M),
    ]


@each_kind
@each_meaning
@each_batch
def test_products_solves_and_determinants_are_those_of_the_matrix(
    kind: str, as_: Any, batch: tuple[int, ...]
) -> None:
    P = KINDS[kind](12, batch)
    for op, M in views(P.to_linear_operator(as_), dense(P, as_)):
        X, v = randn(1, *M.shape[:-1], 2), randn(2, 12)
        few = X[(0,) * (M.ndim - 2)]
        close(op @ X, M @ X)
        close(op @ few, M @ few)
        close(op @ v, M @ v)
        close(few.mT @ op, few.mT @ M)
        close(torch.matmul(X.mT, op), X.mT @ M)
        close(torch.linalg.solve(op, X), torch.linalg.solve(M, X))
        close(linear_operator.solve(op, few), torch.linalg.solve(M, few.expand_as(X)))
        close(op.solve(v), torch.linalg.solve(M, v.expand(M.shape[:-1]).unsqueeze(-1)).squeeze(-1))
        close(op.solve(X, X.mT), X.mT @ torch.linalg.solve(M, X))
        close(torch.logdet(op), torch.logdet(M))
        close(torch.diagonal(op), M.diagonal(dim1=-2, dim2=-1))
        close(op.sum(-1), M.sum(-1))
        close(op.to_dense(), M)
        close(torch.inverse(op).to_dense(), torch.linalg.inv(M))


@each_kind
@each_meaning
@each_batch
def test_quadratic_forms_and_roots_are_those_of_the_matrix(
    kind: str, as_: Any, batch: tuple[int, ...]
) -> None:
    P = KINDS[kind](12, batch)
    for op, M in views(P.to_linear_operator(as_), dense(P, as_)):
        X = randn(1, *M.shape[:-1], 2)
        quads = (X * torch.linalg.solve(M, X)).sum(-2)
        quad, logdet = op.inv_quad_logdet(X, logdet=True)
        close(quad, quads.sum(-1))
        close(logdet, torch.logdet(M))
        close(op.inv_quad(X, reduce_inv_quad=False), quads)
        for root, whole in (
            (op.root_decomposition().root, M),
            (op.root_inv_decomposition().root, torch.linalg.inv(M)),
        ):
            F = root.to_dense()
            close(F @ F.mT, whole)
            close(root @ X, F @ X)
            close(root.mT @ X, F.mT @ X)
            close(root.inverse() @ (root @ X), X)
        noise = torch.Generator().manual_seed(3)
        draws = op.zero_mean_mvn_samples(4, generator=noise)
        z = torch.randn(draws.shape, dtype=F64, generator=torch.Generator().manual_seed(3))
        F = op.root_decomposition().root.to_dense()
        close(draws, (F @ z.unsqueeze(-1)).squeeze(-1))


@each_kind
@each_meaning
@each_batch
def test_parts_are_those_of_the_matrix(kind: str, as_: Any, batch: tuple[int, ...]) -> None:
    P = KINDS[kind](12, batch)
    i, j = torch.tensor([0, 2, -1]), torch.tensor([1, 2, 5])
    for op, M in views(P.to_linear_operator(as_), dense(P, as_))[:4]:
        for part in (slice(2, 7), slice(None, None, 2), slice(0, 1)):
            found = op[..., part, part]
            close(found.to_dense(), M[..., part, part])
            assert isinstance(found, CurvlinLinearOperator)
        close(op[..., 2:9, :3].to_dense(), M[..., 2:9, :3])
        close(op[..., i, :].to_dense(), M[..., i, :])
        close(op[..., 3, :], M[..., 3, :])
        close(op[..., 3, -2], M[..., 3, -2])
        close(op[..., i, j], M[..., i, j])
        close(op[..., i, i], M[..., i, i])
        if M.ndim > 2:
            close(op[-1].to_dense(), M[-1])
            close(op[:2].to_dense(), M[:2])
            close(op[torch.tensor([-1, 0])].to_dense(), M[torch.tensor([-1, 0])])
            close(op[-1, ..., 2:5, 2:5].to_dense(), M[-1, ..., 2:5, 2:5])


MASK = torch.arange(12) % 3 == 0


@pytest.mark.parametrize("as_", MEANINGS)
@pytest.mark.parametrize(
    "index",
    [
        (MASK, MASK),
        (MASK, slice(None)),
        (slice(None), MASK.numpy()),
        (MASK.tolist(), [1, -1, 3, 5]),
        (range(2, 7), slice(None)),
        (slice(None), np.array([3, -2])),
        (np.array([3, -2], dtype=np.int32), slice(1, None)),
        (np.int64(4), slice(None)),
        (-1, slice(None)),
        (slice(None), -12),
        (-1, -1),
        (torch.tensor(-3), [0, 5]),
        ([], slice(None)),
        (slice(0, 0), slice(None)),
        ([[0, 1], [-1, 2]], [[3], [-3]]),
    ],
    ids=str,
)
def test_every_form_of_an_index_means_what_it_does_in_numpy(as_: Any, index: Any) -> None:
    for batch in ((), (2, 3)):
        P = KINDS["blocks"](12, batch)
        found = P.to_linear_operator(as_)[(..., *index)]
        found = found if isinstance(found, Tensor) else found.to_dense()
        plain = (
            i
            if isinstance(i, slice)
            else np.asarray(i, dtype=None if len(np.shape(i)) == 0 or len(i) else int)
            for i in index
        )
        expected = torch.from_numpy(np.array(dense(P, as_).numpy()[(..., *plain)]))
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (([-13], slice(None)), r"index must lie in -12 \.\. 11, found -13"),
        ((slice(None), torch.tensor([0, 12])), "found 12"),
        ((12, 0), "found 12"),
        ((MASK[:5], slice(None)), r"mask must have shape \(12,\), found \(5,\)"),
        ((True, 0), r"mask must have shape \(12,\), found \(\)"),
        (None, "must not hold None; use unsqueeze"),
        ((0, 0, 0), "at most 2 entries"),
        (
            (torch.tensor([0, 1], dtype=torch.uint8), slice(None)),
            r"found torch.uint8; convert it with .long\(\)",
        ),
        (([0.0], slice(None)), "signed integers"),
        (("a", 0), "found a str"),
        (([0, 1], [0, 1, 2]), "must broadcast"),
        (([[0, 1]], slice(None)), r"one dimension, found shape \(1, 2\)"),
    ],
    ids=str,
)
def test_any_other_index_is_refused_in_one_line(index: Any, message: str) -> None:
    with pytest.raises(IndexError, match=message) as info:
        OP[index]
    assert "\n" not in str(info.value)


def test_entries_are_asked_for_by_integers_in_range() -> None:
    for bad in (MASK, torch.tensor([-13]), torch.tensor([12])):
        with pytest.raises(IndexError, match="index must"):
            OP._get_indices(bad, bad)


def test_alpha_scales_the_second_operand() -> None:
    A = OP.to_dense()
    tensor = spd(31, 12)
    for add in (torch.add, torch.Tensor.add):
        close(add(tensor, OP, alpha=3.0).to_dense(), tensor + 3 * A)
        close(add(tensor, OP).to_dense(), tensor + A)
        with pytest.raises(ValueError, match="scale of an operator must be positive"):
            add(tensor, OP, alpha=-1.0)
    close(torch.add(OP, tensor, alpha=3.0).to_dense(), A + 3 * tensor)
    for left, right in ((tensor, OP), (OP, tensor)):
        with pytest.raises(InexactPathError, match="downdate"):
            torch.sub(left, right, alpha=3.0)


@each_kind
@each_meaning
def test_a_right_hand_side_of_another_dtype_is_refused(kind: str, as_: Any) -> None:
    op = KINDS[kind](12, ()).to_linear_operator(as_)
    for dtype in (torch.complex128, torch.float32):
        x = randn(1, 12, 2).to(dtype)
        for call in (op.inv_quad, op.inv_quad_logdet):
            with pytest.raises(TypeError, match=r"float|complex"):
                call(x)


def test_zeros_and_factors_broadcast_over_the_batch() -> None:
    A = OP.to_dense()
    total = OP + ZeroLinearOperator(3, 12, 12, dtype=F64)
    assert total.shape == (3, 12, 12)
    close(total.to_dense(), A.expand(3, 12, 12))
    assert (OP * ZeroLinearOperator(3, 12, 12, dtype=F64)).shape == (3, 12, 12)
    for factor in (torch.tensor([[[2.0]]], dtype=F64), positive(32, 3, 1, 1)):
        assert (OP * factor).shape == (A * factor).shape
        close((OP * factor).to_dense(), A * factor)


@each_kind
@each_meaning
def test_multiples_are_those_of_the_matrix(kind: str, as_: Any) -> None:
    P = KINDS[kind](12, (3,))
    op, M, c = P.to_linear_operator(as_), dense(P, as_), positive(1, 3)
    for found, expected in (
        (2.5 * op, 2.5 * M),
        (op * 2.5, 2.5 * M),
        (op / 2.5, M / 2.5),
        (torch.tensor(2.5, dtype=F64) * op, 2.5 * M),
        (op * c[:, None, None], c[:, None, None] * M),
    ):
        close(found.to_dense(), expected)
        close(found.logdet(), torch.logdet(expected))
    for wrong in (0.0, -1.0):
        with pytest.raises(ValueError, match="must be positive"):
            wrong * op


_SELF = {"itself", "a multiple of itself", "its root's square"}
_DIAGONAL = {"numbers", "diagonal"}
_NUMBER = {"jitter", "one number", "constant"}
_ANY = {"tensor", "tensor first", "dense", "low rank", "root"}
NOT_CLOSED: dict[Any, set[str]] = {
    "kronecker": _DIAGONAL,
    "shifted": _DIAGONAL,
    "spectral": _DIAGONAL,
    "woodbury": _DIAGONAL,
    ("shifted", "precision"): _DIAGONAL | _SELF,  # two general terms and a shift
    ("woodbury", "precision"): _DIAGONAL | _SELF,
    ("two terms", "precision"): _DIAGONAL | _SELF | _NUMBER,
    ("two terms", "covariance"): _DIAGONAL | _SELF | _NUMBER | _ANY,  # the inverse is no operator of its own
}


@each_kind
@each_meaning
def test_sums_are_those_of_the_matrix_or_refused(kind: str, as_: Any) -> None:
    P = KINDS[kind](12, (3,))
    op, M = P.to_linear_operator(as_), dense(P, as_)
    d, U, S = positive(1, 12), randn(2, 12, 2), spd(3, 12)
    eye = torch.eye(12, dtype=F64)
    sums: dict[str, tuple[Callable[[], Any], Tensor]] = {
        "0": (lambda: op + 0, M),
        "zero": (lambda: op + ZeroLinearOperator(12, 12), M),
        "jitter": (lambda: op.add_jitter(0.3), M + 0.3 * eye),
        "one number": (lambda: op.add_diagonal(torch.tensor([0.3], dtype=F64)), M + 0.3 * eye),
        "constant": (lambda: op + ConstantDiagLinearOperator(d[:1], 12), M + d[0] * eye),
        "numbers": (lambda: op.add_diagonal(d), M + torch.diag(d)),
        "diagonal": (lambda: op + DiagLinearOperator(d), M + torch.diag(d)),
        "tensor": (lambda: op + S, M + S),
        "tensor first": (lambda: S + op, M + S),
        "dense": (lambda: op + DenseLinearOperator(S), M + S),
        "low rank": (lambda: op.add_low_rank(U), M + U @ U.mT),
        "root": (lambda: op + RootLinearOperator(U), M + U @ U.mT),
        "itself": (lambda: torch.add(op, op), 2 * M),
        "a multiple of itself": (lambda: op.add(op, alpha=4.0), 5 * M),
        "its root's square": (lambda: op + op.root_decomposition(), 2 * M),
    }
    not_closed = set()
    for name, (make, expected) in sums.items():
        try:
            found = make()
        except NotClosedError:
            not_closed.add(name)
            continue
        close(found.to_dense(), expected)
        close(found.logdet(), torch.logdet(expected))
    assert not_closed == NOT_CLOSED.get((kind, as_), NOT_CLOSED.get(kind, set()))


@each_kind
@each_meaning
def test_beyond_800_rows_everything_is_as_exact(kind: str, as_: Any) -> None:
    P = KINDS[kind](900, ())
    op, M = P.to_linear_operator(as_), dense(P, as_)
    X = randn(1, 900, 3)
    quad, logdet = op.inv_quad_logdet(X, logdet=True)
    close(quad, (X * torch.linalg.solve(M, X)).sum())
    close(logdet, torch.logdet(M))
    close(op.solve(X), torch.linalg.solve(M, X))
    root = op.root_decomposition().root
    close(root @ (root.mT @ X), M @ X)
    close(op[..., 100:150, 100:150].to_dense(), M[100:150, 100:150])
    close(op.diagonal(), M.diagonal())


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "dense"])
@each_meaning
def test_no_path_forms_the_matrix(kind: str, as_: Any) -> None:
    P = KINDS[kind](900, ())
    op, X = P.to_linear_operator(as_), randn(1, 900, 3)
    limit = 900 * 900 // 2
    with forbid_dense(limit):
        for each in (op, op.expand(5, 900, 900), op.unsqueeze(0)):
            each @ X, each.solve(X), each.inv_quad_logdet(X, logdet=True), each.diagonal()
            each.root_decomposition().root @ X, each.root_inv_decomposition().root.mT @ X
            each.zero_mean_mvn_samples(3), 2.0 * each, each.inverse(), each[..., 5:9, 5:9].logdet()
            each[..., 5, :], each.sum(-1)


def test_a_repeated_operator_is_factorised_once(monkeypatch: pytest.MonkeyPatch) -> None:
    P = Dense(spd(1, 12))
    seen: list[torch.Size] = []
    honest = Dense._factorize
    monkeypatch.setattr(Dense, "_factorize", lambda self: seen.append(self.batch_shape) or honest(self))
    P.to_linear_operator("precision").expand(1000, 12, 12).solve(randn(2, 1000, 12, 1))
    P.to_linear_operator("precision").repeat(7, 1, 1).logdet()
    assert seen == [torch.Size(), torch.Size()]


@pytest.mark.parametrize("kind", ["isotropic", "diagonal", "kronecker", "shifted", "spectral"])
@each_meaning
def test_sqrt_inv_matmul_is_the_symmetric_root(kind: str, as_: Any) -> None:
    P = KINDS[kind](12, (3,))
    op, M = P.to_linear_operator(as_), dense(P, as_)
    values, V = torch.linalg.eigh(M)
    root, X, L = V @ torch.diag_embed(values.rsqrt()) @ V.mT, randn(1, 3, 12, 2), randn(2, 3, 4, 12)
    close(op.sqrt_inv_matmul(X), root @ X)
    product, quad = op.sqrt_inv_matmul(X, L)
    close(product, L @ root @ X)
    close(quad, (L @ torch.linalg.solve(M, L.mT)).diagonal(dim1=-2, dim2=-1))


@pytest.mark.parametrize("kind", ["dense", "two terms", "low rank", "woodbury", "blocks"])
def test_sqrt_inv_matmul_is_refused_where_the_root_is_another(kind: str) -> None:
    with pytest.raises(InexactPathError, match=r"symmetric root.*root_inv_decomposition"):
        KINDS[kind](12, ()).to_linear_operator("precision").sqrt_inv_matmul(randn(1, 12, 2))


# -- derivatives ------------------------------------------------------------------------------------------------


@each_meaning
def test_two_orders_of_derivatives_are_exact(as_: Any) -> None:
    """Upstream's second derivatives through inv_quad are silently wrong."""
    A, B, U, x = spd(1, 3), spd(2, 4), randn(3, 12, 2), randn(4, 12, 1)

    def value(op: Any) -> Tensor:
        quad, logdet = op.inv_quad_logdet(x, logdet=True)
        return quad + logdet + (op @ x).square().sum() + torch.linalg.solve(op, x).square().sum()

    def ours(t: Tensor) -> Tensor:
        A_t, U_t = A * t[0].exp() + t[1] * torch.eye(3, dtype=F64), U * t[2]
        P = KroneckerSum.shifted(A_t, B, 0.5 + t[3]).update(U_t)
        return value(P.to_linear_operator(as_).unsqueeze(0).squeeze(0))

    def theirs(t: Tensor) -> Tensor:
        A_t, U_t = A * t[0].exp() + t[1] * torch.eye(3, dtype=F64), U * t[2]
        M = torch.kron(A_t, B) + (0.5 + t[3]) * torch.eye(12, dtype=F64) + U_t @ U_t.mT
        M = M if as_ == "precision" else torch.linalg.inv(M)
        solved = torch.linalg.solve(M, x)
        return (x * solved).sum() + torch.logdet(M) + (M @ x).square().sum() + solved.square().sum()

    t = torch.tensor([0.1, 0.2, 0.9, 0.3], dtype=F64)
    close(ours(t), theirs(t))
    functional = torch.autograd.functional
    close(functional.jacobian(ours, t), functional.jacobian(theirs, t))
    close(functional.hessian(ours, t), functional.hessian(theirs, t), 1e-8)


def test_requires_grad_reaches_the_tensors_of_the_operator() -> None:
    d = positive(1, 6)
    op = Diagonal(d).to_linear_operator("precision")
    assert not op.requires_grad
    op.requires_grad_(True)
    assert d.requires_grad and op.requires_grad
    op.logdet().backward()
    close(d.grad, 1 / d.detach())


# -- what is asked in other ways --------------------------------------------------------------------------------

OP = KroneckerSum.shifted(spd(1, 3), spd(2, 4), 0.5).to_linear_operator("covariance")
OTHER = DenseLinearOperator(spd(3, 12))


@pytest.mark.parametrize(
    ("call", "message"),
    {
        "linalg.cholesky": (lambda: torch.linalg.cholesky(OP), "root_decomposition"),
        "linalg.eigh": (lambda: torch.linalg.eigh(OP), "to_dense"),
        "linalg.eigvalsh": (lambda: torch.linalg.eigvalsh(OP), "to_dense"),
        "linalg.svd": (lambda: torch.linalg.svd(OP), "to_dense"),
        "linalg.solve_triangular": (
            lambda: torch.linalg.solve_triangular(OP, randn(1, 12, 1), upper=False),
            "refused",
        ),
        "exp": (lambda: torch.exp(OP), "refused"),
        "sqrt": (lambda: torch.sqrt(OP), "refused"),
        "abs": (lambda: torch.abs(OP), "refused"),
        "log": (lambda: torch.log(OP), "refused"),
        "isclose": (lambda: torch.isclose(OP, OP), "allclose"),
        "trace": (lambda: torch.trace(OP), "refused"),
        "slogdet": (lambda: torch.linalg.slogdet(OP), "refused"),
        "kron": (lambda: torch.kron(OP, torch.eye(2)), "refused"),
        "einsum": (lambda: torch.einsum("ij->i", OP), "refused"),
        "norm": (lambda: torch.linalg.norm(OP), "refused"),
        "prod": (lambda: torch.prod(OP.unsqueeze(0), 0), "refused"),
        "sum of a batch": (lambda: OP.expand(2, 12, 12).sum(0), r"add the operators"),
        "minus": (lambda: OP - OP, "downdate"),
        "minus a tensor": (lambda: OP - torch.eye(12, dtype=F64), "downdate"),
        "a tensor minus": (lambda: torch.eye(12, dtype=F64) - OP, "downdate"),
        "plus a number": (lambda: OP + 1.0, "refused"),
        "entry by entry": (lambda: OP * torch.ones(12, 12), "entry by entry"),
        "entry by entry with an operator": (lambda: OP * OTHER, "entry by entry"),
        "product with an operator": (lambda: OP @ OTHER, "matmul with a Dense"),
        "another diagonal": (lambda: OP.diagonal(offset=1), "diagonal"),
        "a diagonal over the batch": (lambda: torch.diagonal(OP.unsqueeze(0), 0, 0, 1), "diagonal"),
        "tridiagonalisation": (lambda: OP._solve(randn(1, 12, 1), num_tridiag=5), "num_tridiag"),
        "a principal part of a rectangle": (lambda: OP[[0, 2]][:, [0, 2]].logdet(), "refused"),
    }.values(),
)
def test_torch_functions_are_exact_or_refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(InexactPathError, match=message):
        call()


def test_numpy_makes_no_object_array() -> None:
    """F13: upstream gives a 0-dimensional object array, silently."""
    with pytest.raises(TypeError, match="not turned into an array silently"):
        np.asarray(OP)
    with pytest.raises(InexactPathError, match=r"entry by entry.*ndarray"):
        np.ones(12) * OP
    close(torch.from_numpy(OP.numpy()), OP.to_dense())


def test_expressions_that_upstream_builds_around_ours_are_refused_at_every_operation() -> None:
    """F1: a sum whose left operand is theirs is their class; it is refused before it could iterate, at @ too.

    With the settings that linear_operator comes with; BoTorch, once imported, has larger matrices factorised.
    """
    d = positive(1, 900)
    ours = KINDS["shifted"](900, ()).to_linear_operator("precision")
    X = randn(2, 900, 2)
    for theirs in (DiagLinearOperator(d) + ours, DenseLinearOperator(torch.diag(d)) + ours):
        if isinstance(theirs, CurvlinLinearOperator):
            continue
        for call in (
            lambda t=theirs: t @ X,
            lambda t=theirs: t.solve(X),
            lambda t=theirs: t.logdet(),
            lambda t=theirs: t.inv_quad_logdet(X, logdet=True),
            lambda t=theirs: t.zero_mean_mvn_samples(2),
            lambda t=theirs: t.root_decomposition().root.to_dense(),
            lambda t=theirs: t.diagonalization(),
            lambda t=theirs: t.sqrt_inv_matmul(X),
            lambda t=theirs: t.pivoted_cholesky(3),
        ):
            with (
                linear_operator.settings.max_cholesky_size(800),
                linear_operator.settings.fast_computations(True, True, True),
                pytest.raises(InexactPathError, match="on the left of"),
            ):
                call()


def test_to_dense_is_bounded_because_upstream_calls_it_unasked() -> None:
    op = Isotropic(torch.ones((), dtype=F64), 3000).to_linear_operator("precision")
    with pytest.raises(InexactPathError, match=r"3000 rows exceeds max_size=2048; use to_dense\(max_size\)"):
        op.to_dense()
    assert op.to_dense(max_size=3000).shape == (3000, 3000)
    with pytest.raises(InexactPathError, match="2500 rows or columns"):
        op[:2500, 1:2501]


def test_the_meaning_has_to_be_said() -> None:
    P = Isotropic(torch.ones(()), 3)
    with pytest.raises(TypeError, match="as_"):
        P.to_linear_operator()  # type: ignore[call-arg]
    with pytest.raises(ValueError, match='as_ must be "precision" or "covariance", found \'prec\''):
        P.to_linear_operator("prec")  # type: ignore[arg-type]
    C = Covariance(P)
    close(C.to_linear_operator("covariance").to_dense(), C.to_dense())
    close(C.to_linear_operator("precision").to_dense(), P.to_dense())


def test_importing_curvlin_imports_neither_gpytorch_nor_linear_operator() -> None:
    import subprocess
    import sys

    code = "import sys, curvlin; print([m for m in ('gpytorch', 'linear_operator') if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


# -- what upstream gets wrong -----------------------------------------------------------------------------------


def test_f4_submatrices_of_blocks_are_right() -> None:
    blocks = spd(1, 3, (4,))
    P = BlockDiag([Dense(b) for b in blocks])
    close(P.to_linear_operator("precision")[:8, :8].to_dense(), torch.block_diag(*blocks)[:8, :8])


def test_f5_no_answer_depends_on_scale() -> None:
    A, B = spd(1, 30), spd(2, 30)
    reference = KroneckerSum([(A, B)]).to_linear_operator("precision").logdet()
    scaled = KroneckerSum([(A * 2.0**-30, B * 2.0**-10)]).to_linear_operator("precision")
    close(scaled.logdet() + 900 * 40 * np.log(2.0), reference)
    x = randn(3, 900, 1)
    close(
        Dense(spd(4, 900) * 1e-11).to_linear_operator("precision").solve(x) * 1e-11,
        torch.linalg.solve(spd(4, 900), x),
    )


def test_f7_a_multiple_of_a_shifted_product_is_exact_beyond_800_rows() -> None:
    P = KINDS["shifted"](900, ())
    op, M, x = 2.0 * P.to_linear_operator("precision"), 2.0 * P.to_dense(), randn(1, 900, 2)
    close(op.solve(x), torch.linalg.solve(M, x))
    close(op.logdet(), torch.logdet(M))
    R = op.root_inv_decomposition().root
    close(R @ (R.mT @ x), torch.linalg.solve(M, x))


def test_f8_nothing_is_cached() -> None:
    U = randn(1, 12, 2).requires_grad_()
    op = LowRankPlusDiag(torch.ones(12, dtype=F64), U).to_linear_operator("precision")
    with torch.no_grad():
        before = op.logdet()
    for _ in range(2):
        U.grad = None
        op.logdet().backward()
        close(U.grad, 2 * torch.linalg.solve(torch.eye(12, dtype=F64) + U @ U.mT, U).detach())
    with torch.no_grad():
        U.mul_(2)
    close(op.logdet().detach(), torch.logdet(torch.eye(12, dtype=F64) + U @ U.mT).detach())
    assert float(op.logdet().detach() - before) > 0.1


def test_f9_what_was_not_asked_for_is_a_zero() -> None:
    for P in (Diagonal(positive(1, 6)), Dense(spd(2, 6))):
        op = P.to_linear_operator("precision")
        x = randn(3, 6, 1)
        quad, nothing = op.inv_quad_logdet(x)
        assert nothing.shape == () and float(nothing) == 0.0
        close(quad, op.inv_quad(x))
        nothing, logdet = op.inv_quad_logdet(logdet=True)
        assert nothing.shape == () and float(nothing) == 0.0
        close(logdet, op.logdet())
    zero = Diagonal(positive(1, 6)).to_linear_operator("precision") + ZeroLinearOperator(6, 6)
    close(zero.solve(torch.ones(6, 1, dtype=F64)).squeeze(-1), 1 / positive(1, 6))


def test_f11_blocks_of_any_size_take_vectors() -> None:
    P = BlockDiag([Dense(spd(1, 20)) if i % 2 else KroneckerSum([(spd(i, 3), spd(2, 4))]) for i in range(60)])
    op, x = P.to_linear_operator("precision"), randn(3, P.size)
    assert P.size > 800
    M = P.to_dense()
    quad, logdet = op.inv_quad_logdet(x, logdet=True)
    close(quad, x @ torch.linalg.solve(M, x))
    close(logdet, torch.logdet(M))
    close(op.solve(x), torch.linalg.solve(M, x))


def test_singular_and_indefinite_matrices_say_so() -> None:
    op = KroneckerSum([(torch.diag(torch.tensor([1.0, 0.0])), torch.eye(2))]).to_linear_operator("precision")
    for call in (op.logdet, lambda: op.solve(torch.ones(4)), lambda: op.zero_mean_mvn_samples(2)):
        with pytest.raises(NotPositiveDefiniteError):
            call()
