"""KFAC, EKFAC and exact blocks on captures made by hand: columns in pieces, merging, transposition, ignored terms."""

import functools
from dataclasses import replace

import pytest
import torch
from networks import problem

from curvlin_nn import ParameterSpace, curvature, structures
from curvlin_nn.capture import Block, Captures
from curvlin_nn.capture.blocks import merged
from curvlin_nn.errors import UnsupportedError

SPACE = ParameterSpace(("w",), (torch.Size((2, 3)),))
REDUCE = functools.partial(structures.Kronecker, approximation="reduce")
FACTORIES = {
    "kron": structures.Kronecker,
    "reduce": REDUCE,
    "ekfac": structures.EKFAC,
    "block": structures.Block,
}


def captures(n: int, seed: int, *, transposed: bool = False) -> Captures:
    """Rows of a (2, 3) matrix that two columns and four positions use; (3, 2) uses of it where transposed."""
    generator = torch.Generator().manual_seed(seed)
    out, inputs = (3, 2) if transposed else (2, 3)
    left = torch.randn(n, 2, 4, out, dtype=torch.float64, generator=generator)
    right = torch.randn(n, 4, inputs, dtype=torch.float64, generator=generator)
    return Captures(n, (Block("w", 0, left, right, transposed=transposed),))


def columns(c: Captures, some: slice, *, first: bool) -> Captures:
    return replace(c, parts=tuple(replace(b, left=b.left[:, some]) for b in c.blocks), first=first)


def state(factory, *batches: Captures):
    made = factory(SPACE)
    for index in range(made.passes):
        made.begin(index)
        for batch in batches:
            made.update(batch)
    return made


@pytest.mark.parametrize("name", [*FACTORIES, "kfoc", "kron-lowrank"])
def test_columns_in_pieces_are_the_columns(name):
    c, factory = captures(5, 0), FACTORIES.get(name) or structures.resolve(name)
    pieces = [columns(c, slice(0, 1), first=True), columns(c, slice(1, 2), first=False)]
    whole = state(factory, c).finish().to_dense()
    parts = state(factory, *pieces).finish().to_dense()
    torch.testing.assert_close(parts, whole, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["kron", "reduce", "block"])
