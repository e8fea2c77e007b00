"""What is asked of a Gaussian posterior besides predictions: distances, densities, and its covariance in numbers."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from curvlin import Dense, Diagonal, Gaussian
from curvlin._check import floating
from curvlin.precision.base import PrecisionOperator
from curvlin_nn.errors import UnsupportedError


def square_norm(q: Gaussian, value: Float[Tensor, "*S P"]) -> Float[Tensor, "*S"]:
    """``(value - mean)^T P (value - mean)``, as a sum of squares.

    Raises:
        ValueError: if `value` does not end in an axis of length P.
    """
    floating("value", value, ndim=1, like=q.mean)
    if value.shape[-1] != len(q.mean):
        raise ValueError(f"value must have shape (..., {len(q.mean)}), found {tuple(value.shape)}")
    return q.precision.whiten(value - q.mean).square().sum(-1)


def log_prob(q: Gaussian, value: Float[Tensor, "*S P"], normalized: bool = True) -> Float[Tensor, "*S"]:
    """The log density in nats, or only the term that depends on `value`."""
    return q.log_prob(value) if normalized else -square_norm(q, value) / 2


def scale(P: PrecisionOperator) -> Float[Tensor, "P P"] | Float[Tensor, " P"]:
    """The lower triangular S with ``S S^T = P^-1``; of a diagonal P the diagonal of S.

    Raises:
        UnsupportedError: for any other structure.
        NotPositiveDefiniteError: if P is not positive definite.
    """
    if isinstance(P, Diagonal):
        return P.inverse_diagonal().sqrt()
    if isinstance(P, Dense):
        # Q R = W^T for any W with W W^T = P^-1: R^T is another one, and triangular.
        R = torch.linalg.qr(P.unwhiten(_eye(P)).double(), mode="r").R
        return (R.mT * R.diagonal().sign()).to(P.dtype)
    raise UnsupportedError(
        f"posterior_scale needs hessian_structure='full' or 'diag', found a {type(P).__name__}; use sample for draws, "
        "or posterior_precision.unwhiten(z), whose covariance for white z is P^-1"
    )


def covariance(P: PrecisionOperator) -> Float[Tensor, "P P"]:
    """``P^-1`` in numbers.

    Raises:
        UnsupportedError: if P is not dense already.
        NotPositiveDefiniteError: if P is not positive definite.
    """
    if not isinstance(P, Dense):
        raise UnsupportedError(
            f"posterior_covariance needs hessian_structure='full', found a {type(P).__name__}; use posterior_variance "
            "for its diagonal, la(x, joint=True) for that of outputs, or posterior_precision.solve for products"
        )
    inverse = P.solve(_eye(P))
    return (inverse + inverse.mT) / 2


def _eye(P: PrecisionOperator) -> Float[Tensor, "P P"]:
    return torch.eye(P.size, dtype=P.dtype, device=P.device)
