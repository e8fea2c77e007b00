"""The Laplace posterior on the K coordinates of a feature map.

    P = sum_n Phi_n^T Lambda_n Phi_n / (sigma^2 T) + delta I_K
    log Z = log p(D | theta) / T - delta |theta - mu|^2 / 2 - (logdet P - K log delta) / 2

The coordinates are a deviation from the network: their mean is zero. In log Z the other P - K directions of weights
have the prior's precision and cancel, but for the scatter of theta, which is that of all P weights. Predictions add
what the features leave out; see `curvlin_nn.residual`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from curvlin.precision.base import PrecisionOperator
from curvlin_nn import structures
from curvlin_nn.errors import StaleModelError, UnsupportedError
from curvlin_nn.feature_maps import FeatureMap
from curvlin_nn.feature_maps.base import COORDINATES
from curvlin_nn.fingerprint import checksum
from curvlin_nn.parameters import ParameterSpace
from curvlin_nn.predictive import Predictive
from curvlin_nn.prior import GroupedPrior, Prior
from curvlin_nn.residual import ResidualPredictive
from curvlin_nn.structures import StructureChoice


@dataclass(frozen=True)
class FeatureSpace:
    """The part of a `Laplace` object that knows of its feature map.

    Attributes:
        feature_map: the map.
        residual: whether predictions keep the residual prior variance.
    """

    feature_map: FeatureMap
    residual: bool

    @classmethod
    def of(
        cls,
        feature_map: object,
        residual: bool,
        subset_of_weights: object,
        hessian_structure: StructureChoice | None,
        curvature: str,
        enable_backprop: bool,
    ) -> FeatureSpace:
        """What the constructor of `Laplace` is given, checked.

        Raises:
            UnsupportedError: if it does not go with a feature map.
        """
        if not isinstance(feature_map, FeatureMap):
            raise UnsupportedError(
                f"feature_map must be a curvlin_nn.feature_maps.FeatureMap, found {type(feature_map).__name__}"
            )
        if not (
            subset_of_weights is None or (isinstance(subset_of_weights, str) and subset_of_weights == "all")
        ):
            raise UnsupportedError(
                f"subset_of_weights={subset_of_weights!r} is not supported with a feature_map, which decides about "
                "weights itself; leave it at None"
            )
        full = structures.resolve("full")
        if hessian_structure is not None and structures.resolve(hessian_structure) is not full:
            raise UnsupportedError(
                f"hessian_structure={hessian_structure!r} is not supported with a feature_map, whose posterior is "
                "K x K; leave it at None, or 'full'"
            )
        if curvature == "hessian":
            raise UnsupportedError(
                "curvature='hessian' is not supported with a feature_map, whose model is linear; take 'ggn'"
            )
        if enable_backprop:
            raise UnsupportedError(
                "enable_backprop=True is not supported with a feature_map, whose features have no gradients; leave it "
                "at False"
            )
        return cls(feature_map, residual)

    @property
    def stands_in(self) -> bool:
        """Whether the coordinates are not themselves parameters of the model."""
        return self.feature_map.space.names == (COORDINATES,)

    def weights(self, model: nn.Module) -> Float[Tensor, " P"]:
        """All the weights that the map linearises around, flat.

        Raises:
            UnsupportedError: if it is a map of another model, or its residual is asked for and not known.
        """
        jacobian = self.feature_map.jacobian
        if jacobian is None:
            if self.residual:
                raise UnsupportedError(
                    "residual=True needs a feature_map that knows its Jacobian, found "
                    f"{type(self.feature_map).__name__}; take residual=False"
                )
            space = ParameterSpace.of(model)
        elif jacobian.model is not model:
            raise UnsupportedError(
                "feature_map is that of another model object; make it of the one that Laplace is given"
            )
        else:
            space = jacobian.space
        return space.flatten(space.tensors(model))

    def prior(self, precision: Tensor | PrecisionOperator, deviation: Float[Tensor, " P"]) -> FeaturePrior:
        """``N(0, I / delta)`` on the coordinates, with the scatter of all weights.

        Raises:
            UnsupportedError: if the precision is not one number.
        """
        if not isinstance(precision, Tensor) or precision.numel() != 1:
            found = (
                f"{precision.numel()} numbers" if isinstance(precision, Tensor) else type(precision).__name__
            )
            raise UnsupportedError(
                "prior_precision must be one number with a feature_map, whose coordinates are no weights, found "
                f"{found}"
            )
        groups = torch.zeros(self.feature_map.size, dtype=torch.long, device=deviation.device)
        delta = precision.reshape(1).to(deviation.device).double()
        return FeaturePrior(delta, groups, deviation, lambda k: "the parameter vector")

    def predictive(self, precision: PrecisionOperator, prior: Prior, progress_bar: bool) -> Predictive:
        """Predictions with this posterior precision."""
        if self.residual and isinstance(prior, FeaturePrior):
            delta = float(prior.precision.detach())
            return ResidualPredictive(self.feature_map, precision, progress_bar, delta)
        return Predictive(self.feature_map, precision, progress_bar)

    def checksums(self) -> dict[str, Tensor]:
        """Of what the features depend on besides the model."""
        return {name: checksum(tensor).cpu() for name, tensor in self.feature_map.tensors().items()}

    def check_unchanged(self, checksums: Mapping[str, Tensor]) -> None:
        """Whether the features are those that had these checksums.

        Raises:
            StaleModelError: if they are not.
        """
        now = self.checksums()
        changed = [name for name in checksums if not torch.equal(now[name], checksums[name])]
        if changed:
            raise StaleModelError(
                f"{changed[0]!r} of the feature_map changed since fit; call fit again, or restore it"
            )

    def description(self) -> dict[str, Any]:
        """What is stored of the map: enough to tell it from others, not to make it again."""
        kind = type(self.feature_map).__name__
        return {"kind": kind, "checksums": self.checksums(), "residual": self.residual}


@dataclass(frozen=True)
class FeaturePrior(GroupedPrior):
    """``N(0, I / delta)`` on K coordinates, where `deviation` is that of all P weights."""

    def regrouped(self, space: ParameterSpace, structure: str) -> GroupedPrior:
        """See `GroupedPrior.regrouped`.

        Raises:
            UnsupportedError: if it is to have several precisions.
        """
        if structure != "scalar":
            raise UnsupportedError(
                f"prior_structure={structure!r} is not supported with a feature_map, whose coordinates are no weights; "
                "expected 'scalar'"
            )
        return self
