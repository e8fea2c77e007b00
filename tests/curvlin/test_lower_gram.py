import pytest
import torch

from curvlin.numerics.gram import add_lower_gram, symmetric_of_lower


@pytest.mark.parametrize("size", [1, 47, 48, 49, 384, 385, 800])
@pytest.mark.parametrize("columns_first", [False, True])
def test_what_is_added_below_the_diagonal_is_the_sum_of_outer_products(size, columns_first):
    X, Y = torch.randn(5, size).double(), torch.randn(size, 3).double().mT
    if columns_first:
        X, Y = Y, X
    total = add_lower_gram(Y, add_lower_gram(X, torch.zeros(size, size, dtype=torch.float64)))
    expected = sum(torch.outer(row, row) for row in (*X, *Y))
    torch.testing.assert_close(total.tril(), expected.tril(), rtol=1e-12, atol=1e-12)
    found = symmetric_of_lower(total)
    assert torch.equal(found, found.mT)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
