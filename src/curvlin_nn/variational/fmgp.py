"""`FMGP`: the fixed-mean Gaussian process (Ortega et al., 2024, arXiv 2412.04177)."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from gpytorch.kernels import Kernel
from jaxtyping import Float, Int
from torch import Tensor, nn

from curvlin._check import positive_integer
from curvlin._random import checked_generator
from curvlin_nn import likelihoods
from curvlin_nn.batches import batches
from curvlin_nn.capture.state import device_of, random_state_kept
from curvlin_nn.columns import Columns
from curvlin_nn.errors import (
    DataError,
    NotFittedError,
    OutputError,
    StaleModelError,
    TrainingDivergedError,
    UnsupportedError,
)
from curvlin_nn.feature_maps.pool import Pool
from curvlin_nn.fingerprint import Fingerprint
from curvlin_nn.hyperparameters import checked_noise
from curvlin_nn.inference_mode import outside_inference_mode
from curvlin_nn.likelihoods import Categorical, Likelihood
from curvlin_nn.parameters import check_model
from curvlin_nn.predictive import GaussianPredictor, PosteriorPredictive, Predictor, Response
from curvlin_nn.predictive.request import check_pred_type
from curvlin_nn.variational import inducing as places
from curvlin_nn.variational import kernels
from curvlin_nn.variational.expected_likelihood import check_expected
from curvlin_nn.variational.fixed_mean import FixedMean
from curvlin_nn.variational.fixed_mean_gp import FixedMeanGP, SparseCovariance
from curvlin_nn.variational.fixed_mean_objective import FixedMeanObjective
from curvlin_nn.variational.points import Points, Seen
from curvlin_nn.variational.training import TrainingHistory, TrainingOptions, positive, train

CHUNK = 256
"""Samples that the network is run on at a time before the training."""

N_DISTANCES = 1000
"""Samples whose distances decide about the first lengthscale."""


class FMGP(PosteriorPredictive):
    """A sparse Gaussian process whose mean is the output of a trained network, and whose covariance is learned.

        mean(x) = f(x),  Cov[f(x), f(x')] = k(x, x') - k_xZ (A^-1 + k_Z)^-1 k_Zx'

    For a universal kernel some element of its space is as close to the network as one likes, so that a mean fixed
    there costs nothing; no Jacobian is needed. Learned are ``A = L L^T``, the inducing points Z, the kernel, the
    covariance B of the outputs and the noise; see `curvlin_nn.variational.fixed_mean_gp` for the objective. The
    process is computed in float64, predictions come in the network's dtype. The model is never changed.

    Args:
        model: a trained network that maps one tensor of samples to outputs ``(N, C)``.
        likelihood: ``"regression"``, ``"classification"``, ``"binary"``, a loss of torch, or a `Likelihood` of these.
        n_inducing: M, the number of inducing variables; by default 100, or as many as there are given inputs.
        kernel: ``"rbf"`` of flat inputs, a lengthscale for each; ``"rbf_x_last_layer"``, the same times the tangent
            kernel of the last layer, which is to be linear; or a kernel of gpytorch's for flat inputs, of which a copy
            is trained, by its own constraints and priors. Each is multiplied by B, the identity at first. None takes
            ``"rbf_x_last_layer"`` for classes and ``"rbf"`` otherwise.
        inducing: ``"kmeans"``, ``"random"`` members of the data, or a tensor of inputs. Each is of one output: where
            there are classes, of the one that the network predicts, with as many for each; otherwise outputs take
            turns.
        sigma_noise: the standard deviation of observations, or one for each output, at first; regression only.
        generator: source of randomness for the choice of inducing inputs; None is torch's default generator.

    Raises:
        UnsupportedError: for an option or a model that is not served.
        TypeError, ValueError: for a number out of its range.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: str | nn.Module | Likelihood,
        *,
        n_inducing: int | None = None,
        kernel: str | Kernel | None = None,
        inducing: str | Float[Tensor, M * T] = "kmeans",
        sigma_noise: float | Tensor = 1.0,
        generator: torch.Generator | None = None,
    ) -> None:
        check_model(model)
        self.model = model
        self.likelihood = likelihoods.resolve(likelihood)
        check_expected(self.likelihood)
        if kernel is None:
            kernel = "rbf_x_last_layer" if isinstance(self.likelihood, Categorical) else "rbf"
        kernels.check_kernel(kernel)
        places.check_choice(inducing)
        self.n_inducing = _number(n_inducing, inducing)
        self._prior_kernel, self._inducing = kernel, inducing
        self._prior_noise = checked_noise(sigma_noise, self.likelihood, Columns("exact")).detach()
        self._generator = checked_generator(generator)
        self._points = Points(model, isinstance(kernel, str) and kernel == "rbf_x_last_layer")
        self._fitted: _Fitted | None = None

    # -- fitting ---------------------------------------------------------------------------------------------

    @outside_inference_mode()
    def fit(
        self,
        train_loader: Iterable[Any],
        *,
        n_steps: int,
        lr: float = 1e-3,
        validation_loader: Iterable[Any] | None = None,
        every: int = 100,
        patience: int | None = None,
        max_seconds: float | None = None,
        optimize_noise: bool = True,
        progress_bar: bool = False,
    ) -> FMGP:
        """Choose inducing inputs, and train the covariance around the model's present parameters by Adam.

        Args:
            train_loader: batches ``(inputs, targets)``, in random order; gone through several times.
            n_steps: how many batches to take.
            lr: the learning rate.
            validation_loader: other data: the state with the least mean negative log-likelihood on it is kept.
            every: how many steps there are between two evaluations.
            patience: how many evaluations in a row may be no better than the best before the training ends; None for
                any number.
            max_seconds: after which the training ends as well.
            optimize_noise: whether the noise is learned, where there is some.
            progress_bar: whether to show one.

        Returns:
            The object itself. If anything raises, it is as it was before, and so is the model.

        Raises:
            DataError: if a loader yields nothing, or inputs or targets that do not fit.
            OutputError: if outputs have the wrong shape or are not finite.
            UnsupportedError: if the kernel does not take the inputs.
            TrainingDivergedError: if a loss, a gradient or a score is not finite; its `best` is a fitted `FMGP`.
            TypeError, ValueError: for a number out of its range.
        """
        options = TrainingOptions(n_steps, every, patience, max_seconds)
        lr = positive("lr", lr)
        device = device_of(self.model)
        with random_state_kept(device):
            gp, first, n_data = self._begun(train_loader, optimize_noise and self.likelihood.has_noise)
            shape = tuple(first.outputs.shape[1:]) or (1,)
            task = FixedMeanObjective(self._points, gp, self.likelihood, n_data)
            trained = [p for p in gp.parameters() if p.requires_grad]
            result = copy.copy(self)
            fingerprint = Fingerprint.of(self.model)

            def finish(history: TrainingHistory) -> None:
                gp.requires_grad_(False)
                result._fitted = _Fitted(
                    gp, gp.covariance(), shape, first.n_inputs, n_data, fingerprint, history
                )

            try:
                history = train(
                    torch.optim.Adam(trained, lr),
                    task.loss,
                    train_loader,
                    device,
                    options,
                    score=None
                    if validation_loader is None
                    else lambda: task.score(validation_loader, device),
                    description="FMGP",
                    progress_bar=progress_bar,
                )
            except TrainingDivergedError as error:
                finish(TrainingHistory())
                error.best = result
                raise
            finish(history)
        self._fitted = result._fitted
        return self

    def _begun(self, loader: Iterable[Any], optimize_noise: bool) -> tuple[FixedMeanGP, Seen, int]:
        """The process before any step, what was seen of the data, and how many samples there are."""
        device = device_of(self.model)
        pool = Pool.of(loader, "train_loader", places.POOL)
        n_data = sum(len(targets) for _, targets in batches(loader, device))
        if not isinstance(pool.x, Tensor):
            raise DataError(
                f"train_loader must yield one tensor of inputs, as kernels take, found {type(pool.x).__name__}"
            )
        first = self._points(pool[: min(N_DISTANCES, pool.size)], "the first samples")
        Z = self._inducing_inputs(pool, first)
        seen = self._points(Z[0], "the inducing inputs")
        outputs = seen.rows.argmax(1) if Z[1] is None else Z[1]
        kernel = kernels.made(self._prior_kernel, first.points, first.n_inputs)
        n_outputs = first.rows.shape[1]
        noise = self._prior_noise
        if noise.ndim and len(noise) != self.likelihood.terms(first.outputs[:1]).shape[-1]:
            raise ValueError(f"sigma_noise must be one number or one for each output, found {len(noise)}")
        return FixedMeanGP(kernel, n_outputs, seen.points, outputs, noise, optimize_noise), first, n_data

    def _inducing_inputs(self, pool: Pool, first: Seen) -> tuple[Tensor, Int[Tensor, " M"] | None]:
        """The inputs, and of which output each is; None where the network is to say."""
        x, n_outputs = pool.x, first.rows.shape[1]
        has_classes = isinstance(self.likelihood, Categorical) and first.outputs.ndim == 2
        if isinstance(self._inducing, Tensor):
            Z = self._inducing.detach()
            if Z.shape[1:] != x.shape[1:] or Z.dtype != x.dtype:
                raise DataError(
                    f"inducing must be inputs of shape {('M', *x.shape[1:])} and {x.dtype} as in train_loader, "
                    f"found {tuple(Z.shape)} of {Z.dtype}"
                )
            return Z, None if has_classes else torch.arange(len(Z)).to(first.points.device) % n_outputs
        classes = None
        if has_classes:
            parts = [self._points(some, "the first samples").outputs for some in pool.batches(CHUNK)]
            classes = torch.cat(parts).argmax(1)
        flat = x.reshape(pool.size, -1).to(first.points)
        Z, outputs = places.chosen(flat, classes, self.n_inducing, n_outputs, self._inducing, self._generator)
        return Z.reshape(-1, *x.shape[1:]).to(x.dtype), outputs

    # -- what was fitted -------------------------------------------------------------------------------------

    @property
    def _fit(self) -> _Fitted:
        if self._fitted is None:
            raise NotFittedError("FMGP is not fitted yet; call fit first")
        return self._fitted

    @property
    def history(self) -> TrainingHistory:
        """How the training went."""
        return self._fit.history

    @property
    def gp(self) -> FixedMeanGP:
        """The process: its kernel, inducing points, factor and noise."""
        return self._fit.gp

    @property
    def kernel(self) -> Kernel:
        """The trained kernel of gpytorch's, in float64."""
        return self._fit.gp.kernel

    @property
    def n_data(self) -> int:
        """The number of training samples."""
        return self._fit.n_data

    @property
    def sigma_noise(self) -> Float[Tensor, "*C"]:
        """The standard deviation of observations: as learned, or before `fit` as given."""
        return self._prior_noise if self._fitted is None else self._fitted.gp.sigma_noise

    def _predictor(self, pred_type: str, progress_bar: bool = False) -> Predictor:
        check_pred_type(pred_type, True)
        if pred_type == "nn":
            raise UnsupportedError(
                "pred_type='nn' runs the network at draws of its weights, and an FMGP has none; take 'glm'"
            )
        fit = self._fit
        name = fit.fingerprint.difference(self.model)
        if name is not None:
            raise StaleModelError(f"{name!r} of the model changed since fit; call fit again, or restore it")
        response = Response(self.likelihood, lambda: fit.output_shape, self.sigma_noise)
        return GaussianPredictor(response, FixedMean(self._seen, fit.covariance, progress_bar))

    def _seen(self, x: Any) -> tuple[Float[Tensor, "N C"], Float[Tensor, "N D"]]:
        """Outputs and points, which are to be as in `fit`."""
        fit, seen = self._fit, self._points(x)
        if seen.n_inputs != fit.n_inputs:
            raise DataError(
                f"the input must have {fit.n_inputs} numbers for each sample as in fit, found {seen.n_inputs}"
            )
        if (tuple(seen.outputs.shape[1:]) or (1,)) != fit.output_shape:
            expected = ("N", *fit.output_shape)
            raise OutputError(
                f"model outputs must have shape {expected} as in fit, found {tuple(seen.outputs.shape)}"
            )
        return seen.rows, seen.points


def _number(n_inducing: int | None, inducing: str | Tensor) -> int:
    """M."""
    if not isinstance(inducing, Tensor):
        return 100 if n_inducing is None else positive_integer("n_inducing", n_inducing)
    if inducing.ndim == 0 or len(inducing) == 0:
        raise ValueError(f"inducing must hold at least one input, found shape {tuple(inducing.shape)}")
    if n_inducing is not None and n_inducing != len(inducing):
        raise ValueError(
            f"n_inducing must be the number of inducing inputs, {len(inducing)}, or None, found {n_inducing}"
        )
    return len(inducing)


@dataclass(frozen=True)
class _Fitted:
    gp: FixedMeanGP
    covariance: SparseCovariance
    output_shape: tuple[int, ...]
    n_inputs: int
    n_data: int
    fingerprint: Fingerprint
    history: TrainingHistory
