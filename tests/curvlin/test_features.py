"""Feature operators against their rows written out, and the laws of a linear map and its adjoint."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from feature_cases import (
    BLOCKS,
    KINDS,
    Features,
    close,
    features,
    generator,
    randn,
    some_features,
    tiny_chunks,
)
from hypothesis import given
from hypothesis import strategies as st
from torch.utils import _pytree as pytree

from curvlin import BlockFeatures, DenseFeatures, KhatriRaoFeatures, NotClosedError
from curvlin.testing import forbid_dense

seeds = st.integers(0, 2**20)


@given(case=some_features())
def test_rows_are_those_of_the_definition(case: Features) -> None:
    close(case.operator.to_dense(), case.rows)
    assert case.operator.shape == case.rows.shape


@given(case=some_features(), seed=seeds, K=st.integers(1, 40))
def test_product_with_columns_is_a_jvp(case: Features, seed: int, K: int) -> None:
    V = randn(generator(seed), case.operator.size, K)
    close(case.operator @ V, torch.einsum("...nrd,dk->...nrk", case.rows, V))
    close(case.operator @ V[:, 0], torch.einsum("...nrd,d->...nr", case.rows, V[:, 0]))


@given(case=some_features(), seed=seeds, K=st.integers(1, 40))
def test_transpose_is_a_vjp_summed_over_samples(case: Features, seed: int, K: int) -> None:
    u = randn(generator(seed), *case.rows.shape[-3:-1], K)
    close(case.operator.T @ u, torch.einsum("...nrd,nrk->...dk", case.rows, u))
    close(case.operator.T @ u[..., 0], torch.einsum("...nrd,nr->...d", case.rows, u[..., 0]))


@given(case=some_features(batch=False), seed=seeds)
def test_transpose_is_the_adjoint(case: Features, seed: int) -> None:
    g = generator(seed)
    v, u = randn(g, case.operator.size), randn(g, *case.rows.shape[:2])
    forward, backward = ((case.operator @ v) * u).sum(), (v * (case.operator.T @ u)).sum()
    assert abs(float(forward - backward)) <= 1e-12 * float(case.rows.norm() * v.norm() * u.norm())


@given(case=some_features(), seed=seeds)
def test_batched_operands_multiply_element_by_element(case: Features, seed: int) -> None:
    g = generator(seed)
    V, u = randn(g, 2, case.operator.size, 3), randn(g, 2, *case.rows.shape[-3:-1], 3)
    rows = case.rows.expand(2, *case.rows.shape[-3:])
    close(case.operator @ V, torch.stack([torch.einsum("nrd,dk->nrk", rows[b], V[b]) for b in range(2)]))
    close(case.operator.T @ u, torch.stack([torch.einsum("nrd,nrk->dk", rows[b], u[b]) for b in range(2)]))


@given(case=some_features())
def test_gram_is_the_product_with_the_transpose(case: Features) -> None:
    close(case.operator.gram(), torch.einsum("...nrd,...mqd->...nrmq", case.rows, case.rows))


@given(case=some_features(), seed=seeds)
def test_gram_is_symmetric_to_the_bit(case: Features, seed: int) -> None:
    K = case.operator.gram().flatten(-2).flatten(-3, -2)
    assert torch.equal(K, K.mT)


@pytest.mark.parametrize("left", KINDS)
@pytest.mark.parametrize("right", KINDS)
def test_gram_with_other_features(left: str, right: str) -> None:
    Phi, Psi = features(left, 1, N=3, R=2, S=3), features(right, 2, N=2, R=3, S=1)
    if "block" in (left, right) and left != right:
        other = Features(DenseFeatures(randn(generator(3), 2, 3, 15)), torch.empty(0))
        other = Features(other.operator, other.operator.to_dense())
        Phi, Psi = (Phi, other) if left == "block" else (other, Psi)
    close(Phi.operator.gram(Psi.operator), torch.einsum("nrd,mqd->nrmq", Phi.rows, Psi.rows))


def test_gram_of_kinds_without_a_common_product_is_refused() -> None:
    one_block = BlockFeatures([features("khatri_rao", 0).operator])
    with pytest.raises(NotClosedError, match="DenseFeatures"):
        one_block.gram(features("khatri_rao", 1).operator)


@given(case=some_features(), seed=seeds, per_sample=st.booleans())
def test_mixing_rows(case: Features, seed: int, per_sample: bool) -> None:
    N, R = case.rows.shape[-3:-1]
    S = randn(generator(seed), *((N, 2, R) if per_sample else (2, R)))
    close((S @ case.operator).to_dense(), S @ case.rows)


# Nearer to zero the product leaves the normal range of float64, where nothing holds relatively.
@given(case=some_features(), c=st.floats(-8, 8).filter(lambda c: c == 0 or abs(c) > 1e-100))
def test_scaling(case: Features, c: float) -> None:
    close((c * case.operator).to_dense(), c * case.rows)
    close((case.operator * torch.tensor(c, dtype=torch.float64)).to_dense(), c * case.rows)


@given(case=some_features(), seed=seeds)
def test_columns_come_in_the_order_asked_for(case: Features, seed: int) -> None:
    index = torch.randperm(case.operator.size, generator=generator(seed))[:5]
    close(case.operator.columns(index), case.rows[..., index])


@given(case=some_features(), data=st.data())
def test_selecting_samples(case: Features, data: st.DataObject) -> None:
    N = case.operator.n_samples
    start = data.draw(st.integers(0, N - 1))
    stop = data.draw(st.integers(start + 1, N))
    step = data.draw(st.integers(1, 2))
    close(case.operator[start:stop:step].to_dense(), case.rows[..., start:stop:step, :, :])
    order = torch.tensor(data.draw(st.permutations(range(N))))
    close(case.operator[order].to_dense(), case.rows[..., order, :, :])


@given(case=some_features())
def test_flattening_keeps_the_rows_sample_major(case: Features) -> None:
    close(case.operator.flatten().to_dense(), case.rows.flatten(-3, -2).unsqueeze(-2))


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_is_a_stack_of_singles(kind: str) -> None:
    batched = features(kind, 5, batch=(2,)).operator
    v = randn(generator(6), batched.size)
    for b in range(2):
        single = features(kind, 5 + 1000 * b).operator
        close((batched @ v)[b], single @ v)
        close(batched.gram()[b], single.gram())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("S", [1, 3])
def test_chunks_do_not_change_products(kind: str, S: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = features(kind, 8, N=5, R=3, S=S)
    V, u = randn(generator(9), case.operator.size, 30), randn(generator(10), 5, 3, 30)
    tiny_chunks(monkeypatch)
    close(case.operator @ V, torch.einsum("nrd,dk->nrk", case.rows, V))
    close(case.operator.T @ u, torch.einsum("nrd,nrk->dk", case.rows, u))
    close(case.operator.gram(), torch.einsum("nrd,mqd->nrmq", case.rows, case.rows))


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("S", [1, 3])
def test_products_have_two_derivatives(S: int, chunked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if chunked:
        tiny_chunks(monkeypatch)
    g = generator(11)
    left, right, V = randn(g, 2, 2, S, 2), randn(g, 2, S, 3), randn(g, 6, 2)
    inputs = tuple(t.requires_grad_() for t in (left, right, V))

    def products(left: torch.Tensor, right: torch.Tensor, V: torch.Tensor) -> tuple[torch.Tensor, ...]:
        Phi = KhatriRaoFeatures(left, right)
        return Phi @ V, Phi.T @ (Phi @ V), Phi.gram()

    assert torch.autograd.gradcheck(products, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(products, inputs, fast_mode=True)


@pytest.mark.parametrize("kind", KINDS)
def test_vmap_over_features_is_a_loop(kind: str) -> None:
    stacked = [features(kind, 20 + b).operator for b in range(3)]
    leaves = [torch.stack(ts) for ts in zip(*(pytree.tree_leaves(o) for o in stacked), strict=True)]
    structure = pytree.tree_structure(stacked[0])
    v = randn(generator(21), stacked[0].size)

    def product(*tensors: torch.Tensor) -> torch.Tensor:
        return pytree.tree_unflatten(list(tensors), structure) @ v

    close(torch.vmap(product)(*leaves), torch.stack([o @ v for o in stacked]))


@pytest.mark.parametrize("kind", KINDS)
def test_features_are_immutable_and_copy(kind: str) -> None:
    Phi = features(kind, 1).operator
    with pytest.raises(AttributeError):
        Phi.anything = 1  # type: ignore[attr-defined]
    close(copy.deepcopy(Phi).to_dense(), Phi.to_dense())
    assert Phi.to(torch.float32).dtype == torch.float32


def test_products_of_a_large_layer_form_no_rows() -> None:
    N, R, out, inputs = 4, 6, 512, 640  # N R D is 7.9 million
    g = generator(3)
    Phi = KhatriRaoFeatures(randn(g, N, R, 1, out).float(), randn(g, N, 1, inputs).float())
    v, u = torch.randn(out * inputs), torch.randn(N, R)
    with forbid_dense(2 * out * inputs):
        forward, backward, gram = Phi @ v, Phi.T @ u, Phi.gram()
    assert abs(float((forward * u).sum() - (v * backward).sum())) < 1e-2 * float(forward.norm() * u.norm())
    # <Phi Phi^T u, u> = |Phi^T u|^2
    quad = torch.einsum("nrmq,nr,mq->", gram, u, u)
    assert float((quad - backward.square().sum()).abs()) < 1e-4 * float(quad)


def test_a_numpy_array_is_not_multiplied_elementwise() -> None:
    with pytest.raises(TypeError):
        np.ones(2) * features("dense", 0).operator


LEFT, RIGHT = torch.ones(2, 2, 1, 3), torch.ones(2, 1, 4)
PHI = KhatriRaoFeatures(LEFT, RIGHT)
BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "dense from a list": (lambda: DenseFeatures([[1.0]]), TypeError, "matrix must be a torch.Tensor"),  # type: ignore[arg-type]
    "dense of integers": (
        lambda: DenseFeatures(torch.ones(1, 1, 1, dtype=torch.long)),
        TypeError,
        "floating",
    ),
    "dense matrix": (lambda: DenseFeatures(torch.ones(2, 2)), ValueError, "at least 3 dimensions"),
    "dense without rows": (lambda: DenseFeatures(torch.ones(2, 0, 2)), ValueError, "at least one sample"),
    "dense with NaN": (lambda: DenseFeatures(torch.full((1, 1, 1), torch.nan)), ValueError, "finite"),
    "positions differ": (
        lambda: KhatriRaoFeatures(LEFT, torch.ones(2, 2, 4)),
        ValueError,
        "right must have shape",
    ),
    "samples differ": (
        lambda: KhatriRaoFeatures(LEFT, torch.ones(3, 1, 4)),
        ValueError,
        "right must have shape",
    ),
    "dtypes differ": (lambda: KhatriRaoFeatures(LEFT, RIGHT.double()), TypeError, "right must have dtype"),
    "no inputs": (lambda: KhatriRaoFeatures(LEFT, torch.ones(2, 1, 0)), ValueError, "at least one entry"),
    "no parts": (lambda: BlockFeatures([]), ValueError, "at least one feature operator"),
    "part is a tensor": (lambda: BlockFeatures([torch.ones(1)]), TypeError, r"parts\[0\]"),  # type: ignore[list-item]
    "parts of different N": (lambda: BlockFeatures([PHI, PHI[:1]]), ValueError, "2 samples of 2 rows"),
    "indices too few": (lambda: BlockFeatures([PHI], [range(5)]), ValueError, "indices must hold"),
    "indices overlap": (
        lambda: BlockFeatures([PHI, PHI], [range(12), range(11, 23)]),
        ValueError,
        "exactly once",
    ),
    "product of wrong size": (lambda: PHI @ torch.ones(5), ValueError, "v must have 12 rows"),
    "product of wrong dtype": (lambda: PHI @ torch.ones(12).double(), TypeError, "v must have dtype"),
    "transpose of wrong size": (lambda: PHI.T @ torch.ones(2, 3), ValueError, "u must have shape"),
    "mixing of wrong size": (lambda: torch.ones(2, 3) @ PHI, ValueError, "S must have shape"),
    "gram with a tensor": (lambda: PHI.gram(torch.ones(1)), TypeError, "Psi must be a FeatureOperator"),  # type: ignore[arg-type]
    "gram of another size": (lambda: PHI.gram(DenseFeatures(torch.ones(1, 1, 3))), ValueError, "12 features"),
    "gram of another layer": (
        lambda: PHI.gram(KhatriRaoFeatures(torch.ones(2, 2, 1, 4), torch.ones(2, 1, 3))),
        ValueError,
        "out and in sizes",
    ),
    "no samples chosen": (lambda: PHI[2:], ValueError, "none of the 2 samples"),
    "one sample by number": (lambda: PHI[0], TypeError, r"Phi\[n : n \+ 1\]"),  # type: ignore[index]
    "column out of range": (lambda: PHI.columns([12]), ValueError, "index must lie"),
    "NaN scale": (lambda: float("nan") * PHI, ValueError, "finite"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named_in_one_line(name: str) -> None:
    call, error, message = BAD[name]
    with pytest.raises(error, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_default_blocks_are_consecutive() -> None:
    case = features("block", 4)
    assert isinstance(case.operator, BlockFeatures)
    consecutive = BlockFeatures(case.operator.parts)
    close(consecutive.to_dense(), case.rows[..., torch.cat(BLOCKS)])
