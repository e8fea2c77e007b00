"""One layer's Jacobian in factored form; its products cost what a forward pass through the layer costs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from curvlin._check import broadcastable, floating
from curvlin._tree import tensor_field
from curvlin.features.base import FeatureOperator
from curvlin.numerics import contraction
from curvlin.numerics.chunks import joined, pieces


@dataclass(eq=False, repr=False, init=False)
class KhatriRaoFeatures(FeatureOperator):
    """Rows ``sum_s left_nrs (x) right_ns``, never multiplied out.

    For a layer ``y = W a`` with W of shape (out, in), used at S positions (pixels, tokens), `right` holds its
    inputs and `left` the gradients of the network's R outputs with respect to y. The rows are then the
    Jacobian with respect to ``W.flatten()``: feature ``o * in + i`` belongs to ``W[o, i]``.

    Args:
        left: ``(*batch, N, R, S, out)``.
        right: ``(*batch, N, S, in)``, shared by the R rows of a sample.

    Raises:
        TypeError: if they are not floating tensors of one dtype.
        ValueError: if N or S differ, a dimension is empty, or a value is not finite.
    """

    left: Float[Tensor, "*batch N R S out"] = tensor_field(4)
    right: Float[Tensor, "*batch N S in"] = tensor_field(3)

    def __init__(
        self, left: Float[Tensor, "*batch N R S out"], right: Float[Tensor, "*batch N S in"]
    ) -> None:
        floating("left", left, ndim=4)
        floating("right", right, ndim=3, like=left)
        N, R, S, out = left.shape[-4:]
        if right.shape[-3:-1] != (N, S):
            raise ValueError(
                f"right must have shape (..., {N}, {S}, in) to match left {tuple(left.shape)}, found "
                f"{tuple(right.shape)}"
            )
        if 0 in (N, R, S, out, right.shape[-1]):
            raise ValueError(
                "left and right must have at least one entry along every dimension, found shapes "
                f"{tuple(left.shape)} and {tuple(right.shape)}"
            )
        broadcastable("right", right.shape[:-3], left.shape[:-4])
        self.left, self.right = left, right

    @property
    def n_samples(self) -> int:
        return self.left.shape[-4]

    @property
    def n_rows(self) -> int:
        return self.left.shape[-3]

    @property
    def n_positions(self) -> int:
        """S, how often a sample uses the weight."""
        return self.left.shape[-2]

    @property
    def out_features(self) -> int:
        """The number of rows of the weight."""
        return self.left.shape[-1]

    @property
    def in_features(self) -> int:
        """The number of columns of the weight."""
        return self.right.shape[-1]

    @property
    def size(self) -> int:
        return self.out_features * self.in_features

    def flatten(self) -> KhatriRaoFeatures:
        # Each row is a sample now and needs its own copy of the inputs: R times the memory of `right`.
        right = self.right.repeat_interleave(self.n_rows, dim=-3)
        return KhatriRaoFeatures(self.left.flatten(-4, -3).unsqueeze(-3), right)

    def to_dense(self) -> Float[Tensor, "*batch N R D"]:
        return contraction.multiplied(self.left, self.right)

    def _matmul(self, v: Tensor) -> Tensor:
        return contraction.forward(
            self.left, self.right, v.unflatten(-2, (self.out_features, self.in_features))
        )

    def _rmatmul(self, u: Tensor) -> Tensor:
        return contraction.backward(self.left, self.right, u).flatten(-3, -2)

    def _gram(self, Psi: FeatureOperator) -> Tensor | None:
        if not isinstance(Psi, KhatriRaoFeatures):
            return None
        same_layer("Psi", Psi, self)
        return contraction.cross(self.left, self.right, Psi.left, Psi.right)

    def _mix(self, S: Tensor) -> KhatriRaoFeatures:
        return KhatriRaoFeatures((S @ self.left.flatten(-2)).unflatten(-1, self.left.shape[-2:]), self.right)

    def _scale(self, c: Tensor) -> KhatriRaoFeatures:
        return KhatriRaoFeatures(c[..., None, None, None, None] * self.left, self.right)

    def _select(self, samples: slice | Tensor) -> KhatriRaoFeatures:
        return KhatriRaoFeatures(self.left[..., samples, :, :, :], self.right[..., samples, :, :])

    def _columns(self, index: Tensor) -> Tensor:
        outputs, inputs = index // self.in_features, index % self.in_features
        bytes_each = (
            self.dtype.itemsize * self.batch_shape.numel() * self.n_rows * self.n_positions * len(index)
        )

        def some(n: slice) -> Tensor:
            left = self.left[..., n, :, :, :].index_select(-1, outputs)
            right = self.right[..., n, :, :].index_select(-1, inputs)
            return torch.einsum("...nrsk,...nsk->...nrk", left, right)

        return joined([some(n) for n in pieces(self.n_samples, bytes_each, least=self.n_samples)], dim=-3)


def same_layer(name: str, Psi: KhatriRaoFeatures, Phi: KhatriRaoFeatures) -> None:
    """Psi and Phi have equal (out, in), not only equal products of them."""
    found, expected = (Psi.out_features, Psi.in_features), (Phi.out_features, Phi.in_features)
    if found != expected:
        raise ValueError(f"{name} must have out and in sizes {expected}, found {found}")
