"""`Laplace`: a Gaussian posterior around a trained network, as a composition of operators."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from curvlin._check import positive_integer
from curvlin.gaussian import Gaussian
from curvlin.precision.base import PrecisionOperator
from curvlin_nn import likelihoods, structures
from curvlin_nn._check import numbers
from curvlin_nn.batches import Labelled
from curvlin_nn.capture import Recorder
from curvlin_nn.capture.state import device_of, random_state_kept
from curvlin_nn.columns import Columns
from curvlin_nn.curvature import Accumulated, accumulate
from curvlin_nn.errors import NotFittedError, OutputError, StaleModelError, UnsupportedError, one_of
from curvlin_nn.evidence import Evidence, curvature_scale
from curvlin_nn.feature_maps import FeatureMap, JacobianMap
from curvlin_nn.feature_posterior import FeatureSpace
from curvlin_nn.fingerprint import Fingerprint
from curvlin_nn.inference_mode import outside_inference_mode
from curvlin_nn.likelihoods import Likelihood
from curvlin_nn.parameters import ParameterSpace, Selection, check_model
from curvlin_nn.predictive import Predictive, check_link, draw
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
from curvlin_nn.residual import Residual, ResidualPredictive
from curvlin_nn.spectrum import Spectrum, spectrum
from curvlin_nn.storage import posterior as stored
from curvlin_nn.storage.checkpoint import Checkpoint
from curvlin_nn.storage.files import StrPath, read, write
from curvlin_nn.structures import StructureChoice, StructureFactory
from curvlin_nn.summary import Summary, summarise

CURVATURES = {"ggn": "exact", "fisher_mc": "mc", "ef": "empirical", "hessian": "exact"}
"""The curvatures by name, with the kind of columns that each is made of; a Hessian is made of none."""


@dataclass(frozen=True)
class _Fitted:
    """What `fit` leaves: sums over the data, and what is made of them."""

    accumulated: Accumulated
    mean: Float[Tensor, " P"]
    curvature: PrecisionOperator
    fingerprint: Fingerprint
    seconds: float = 0.0
    of_map: Mapping[str, Tensor] = field(default_factory=dict)  # checksums

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
            ``"kron-lowrank"``, ``"block"``, ``"lowrank"``, a `Structure` class, or one of these for each ``fnmatch``
            pattern of names of parameters or modules.
        curvature: ``"ggn"``; ``"fisher_mc"``, of one draw of targets for each sample, unbiased; ``"ef"``, the empirical
            Fisher matrix; or ``"hessian"`` (``"full"``, ``"block"`` or ``"diag"``), exact.
        indefinite: what a Hessian with negative eigenvalues does; see `curvlin_nn.curvature`.
        generator: source of randomness for ``"fisher_mc"``; None is torch's default generator.
        prior_precision: a number, one per parameter tensor, one per module, one per parameter, or an
            operator.
        prior_mean: a number or a flat vector.
        sigma_noise: the standard deviation of observations, in the units of the targets; regression only.
        temperature: T; the likelihood counts with weight 1 / T.
        feature_map: features in the place of the Jacobian, such as a `NystromMap`: the posterior is then over their K
            coordinates, ``"full"``, a deviation from the network with mean zero; see `curvlin_nn.feature_posterior`.
        residual: with such a map, whether predictions keep the prior variance that its features leave out.
        prior_structure: ``"scalar"``, ``"layerwise"`` (per parameter tensor), ``"modulewise"`` or ``"diag"``;
            needed only where the length of `prior_precision` fits several.
        dict_key_y: the name of the targets in loaders that yield mappings, as those of Hugging Face do.

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
        feature_map: FeatureMap | None = None,
        residual: bool = True,
        prior_structure: str | None = None,
        dict_key_y: str = "labels",
    ) -> None:
        if curvature not in CURVATURES:
            raise UnsupportedError(f"curvature={curvature!r} is not supported; expected {one_of(CURVATURES)}")
        check_model(model)
        self.feature_map = feature_map
        self._features: FeatureSpace | None = None
        if feature_map is not None:
            self._features = FeatureSpace.of(
                feature_map, residual, subset_of_weights, hessian_structure, curvature
            )
            subset_of_weights, hessian_structure = "all", "full"
        self.model = model
        self.likelihood = likelihoods.resolve(likelihood)
        self.subset_of_weights: Selection = "last_layer" if subset_of_weights is None else subset_of_weights
        structure = "kron" if hessian_structure is None else hessian_structure
        self._curvature = curvature
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
        self._fitted: _Fitted | None = None
        self._posterior: tuple[tuple[int, ...], PrecisionOperator] | None = None
        self._prior_structure = prior_structure
        self.dict_key_y = dict_key_y
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
    def fit(
        self,
        train_loader: Iterable[Any],
        override: bool = True,
        progress_bar: bool = False,
        *,
        checkpoint: StrPath | None = None,
        every: int = 100,
    ) -> Laplace:
        """Accumulate the curvature over the data, around the model's present parameters.

        Args:
            train_loader: batches ``(inputs, targets)``, or mappings with targets under `dict_key_y`; the number of
                samples is counted as they come.
            override: whether to forget earlier data; otherwise the sums continue, around the same parameters.
            progress_bar: whether to show one.
            checkpoint: a file that the sums are stored in as they grow. The same call goes on from it after an
                interruption of any kind, and removes it at the end; the loader must yield the same batches again.
            every: how many batches there are between two writes of it.

        Returns:
            The object itself. If anything raises, it is as it was before, and so is the model.

        Raises:
            DataError: if the loader yields nothing, or targets have the wrong dtype, shape or range.
            OutputError: if outputs have the wrong shape or are not finite.
            UnsupportedError: if the model uses a chosen parameter in a way that is not served.
            StaleModelError: if the sums were to continue, and the model has changed since they began.
            StorageError: if the checkpoint cannot be written, or is that of another fit or of other data.
        """
        begin = time.perf_counter()
        if not override and self._fitted is not None:
            self._check_unchanged()
        if checkpoint is not None and self._hessian is not None:
            raise UnsupportedError("checkpoint is not supported for curvature='hessian'; leave it at None")
        train_loader = Labelled(train_loader, self.dict_key_y)
        file = None if checkpoint is None else Checkpoint(checkpoint, every, stored.choices_of(self))
        found = accumulate(
            self.model,
            self.likelihood,
            train_loader,
            self.subset_of_weights if self.feature_map is None else self.feature_map,
            self._structures,
            columns=self._columns,
            progress_bar=progress_bar,
            checkpoint=file,
        )
        if self._hessian is not None:
            space = found.space
            H = Hessian(self.model, self.likelihood, train_loader, list(space.names), progress_bar)
            with random_state_kept(device_of(self.model)):
                found = replace(found, states=(HessianSum.of(H, *self._hessian),))
            H.passes.check_count(found.n_data)
        if not override and self._fitted is not None:
            found = found.merged(self._fitted.accumulated)
        self._finish(found, begin)
        if file is not None:
            file.remove()
        return self

    def _finish(self, found: Accumulated, begin: float) -> None:
        """Be fitted with these sums, around the model's present parameters; it took the time since `begin`."""
        curvature, fingerprint = found.states[0].finish(), Fingerprint.of(self.model)
        if self._features is None:
            mean, of_map = found.space.flatten(found.space.tensors(self.model)), {}
        else:
            mean, of_map = self._features.weights(self.model), self._features.checksums()
        fitted = _Fitted(found, mean, curvature, fingerprint, time.perf_counter() - begin, of_map)
        _check_mean_length(self._prior_mean, fitted)
        self._prior_of(fitted, self._prior_precision)
        self._fitted, self._posterior = fitted, None

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
        """The posterior mean: the parameters the posterior was fitted around, flat; zero for features."""
        return self._fit.mean if self._features is None else self._fit.mean.new_zeros(self.n_params)

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

        Raises:
            UnsupportedError: for a posterior on features, which are no weights.
        """
        if self._features is not None:
            raise UnsupportedError(
                "sample draws weights, and a posterior with a feature_map has none; take functional_samples"
            )
        shape = (positive_integer("n_samples", n_samples),)
        return self.mean + self.posterior_precision.sample(shape, generator=generator)

    # -- storage ---------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Sums over the data, hyperparameters and what they are of: tensors and plain values, without the model.

        ``torch.load(file, weights_only=True)`` reads them. Tensors are not copied.

        Raises:
            NotFittedError: before `fit`.
            UnsupportedError: for a structure or a prior that cannot be stored; the message says what to do.
        """
        return stored.state_of(self)

    @outside_inference_mode()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Be what another object was, hyperparameters included, if made with the same choices for the same model.

        Args:
            state: what its `state_dict` returned. Tensors are copied, to the device of the model.

        Raises:
            StorageError: if it is no such state, or that of other choices; the object is as it was.
            StaleModelError: if it is that of another model, or of other values of its parameters or buffers.
        """
        stored.take_up(self, state)

    def save(self, path: StrPath) -> None:
        """Put the `state_dict` into one safetensors file, whole or not at all; no pickle, and no model.

        Args:
            path: of the file, in a folder that exists.

        Raises:
            NotFittedError: before `fit`.
            StorageError: if it cannot be written; what was there stays.
            UnsupportedError: for a structure or a prior that cannot be stored; the message says what to do.
        """
        write(path, stored.KIND, self.state_dict())

    @classmethod
    @outside_inference_mode()
    def load(
        cls,
        path: StrPath,
        model: nn.Module,
        *,
        likelihood: str | nn.Module | Likelihood | None = None,
        hessian_structure: StructureChoice | None = None,
        feature_map: FeatureMap | None = None,
    ) -> Laplace:
        """The object that was saved; predictions, evidence and further fits are as they would have been.

        Args:
            path: of the file.
            model: the model that it was fitted to, with the same parameters and buffers.
            likelihood: the one it had, needed only where no name stands for it (such as `likelihoods.Custom`).
            hessian_structure: likewise, such as a class of one's own that is not registered.
            feature_map: the one it had, with the same features; no file holds it.

        Raises:
            FileNotFoundError: if there is no such file.
            StorageError: if it is damaged, of another kind, or something must be given that no file holds.
            StaleModelError: if the model is another one, or holds other values.
        """
        state = read(path, stored.KIND)
        given = stored.arguments(state, likelihood, hessian_structure, feature_map)
        la = cls(model, **given)
        la.load_state_dict(state)
        return la

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

    @outside_inference_mode()
    def describe(self) -> Summary:
        """The posterior layer by layer: structure, memory, prior and effective number of parameters.

        Returns:
            Data; ``str`` and `rich` show it as a table.

        Raises:
            NotFittedError: before `fit`.
            NotPositiveDefiniteError: if the prior is lost in the rounding of the curvature.
        """
        fit, prior, noise = self._fit, self._prior(self._prior_precision), self._sigma_noise.detach()
        with torch.no_grad():
            return summarise(self.model, fit.accumulated, self._evidence(), prior, noise, fit.seconds)

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
        """The predictive distribution at x, from the network linearised around its parameters.

        Args:
            x: what the model takes.
            pred_type: ``"glm"``.
            link_approx: a closed form of the likelihood's expected link, or ``"mc"`` for `n_samples` draws of the
                outputs. The default is the likelihood's first closed form: ``"probit"`` for classes, ``"exact"`` for
                counts. Regression has no link, and takes the default only.
            joint: for regression, the covariance between all samples, sample-major.
            diagonal_output: variances of the outputs only (for ``"mc"``: outputs drawn independently).
            n_samples: the number of draws for ``"mc"``.
            generator: source of randomness for ``"mc"``; None is torch's default generator.
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
        if pred_type != "glm":
            raise UnsupportedError(f"pred_type={pred_type!r} is not supported; expected 'glm'")
        if observation_noise and not self.likelihood.has_additive_noise:
            raise UnsupportedError(
                f"observation_noise needs a likelihood with noise, found {self.likelihood.name}"
            )
        if joint and diagonal_output:
            raise UnsupportedError("joint and diagonal_output exclude each other; choose one")
        link_approx = check_link(self.likelihood, link_approx)
        if not self.likelihood.has_link:
            return self._moments(x, joint, diagonal_output, observation_noise, progress_bar)
        if joint:
            raise UnsupportedError(
                f"joint is not supported for {self.likelihood.name}; use functional_samples for joint draws "
                "of outputs"
            )
        if link_approx == "mc":
            positive_integer("n_samples", n_samples)
        predictive = self._predictive(progress_bar)
        if link_approx != "mc":
            approximation = self.likelihood.link_approximations[link_approx]
            return self._linked(approximation, *predictive.mean_and_variance(x))
        if diagonal_output:
            mean, variance = predictive.mean_and_variance(x)
            covariance = torch.diag_embed(variance)
        else:
            mean, covariance = predictive.mean_and_covariance(x)
        return self._linked(self.likelihood.link, draw(mean, covariance, n_samples, generator)).mean(0)

    @outside_inference_mode()
    def functional_samples(
        self, x: Any, n_samples: int = 100, generator: torch.Generator | None = None
    ) -> Float[Tensor, "S N C"]:
        """Draws of the outputs, jointly Gaussian over the samples in x.

        Each is the linearised network at one draw of its parameters: one generator state gives the same
        functions at any x.
        """
        return self._predictive().samples(x, positive_integer("n_samples", n_samples), generator)

    @outside_inference_mode()
    def predictive_samples(
        self,
        x: Any,
        n_samples: int = 100,
        generator: torch.Generator | None = None,
        observation_noise: bool = False,
    ) -> Float[Tensor, "S N C"]:
        """Draws of the prediction: probabilities, or for regression outputs (with noise on request)."""
        if observation_noise and not self.likelihood.has_additive_noise:
            raise UnsupportedError(
                f"observation_noise needs a likelihood with noise, found {self.likelihood.name}"
            )
        outputs = self.functional_samples(x, n_samples, generator)
        if self.likelihood.has_link:
            return self._linked(self.likelihood.link, outputs)
        if self.likelihood.is_linear and not observation_noise:
            return outputs
        terms = self.likelihood.terms(self._rows(outputs))
        samples = self.likelihood.link(terms)
        if observation_noise:
            targets = self.likelihood.draw(terms, terms, 1, generator).reshape(samples.shape)
            samples = samples + self._sigma_noise.detach().to(samples) * (targets - samples)
        return samples.reshape(*outputs.shape[:2], -1)

    @outside_inference_mode()
    def residual_covariance(self, x: Any) -> Residual:
        """The prior variance that the features of a `feature_map` leave out, as predictions at x add it.

        Raises:
            UnsupportedError: where there is none: without such a map, or with ``residual=False``.
        """
        predictive = self._predictive()
        if not isinstance(predictive, ResidualPredictive):
            raise UnsupportedError(
                "residual_covariance needs a feature_map that stands in for a Jacobian, and residual=True"
            )
        return predictive.residual(x)

    def _linked(self, link: Callable[..., Tensor], *outputs: Float[Tensor, "*batch C"]) -> Tensor:
        """A function of terms, in the shape of the model's outputs."""
        rows = [self._rows(f) for f in outputs]
        found = link(*(self.likelihood.terms(f) for f in rows))
        shape = (*outputs[0].shape[:-1], *self._output_shape)
        return self.likelihood.outputs(found, rows[0]).reshape(shape)

    def _rows(self, outputs: Float[Tensor, "*batch C"]) -> Float[Tensor, "B ..."]:
        """Outputs in the shape that the model gave them in `fit`."""
        if outputs.shape[-1] != self.n_outputs:
            raise OutputError(
                f"model outputs must have {self.n_outputs} numbers for each sample as in fit, found "
                f"{outputs.shape[-1]}"
            )
        return outputs.reshape(-1, *self._output_shape)

    def _moments(
        self, x: Any, joint: bool, diagonal_output: bool, observation_noise: bool, progress_bar: bool
    ) -> tuple[Tensor, Tensor]:
        predictive = self._predictive(progress_bar)
        if not self.likelihood.is_linear:
            return self._nonlinear_moments(predictive, x, joint, diagonal_output, observation_noise)
        if diagonal_output:
            mean, spread = predictive.mean_and_variance(x)
        else:
            mean, spread = predictive.joint(x) if joint else predictive.mean_and_covariance(x)
        if observation_noise:
            noise = self._noise_covariance(mean.view(-1, self.n_outputs), None)
            if joint:
                noise = torch.block_diag(*[noise] * (len(mean) // self.n_outputs))
            spread = spread + (noise.diagonal() if diagonal_output else noise)
        return mean, spread

    def _nonlinear_moments(
        self, predictive: Predictive, x: Any, joint: bool, diagonal_output: bool, observation_noise: bool
    ) -> tuple[Tensor, Tensor]:
        if joint:
            raise UnsupportedError(
                f"joint is not supported for {self.likelihood.name}; use functional_samples for joint draws "
                "of outputs"
            )
        f, V = predictive.mean_and_covariance(x)
        places = torch.arange(f.shape[-1], device=f.device).reshape(1, *self._output_shape)
        # The first number of every term comes first.
        order = self.likelihood.terms(places).squeeze(0).mT.flatten()
        f, V = f[:, order], V[:, order][:, :, order]
        mean, covariance = self.likelihood.moments(f, V)
        if observation_noise:
            covariance = covariance + self._noise_covariance(f, V)
        return mean, covariance.diagonal(dim1=-2, dim2=-1) if diagonal_output else covariance

    def _noise_covariance(self, mean: Tensor, covariance: Tensor | None) -> Tensor:
        """Of the targets given all outputs of a sample."""
        return self._sigma_noise.detach().to(mean).square() * self.likelihood.noise_covariance(
            mean, covariance
        )

    # -- what the above is made of ---------------------------------------------------------------------------

    @property
    def _output_shape(self) -> tuple[int, ...]:
        """Of one sample's outputs; one number counts as an axis of length one."""
        return self._fit.accumulated.output_shape or (1,)

    @property
    def _fit(self) -> _Fitted:
        if self._fitted is None:
            raise NotFittedError("this Laplace object is not fitted; call fit(train_loader) first")
        return self._fitted

    def _predictive(self, progress_bar: bool = False) -> Predictive:
        self._check_unchanged()
        if self._features is not None:
            prior = self._prior(self._prior_precision)
            return self._features.predictive(self.posterior_precision, prior, progress_bar)
        recorder = self._fit.accumulated.recorder
        assert isinstance(recorder, Recorder)
        return Predictive(JacobianMap.of(recorder), self.posterior_precision, progress_bar)

    def _check_unchanged(self) -> None:
        """Every parameter and buffer counts, those outside of the posterior included: outputs depend on all."""
        name = self._fit.fingerprint.difference(self.model)
        if name is not None:
            raise StaleModelError(f"{name!r} of the model changed since fit; call fit again, or restore it")
        if self._features is not None:
            self._features.check_unchanged(self._fit.of_map)

    def _evidence(self) -> Evidence:
        fit = self._fit
        return Evidence(
            self.likelihood, fit.accumulated.statistics, fit.curvature, fit.spectrum, self._temperature
        )

    def _prior(self, precision: Tensor | PrecisionOperator) -> Prior:
        return self._prior_of(self._fit, precision)

    def _prior_of(self, fitted: _Fitted, precision: Tensor | PrecisionOperator) -> Prior:
        deviation = fitted.mean.double() - self._prior_mean.to(fitted.mean).double()
        if self._features is not None and self._features.stands_in:
            return self._features.prior(precision, deviation)
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
