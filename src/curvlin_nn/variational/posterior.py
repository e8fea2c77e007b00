"""What the variational posteriors have in common: how they are trained, asked, and kept in a file."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from curvlin._random import checked_generator
from curvlin.errors import NotPositiveDefiniteError
from curvlin_nn import likelihoods
from curvlin_nn.capture.state import device_of
from curvlin_nn.columns import Columns
from curvlin_nn.errors import NotFittedError, TrainingDivergedError, UnsupportedError
from curvlin_nn.fingerprint import Fingerprint
from curvlin_nn.hyperparameters import checked_noise
from curvlin_nn.likelihoods import Likelihood
from curvlin_nn.metrics import evaluate
from curvlin_nn.parameters import check_model
from curvlin_nn.predictive import GaussianPredictor, OutputGaussian, PosteriorPredictive, Predictor, Response
from curvlin_nn.predictive.request import check_pred_type
from curvlin_nn.variational.dual import Dual
from curvlin_nn.variational.expected_likelihood import check_expected
from curvlin_nn.variational.inducing import Inducing, InducingPoints, check_inducing
from curvlin_nn.variational.training import Loss, TrainingHistory, TrainingOptions, train


class VariationalFit(Protocol):
    """What a fit leaves."""

    @property
    def dual(self) -> Dual:
        """What the inducing variables take from the prior."""

    @property
    def points(self) -> InducingPoints:
        """The inducing points."""

    @property
    def sigma_noise(self) -> Float[Tensor, "*E"]:
        """The noise scale."""

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Of one sample's outputs; one number counts as an axis of length one."""

    @property
    def fingerprint(self) -> Fingerprint:
        """Of the model as it was."""

    @property
    def history(self) -> TrainingHistory:
        """How it went."""

    @property
    def n_data(self) -> int:
        """The number of training samples."""


FitT = TypeVar("FitT", bound=VariationalFit)


class VariationalPosterior(PosteriorPredictive, Generic[FitT]):
    """A Gaussian around a network's output whose covariance is trained on batches; see `VaLLA` and `FMGP`."""

    _over: ClassVar[str]
    """What it is a posterior of, in messages."""

    _is_process: ClassVar[bool]
    """Whether ``pred_type="gp"`` is a name for its predictions."""

    def __init__(
        self,
        model: nn.Module,
        likelihood: str | nn.Module | Likelihood,
        n_inducing: int | None,
        inducing: Inducing,
        sigma_noise: float | Tensor,
        dict_key_y: str,
        generator: torch.Generator | None,
    ) -> None:
        check_model(model)
        check_inducing(inducing, n_inducing)
        self.model = model
        self.likelihood = check_expected(likelihoods.resolve(likelihood))
        self.n_inducing = 100 if n_inducing is None else n_inducing
        self.inducing = inducing
        self._sigma_noise = checked_noise(sigma_noise, self.likelihood, Columns()).detach()
        self.dict_key_y = dict_key_y
        self._generator = checked_generator(generator)
        self._fitted: FitT | None = None

    @property
    def sigma_noise(self) -> Float[Tensor, "*E"]:
        """The standard deviation of observations: as it was given, or as `fit` found it."""
        return self._sigma_noise if self._fitted is None else self._fitted.sigma_noise

    @property
    def inducing_points(self) -> InducingPoints:
        """The inducing inputs, and the output that each stands for."""
        return self._fit.points

    @property
    def history(self) -> TrainingHistory:
        """How the fit went; its losses are what is minimised, of all data, estimated from batches."""
        return self._fit.history

    @property
    def n_data(self) -> int:
        """The number of samples that it was fitted to."""
        return self._fit.n_data

    @property
    def kl_divergence(self) -> Float[Tensor, ""]:
        """From the prior, in nats, without the part of the mean, which is not learned."""
        return self._fit.dual.divergence()

    @property
    def _fit(self) -> FitT:
        if self._fitted is None:
            name = type(self).__name__
            raise NotFittedError(f"this {name} object is not fitted; call fit(train_loader) first")
        return self._fitted

    def _checked(self) -> FitT:
        """What the fit left, if the model is still the same."""
        fit = self._fit
        fit.fingerprint.check_unchanged(self.model)
        return fit

    def _predictor(self, pred_type: str, progress_bar: bool = False) -> Predictor:
        check_pred_type(pred_type, self._is_process)
        if pred_type == "nn":
            raise UnsupportedError(
                f"pred_type='nn' runs the network at draws of its weights, and {type(self).__name__} is a posterior of "
                f"{self._over}; take 'glm'"
            )
        fit = self._checked()
        response = Response(self.likelihood, lambda: fit.output_shape, fit.sigma_noise)
        return GaussianPredictor(response, self._outputs(progress_bar))

    @abstractmethod
    def _outputs(self, progress_bar: bool) -> OutputGaussian:
        """The Gaussian that predictions are made from, after a fit to the model as it is."""

    def _train(
        self,
        optimizer: torch.optim.Optimizer,
        loss: Loss,
        loader: Iterable[Any],
        options: TrainingOptions,
        history: TrainingHistory,
        fitted: Callable[[], FitT],
        validation_loader: Iterable[Any] | None,
        progress_bar: bool,
    ) -> None:
        """Train, and hold what is found.

        Args:
            optimizer: as `train` takes it; so are the following.
            loss: of a batch.
            loader: the training data.
            options: how long.
            history: where to write how it goes.
            fitted: what the numbers that are trained stand for now.
            validation_loader: held-out data for the score; None for none.
            progress_bar: whether to show one.

        Raises:
            TrainingDivergedError: if numbers are no longer finite, with the best state before.
        """

        @torch.no_grad()
        def now() -> VariationalPosterior[FitT]:
            found = copy.copy(self)
            found._fitted = fitted()
            return found

        def score() -> float:
            assert validation_loader is not None
            try:
                return evaluate(now(), validation_loader, ["nll"])["nll"]
            except NotPositiveDefiniteError as error:
                raise FloatingPointError(str(error)) from error

        try:
            train(
                optimizer,
                loss,
                loader,
                device_of(self.model),
                options,
                score=None if validation_loader is None else score,
                history=history,
                description=type(self).__name__,
                progress_bar=progress_bar,
            )
        except TrainingDivergedError as error:
            error.best = now()
            raise
        self._fitted = now()._fit