def test_states_of_disjoint_data_merge_to_the_state_of_all(name):
    a, b = captures(5, 0), captures(3, 1)
    mine, theirs = state(FACTORIES[name], a), state(FACTORIES[name], b)
    mine.merge(theirs)
    whole = state(FACTORIES[name], a, b).finish().to_dense()
    torch.testing.assert_close(mine.finish().to_dense(), whole, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("factory", [structures.EKFAC, structures.KFOC])
def test_structures_of_several_passes_merge_before_their_second(factory):
    a, b = captures(5, 0), captures(3, 1)
    mine, theirs = factory(SPACE), factory(SPACE)
    mine.update(a)
    theirs.update(b)
    mine.merge(theirs)
    for index in range(1, mine.passes):
        mine.begin(index)
        mine.update(a)
        mine.update(b)
    whole = state(factory, a, b).finish().to_dense()
    torch.testing.assert_close(mine.finish().to_dense(), whole, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", FACTORIES)
def test_transposed_blocks_stand_transposed_in_the_flat_vector(name):
    c = captures(5, 2, transposed=True)
    block = c.blocks[0]
    rows = torch.einsum("nvso,nsi->nvio", block.left, block.right).flatten(0, 1).flatten(1)
    exact = rows.T @ rows
    H = state(FACTORIES[name], c).finish().to_dense()
    if name == "block":
        torch.testing.assert_close(H, exact, rtol=1e-10, atol=1e-12)
    elif name == "ekfac":
        torch.testing.assert_close(H.trace(), exact.trace(), rtol=1e-12, atol=0)
        B, A = (block.left.reshape(-1, 3), block.right.reshape(-1, 2))
        Q = torch.kron(torch.linalg.eigh(A.T @ A)[1], torch.linalg.eigh(B.T @ B)[1])
        expected = Q @ torch.diag((Q.T @ exact @ Q).diagonal()) @ Q.T
        torch.testing.assert_close(H, expected, rtol=1e-9, atol=1e-11)
    else:
        left, right = block.left.reshape(-1, 3), block.right.reshape(-1, 2)
        if name == "reduce":
            left, right = block.left.sum(2).reshape(-1, 3), block.right.mean(1)
        expected = torch.kron(right.T @ right / len(right), left.T @ left)
        torch.testing.assert_close(H, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["kron", "reduce"])
def test_positions_of_ignored_terms_leave_the_input_factor(name):
    c = captures(3, 3)
    kept = torch.tensor([[True, True, False, True], [False, True, False, False], [False] * 4])
    left, right = c.blocks[0].left * kept[:, None, :, None], c.blocks[0].right
    c = Captures(3, (replace(c.blocks[0], left=left),), kept=kept)
    if name == "kron":
        B, inputs = left.reshape(-1, 2), [right[n, s] for n, s in kept.nonzero().tolist()]
    else:
        B, inputs = left.sum(2).reshape(-1, 2), [right[0, [0, 1, 3]].mean(0), right[1, 1]]
    A = sum(torch.outer(a, a) for a in inputs) / len(inputs)
    H = state(FACTORIES[name], c).finish().to_dense()
    torch.testing.assert_close(H, torch.kron(B.T @ B, A), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["kron", "reduce", "ekfac"])
def test_a_batch_of_ignored_terms_adds_nothing(name):
    c = captures(3, 4)
    nothing = torch.zeros(3, 4, dtype=torch.bool)
    ignored = Captures(3, (replace(c.blocks[0], left=torch.zeros_like(c.blocks[0].left)),), kept=nothing)
    with_it = state(FACTORIES[name], c, ignored).finish().to_dense()
    torch.testing.assert_close(with_it, state(FACTORIES[name], c).finish().to_dense(), rtol=1e-12, atol=0)


def test_uses_in_both_orientations_have_the_nearest_product():
    natural, turned = captures(5, 5).blocks[0], captures(5, 6, transposed=True).blocks[0]
    tied = merged("w", 0, [natural, turned])
    H = state(structures.Kronecker, Captures(5, (tied,))).finish().to_dense()
    B, A = natural.left.reshape(-1, 2), natural.right.reshape(-1, 3)
    C, D = turned.left.reshape(-1, 3), turned.right.reshape(-1, 2)
    total = torch.kron(B.T @ B, A.T @ A / len(A)) + torch.kron(D.T @ D / len(D), C.T @ C)
    rearranged = total.view(2, 3, 2, 3).permute(0, 2, 1, 3).reshape(4, 9)
    U, s, Vh = torch.linalg.svd(rearranged)
    expected = s[0] * torch.kron(U[:, 0].view(2, 2), Vh[0].view(3, 3))
    torch.testing.assert_close(H, expected, rtol=1e-9, atol=1e-11)


def test_products_in_single_precision_are_asked_for_by_name_and_known_to_be_such():
    p = problem("mlp", "classification")
    fast = functools.partial(structures.Kronecker, dtype=torch.float32)
    found, exact = (curvature(p.model, p.likelihood, p.batches(), s) for s in (fast, "kron"))
    for block, other in zip(found.blocks, exact.blocks, strict=True):
        assert block.resolution == torch.finfo(torch.float32).eps
        assert other.resolution == torch.finfo(torch.float64).eps
        scale = float(other.to_dense().abs().max())
        torch.testing.assert_close(block.to_dense(), other.to_dense(), rtol=0, atol=1e-6 * scale)
        assert not torch.equal(block.to_dense(), other.to_dense())
    with pytest.raises(
        UnsupportedError, match=r"dtype must be torch.float32 or torch.float64, found torch.float16"
    ):
        curvature(
            p.model, p.likelihood, p.batches(), functools.partial(structures.Kronecker, dtype=torch.float16)
        )
