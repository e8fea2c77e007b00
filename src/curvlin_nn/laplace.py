"""`Laplace`: a Gaussian posterior around a trained network, as a composition of operators."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from curvlin import FeatureOperator
from curvlin._check import positive_integer
from curvlin.gaussian import Gaussian
from curvlin.precision.base import PrecisionOperator
from curvlin_nn import likelihoods, structures
from curvlin_nn._check import numbers
from curvlin_nn.capture.state import device_of, random_state_kept
from curvlin_nn.columns import Columns
from curvlin_nn.curvature import Accumulated, accumulate
from curvlin_nn.errors import NotFittedError, StaleModelError, UnsupportedError, one_of
from curvlin_nn.evidence import Evidence, curvature_scale
from curvlin_nn.feature_maps import JacobianMap
from curvlin_nn.fingerprint import Fingerprint
from curvlin_nn.inference_mode import outside_inference_mode
from curvlin_nn.likelihoods import Likelihood
from curvlin_nn.parameters import ParameterSpace, Selection, check_model
from curvlin_nn.predictive import (
    Linearised,
    Prediction,
    Predictive,
    Predictor,
    Request,
    Response,
    Sampled,
    WeightSpace,
)
from curvlin_nn.predictive.linearised import functional_covariance
from curvlin_nn.predictive.request import check_draws, check_noise, check_pred_type
from curvlin_nn.prior import (
    GroupedPrior,
    OperatorPrior,
    Prior,
    check_precision,
    check_structure,
    infer_structure,
)
from curvlin_nn.prior_search import Optimum, maximise
from curvlin_nn.products.hessian import Hessian
from curvlin_nn.products.hessian_sums import HessianSum
from curvlin_nn.products.hessian_sums import check_structure as check_hessian
from curvlin_nn.spectrum import Spectrum, spectrum
from curvlin_nn.structures import FunctionSpace, StructureChoice, StructureFactory
from curvlin_nn.subset import random_subset

CURVATURES = {"ggn": "exact", "fisher_mc": "mc", "ef": "empirical", "hessian": "exact"}
"""The curvatures by name, with the kind of columns that each is made of; a Hessian is made of none."""


@dataclass(frozen=True)
class _Fitted:
    """What `fit` leaves: sums over the data, and what is made of them."""

    accumulated: Accumulated
    mean: Float[Tensor, " P"]
    curvature: PrecisionOperator
    fingerprint: Fingerprint

    @cached_property
    @outside_inference_mode()
    def spectrum(self) -> Spectrum | None:
        """The eigenvalues of the curvature, computed when the evidence is first asked for."""
        return spectrum(self.curvature)


class Laplace:
    """The Laplace approximation ``q(theta) = N(theta_MAP, P^-1)`` with ``P = H / (sigma^2 T) + P0``.

    H is the generalised Gauss-Newton matrix of the negative log-likelihood, summed over the data, in the
    chosen structure. Predictions linearise the network around ``theta_MAP``. The model is never changed.

    Args:
        model: a trained network that maps one argument to outputs ``(N, C)``.
        likelihood: a name (`likelihoods.available`), a loss of torch (`likelihoods.from_loss`) or a `Likelihood`.
        subset_of_weights: ``"all"`` (parameters that require a gradient), ``"last_layer"`` (the default),
            names of parameters or modules, or a predicate of name and parameter.
        hessian_structure: ``"full"``, ``"kron"`` (the default), ``"diag"``, ``"ekfac"``, ``"kfoc"``,
            ``"kron-lowrank"``, ``"block"``, ``"lowrank"``, ``"gp"`` (``"full"`` in function space), a `Structure`
            class, or one of these for each ``fnmatch`` pattern of names of parameters or modules.
        curvature: ``"ggn"``; ``"fisher_mc"``, of one draw of targets for each sample, unbiased; ``"ef"``, the empirical
            Fisher matrix; or ``"hessian"`` (``"full"``, ``"block"`` or ``"diag"``), exact.
        indefinite: what a Hessian with negative eigenvalues does; see `curvlin_nn.curvature`.
        generator: source of randomness for ``"fisher_mc"`` and `n_subset`; None is torch's default generator.
        prior_precision: a number, one per parameter tensor, one per module, one per parameter, or an
            operator.
        prior_mean: a number or a flat vector.
        sigma_noise: the standard deviation of observations, in the units of the targets; regression only.
        temperature: T; the likelihood counts with weight 1 / T.
        feature_map: not supported yet.
        prior_structure: ``"scalar"``, ``"layerwise"`` (per parameter tensor), ``"modulewise"`` or ``"diag"``;
            needed only where the length of `prior_precision` fits several.
        enable_backprop: whether predictions have gradients with respect to their inputs.
        n_subset: fit to that many samples of the data, drawn at random by `generator`, and forget the others: the
            posterior and the evidence of these (the "subset of data" of Gaussian processes), nothing scaled up. Each
            `fit` draws anew.

    Raises:
        UnsupportedError: for an option that is not served; the message says which are.
        ValueError: for a hyperparameter out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: str | nn.Module | Likelihood,
        subset_of_weights: Selection | None = None,
        hessian_structure: StructureChoice | None = None,
        *,
        curvature: str = "ggn",
        indefinite: str = "raise",
        generator: torch.Generator | None = None,
        prior_precision: float | Tensor | PrecisionOperator = 1.0,
        prior_mean: float | Tensor = 0.0,
        sigma_noise: float | Tensor = 1.0,
        temperature: float = 1.0,
        feature_map: object | None = None,
        prior_structure: str | None = None,
        enable_backprop: bool = False,
        n_subset: int | None = None,
    ) -> None:
        if curvature not in CURVATURES:
            raise UnsupportedError(f"curvature={curvature!r} is not supported; expected {one_of(CURVATURES)}")
        if feature_map is not None:
            raise UnsupportedError(
                "feature_map is not supported; the exact Jacobian is used, leave it at None"
            )
        check_model(model)
        self.model = model
        self.likelihood = likelihoods.resolve(likelihood)
        self.subset_of_weights: Selection = "last_layer" if subset_of_weights is None else subset_of_weights
        structure = "kron" if hessian_structure is None else hessian_structure
        self._hessian: tuple[str, str] | None = None
        self._structures: list[StructureFactory] = []
        self._columns = Columns(CURVATURES[curvature], generator=generator)
        if curvature == "hessian":
            self._hessian = check_hessian(structure, indefinite)
        else:
            self._structures = [structures.resolve(structure)]
        if prior_structure is not None:
            check_structure(prior_structure)
        if self.subset_of_weights != "last_layer":
            ParameterSpace.of(model, self.subset_of_weights)  # say now what is wrong with it
        self.enable_backprop = bool(enable_backprop)
        self.n_subset = None if n_subset is None else positive_integer("n_subset", n_subset)
        self._generator = generator
        self._fitted: _Fitted | None = None
        self._posterior: tuple[tuple[int, ...], PrecisionOperator] | None = None
        self._prior_structure = prior_structure
        self.prior_precision = prior_precision
        self.prior_mean = prior_mean
        self.sigma_noise = sigma_noise
        self.temperature = temperature

    # -- hyperparameters: the posterior follows, nothing is fitted again -------------------------------------

    @property
    def prior_precision(self) -> Tensor | PrecisionOperator:
        """The prior precision P0, as it was given."""
        return self._prior_precision

    @prior_precision.setter
    def prior_precision(self, value: float | Tensor | PrecisionOperator) -> None:
        checked = value if isinstance(value, PrecisionOperator) else check_precision(value)
        if self._fitted is not None:
            self._prior(checked)
        self._prior_precision = checked
        self._posterior = None

    @property
    def prior_mean(self) -> Tensor:
        """The prior mean: 0-dimensional or flat."""
        return self._prior_mean

    @prior_mean.setter
    def prior_mean(self, value: float | Tensor) -> None:
        mean = numbers("prior_mean", value)
        if not mean.is_floating_point() or mean.ndim > 1 or not bool(torch.isfinite(mean).all()):
            raise ValueError(
                f"prior_mean must be a number or a flat vector, finite, found shape {tuple(mean.shape)} of "
                f"{mean.dtype}"
            )
        if self._fitted is not None:
            _check_mean_length(mean, self._fitted)
        self._prior_mean = mean

    @property
    def sigma_noise(self) -> Float[Tensor, ""]:
        """The standard deviation of observations; 1 where the likelihood has no noise."""
        return self._sigma_noise

    @sigma_noise.setter
    def sigma_noise(self, value: float | Tensor) -> None:
        self._sigma_noise = self._checked_noise(value)
        self._posterior = None

    @property
    def temperature(self) -> float:
        """T: the likelihood counts with weight 1 / T, the prior with weight 1."""
        return self._temperature

    @temperature.setter
    def temperature(self, value: float) -> None:
        temperature = numbers("temperature", value)
        if temperature.numel() != 1:
            raise ValueError(f"temperature must be one number, found shape {tuple(temperature.shape)}")
        if not 0 < float(temperature) < float("inf"):
            raise ValueError(f"temperature must be positive and finite, found {float(temperature)}")
        self._temperature = float(temperature)
        self._posterior = None

    # -- fitting ---------------------------------------------------------------------------------------------

    @outside_inference_mode()
    def fit(self, train_loader: Iterable[Any], override: bool = True, progress_bar: bool = False) -> Laplace:
        """Accumulate the curvature over the data, around the model's present parameters.

        Args:
            train_loader: batches ``(inputs, targets)``; the number of samples is counted as they come.
            override: whether to forget earlier data; otherwise the sums continue, around the same parameters.
            progress_bar: whether to show one.

        Returns:
            The object itself. If anything raises, it is as it was before, and so is the model.

        Raises:
            DataError: if the loader yields nothing, or targets have the wrong dtype, shape or range.
            OutputError: if outputs have the wrong shape or are not finite.
            UnsupportedError: if the model uses a chosen parameter in a way that is not served.
            StaleModelError: if the sums were to continue, and the model has changed since they began.
        """
        if not override and self._fitted is not None:
            self._check_unchanged()
        if self.n_subset is not None:
            device = device_of(self.model)
            train_loader = random_subset(train_loader, self.n_subset, device, self._generator, progress_bar)
        found = accumulate(
            self.model,
            self.likelihood,
            train_loader,
            self.subset_of_weights,
            self._structures,
            columns=self._columns,
            progress_bar=progress_bar,
        )
        if self._hessian is not None:
            space = found.space
            H = Hessian(self.model, self.likelihood, train_loader, list(space.names), progress_bar)
            with random_state_kept(device_of(self.model)):
                found = replace(found, states=(HessianSum.of(H, *self._hessian),))
            H.passes.check_count(found.n_data)
        if not override and self._fitted is not None:
            found = found.merged(self._fitted.accumulated)
        mean = found.space.flatten(found.space.tensors(self.model))
        fitted = _Fitted(found, mean, found.states[0].finish(), Fingerprint.of(self.model))
        _check_mean_length(self._prior_mean, fitted)
        self._prior_of(fitted, self._prior_precision)
        self._fitted, self._posterior = fitted, None
        return self

    @property
    def n_params(self) -> int:
        """P, the number of parameters the posterior is about."""
        return self._fit.accumulated.space.size

    @property
    def n_data(self) -> int:
        """The number of samples that `fit` saw."""
        return self._fit.accumulated.n_data

    @property
    def n_outputs(self) -> int:
        """C, the number of outputs per sample."""
        return self._fit.accumulated.n_outputs

    @property
    def parameters(self) -> ParameterSpace:
        """The parameters in flat order."""
        return self._fit.accumulated.space

    @property
    def curvature(self) -> PrecisionOperator:
        """H, summed over the data, at sigma = 1 and T = 1, in the model's dtype."""
        return self._fit.curvature.to(self._fit.mean.dtype)

    # -- the posterior ---------------------------------------------------------------------------------------

    @property
    def mean(self) -> Float[Tensor, " P"]:
        """The posterior mean: the parameters the posterior was fitted around, flat."""
        return self._fit.mean

    @property
    @outside_inference_mode()
    def posterior_precision(self) -> PrecisionOperator:
        """``P = H / (sigma^2 T) + P0``, factored; made once for each choice of hyperparameters."""
        tensors = [t for t in (self._prior_precision, self._sigma_noise) if isinstance(t, Tensor)]
        versions = tuple(t._version for t in tensors)
        if self._posterior is None or self._posterior[0] != versions:
            H = self._fit.curvature.to(torch.float64)
            scale = curvature_scale(self._sigma_noise.detach(), self._temperature)
            prior = self._prior(self._prior_precision).operator(H).detach()
            self._posterior = versions, (scale * H + prior).factor(self._fit.mean.dtype)
        return self._posterior[1]

    @property
    def posterior(self) -> Gaussian:
        """The posterior over the flat parameters."""
        return Gaussian(self.mean, self.posterior_precision)

    def sample(self, n_samples: int = 100, generator: torch.Generator | None = None) -> Float[Tensor, "S P"]:
        """Draws of flat parameter vectors.

        Args:
            n_samples: how many, at least one.
            generator: source of randomness; None is torch's default generator.
        """
        shape = (positive_integer("n_samples", n_samples),)
        return self.mean + self.posterior_precision.sample(shape, generator=generator)

    # -- evidence --------------------------------------------------------------------------------------------

    def log_marginal_likelihood(
        self,
        prior_precision: float | Tensor | PrecisionOperator | None = None,
        sigma_noise: float | Tensor | None = None,
    ) -> Float[Tensor, ""]:
        """The Laplace approximation of ``log p(D)`` in nats.

        ``log p(D | theta) / T - (theta - mu)^T P0 (theta - mu) / 2 - (logdet P - logdet P0) / 2``

        Args:
            prior_precision: evaluate here instead of at the current value (which stays).
            sigma_noise: likewise.

        Returns:
            A 0-dimensional float64 tensor, differentiable in both.
        """
        precision = self._prior_precision if prior_precision is None else prior_precision
        if not isinstance(precision, PrecisionOperator):
            precision = check_precision(precision)
        noise = self._sigma_noise if sigma_noise is None else self._checked_noise(sigma_noise)
        return self._evidence().log_marginal_likelihood(self._prior(precision), noise)

    def optimize_prior_precision(
        self,
        method: str = "marglik",
        prior_structure: str = "scalar",
        optimize_noise: bool = False,
        *,
        tolerance: float = 1e-9,
        max_steps: int = 200,
        progress_bar: bool = False,
    ) -> Optimum:
        """Set the prior precision to the maximum of the log marginal likelihood.

        The problem is concave in the logarithms of the hyperparameters; Newton's method solves it from any
        start.

        Args:
            method: ``"marglik"``.
            prior_structure: which parameters share a precision: ``"scalar"``, ``"layerwise"`` (each parameter
                tensor its own), ``"modulewise"`` or ``"diag"``.
            optimize_noise: whether to optimise `sigma_noise` jointly; regression only.
            tolerance: largest relative gradient at the end.
            max_steps: Newton steps before giving up.
            progress_bar: whether to show one; a search ends long before `max_steps`.

        Returns:
            The optimum with its log marginal likelihood, gradient norm and number of steps.

        Raises:
            NoFiniteOptimumError: if there is none; it says why.
            ConvergenceError: if `max_steps` do not suffice.
            NotPositiveDefiniteError: if the prior precision at the maximum is lost in the rounding of the
                curvature.
        """
        if method != "marglik":
            raise UnsupportedError(f"method={method!r} is not supported; expected 'marglik'")
        if optimize_noise and not self.likelihood.has_noise:
            raise UnsupportedError(
                f"optimize_noise needs a likelihood with noise, found {self.likelihood.name}"
            )
        start = self._start(prior_structure)
        optimum = maximise(
            self._evidence(),
            start,
            float(self._sigma_noise.detach()),
            optimize_noise=optimize_noise,
            tolerance=tolerance,
            max_steps=max_steps,
            progress_bar=progress_bar,
        )
        self._prior_structure = prior_structure
        self.prior_precision = optimum.prior_precision.squeeze()
        if optimize_noise:
            self.sigma_noise = optimum.sigma_noise
        return optimum

    # -- prediction ------------------------------------------------------------------------------------------

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

    @outside_inference_mode()
    def functional_variance(self, Js: FeatureOperator | Float[Tensor, "N C P"]) -> Float[Tensor, "N C C"]:
        """``J P^-1 J^T`` of each sample, for Jacobians in factored form (`JacobianMap`) or multiplied out."""
        return functional_covariance(self.posterior_precision, Js, joint=False)

    @outside_inference_mode()
    def functional_covariance(self, Js: FeatureOperator | Float[Tensor, "N C P"]) -> Float[Tensor, "NC NC"]:
        """The same between all outputs of all samples, sample-major."""
        return functional_covariance(self.posterior_precision, Js, joint=True)

    # -- what the above is made of ---------------------------------------------------------------------------

    @property
    def _fit(self) -> _Fitted:
        if self._fitted is None:
            raise NotFittedError("this Laplace object is not fitted; call fit(train_loader) first")
        return self._fitted

    def _predictor(self, pred_type: str, progress_bar: bool = False) -> Predictor:
        check_pred_type(pred_type, FunctionSpace in self._structures)
        shape = self._fit.accumulated.output_shape or (1,)
        response = Response(self.likelihood, shape, self._sigma_noise.detach())
        if pred_type == "nn":
            return Sampled(response, self._weight_space(progress_bar))
        return Linearised(response, self._predictive(progress_bar))

    def _predictive(self, progress_bar: bool = False) -> Predictive:
        self._check_unchanged()
        jacobians = JacobianMap.of(self._fit.accumulated.recorder, differentiable=self.enable_backprop)
        return Predictive(jacobians, self.posterior_precision, progress_bar)

    def _weight_space(self, progress_bar: bool = False) -> WeightSpace:
        self._check_unchanged()
        precision = self.posterior_precision
        return WeightSpace(
            self.model, self.parameters, self.mean, precision, self.enable_backprop, progress_bar
        )

    def _check_unchanged(self) -> None:
        """Every parameter and buffer counts, those outside of the posterior included: outputs depend on all."""
        name = self._fit.fingerprint.difference(self.model)
        if name is not None:
            raise StaleModelError(f"{name!r} of the model changed since fit; call fit again, or restore it")

    def _evidence(self) -> Evidence:
        fit = self._fit
        return Evidence(
            self.likelihood, fit.accumulated.statistics, fit.curvature, fit.spectrum, self._temperature
        )

    def _prior(self, precision: Tensor | PrecisionOperator) -> Prior:
        return self._prior_of(self._fit, precision)

    def _prior_of(self, fitted: _Fitted, precision: Tensor | PrecisionOperator) -> Prior:
        deviation = fitted.mean.double() - self._prior_mean.to(fitted.mean).double()
        if isinstance(precision, PrecisionOperator):
            if precision.size != len(deviation):
                raise ValueError(
                    f"prior_precision must have {len(deviation)} rows like the posterior, found "
                    f"{precision.size}"
                )
            return OperatorPrior(precision, deviation)
        space = fitted.accumulated.space
        structure = infer_structure(space, precision, self._prior_structure)
        return GroupedPrior.of(space, structure, precision.reshape(-1), deviation)

    def _start(self, prior_structure: str) -> GroupedPrior:
        """The current precision, over the groups of another structure."""
        current = self._prior(self._prior_precision)
        if not isinstance(current, GroupedPrior):
            raise UnsupportedError(
                "a prior given as an operator cannot be optimised; set prior_precision to a number first"
            )
        return current.regrouped(self._fit.accumulated.space, prior_structure)

    def _checked_noise(self, value: float | Tensor) -> Tensor:
        noise = numbers("sigma_noise", value)
        if noise.numel() != 1:
            raise UnsupportedError(f"sigma_noise must be one number, found shape {tuple(noise.shape)}")
        if not bool((noise > 0) & torch.isfinite(noise)):
            raise ValueError(f"sigma_noise must be positive and finite, found {float(noise)}")
        if not self.likelihood.has_noise and float(noise) != 1:
            raise ValueError(
                f"sigma_noise must be 1 for {self.likelihood.name}, which has no noise, found {float(noise)}"
            )
        return noise.reshape(())


def _check_mean_length(mean: Tensor, fitted: _Fitted) -> None:
    if mean.ndim == 1 and mean.shape != fitted.mean.shape:
        raise ValueError(f"prior_mean must have {len(fitted.mean)} entries, found {len(mean)}")
