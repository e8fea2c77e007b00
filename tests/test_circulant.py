"""The operator of the tutorial, through every law."""

import pytest
import torch

from circulant import Circulant, circulant_matrix, make_circulant
from curvlin import Diagonal, Isotropic, NotClosedError
from curvlin.testing import operator_suite


@operator_suite(make_circulant, dense=circulant_matrix)
class TestCirculant:
    """Gets one test for each law and dtype; its own say which sums are closed."""

    def test_closed_sums_are_circulant_in_any_order(self) -> None:
        P, Q = (make_circulant(7, 2.0, 0.0, (), torch.Generator().manual_seed(seed)) for seed in (0, 1))
        R = Isotropic(torch.tensor([0.5, 2.0], dtype=torch.float64), 7)
        for left, right in ((P, Q), (Q, P), (P, R), (R, P)):
            total = left + right
            assert type(total) is Circulant
            exact = left.to_dense() + right.to_dense()
            assert torch.allclose(total.to_dense(), exact, rtol=1e-14, atol=1e-15)

    def test_other_sums_are_refused(self) -> None:
        P = make_circulant(6, 2.0, 0.0, (), torch.Generator().manual_seed(0))
        ramp = Diagonal(torch.arange(1.0, 7.0, dtype=torch.float64))
        for left, right in ((P, ramp), (ramp, P)):
            with pytest.raises(NotClosedError, match="Circulant"):
                left + right


def test_the_couplings_fit_the_size() -> None:
    with pytest.raises(ValueError, match="couplings must end in 4 entries for size 6"):
        Circulant(torch.ones(3), 6)
    with pytest.raises(TypeError, match="couplings must be a torch"):
        Circulant([1.0], 1)
