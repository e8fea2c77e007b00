"""`Prediction`: what a posterior says of some inputs, with its uncertainty taken apart."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from curvlin_nn.errors import UnsupportedError
from curvlin_nn.inference_mode import outside_inference_mode
from curvlin_nn.likelihoods import Likelihood
from curvlin_nn.predictive.counts import entropies
from curvlin_nn.predictive.response import Response
from curvlin_nn.predictive.running import RunningMoments


@dataclass(frozen=True, repr=False, eq=False)
class Prediction:
    """The predictive distribution at N inputs. What costs something is computed when it is first asked for.

    Uncertainty has two parts: what the likelihood leaves open at known outputs (aleatoric), and what the posterior
    leaves open about the outputs (epistemic). Where targets are classes the measure is entropy in nats, and the
    parts add up to that of the mean prediction; the second is the mutual information between target and parameters
    (Houlsby et al., 2011; Depeweg et al., 2018). Where they are numbers it is variance (law of total variance);
    `entropy` and `mutual_information` are there as well for counts and for Gaussian noise of known scale.

    Attributes:
        mean: the expected target, as `PosteriorPredictive.__call__` gives it: probabilities or rates in the shape of
            the outputs, or the expected mean ``(N, D)``.
        output_mean: of the Gaussian over the model's outputs, ``(N, C)``.
        output_covariance: ``(N, C, C)``; with ``pred_type="nn"`` both are estimated from the draws.
    """

    _response: Response
    mean: Float[Tensor, "N ..."]
    output_mean: Float[Tensor, "N C"]
    output_covariance: Float[Tensor, "N C C"]
    _draws: Callable[[], Float[Tensor, "S N C"]]
    _covariance: Float[Tensor, "N D D"] | None = None
    _noise: Float[Tensor, "*N D D"] | None = None

    def __repr__(self) -> str:
        return f"Prediction({self._likelihood.name}, mean of shape {tuple(self.mean.shape)})"

    def __len__(self) -> int:
        """N."""
        return len(self.mean)

    @property
    def _likelihood(self) -> Likelihood:
        return self._response.likelihood

    @property
    def probabilities(self) -> Float[Tensor, "N ..."]:
        """The mean, where it is one of probabilities.

        Raises:
            UnsupportedError: where it is not.
        """
        if not (self._likelihood.has_link and self._likelihood.has_classes):
            raise UnsupportedError(
                f"probabilities needs a likelihood of classes, found {self._likelihood.name}; use mean"
            )
        return self.mean

    @cached_property
    @outside_inference_mode()
    def outputs(self) -> Float[Tensor, "S N C"]:
        """Draws of the model's outputs: independent over inputs, or with ``pred_type="nn"`` one network each."""
        return self._draws()

    @cached_property
    @outside_inference_mode()
    def samples(self) -> Float[Tensor, "S N ..."]:
        """Draws of what `mean` is the mean of: probabilities, rates, or means of the targets."""
        return self._response.values(self.outputs)

    @cached_property
    @outside_inference_mode()
    def covariance(self) -> Float[Tensor, "N D D"]:
        """Of what `mean` is the mean of, under the posterior: without noise; where there is a link, from `samples`."""
        if self._covariance is not None:
            return self._covariance
        return self._spread(diagonal=False)

    @cached_property
    @outside_inference_mode()
    def variance(self) -> Float[Tensor, "N ..."]:
        """The diagonal of the covariance, in the shape of the mean."""
        if self._covariance is not None:
            return self._covariance.diagonal(dim1=-2, dim2=-1)
        return self._spread(diagonal=True).reshape(self.mean.shape)

    @cached_property
    @outside_inference_mode()
    def aleatoric(self) -> Tensor:
        """The part that stays when outputs are known: expected entropy ``(N, *terms)``, or noise variance.

        Raises:
            UnsupportedError: for a likelihood that does not say what its targets do.
        """
        if self._likelihood.has_classes:
            return self._by_term(_entropy(self._log_probabilities).mean(0))
        if self._noise is not None:
            return self._noise.diagonal(dim1=-2, dim2=-1).expand(self.mean.shape)
        terms = self._response.terms(self.outputs)
        variances = self._likelihood.target_variance(terms).reshape(self.samples.shape)
        return variances.mean(0)

    @cached_property
    @outside_inference_mode()
    def epistemic(self) -> Tensor:
        """The part that more data would take away: mutual information ``(N, *terms)``, or `variance`."""
        if self._likelihood.has_classes:
            return (self.entropy - self.aleatoric).clamp(min=0)
        return self.variance

    @cached_property
    @outside_inference_mode()
    def entropy(self) -> Tensor:
        """Of the target, in nats: of its mean distribution over the draws, ``(N, *terms)``.

        For counts, summed over all of them; see `counts.entropies`. For Gaussian noise, the differential entropy of all
        targets of an input together, ``(N,)``.

        Raises:
            UnsupportedError: for other likelihoods.
        """
        if self._likelihood.has_classes:
            log_p = self._log_probabilities
            return self._by_term(_entropy(torch.logsumexp(log_p, 0) - math.log(len(log_p))))
        if self._likelihood.has_counts:
            return self._by_term(self._entropies_of_counts[0])
        return _gaussian_entropy(self.covariance + self._gaussian_noise)

    @cached_property
    @outside_inference_mode()
    def mutual_information(self) -> Tensor:
        """Between target and parameters, in nats: what an observation of the target is expected to teach.

        Raises:
            UnsupportedError: where the entropy does.
        """
        if self._likelihood.has_classes:
            return self.epistemic
        if self._likelihood.has_counts:
            of_mean, mean_of = self._entropies_of_counts
            return self._by_term((of_mean - mean_of).clamp(min=0))
        return self.entropy - _gaussian_entropy(self._gaussian_noise)

    @cached_property
    @outside_inference_mode()
    def _log_probabilities(self) -> Float[Tensor, "S NR K"]:
        """Of the classes of each term at each draw."""
        log_p = self._likelihood.log_probabilities(self._response.terms(self.outputs))
        return log_p.reshape(len(self.outputs), -1, log_p.shape[-1])

    @cached_property
    @outside_inference_mode()
    def _entropies_of_counts(self) -> tuple[Float[Tensor, " NR"], Float[Tensor, " NR"]]:
        """Of the mean distribution of each term, and their mean over the draws."""
        terms = self._response.terms(self.outputs)
        found = entropies(self._likelihood, terms.reshape(len(self.outputs), -1, terms.shape[-1]))
        return found[0].to(self.mean), found[1].to(self.mean)

    def _by_term(self, values: Float[Tensor, " NR"]) -> Tensor:
        by_sample = values.reshape(len(self), -1)
        return by_sample.squeeze(1) if by_sample.shape[1] == 1 else by_sample

    def _spread(self, *, diagonal: bool) -> Tensor:
        moments = RunningMoments(diagonal=diagonal)
        moments.add(self.samples.flatten(2))
        return moments.spread()

    @property
    def _gaussian_noise(self) -> Float[Tensor, "*N D D"]:
        """The noise, where targets are Gaussian given their mean and the posterior is Gaussian about that."""
        if self._noise is None or not self._likelihood.is_linear:
            raise UnsupportedError(
                f"entropy is not supported for {self._likelihood.name}, whose targets have none in closed form; use "
                "aleatoric and epistemic, which are variances"
            )
        return self._noise


def _entropy(log_p: Float[Tensor, "*batch K"]) -> Float[Tensor, "*batch"]:
    """``-sum p log p``."""
    return -(log_p.exp() * log_p).sum(-1)


def _gaussian_entropy(covariance: Float[Tensor, "*batch D D"]) -> Float[Tensor, "*batch"]:
    """``logdet(2 pi e Sigma) / 2``."""
    logdet = torch.linalg.slogdet(covariance.double()).logabsdet
    return ((logdet + covariance.shape[-1] * math.log(2 * math.pi * math.e)) / 2).to(covariance.dtype)
