"""A lower bound of the exact evidence from K features: what they leave out counts against it.

With ``Phi = J V`` and orthonormal V the curvature of the exact evidence is a sum of two positive semidefinite ones,

    S^T J J^T S = S^T Phi Phi^T S + S^T (kappa - Phi Phi^T) S,    S S^T = Lambda, over all data

of which the evidence on K coordinates knows the first alone. As ``log det(I + A + R) <= log det(I + A) + tr R``,

    log Z >= log Z_K - t / (2 delta sigma^2 T),    t = sum_n tr(Lambda_n (kappa_n - Phi_n Phi_n^T))

For a Gaussian likelihood this is the bound of Titsias (2009, equation 9) for the linearised network, and predictions
with the residual are those of his sparse process. For any likelihood it is one of the Laplace approximation of the
evidence by the full GGN, around the same weights.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from curvlin import Isotropic
from curvlin_nn.batches import Labelled
from curvlin_nn.capture import Captures
from curvlin_nn.curvature import accumulate
from curvlin_nn.errors import DataError, UnsupportedError
from curvlin_nn.feature_maps import JacobianMap
from curvlin_nn.feature_maps.jacobian import features
from curvlin_nn.inference_mode import outside_inference_mode
from curvlin_nn.parameters import ParameterSpace
from curvlin_nn.structures import Structure

if TYPE_CHECKING:
    from curvlin_nn.laplace import Laplace


class Traces(Structure):
    """``tr H_c`` of the curvature of each of C outputs, or of their sum: squared rows, of which none is multiplied out.

    Args:
        space: all parameters.
        n_outputs: C; one for the sum.

    Attributes:
        traces: of everything seen, float64.
    """

    name = "traces"

    def __init__(self, space: ParameterSpace, *, n_outputs: int = 1) -> None:
        super().__init__(space)
        self.traces = torch.zeros(n_outputs, dtype=torch.float64)
        self._column = 0

    def update(self, captures: Captures) -> None:
        """See `Structure.update`; columns come output by output, some at a time."""
        rows = features(captures).to(torch.float64)
        one = torch.ones((), dtype=torch.float64, device=rows.device)
        squares = Isotropic(one, rows.size).inv_congruence_diagonal(rows).sum(0)
        first = 0 if captures.first else self._column
        self._column = first + len(squares)
        output = torch.arange(first, self._column, device=squares.device) % len(self.traces)
        self.traces = self.traces.to(squares.device).index_add(0, output, squares)

    def merge(self, other: Traces) -> None:
        """See `Structure.merge`."""
        self.traces = self.traces + other.traces

    def finish(self) -> Isotropic:
        """The multiple of the identity with this trace, nearest to H in the Frobenius norm."""
        return Isotropic(self.traces.sum() / self.space.size, self.space.size)


@outside_inference_mode()
def left_out_curvature(
    la: Laplace, train_loader: Iterable[Any] | None, progress_bar: bool = False
) -> Float[Tensor, "*C"]:
    """``sum_n tr(Lambda_n (kappa_n - Phi_n Phi_n^T))`` at sigma = 1 and T = 1, by one pass over the data.

    Args:
        la: a fitted posterior.
        train_loader: the data that it was fitted to.
        progress_bar: whether to show one.

    Returns:
        Its value, float64, or that of each output where these have noise scales of their own.

    Raises:
        UnsupportedError: if there is no such bound of this posterior, or no loader.
        DataError: if the loader yields another number of samples than `fit` saw.
        StaleModelError: if the model or the features have changed since then.
    """
    jacobian = _checked_jacobian(la)
    if train_loader is None:
        raise UnsupportedError("the bound needs train_loader, the batches that fit was given; found None")
    la._check_unchanged()
    curvature = la._fit.curvature
    traces = partial(Traces, n_outputs=max(1, curvature.n_noise_scales))
    found = accumulate(
        la.model,
        la.likelihood,
        Labelled(train_loader, la.dict_key_y),
        jacobian,
        [traces],
        columns=la._columns,
        progress_bar=progress_bar,
    )
    if found.n_data != la.n_data:
        raise DataError(
            f"train_loader yielded {found.n_data} samples, expected the {la.n_data} that the posterior was fitted to; "
            "give these, or fit again"
        )
    (state,) = found.states
    assert isinstance(state, Traces)
    known = [H.diagonal().double().sum() for H in curvature.outputs or (curvature.total,)]
    left_out = (state.traces - torch.stack(known)).clamp(min=0)  # below zero by rounding only
    return left_out if curvature.outputs else left_out.squeeze(0)


def _checked_jacobian(la: Laplace) -> JacobianMap:
    """The Jacobian whose rest the bound counts."""
    space = la._features
    if space is None or not space.stands_in:
        raise UnsupportedError(
            "a bound of the evidence needs a feature_map that stands in for a Jacobian, such as NystromMap; nothing is "
            "left out without one, take method='marglik'"
        )
    kind = type(space.feature_map).__name__
    if not space.feature_map.orthonormal:
        raise UnsupportedError(
            f"feature_map={kind} has no bound of the evidence: what features that are not orthonormal leave out, "
            "kappa - Phi Phi^T, need not be a kernel; take a NystromMap, or method='gridsearch'"
        )
    jacobian = space.feature_map.jacobian
    if not space.residual or jacobian is None:
        raise UnsupportedError(
            "with residual=False there is nothing beside the features for a bound to count; take residual=True, or "
            "method='marglik'"
        )
    if la._columns.kind == "mc":
        raise UnsupportedError(
            "the bound needs the same curvature in the features and beside them, and curvature='fisher_mc' draws anew; "
            "take 'ggn'"
        )
    return jacobian
