"""Answers to requests, from a Gaussian over outputs or from the network at draws of its weights."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from curvlin_nn.predictive.links import draw
from curvlin_nn.predictive.output_gaussian import OutputGaussian
from curvlin_nn.predictive.prediction import Prediction
from curvlin_nn.predictive.request import Request, check_noise
from curvlin_nn.predictive.response import Response
from curvlin_nn.predictive.running import RunningMoments
from curvlin_nn.predictive.weight_space import WeightSpace
from curvlin_nn.randomness import frozen

Answer = Tensor | tuple[Tensor, Tensor]
"""Expected links; or mean and (co)variance."""


class Predictor(ABC):
    """What a fitted posterior predicts.

    Requests have been checked (`Request.checked`).
    """

    response: Response

    def __call__(self, x: Any, request: Request) -> Answer:
        """See `PosteriorPredictive.__call__`."""
        if self.response.likelihood.has_link:
            return self._expected_link(x, request)
        return self._moments(x, request)

    @abstractmethod
    def functional_samples(
        self, x: Any, n_samples: int, generator: torch.Generator | None
    ) -> Float[Tensor, "S N C"]:
        """Draws of the outputs, joint over the samples in x."""

    def predictive_samples(
        self, x: Any, n_samples: int, generator: torch.Generator | None, observation_noise: bool
    ) -> Tensor:
        """See `PosteriorPredictive.predictive_samples`."""
        check_noise(self.response.likelihood, observation_noise)
        outputs = self.functional_samples(x, n_samples, generator)
        return (
            self.response.targets(outputs, generator) if observation_noise else self.response.values(outputs)
        )

    @abstractmethod
    def predict(self, x: Any, request: Request) -> Prediction:
        """See `PosteriorPredictive.predict`."""

    @abstractmethod
    def _expected_link(self, x: Any, request: Request) -> Tensor:
        """The mean of the link, in the shape of the outputs."""

    @abstractmethod
    def _moments(self, x: Any, request: Request) -> tuple[Tensor, Tensor]:
        """Mean and covariance of what the outputs stand for, or its variance."""


@dataclass(frozen=True)
class GaussianPredictor(Predictor):
    """From the Gaussian over outputs.

    Attributes:
        response: what outputs mean.
        predictive: the Gaussian.
    """

    response: Response
    predictive: OutputGaussian

    def functional_samples(
        self, x: Any, n_samples: int, generator: torch.Generator | None
    ) -> Float[Tensor, "S N C"]:
        """See `Predictor.functional_samples`."""
        return self.predictive.samples(x, n_samples, generator)

    def predict(self, x: Any, request: Request) -> Prediction:
        """See `Predictor.predict`."""
        f, V = self.predictive.mean_and_covariance(x)
        generator = frozen(request.generator, f.device)

        def outputs() -> Tensor:
            return draw(f, V, request.n_samples, generator())

        if not self.response.likelihood.has_link:
            mean, covariance = self.response.moments(f, V)
            noise = self.response.noise_covariance(f, V) if self.response.is_noisy else None
            return Prediction(self.response, mean, f, V, outputs, covariance, noise)
        if request.link_approx == "mc":
            mean = self.response.values(outputs()).mean(0)
        else:
            wide = self.response.needs_covariance(request.link_approx)
            spread = V if wide else V.diagonal(dim1=-2, dim2=-1)
            mean = self.response.expected_link(request.link_approx, f, spread)
        return Prediction(self.response, mean, f, V, outputs)

    def _expected_link(self, x: Any, request: Request) -> Tensor:
        if request.link_approx == "mc":
            if request.diagonal_output:
                f, variance = self.predictive.mean_and_variance(x)
                V = torch.diag_embed(variance)
            else:
                f, V = self.predictive.mean_and_covariance(x)
            return self.response.values(draw(f, V, request.n_samples, request.generator)).mean(0)
        if self.response.needs_covariance(request.link_approx):
            return self.response.expected_link(request.link_approx, *self.predictive.mean_and_covariance(x))
        return self.response.expected_link(request.link_approx, *self.predictive.mean_and_variance(x))

    def _moments(self, x: Any, request: Request) -> tuple[Tensor, Tensor]:
        if self.response.likelihood.is_linear and request.diagonal_output:
            f, variance = self.predictive.mean_and_variance(x)
            if request.observation_noise:
                variance = variance + self.response.noise_covariance(f, None).diagonal()
            return f, variance
        if request.joint:
            return self._joint(x, request.observation_noise)
        f, V = self.predictive.mean_and_covariance(x)
        mean, covariance = self.response.moments(f, V)
        if request.observation_noise:
            covariance = covariance + self.response.noise_covariance(f, V)
        return mean, covariance.diagonal(dim1=-2, dim2=-1) if request.diagonal_output else covariance

    def _joint(self, x: Any, observation_noise: bool) -> tuple[Float[Tensor, " NC"], Float[Tensor, "NC NC"]]:
        mean, covariance = self.predictive.joint(x)
        return mean, covariance + _repeated(self.response, mean) if observation_noise else covariance


@dataclass(frozen=True)
class SampledPredictor(Predictor):
    """From outputs of the network at draws of its weights.

    Attributes:
        response: what outputs mean.
        weights: the draws.
    """

    response: Response
    weights: WeightSpace

    def functional_samples(
        self, x: Any, n_samples: int, generator: torch.Generator | None
    ) -> Float[Tensor, "S N C"]:
        """See `Predictor.functional_samples`."""
        return torch.cat(list(self.weights.outputs(x, n_samples, generator)))

    def predict(self, x: Any, request: Request) -> Prediction:
        """See `Predictor.predict`."""
        outputs = self.functional_samples(x, request.n_samples, request.generator)
        f, V = _mean_and_covariance(outputs)
        if self.response.likelihood.has_link:
            return Prediction(self.response, self.response.values(outputs).mean(0), f, V, lambda: outputs)
        mean, covariance = _mean_and_covariance(self.response.values(outputs))
        noise = self.response.noise_at(outputs).mean(0) if self.response.is_noisy else None
        return Prediction(self.response, mean, f, V, lambda: outputs, covariance, noise)

    def _parts(self, x: Any, request: Request) -> Iterator[Float[Tensor, "s N C"]]:
        return self.weights.outputs(x, request.n_samples, request.generator)

    def _expected_link(self, x: Any, request: Request) -> Tensor:
        parts = (self.response.values(outputs).sum(0) for outputs in self._parts(x, request))
        return functools.reduce(torch.add, parts) / request.n_samples

    def _moments(self, x: Any, request: Request) -> tuple[Tensor, Tensor]:
        values = RunningMoments(diagonal=request.diagonal_output)
        noise: list[Tensor] = []
        for outputs in self._parts(x, request):
            found = self.response.values(outputs)
            values.add(found.flatten(1) if request.joint else found)
            if request.observation_noise:
                noise.append(self.response.noise_at(outputs).sum(0))
        spread = values.spread()
        if request.observation_noise:
            own = functools.reduce(torch.add, noise) / request.n_samples
            if request.joint:
                own = torch.block_diag(*own)
            spread = spread + (own.diagonal(dim1=-2, dim2=-1) if request.diagonal_output else own)
        return values.mean, spread


def _mean_and_covariance(outputs: Float[Tensor, "S N D"]) -> tuple[Tensor, Tensor]:
    moments = RunningMoments()
    moments.add(outputs)
    return moments.mean, moments.spread()


def _repeated(response: Response, mean: Float[Tensor, " NC"]) -> Float[Tensor, "NC NC"]:
    """The noise of each sample along the diagonal."""
    n_outputs = torch.Size(response.shape).numel()
    noise = response.noise_covariance(mean.view(-1, n_outputs), None)
    return torch.block_diag(*[noise] * (len(mean) // n_outputs))
