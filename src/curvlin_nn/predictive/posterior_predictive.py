"""`PosteriorPredictive`: how a posterior over functions is asked for predictions, and kept, whatever kind it is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from curvlin._check import positive_integer
from curvlin_nn.inference_mode import outside_inference_mode
from curvlin_nn.likelihoods import Likelihood
from curvlin_nn.predictive.prediction import Prediction
from curvlin_nn.predictive.predictor import Predictor
from curvlin_nn.predictive.request import Request, check_draws, check_noise
from curvlin_nn.storage.files import StrPath, write


class PosteriorPredictive(ABC):
    """What `Laplace` and the variational posteriors have in common: the questions that their users ask.

    Attributes:
        likelihood: of targets given outputs.
        dict_key_y: the name of the targets in loaders that yield mappings.
    """

    likelihood: Likelihood
    dict_key_y: str = "labels"

    @outside_inference_mode()
    def __call__(
        self,
        x: Any,
        pred_type: str = "glm",
        link_approx: str = "probit",
        joint: bool = False,
        diagonal_output: bool = False,
        n_samples: int = 100,
        generator: torch.Generator | None = None,
        observation_noise: bool = False,
        progress_bar: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The predictive distribution at x.

        Args:
            x: what the model takes.
            pred_type: ``"glm"``, of the network linearised around its parameters; ``"nn"``, of the network itself at
                `n_samples` draws of its parameters; or ``"gp"``, which is ``"glm"`` of the structure of that name.
            link_approx: a closed form of the likelihood's expected link, or ``"mc"`` for `n_samples` draws of the
                outputs. The default is the likelihood's first closed form: ``"probit"`` for classes, ``"exact"`` for
                counts. Classes have ``"mean_field"``, ``"bridge"`` and ``"bridge_norm"`` too
                (`likelihoods.expected_softmax`). Regression has no link, and takes the default only; so does
                ``"nn"``, whose outputs are draws.
            joint: for regression, the covariance between all samples, sample-major.
            diagonal_output: variances of the outputs only (for ``"mc"``: outputs drawn independently).
            n_samples: the number of draws for ``"mc"`` and ``"nn"``.
            generator: source of randomness for draws; None is torch's default generator.
            observation_noise: for regression, whether to add the covariance of the noise: ``sigma_noise^2``, or what
                the model says of it.
            progress_bar: whether to show one over the parts that `x` is taken in.

        Returns:
            Where the likelihood has a link, its expectation: probabilities or rates ``(N, C)``, or in the shape of the
            outputs where these have more axes. For regression and
            rewards, mean ``(N, C)`` and covariance ``(N, C, C)``, with `diagonal_output` variance ``(N, C)``, with
            `joint` ``(N C,)`` and ``(N C, N C)``.

        Raises:
            UnsupportedError: for a combination that is not served.
            NotFittedError: before `fit`.
            StaleModelError: if a parameter or buffer of the model changed since `fit`.
        """
        request = Request(
            pred_type, link_approx, joint, diagonal_output, n_samples, generator, observation_noise
        ).checked(self.likelihood)
        return self._predictor(pred_type, progress_bar)(x, request)

    @outside_inference_mode()
    def predict(
        self,
        x: Any,
        pred_type: str = "glm",
        link_approx: str = "probit",
        n_samples: int = 100,
        generator: torch.Generator | None = None,
        progress_bar: bool = False,
    ) -> Prediction:
        """The same as an object: mean and covariance, probabilities, and uncertainty taken apart.

        Args:
            x: what the model takes.
            pred_type: as of a call.
            link_approx: as of a call.
            n_samples: the number of draws, at least two; of ``"glm"`` they are made when first needed.
            generator: source of randomness, which decides about the draws now, whenever they are made.
            progress_bar: as of a call.

        Raises:
            UnsupportedError, NotFittedError, StaleModelError: as a call does.
        """
        check_draws(n_samples, 2)
        request = Request(pred_type, link_approx, n_samples=n_samples, generator=generator)
        return self._predictor(pred_type, progress_bar).predict(x, request.checked(self.likelihood))

    @outside_inference_mode()
    def functional_samples(
        self, x: Any, n_samples: int = 100, generator: torch.Generator | None = None, pred_type: str = "glm"
    ) -> Float[Tensor, "S N C"]:
        """Draws of the outputs, jointly over the samples in x.

        Each is the network, linearised (Gaussian) or for ``pred_type="nn"`` itself, at one draw of its parameters:
        one generator state gives the same functions at any x, and the same parameters for either.
        """
        n_samples = positive_integer("n_samples", n_samples)
        return self._predictor(pred_type).functional_samples(x, n_samples, generator)

    @outside_inference_mode()
    def predictive_samples(
        self,
        x: Any,
        n_samples: int = 100,
        generator: torch.Generator | None = None,
        observation_noise: bool = False,
        pred_type: str = "glm",
    ) -> Float[Tensor, "S N C"]:
        """Draws of the prediction: probabilities, or for regression outputs (with noise on request)."""
        check_noise(self.likelihood, observation_noise)
        n_samples = positive_integer("n_samples", n_samples)
        return self._predictor(pred_type).predictive_samples(x, n_samples, generator, observation_noise)

    def save(self, path: StrPath) -> None:
        """Put the posterior into one safetensors file, whole or not at all; no pickle, and no model.

        Args:
            path: of the file, in a folder that exists.

        Raises:
            NotFittedError: before `fit`.
            StorageError: if it cannot be written; what was there stays.
            UnsupportedError: for a structure, a prior, inducing inputs or a kernel that cannot be stored; the message
                says what to do.
        """
        write(path, *self._stored())

    @abstractmethod
    def _stored(self) -> tuple[str, dict[str, Any]]:
        """What a file of it says that it is, and what it holds."""

    @abstractmethod
    def _predictor(self, pred_type: str, progress_bar: bool = False) -> Predictor:
        """What answers; it checks that the posterior can be asked now, and in this way."""
