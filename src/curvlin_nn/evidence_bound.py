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

from curvlin_nn.batches import Labelled
from curvlin_nn.curvature import accumulate
from curvlin_nn.errors import DataError, UnsupportedError
from curvlin_nn.evidence import Curvature
from curvlin_nn.feature_maps import JacobianMap
from curvlin_nn.inference_mode import outside_inference_mode
from curvlin_nn.per_output import PerOutput
from curvlin_nn.structures import Diagonal, StructureFactory

if TYPE_CHECKING:
    from curvlin_nn.laplace import Laplace


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
    in_features = la._fit.curvature
    structure: StructureFactory = Diagonal
    if in_features.outputs:
        structure = partial(PerOutput, structure=Diagonal, n_outputs=len(in_features.outputs))
    found = accumulate(
        la.model,
        la.likelihood,
        Labelled(train_loader, la.dict_key_y),
        jacobian,
        [structure],
        columns=la._choice.columns,
        progress_bar=progress_bar,
    )
    if found.n_data != la.n_data:
        raise DataError(
            f"train_loader yielded {found.n_data} samples, expected the {la.n_data} that the posterior was fitted to; "
            "give these, or fit again"
        )
    whole = Curvature.of(found.states[0])
    left_out = (_traces(whole) - _traces(in_features)).clamp(min=0)  # below zero by rounding only
    return left_out if in_features.outputs else left_out.squeeze(0)


def _traces(curvature: Curvature) -> Float[Tensor, " C"]:
    """That of each output where these are kept apart, or the one of all."""
    return torch.stack([H.diagonal().double().sum() for H in curvature.outputs or (curvature.total,)])


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
    if la._choice.columns.kind == "mc":
        raise UnsupportedError(
            "the bound needs the same curvature in the features and beside them, and curvature='fisher_mc' draws anew; "
            "take 'ggn'"
        )
    return jacobian
