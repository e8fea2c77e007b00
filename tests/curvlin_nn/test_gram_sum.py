import itertools

import pytest
import torch

from curvlin_nn.structures.gram_sum import GramSum

SIZES = (1, 7, 255, 300, 513)


def rows(kind: str, n: int, size: int) -> torch.Tensor:
    """Rows that lie in memory in different ways."""
    if kind == "matrix":
        return torch.randn(n, size).double()
    if kind == "columns first":  # (N, V, S, out) as a capture has it
        return torch.randn(3, n, 2, size).double().movedim(0, 1)
    if kind == "channels first":  # (N, V, H W, C) from (V, N, C, H W)
        return torch.randn(3, n, size, 5).double().movedim(0, 1).movedim(2, 3)
    if kind == "large images":
        return torch.randn(2, 1, size, 2 * size + 1).double().movedim(0, 1).movedim(2, 3)
    return torch.randn(1, size).double().expand(n, size)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["matrix", "columns first", "channels first", "large images", "expanded"])
def test_the_sum_is_that_of_all_outer_products(kind, size):
    total, expected = GramSum(size), torch.zeros(size, size, dtype=torch.float64)
    for n in (1, 4, size // 2 + 1, 3):
        X = rows(kind, n, size)
        total.add(X)
        for row in X.reshape(-1, size).split(1000):
            expected += torch.einsum("ni,nj->ij", row, row)
    torch.testing.assert_close(total.value(), expected, rtol=1e-12, atol=1e-12 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("mine", "theirs"), [pair for pair in itertools.product((0, 3, 600), repeat=2) if any(pair)]
)
def test_sums_merge_and_the_other_stays_as_it_is(mine, theirs):
    X, Y = torch.randn(mine, 300).double(), torch.randn(theirs, 300).double()
    first, second = GramSum(300), GramSum(300)
    first.add(X)
    second.add(Y)
    before = second.value() if theirs else None
    first.merge(second)
    first.add(X)
    torch.testing.assert_close(first.value(), 2 * X.T @ X + Y.T @ Y, rtol=1e-12, atol=1e-10)
    if theirs:
        assert torch.equal(second.value(), before)


def test_rows_that_wait_are_copies():
    X, total = torch.randn(3, 9).double(), GramSum(9)
    expected = X.T @ X
    total.add(X)
    X.zero_()
    torch.testing.assert_close(total.value(), expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("products", "allowed"), [(torch.float64, 1e-13), (torch.float32, 500**0.5 * 2**-23)]
)
def test_products_are_as_accurate_as_their_dtype(dtype, products, allowed):
    X, total = torch.randn(4000, 40).to(dtype), GramSum(40, products)
    for part in X.split(500):
        total.add(part)
    exact = X.double().T @ X.double()
    assert (total.value() - exact).abs().max() <= allowed * exact.max()


@pytest.mark.parametrize("n", [3, 40])
def test_few_rows_in_single_precision_give_no_more_rank_than_they_have(n):
    X, total = torch.randn(n, 300), GramSum(300)
    total.add(X)
    total.add(X)
    eigenvalues = torch.linalg.eigvalsh(total.value())
    assert eigenvalues[:-n].abs().max() <= 1e-12 * eigenvalues[-1]
