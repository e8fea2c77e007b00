"""What a fit leaves: sums over the data, what is made of them, and what they say of vectors and hyperparameters."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn

from curvlin.precision.base import PrecisionOperator
from curvlin_nn.curvature import Accumulated
from curvlin_nn.errors import OutputError, UnsupportedError
from curvlin_nn.evidence import Curvature
from curvlin_nn.feature_maps import FeatureMap
from curvlin_nn.feature_posterior import FeatureSpace
from curvlin_nn.fingerprint import Fingerprint
from curvlin_nn.likelihoods import Likelihood
from curvlin_nn.prior import GroupedPrior, OperatorPrior, Prior, infer_structure
from curvlin_nn.prior_projection import closed


@dataclass(frozen=True)
class Fitted:
    """A model seen by a posterior.

    Attributes:
        accumulated: the sums over the data.
        mean: the parameters that the prior is about, flat: those of a subnetwork alone; with features all weights.
        curvature: H, as a function of the noise.
        fingerprint: of the model.
        feature_map: the linearisation, in the posterior's coordinates.
        whole_mean: all parameters, flat.
        seconds: how long the fit took.
        of_map: checksums of what features depend on besides the model.
        left_out: the curvature beside the features of a `feature_map`, once it is known; see `evidence_bound`.
        known_unchanged: whether the model has been compared, as by a search before it predicts many times; then it is
            not compared again.
    """

    accumulated: Accumulated
    mean: Float[Tensor, " P"]
    curvature: Curvature
    fingerprint: Fingerprint
    feature_map: FeatureMap
    whole_mean: Float[Tensor, " W"]
    seconds: float = 0.0
    of_map: Mapping[str, Tensor] = field(default_factory=dict)
    left_out: Float[Tensor, "*C"] | None = None
    known_unchanged: bool = False

    @classmethod
    def of(
        cls,
        model: nn.Module,
        found: Accumulated,
        features: FeatureSpace | None,
        *,
        damping: bool,
        enable_backprop: bool,
        begin: float,
    ) -> Fitted:
        """What sums over data leave, around the model's present parameters; it took the time since `begin`.

        Raises:
            UnsupportedError: if the curvature cannot be damped, or the features are those of another model.
        """
        if features is None:
            whole, of_map = found.whole_space.flatten(found.whole_space.tensors(model)), {}
        else:
            whole, of_map = features.weights(model), features.checksums()
        mean = whole if found.subnetwork is None else found.subnetwork.of_whole(whole)
        H = Curvature.of(found.states[0], damping=damping)
        linearised, fingerprint = found.feature_map(enable_backprop), Fingerprint.of(model)
        return cls(found, mean, H, fingerprint, linearised, whole, time.perf_counter() - begin, of_map)

    def check_unchanged(self, model: nn.Module, features: FeatureSpace | None) -> None:
        """Every parameter and buffer counts, those outside of the posterior included: outputs depend on all.

        Raises:
            StaleModelError: if the model, or what features depend on, is not what it was.
        """
        if self.known_unchanged:
            return
        self.fingerprint.check_unchanged(model)
        if features is not None:
            features.check_unchanged(self.of_map)

    def check_mean(self, mean: Float[Tensor, "*P"]) -> None:
        """Whether a prior mean is a number, or has as many entries as the posterior.

        Raises:
            ValueError: if it has not.
        """
        if mean.ndim == 1 and mean.shape != self.mean.shape:
            raise ValueError(f"prior_mean must have {len(self.mean)} entries, found {len(mean)}")

    def check_noise(self, noise: Float[Tensor, "*C"]) -> None:
        """Whether a noise scale is one number, or one for each output whose curvature was kept.

        Raises:
            UnsupportedError: if none was kept.
            ValueError: if there are more or fewer.
        """
        if noise.ndim == 0:
            return
        if self.curvature.outputs is None:
            raise UnsupportedError(
                f"sigma_noise has {len(noise)} entries, but the curvature of each output was not kept; set them, then "
                "fit"
            )
        expected = self.accumulated.of_a_term
        if not len(noise) == self.curvature.n_noise_scales == expected:
            raise ValueError(
                f"sigma_noise must have {expected} entries, one for each output, found {len(noise)}"
            )

    def prior(
        self,
        precision: Tensor | PrecisionOperator,
        mean: Float[Tensor, "*P"],
        structure: str | None,
        features: FeatureSpace | None,
    ) -> Prior:
        """The prior as it is stated.

        Args:
            precision: numbers, or an operator.
            mean: a number, or one for each coordinate.
            structure: which coordinates share a number, where their count fits several structures.
            features: whose coordinates have the prior, where these stand in for weights.

        Raises:
            ValueError: if it has another size than the posterior.
            UnsupportedError: for more than one number with features.
        """
        deviation = self.mean.double() - mean.to(self.mean).double()
        if features is not None and features.stands_in:
            return features.prior(precision, deviation)
        if isinstance(precision, PrecisionOperator):
            if precision.size != len(deviation):
                raise ValueError(
                    f"prior_precision must have {len(deviation)} rows like the posterior, found {precision.size}"
                )
            return OperatorPrior(precision, deviation)
        space = self.accumulated.space
        structure = infer_structure(space, precision, structure)
        return GroupedPrior.of(space, structure, precision.reshape(-1), deviation)

    def closed(self, stated: Prior, projection: str | None) -> Prior:
        """The prior as it enters the posterior: itself, or projected by this name where its sum is not closed.

        Raises:
            UnsupportedError: if it cannot be.
        """
        if self.curvature.damped is not None:
            self.curvature.damped.check(stated)
            return stated
        return closed(stated, self.curvature.total, projection)

    def output_shape(self, likelihood: Likelihood) -> tuple[int, ...]:
        """Of one sample's outputs at the input of this prediction.

        Raises:
            OutputError: if they differ from those in `fit` in more than the length of sequences.
        """
        fitted = self.accumulated.output_shape
        shape = self.accumulated.recorder.output_shape
        shape = fitted if shape is None else shape
        if shape != fitted and not self.accumulated.takes(shape, _of_a_term(likelihood, shape)):
            expected, found = (", ".join(("N", *map(str, s))) for s in (fitted, shape))
            raise OutputError(
                f"model outputs must have shape ({expected}) as in fit, but for the length of sequences, "
                f"found ({found})"
            )
        return shape

    def in_whole(self, values: Float[Tensor, "*batch k"]) -> Float[Tensor, "*batch P"]:
        """Values of the posterior's coordinates, in the flat vector of all parameters."""
        subnetwork = self.accumulated.subnetwork
        return values if subnetwork is None else subnetwork.fill(self.whole_mean, values)

    def of_whole(self, value: Float[Tensor, "*S P"]) -> Float[Tensor, "*S k"]:
        """The posterior's coordinates of vectors of all parameters; others are left to be refused."""
        subnetwork = self.accumulated.subnetwork
        if subnetwork is None or value.shape[-1:] != (subnetwork.whole.size,):
            return value
        return subnetwork.of_whole(value)


def _of_a_term(likelihood: Likelihood, output_shape: tuple[int, ...]) -> int:
    """How many of the outputs are of one term; 0 where the likelihood does not take them."""
    try:
        return likelihood.terms(torch.zeros(1, *output_shape)).shape[-1]
    except RuntimeError:
        return 0
