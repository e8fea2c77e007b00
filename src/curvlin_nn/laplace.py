"""`Laplace`: a Gaussian posterior around a trained network, as a composition of operators."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, NoReturn

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from curvlin import FeatureOperator
from curvlin._check import positive_integer
from curvlin.gaussian import Gaussian
from curvlin.precision.base import PrecisionOperator
from curvlin.projection import Projection
from curvlin_nn import arguments, likelihoods, posterior
from curvlin_nn.batches import Labelled
from curvlin_nn.capture.state import device_of
from curvlin_nn.curvature import Accumulated
from curvlin_nn.curvature_choice import curvature_choice
from curvlin_nn.data_subset import random_subset
from curvlin_nn.errors import NoFiniteOptimumError, NotFittedError, UnsupportedError, one_of
from curvlin_nn.evidence import Evidence, prior_not_lost
from curvlin_nn.evidence_bound import left_out_curvature
from curvlin_nn.feature_maps import FeatureMap
from curvlin_nn.feature_posterior import FeatureSpace
from curvlin_nn.fitted import Fitted
from curvlin_nn.held_out import METHODS, Grid, HeldOutOptimum, search
from curvlin_nn.hyperparameters import check_knows_noise, checked_mean, checked_noise, checked_temperature
from curvlin_nn.inference_mode import outside_inference_mode
from curvlin_nn.likelihoods import Likelihood
from curvlin_nn.noise_search import maximise_by_output
from curvlin_nn.parameters import ParameterSpace, Selection, check_model
from curvlin_nn.predictive import (
    GaussianPredictor,
    PosteriorPredictive,
    Predictive,
    Predictor,
    Response,
    SampledPredictor,
    WeightSpace,
)
from curvlin_nn.predictive.linearised import functional_covariance
from curvlin_nn.predictive.request import Request, check_pred_type
from curvlin_nn.prior import GroupedPrior, Prior, check_precision, check_structure
from curvlin_nn.prior_projection import check_projection, project_prior
from curvlin_nn.prior_search import Optimum, maximise
from curvlin_nn.residual import Residual, ResidualPredictive
from curvlin_nn.storage import posterior as stored
from curvlin_nn.storage.checkpoint import Checkpoint
from curvlin_nn.storage.files import StrPath, read
from curvlin_nn.structures import StructureChoice
from curvlin_nn.subnetwork import SubnetMask
from curvlin_nn.subnetwork_space import Subnetwork
from curvlin_nn.subset import Subset
from curvlin_nn.summary import Summary, summarise

EVIDENCES = ("marglik", "bound")
"""What a prior precision is found to maximise, where it is not to score best on held-out data."""


class Laplace(PosteriorPredictive):
    """The Laplace approximation ``q(theta) = N(theta_MAP, P^-1)`` with ``P = H / (sigma^2 T) + P0``.

    H is the generalised Gauss-Newton matrix of the negative log-likelihood, summed over the data, in the
    chosen structure. Predictions linearise the network around ``theta_MAP``. The model is never changed.

    Args:
        model: a trained network that maps one argument to outputs ``(N, C)``.
        likelihood: a name (`likelihoods.available`), a loss of torch (`likelihoods.from_loss`) or a `Likelihood`.
        subset_of_weights: ``"all"`` (parameters that require a gradient), ``"last_layer"`` (the default),
            ``"subnetwork"``, names of parameters or modules, a predicate of name and parameter, or a mask of
            `curvlin_nn.subnetwork`.
        hessian_structure: ``"full"``, ``"kron"`` (the default), ``"diag"``, ``"ekfac"``, ``"kfoc"``,
            ``"kron-lowrank"``, ``"block"``, ``"lowrank"``, ``"gp"`` (``"full"`` in function space), a `Structure`
            class, or one of these for each ``fnmatch`` pattern of names of parameters or modules.
        curvature: ``"ggn"``; ``"fisher_mc"``, of one draw of targets for each sample, unbiased; ``"ef"``, the empirical
            Fisher matrix, at ``sigma_noise = 1`` only; or ``"hessian"``, exact (``"full"``, ``"block"``, ``"diag"`` or
            ``"lowrank"``, its 100 leading eigenpairs).
        indefinite: what a Hessian with negative eigenvalues does; see `curvlin_nn.curvature`.
        generator: source of randomness for ``"fisher_mc"``, the eigenpairs of a Hessian and `n_subset`; None is torch's
            default generator.
        prior_precision: a number, one per parameter tensor, one per module, one per parameter, or an
            operator.
        prior_mean: a number or a flat vector.
        sigma_noise: the standard deviation of observations, in the units of the targets, or one for each output;
            regression only.
        temperature: T; the likelihood counts with weight 1 / T.
        feature_map: features in the place of the Jacobian, such as a `NystromMap`: the posterior is then over their K
            coordinates, ``"full"``, a deviation from the network with mean zero; see `curvlin_nn.feature_posterior`.
        residual: with such a map, whether predictions keep the prior variance that its features leave out.
        subnetwork_indices: for ``"subnetwork"``, distinct coordinates of the flat vector of all parameters that require
            a gradient. The posterior is over these alone, in increasing order.
        last_layer_name: for ``"last_layer"``, the module to take; None finds it by running the model.
        feature_reduction: ``"pick_first"``, ``"pick_last"`` or ``"average"``, if that is what the model does with the
            outputs of its last layer at several positions: KFAC then counts the reduced features only.
        prior_structure: ``"scalar"``, ``"layerwise"`` (per parameter tensor), ``"modulewise"`` or ``"diag"``;
            needed only where the length of `prior_precision` fits several.
        dict_key_y: the name of the targets in loaders that yield mappings, as those of Hugging Face do.
        damping: whether a Kronecker block ``B (x) A`` and its prior precision make
            ``(sqrt(s) B + sqrt(delta) I) (x) (sqrt(s) A + sqrt(delta) I)``, ``s = 1 / (sigma^2 T)``, instead of
            ``s B (x) A + delta I``; see `curvlin_nn.damping`.
        prior_projection: ``"kronecker"`` or ``"isotropic"``, what a prior is projected onto in blocks of the curvature
            whose sum with it is not closed: one precision per parameter or an earlier posterior beside a Kronecker
            product. `projected_prior` tells the error. By default such a prior is refused.
        enable_backprop: whether predictions have gradients with respect to their inputs.
        n_subset: fit to that many samples of the data, drawn at random by `generator`, and forget the others: the
            posterior and the evidence of these (the "subset of data" of Gaussian processes), nothing scaled up. Each
            `fit` draws anew.

    Raises:
        UnsupportedError: for an option that is not served, ``backend`` of laplace-torch included; the message says
            which are.
        TypeError: for an argument that does not exist.
        ValueError: for a hyperparameter out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: str | nn.Module | Likelihood,
        subset_of_weights: Selection | SubnetMask | None = None,
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
        subnetwork_indices: Tensor | None = None,
        last_layer_name: str | None = None,
        feature_reduction: str | None = None,
        dict_key_y: str = "labels",
        damping: bool = False,
        prior_projection: str | None = None,
        enable_backprop: bool = False,
        n_subset: int | None = None,
        **unknown: NoReturn,
    ) -> None:
        arguments.refuse(unknown, Laplace, arguments.CONSTRUCTOR)
        check_model(model)
        self.feature_map = feature_map
        self._features: FeatureSpace | None = None
        if feature_map is not None:
            self._features = FeatureSpace.of(
                feature_map, residual, subset_of_weights, hessian_structure, curvature, enable_backprop
            )
            subset_of_weights, hessian_structure = "all", "full"
        self.model = model
        self.likelihood = likelihoods.resolve(likelihood)
        subset = Subset.of(model, subset_of_weights, subnetwork_indices, last_layer_name)
        self.subset_of_weights, self.last_layer_name = subset.name, last_layer_name
        self._choice = curvature_choice(
            feature_map or subset.selection,
            hessian_structure,
            curvature,
            indefinite=indefinite,
            feature_reduction=feature_reduction,
            damping=damping,
            generator=generator,
        )
        self.feature_reduction = self._choice.feature_reduction
        if prior_structure is not None:
            check_structure(prior_structure)
        check_projection(prior_projection)
        self.enable_backprop = bool(enable_backprop)
        self.n_subset = None if n_subset is None else positive_integer("n_subset", n_subset)
        self._generator = generator
        self._fitted: Fitted | None = None
        self._posterior: tuple[tuple[int, ...], PrecisionOperator] | None = None
        self._prior_structure, self._prior_projection = prior_structure, prior_projection
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
        mean = checked_mean(value)
        if self._fitted is not None:
            self._fitted.check_mean(mean)
        self._prior_mean = mean

    @property
    def projected_prior(self) -> Projection:
        """The prior precision as it enters the posterior, and its distance from what was given.

        The `relative_error`, in the Frobenius norm, is zero where no `prior_projection` was named or needed.
        """
        H = self._fit.curvature.total
        P0 = self._stated_prior(self._fit, self._prior_precision).operator(H)
        if self._prior_projection is None:
            return Projection(P0, torch.zeros((), dtype=P0.dtype))
        return project_prior(P0, H, self._prior_projection)

    @property
    def sigma_noise(self) -> Float[Tensor, "*C"]:
        """The standard deviation of observations, of all or of each output; 1 where the likelihood has no noise."""
        return self._sigma_noise

    @sigma_noise.setter
    def sigma_noise(self, value: float | Tensor) -> None:
        noise = checked_noise(value, self.likelihood, self._choice.columns)
        if self._fitted is not None:
            self._fitted.check_noise(noise)
        self._sigma_noise = noise
        self._posterior = None

    @property
    def temperature(self) -> float:
        """T: the likelihood counts with weight 1 / T, the prior with weight 1."""
        return self._temperature

    @temperature.setter
    def temperature(self, value: float) -> None:
        self._temperature = float(checked_temperature(value).detach())
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
                Not for the ``"lowrank"`` of a Hessian.
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
            self._fitted.accumulated.check_mergeable()
        train_loader = Labelled(train_loader, self.dict_key_y)
        file = None if checkpoint is None else Checkpoint(checkpoint, every, stored.summed_choices_of(self))
        if self.n_subset is not None:
            device = device_of(self.model)
            train_loader = random_subset(train_loader, self.n_subset, device, self._generator, progress_bar)
        earlier = None if override else self._fitted
        n_scales = self._n_noise_scales if earlier is None else earlier.curvature.n_noise_scales
        found = self._choice.accumulated(
            self.model, self.likelihood, train_loader, n_scales, progress_bar, file
        )
        if earlier is not None:
            found = found.merged(earlier.accumulated)
        self._finish(found, begin)
        if file is not None:
            file.remove()
        return self

    def _finish(self, found: Accumulated, begin: float) -> None:
        """Be fitted with these sums, around the model's present parameters; it took the time since `begin`."""
        fitted = Fitted.of(
            self.model,
            found,
            self._features,
            damping=self._choice.damping,
            enable_backprop=self.enable_backprop,
            begin=begin,
        )
        fitted.check_mean(self._prior_mean)
        fitted.check_noise(self._sigma_noise)
        fitted.closed(self._stated_prior(fitted, self._prior_precision), self._prior_projection)
        self._fitted, self._posterior = fitted, None

    @property
    def n_params(self) -> int:
        """P, the length of the flat vectors `mean` and `sample`."""
        return self.parameters.size

    @property
    def n_params_subnet(self) -> int:
        """k, the number of coordinates the posterior is over: all P, but for a subnetwork."""
        return self._fit.accumulated.space.size

    @property
    def subnetwork_indices(self) -> Int[Tensor, " k"] | None:
        """The coordinates of the subnetwork in the flat vector, increasing; None for whole parameters."""
        selection = self._choice.selection
        return selection.indices if isinstance(selection, Subnetwork) else None

    @property
    def n_data(self) -> int:
        """The number of samples that `fit` saw."""
        return self._fit.accumulated.n_data

    @property
    def n_outputs(self) -> int:
        """C, the number of outputs per sample (of the last one, where sequences vary in length)."""
        return self._fit.accumulated.n_outputs

    @property
    def parameters(self) -> ParameterSpace:
        """The parameters in flat order, those that a subnetwork holds fixed included."""
        return self._fit.accumulated.whole_space

    @property
    def curvature(self) -> PrecisionOperator:
        """H, summed over the data, at sigma = 1 and T = 1, in the model's dtype."""
        return self._fit.curvature.total.to(self._fit.mean.dtype)

    # -- the posterior ---------------------------------------------------------------------------------------

    @property
    def mean(self) -> Float[Tensor, " P"]:
        """The parameters the posterior was fitted around, flat; for a subnetwork those it holds fixed as well.

        Zero for features, which are a deviation from the network.
        """
        fit = self._fit
        return fit.whole_mean if self._features is None else fit.mean.new_zeros(self.n_params)

    @property
    @outside_inference_mode()
    def posterior_precision(self) -> PrecisionOperator:
        """``P = H / (sigma^2 T) + P0``, factored; made once for each choice of hyperparameters.

        Raises:
            NotFittedError: before `fit`.
            LostPriorError: if a small prior precision is lost in the rounding of H, and P is not positive definite.
        """
        tensors = [t for t in (self._prior_precision, self._sigma_noise) if isinstance(t, Tensor)]
        versions = tuple(t._version for t in tensors)
        if self._posterior is None or self._posterior[0] != versions:
            prior = self._prior(self._prior_precision)
            P = self._fit.curvature.posterior(prior, self._sigma_noise.detach(), self._temperature)
            with prior_not_lost():
                self._posterior = versions, P.detach().factor(self._fit.mean.dtype)
        return self._posterior[1]

    @property
    def posterior(self) -> Gaussian:
        """The posterior over the flat parameters; for a subnetwork over its k coordinates."""
        mean = self._fit.mean if self._features is None else self.mean
        return Gaussian(mean, self.posterior_precision)

    def sample(self, n_samples: int = 100, generator: torch.Generator | None = None) -> Float[Tensor, "S P"]:
        """Draws of flat parameter vectors, of which a subnetwork's coordinates alone vary.

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
        return self._fit.in_whole(
            self._fit.mean + self.posterior_precision.sample(shape, generator=generator)
        )

    @property
    def posterior_variance(self) -> Float[Tensor, " P"]:
        """The diagonal of ``P^-1``, of any structure."""
        return self.posterior_precision.inverse_diagonal()

    @property
    def posterior_covariance(self) -> Float[Tensor, "P P"]:
        """``P^-1`` in numbers, of the structure ``"full"`` only."""
        return posterior.covariance(self.posterior_precision)

    @property
    def posterior_scale(self) -> Float[Tensor, "P P"] | Float[Tensor, " P"]:
        """Lower triangular S with ``S S^T = P^-1`` for ``"full"``, standard deviations for ``"diag"``."""
        return posterior.scale(self.posterior_precision)

    @property
    def prior_precision_diag(self) -> Float[Tensor, " P"]:
        """The diagonal of the prior precision P0: one number per parameter, whatever the prior's structure."""
        return self._prior(self._prior_precision).diagonal().to(self.mean.dtype)

    @outside_inference_mode()
    def log_prob(self, value: Float[Tensor, "*S P"], normalized: bool = True) -> Float[Tensor, "*S"]:
        """The log density of flat parameter vectors under the posterior, in nats.

        Args:
            value: one vector or several.
            normalized: whether to count the normaliser; otherwise ``-square_norm(value) / 2``.
        """
        return posterior.log_prob(self.posterior, self._fit.of_whole(value), normalized)

    @outside_inference_mode()
    def square_norm(self, value: Float[Tensor, "*S P"]) -> Float[Tensor, "*S"]:
        """``(value - mean)^T P (value - mean)`` of flat parameter vectors."""
        return posterior.square_norm(self.posterior, self._fit.of_whole(value))

    # -- evidence --------------------------------------------------------------------------------------------

    @property
    def log_likelihood(self) -> Float[Tensor, ""]:
        """``log p(D | theta) / T`` in nats, float64, normaliser included; differentiable in `sigma_noise`."""
        return self._evidence().log_likelihood(self._sigma_noise)

    @property
    def scatter(self) -> Float[Tensor, ""]:
        """``(theta - mu)^T P0 (theta - mu)``, float64, differentiable in `prior_precision`."""
        return self._prior(self._prior_precision).scatter()

    @property
    def log_det_prior_precision(self) -> Float[Tensor, ""]:
        """``log det P0``, float64, differentiable in `prior_precision`."""
        return self._prior(self._prior_precision).logdet()

    @property
    def log_det_posterior_precision(self) -> Float[Tensor, ""]:
        """``log det P``, float64, differentiable in `prior_precision` and `sigma_noise`."""
        return self.log_det_prior_precision + self.log_det_ratio

    @property
    def log_det_ratio(self) -> Float[Tensor, ""]:
        """``log det P - log det P0``, float64, differentiable in `prior_precision` and `sigma_noise`."""
        return self._evidence().log_det_ratio(self._prior(self._prior_precision), self._sigma_noise)

    def log_marginal_likelihood(
        self,
        prior_precision: float | Tensor | PrecisionOperator | None = None,
        sigma_noise: float | Tensor | None = None,
        *,
        prior_mean: float | Tensor | None = None,
        temperature: float | Tensor | None = None,
    ) -> Float[Tensor, ""]:
        """The Laplace approximation of ``log p(D)`` in nats.

        ``log p(D | theta) / T - (theta - mu)^T P0 (theta - mu) / 2 - (logdet P - logdet P0) / 2``

        Args:
            prior_precision: evaluate here instead of at the current value (which stays).
            sigma_noise: likewise.
            prior_mean: likewise.
            temperature: likewise.

        Returns:
            A 0-dimensional float64 tensor, differentiable in all of them.
        """
        return self._evaluated(self._evidence(), prior_precision, sigma_noise, prior_mean, temperature)

    def log_marginal_likelihood_bound(
        self,
        train_loader: Iterable[Any] | None = None,
        prior_precision: float | Tensor | None = None,
        sigma_noise: float | Tensor | None = None,
        *,
        prior_mean: float | Tensor | None = None,
        temperature: float | Tensor | None = None,
        progress_bar: bool = False,
    ) -> Float[Tensor, ""]:
        """A lower bound of the full GGN's evidence, in nats: of an orthonormal `feature_map` with ``residual=True``.

        ``log_marginal_likelihood() - sum_n tr(Lambda_n (kappa_n - Phi_n Phi_n^T)) / (2 delta sigma^2 T)``: what the
        features leave out counts (Titsias, 2009, equation 9); see `curvlin_nn.evidence_bound`.

        Args:
            train_loader: the batches that `fit` was given. One pass over them is made for each fit; then the trace is
                known, and stored with the object.
            prior_precision: evaluate here instead of at the current value (which stays).
            sigma_noise: likewise.
            prior_mean: likewise.
            temperature: likewise.
            progress_bar: whether to show one over the batches.

        Returns:
            A 0-dimensional float64 tensor, differentiable in all of the hyperparameters.

        Raises:
            UnsupportedError: if there is no such bound of this posterior, or no loader where one is needed.
            DataError: if the loader yields another number of samples than `fit` saw.
            StaleModelError: if the trace is not known yet, and the model or the features have changed since `fit`.
        """
        bound = self._evidence_bound(train_loader, progress_bar)
        return self._evaluated(bound, prior_precision, sigma_noise, prior_mean, temperature)

    def optimize_prior_precision(
        self,
        method: str = "marglik",
        prior_structure: str = "scalar",
        optimize_noise: bool = False,
        *,
        optimize_temperature: bool = False,
        tolerance: float = 1e-9,
        max_steps: int = 200,
        val_loader: Iterable[Any] | None = None,
        train_loader: Iterable[Any] | None = None,
        n_folds: int = 5,
        loss: object | None = None,
        pred_type: str = "glm",
        link_approx: str = "probit",
        n_samples: int = 100,
        generator: torch.Generator | None = None,
        log_prior_prec_min: float = -4,
        log_prior_prec_max: float = 4,
        grid_size: int = 100,
        log_prior_prec_base: float = 10.0,
        progress_bar: bool = False,
        **unknown: NoReturn,
    ) -> Optimum | HeldOutOptimum:
        """Set the prior precision to the maximum of the log marginal likelihood, or to the best on held-out data.

        The marginal likelihood is concave in the logarithms of the hyperparameters, and so is its bound; Newton's
        method solves either from any start.

        Args:
            method: ``"marglik"``; ``"bound"``, the maximum of `log_marginal_likelihood_bound` for a `feature_map` with
                ``residual=True``; ``"gridsearch"`` or ``"brent"`` on `val_loader`; ``"cv"``, a grid on folds of
                `train_loader`, each scored with the curvature of the others (around the same parameters).
            prior_structure: which parameters share a precision: ``"scalar"``, ``"layerwise"`` (each parameter
                tensor its own), ``"modulewise"`` or ``"diag"``; on held-out data ``"scalar"``.
            optimize_noise: whether to optimise `sigma_noise` jointly, all of them if there are several; regression
                and ``"marglik"`` or ``"bound"`` only.
            optimize_temperature: refused. log Z is strictly convex in 1 / T at any prior and noise, so that it has no
                maximum; compare scores on held-out data instead.
            tolerance: largest relative gradient at the end; for ``"brent"`` the largest error of the logarithm (at
                least 1e-3).
            max_steps: Newton steps before giving up.
            val_loader: batches ``(inputs, targets)``, kept for the search.
            train_loader: those that the parameters were trained on, for ``"cv"``; those that `fit` was given, for
                ``"bound"``, which goes through them once for each fit.
            n_folds: how many folds for ``"cv"``.
            loss: what to minimise on held-out data: None for the negative log-likelihood; a function ``(prediction,
                targets)`` or ``(mean, covariance, targets)`` of all data; or a `torchmetrics.Metric` (of which copies
                are used; one that is better when higher is maximised).
            pred_type: as in `__call__`. Variances are computed from kept features for ``"glm"``.
            link_approx: as in `__call__`.
            n_samples: as in `__call__`.
            generator: as in `__call__`; all precisions are tried with the same draws.
            log_prior_prec_min: the least logarithm of a prior precision on held-out data.
            log_prior_prec_max: the largest.
            grid_size: how many are tried by a grid.
            log_prior_prec_base: the base of these logarithms.
            progress_bar: whether to show one.
            **unknown: refused.

        Returns:
            The optimum: with its log marginal likelihood (or the bound), gradient norm and number of steps; or with its
            score, all that were tried, and whether it is at the edge of them.

        Raises:
            UnsupportedError: for options that do not go together.
            DataError: if the held-out data cannot be used, or have no finite score.
            NoFiniteOptimumError: if there is none; it says why.
            ConvergenceError: if `max_steps` do not suffice.
            LostPriorError: if the prior precision at the maximum is lost in the rounding of the
                curvature.
        """
        arguments.refuse(unknown, self.optimize_prior_precision, arguments.SEARCH)
        if method not in (*EVIDENCES, *METHODS):
            expected = one_of((*EVIDENCES, *METHODS))
            raise UnsupportedError(f"method={method!r} is not supported; expected {expected}")
        if optimize_temperature:
            raise NoFiniteOptimumError(
                "optimize_temperature has no finite optimum, as the log marginal likelihood is convex in 1 / T; set "
                "temperature and compare the scores of method='gridsearch'"
            )
        if method not in EVIDENCES:
            if prior_structure != "scalar" or optimize_noise:
                raise UnsupportedError(
                    f"method={method!r} chooses one prior precision on held-out data; leave prior_structure at "
                    "'scalar' and optimize_noise at False, or use method='marglik'"
                )
            best = search(
                self,
                method,
                Grid(log_prior_prec_min, log_prior_prec_max, grid_size, log_prior_prec_base),
                Request(pred_type, link_approx, n_samples=n_samples, generator=generator),
                loss,
                train_loader if method == "cv" else val_loader,
                n_folds=n_folds,
                tolerance=max(tolerance, 1e-3),
                progress_bar=progress_bar,
            )
            self.prior_precision = best.prior_precision
            return best
        if optimize_noise and not self.likelihood.has_noise:
            raise UnsupportedError(
                f"optimize_noise needs a likelihood with noise, found {self.likelihood.name}"
            )
        if optimize_noise:
            check_knows_noise(self._choice.columns)
        start, noise = self._start(prior_structure), self._sigma_noise.detach()
        bound = method == "bound"
        evidence = self._evidence_bound(train_loader, progress_bar) if bound else self._evidence()
        if noise.ndim:
            optimum = maximise_by_output(evidence, start, noise, optimize_noise, max_steps, progress_bar)
        else:
            optimum = maximise(
                evidence,
                start,
                float(noise),
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
            LostPriorError: if the prior is lost in the rounding of the curvature.
        """
        fit, prior, noise = self._fit, self._prior(self._prior_precision), self._sigma_noise.detach()
        with torch.no_grad():
            return summarise(self.model, fit.accumulated, self._evidence(), prior, noise, fit.seconds)

    # -- prediction ------------------------------------------------------------------------------------------

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

    @outside_inference_mode()
    def functional_variance(self, Js: FeatureOperator | Float[Tensor, "N C P"]) -> Float[Tensor, "N C C"]:
        """``J P^-1 J^T`` of each sample, for Jacobians in factored form (`JacobianMap`) or multiplied out."""
        return functional_covariance(self.posterior_precision, Js, joint=False)

    @outside_inference_mode()
    def functional_covariance(self, Js: FeatureOperator | Float[Tensor, "N C P"]) -> Float[Tensor, "NC NC"]:
        """The same between all outputs of all samples, sample-major."""
        return functional_covariance(self.posterior_precision, Js, joint=True)

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

    def _stored(self) -> tuple[str, dict[str, Any]]:
        return stored.KIND, self.state_dict()

    # -- what the above is made of ---------------------------------------------------------------------------

    @property
    def _fit(self) -> Fitted:
        if self._fitted is None:
            raise NotFittedError("this Laplace object is not fitted; call fit(train_loader) first")
        return self._fitted

    def _predictor(self, pred_type: str, progress_bar: bool = False) -> Predictor:
        check_pred_type(pred_type, self._choice.in_function_space)
        if pred_type == "nn" and self._features is not None:
            raise UnsupportedError(
                "pred_type='nn' runs the network at draws of its weights, and a posterior with a feature_map has none; "
                "take 'glm'"
            )
        sigma_noise = self._sigma_noise.detach()
        if pred_type == "nn":
            shape = self._fit.accumulated.output_shape
            return SampledPredictor(
                Response(self.likelihood, lambda: shape, sigma_noise), self._weight_space(progress_bar)
            )
        response = Response(self.likelihood, lambda: self._fit.output_shape(self.likelihood), sigma_noise)
        return GaussianPredictor(response, self._predictive(progress_bar))

    def _predictive(self, progress_bar: bool = False) -> Predictive:
        self._check_unchanged()
        if self._features is not None:
            prior = self._prior(self._prior_precision)
            return self._features.predictive(self.posterior_precision, prior, progress_bar)
        return Predictive(self._fit.feature_map, self.posterior_precision, progress_bar)

    def _weight_space(self, progress_bar: bool = False) -> WeightSpace:
        self._check_unchanged()
        return WeightSpace(
            self.model,
            self.parameters,
            self._fit.mean,
            self.posterior_precision,
            self.enable_backprop,
            progress_bar,
            self._fit.in_whole,
        )

    def _check_unchanged(self) -> None:
        self._fit.check_unchanged(self.model, self._features)

    @property
    def _n_noise_scales(self) -> int:
        """How many outputs have one of their own; 0 where all have one."""
        return len(self._sigma_noise) if self._sigma_noise.ndim else 0

    def _evidence(self) -> Evidence:
        fit = self._fit
        return Evidence(self.likelihood, fit.accumulated.statistics, fit.curvature, self._temperature)

    def _evidence_bound(self, train_loader: Iterable[Any] | None, progress_bar: bool = False) -> Evidence:
        """The evidence less what features leave out of it, which is kept with the fit."""
        if self._fit.left_out is None:
            left_out = left_out_curvature(self, train_loader, progress_bar)
            self._fitted = replace(self._fit, left_out=left_out)
        return replace(self._evidence(), left_out=self._fit.left_out)

    def _evaluated(
        self,
        evidence: Evidence,
        prior_precision: float | Tensor | PrecisionOperator | None,
        sigma_noise: float | Tensor | None,
        prior_mean: float | Tensor | None,
        temperature: float | Tensor | None,
    ) -> Float[Tensor, ""]:
        """At these hyperparameters, or the current ones."""
        precision = self._prior_precision if prior_precision is None else prior_precision
        if not isinstance(precision, PrecisionOperator):
            precision = check_precision(precision)
        noise = self._sigma_noise
        if sigma_noise is not None:
            noise = checked_noise(sigma_noise, self.likelihood, self._choice.columns)
        self._fit.check_noise(noise)
        mean = self._prior_mean if prior_mean is None else checked_mean(prior_mean)
        self._fit.check_mean(mean)
        if temperature is not None:
            evidence = replace(evidence, temperature=checked_temperature(temperature))
        return evidence.log_marginal_likelihood(self._prior(precision, mean), noise)

    def _prior(self, precision: Tensor | PrecisionOperator, mean: Tensor | None = None) -> Prior:
        """The prior as it enters the posterior, at this precision (and mean)."""
        return self._fit.closed(self._stated_prior(self._fit, precision, mean), self._prior_projection)

    def _stated_prior(
        self, fitted: Fitted, precision: Tensor | PrecisionOperator, mean: Tensor | None = None
    ) -> Prior:
        mean = self._prior_mean if mean is None else mean
        return fitted.prior(precision, mean, self._prior_structure, self._features)

    def _start(self, prior_structure: str) -> GroupedPrior:
        """The current precision, over the groups of another structure."""
        current = self._stated_prior(self._fit, self._prior_precision)
        if not isinstance(current, GroupedPrior):
            raise UnsupportedError(
                "a prior given as an operator cannot be optimised; set prior_precision to a number first"
            )
        return current.regrouped(self._fit.accumulated.space, prior_structure)
