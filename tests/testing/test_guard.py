"""`forbid_dense` sees every tensor, whatever made it."""

import pytest
import torch

from curvlin.precision.dense import Dense
from curvlin.precision.diagonal import Diagonal
from curvlin.testing import DenseTensorError, forbid_dense


def test_a_dense_matrix_is_caught_and_a_vector_is_not() -> None:
    P = Diagonal(torch.rand(100) + 1)
    x = torch.randn(100)
    with forbid_dense(None, P, x) as guard:
        P.solve(x)
    assert guard.limit == 4 * (200 + 100)
    assert 100 <= guard.largest <= guard.limit
    with (
        pytest.raises(DenseTensorError, match=r"10000 elements\), and the limit is 1200"),
        forbid_dense(None, P, x),
    ):
        P.to_dense()


def test_expanded_views_cost_nothing() -> None:
    with forbid_dense(10):
        assert torch.ones(()).expand(100, 100).shape == (100, 100)
    with pytest.raises(DenseTensorError), forbid_dense(10):
        torch.ones(()).expand(100, 100).clone()


def test_the_backward_pass_is_watched() -> None:
    x = torch.randn(50, requires_grad=True)
    value = (torch.outer(x, x) ** 2).sum()
    with pytest.raises(DenseTensorError), forbid_dense(500):
        value.backward()


def test_inside_composite_operations_and_outputs_in_place() -> None:
    x, y = torch.randn(50, 2), torch.randn(50, 2)
    with pytest.raises(DenseTensorError), forbid_dense(500):
        torch.einsum("ik,jk,jl->il", x, y, y)  # contracted in the wrong order: 50 x 50
    out = torch.empty(50, 50)
    with pytest.raises(DenseTensorError), forbid_dense(500):
        torch.matmul(x, y.mT, out=out)


def test_under_vmap() -> None:
    x = torch.randn(5, 50)
    with pytest.raises(DenseTensorError), forbid_dense(500):
        torch.vmap(lambda v: torch.outer(v, v).sum())(x)


def test_operators_and_right_hand_sides_say_what_is_affordable() -> None:
    P, x = Diagonal(torch.rand(10) + 1), torch.randn(10)
    assert forbid_dense(P, x).limit == forbid_dense(None, P, x).limit == 4 * 30
    assert forbid_dense(P, x, limit=7).limit == forbid_dense(7).limit == forbid_dense(7, P).limit == 7
    with pytest.raises(TypeError, match=r"takes operators and tensors, found \['Diagonal', 'list'\]"):
        forbid_dense(P, [1.0])  # type: ignore[arg-type]


def test_a_limit_or_inputs_are_needed() -> None:
    with pytest.raises(TypeError, match="needs a limit"):
        forbid_dense()


def test_the_limit_of_a_dense_operator_allows_its_own_matrix() -> None:
    P = Dense(torch.eye(20))
    with forbid_dense(None, P):
        P.logdet()
