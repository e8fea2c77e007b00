"""Answers to requests, from a Gaussian over outputs or from the network at draws of its weights."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
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

    @abstractmethod
    def __call__(self, x: Any, request: Request) -> Answer:
        """See `PosteriorPredictive.__call__`."""

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


@dataclass(frozen=True)
class GaussianPredictor(Predictor):
    """From the Gaussian over outputs.

    Attributes:
        response: what outputs mean.
        predictive: the Gaussian.
    """

    response: Response
    predictive: OutputGaussian

    def __call__(self, x: Any, request: Request) -> Answer:
        """See `Predictor.__call__`."""
        if request.joint:
            return self._joint(x, request.observation_noise)
        if needs_covariance(self.response, request):
            return answer(self.response, request, *self.predictive.mean_and_covariance(x))
        return answer(self.response, request, *self.predictive.mean_and_variance(x))

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

        spread = V if needs_covariance(self.response, request) else V.diagonal(dim1=-2, dim2=-1)
        found = answer(self.response, replace(request, generator=generator()), f, spread)
        if isinstance(found, Tensor):
            return Prediction(self.response, found, f, V, outputs)
        mean, covariance = found
        noise = self.response.noise_covariance(f, V) if self.response.is_noisy else None
        return Prediction(self.response, mean, f, V, outputs, covariance, noise)

    def _joint(self, x: Any, observation_noise: bool) -> tuple[Float[Tensor, " NC"], Float[Tensor, "NC NC"]]:
        mean, covariance = self.predictive.joint(x)
        return mean, covariance + _repeated(self.response, mean) if observation_noise else covariance


def needs_covariance(response: Response, request: Request) -> bool:
    """Whether `answer` takes covariances of the outputs; else it takes their variances."""
    if not response.likelihood.has_link:
        return not (response.likelihood.is_linear and request.diagonal_output)
    if request.link_approx == "mc":
        return not request.diagonal_output
    return response.needs_covariance(request.link_approx)


def answer(
    response: Response,
    request: Request,
    mean: Float[Tensor, "N C"],
    spread: Float[Tensor, "N C"] | Float[Tensor, "N C C"],
) -> Answer:
    """What Gaussian outputs say to a request that is not joint.

    Args:
        response: what outputs mean.
        request: checked.
        mean: of the outputs.
        spread: their covariances, or variances; see `needs_covariance`.
    """
    if response.likelihood.has_link:
        if request.link_approx != "mc":
            return response.expected_link(request.link_approx, mean, spread)
        V = torch.diag_embed(spread) if request.diagonal_output else spread
        return response.values(draw(mean, V, request.n_samples, request.generator)).mean(0)
    if not needs_covariance(response, request):
        noise = response.noise_covariance(mean, None).diagonal() if request.observation_noise else 0.0
        return mean, spread + noise
    values, covariance = response.moments(mean, spread)
    if request.observation_noise:
        covariance = covariance + response.noise_covariance(mean, spread)
    return values, covariance.diagonal(dim1=-2, dim2=-1) if request.diagonal_output else covariance


@dataclass(frozen=True)
class SampledPredictor(Predictor):
    """From outputs of the network at draws of its weights.

    Attributes:
        response: what outputs mean.
        weights: the draws.
    """

    response: Response
    weights: WeightSpace

    def __call__(self, x: Any, request: Request) -> Answer:
        """See `Predictor.__call__`."""
        if self.response.likelihood.has_link:
            return self._expected_link(x, request)
        return self._moments(x, request)

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
