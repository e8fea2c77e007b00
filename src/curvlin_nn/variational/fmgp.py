"""`FMGP`: a Gaussian process with the network for its mean (Ortega et al., 2024, arXiv 2412.04177)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from gpytorch.kernels import Kernel
from torch import Tensor, nn

from curvlin_nn.batches import Labelled
from curvlin_nn.capture.inputs import map_tensors
from curvlin_nn.capture.state import device_of, random_state_kept
from curvlin_nn.errors import DataError, OutputError
from curvlin_nn.feature_maps.pool import Pool
from curvlin_nn.fingerprint import Fingerprint
from curvlin_nn.inference_mode import outside_inference_mode
from curvlin_nn.likelihoods import Categorical, Likelihood
from curvlin_nn.randomness import frozen
from curvlin_nn.storage.files import StrPath, read
from curvlin_nn.variational import fixed_mean_stored as stored
from curvlin_nn.variational import kernels
from curvlin_nn.variational.fixed_mean import FixedMean
from curvlin_nn.variational.fixed_mean_fitted import FixedMeanFitted
from curvlin_nn.variational.fixed_mean_gp import FixedMeanGP
from curvlin_nn.variational.fixed_mean_objective import FixedMeanObjective
from curvlin_nn.variational.inducing import Counted, Inducing, placed
from curvlin_nn.variational.points import Points, Seen
from curvlin_nn.variational.posterior import VariationalPosterior
from curvlin_nn.variational.training import TrainingHistory, TrainingOptions, positive

N_FIRST = 1000
"""Samples that decide about the first scales of a kernel."""


class FMGP(VariationalPosterior[FixedMeanFitted]):
    """A sparse Gaussian process whose mean is the output of a trained network, and whose covariance is learned.

        mean(x) = f(x),  Cov[f(x), f(x')] = k(x, x') - k_xZ (A^-1 + k_Z)^-1 k_Zx'

    The kernel is no Jacobian's. If it is universal, some function of its space is as close to the network as one likes,
    and a mean that is fixed there costs the process nothing. Learned are A, the inducing points Z, the kernel, the
    covariance B of the outputs and the noise: see `curvlin_nn.variational.fixed_mean_gp`. The process is computed in
    float64; predictions have the network's dtype. The model is never changed.

    Args:
        model: a trained network that maps one tensor of samples, itself or in a mapping, to outputs ``(N, C)``.
        likelihood: ``"classification"``, ``"binary"``, ``"regression"``, a loss of torch or a `Likelihood` of these.
        n_inducing: M; None is 100, or as many as are given.
        inducing: ``"kmeans"``, centres of the training inputs (of each class by itself, where targets are classes);
            ``"random"``, some of the inputs; or a pair ``(Z, outputs)``, inputs and a LongTensor with an index into the
            flattened outputs for each.
        kernel: ``"rbf"`` of flat inputs, with a lengthscale for each entry; ``"rbf_x_last_layer"``, that times the
            tangent kernel of a linear last layer; or a kernel of gpytorch's for flat inputs, a copy of which is
            trained, within its constraints and by its priors. All are multiplied by B, the identity at first. None
            takes ``"rbf_x_last_layer"`` for ``"classification"``, ``"rbf"`` otherwise; see
            `curvlin_nn.variational.kernels`.
        sigma_noise: the standard deviation of observations, or one for each output; `fit` begins there.
        dict_key_y: the name of the targets in loaders that yield mappings.
        generator: source of randomness for the placement of inducing points; None is torch's default generator.

    Raises:
        UnsupportedError: for a likelihood, a placement or a kernel that is not served.
        TypeError, ValueError: for an argument of the wrong kind, or out of range.
        ImportError: for ``"kmeans"`` without the extra ``metrics``.
    """

    _over, _is_process = "functions", True

    def __init__(
        self,
        model: nn.Module,
        likelihood: str | nn.Module | Likelihood,
        n_inducing: int | None = None,
        inducing: Inducing = "kmeans",
        *,
        kernel: str | Kernel | None = None,
        sigma_noise: float | Tensor = 1.0,
        dict_key_y: str = "labels",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(model, likelihood, n_inducing, inducing, sigma_noise, dict_key_y, generator)
        if kernel is None:
            kernel = "rbf_x_last_layer" if isinstance(self.likelihood, Categorical) else "rbf"
        self._kernel = kernels.checked(kernel)
        self._points = Points(model, isinstance(kernel, str) and kernel == "rbf_x_last_layer")

    @outside_inference_mode()
    def fit(
        self,
        train_loader: Iterable[Any],
        *,
        n_steps: int = 2000,
        lr: float = 1e-3,
        validation_loader: Iterable[Any] | None = None,
        every: int = 100,
        patience: int | None = None,
        max_seconds: float | None = None,
        optimize_noise: bool = True,
        optimize_inducing: bool = True,
        progress_bar: bool = False,
    ) -> FMGP:
        """Learn the covariance from batches, around the model's present parameters; an earlier fit is forgotten.

        Args:
            train_loader: batches ``(inputs, targets)``, or mappings with targets under `dict_key_y`; gone through once
                to count the samples and to place the inducing points, and then as often as it takes.
            n_steps: the most steps of Adam, one batch each.
            lr: its learning rate.
            validation_loader: other data, whose mean negative log-likelihood decides which state stays; without it,
                the last one does.
            every: how many steps there are between two evaluations.
            patience: how many evaluations in a row may be no better than the best before the fit ends.
            max_seconds: after which it ends as well.
            optimize_noise: whether the noise scale is learned, where the likelihood has one.
            optimize_inducing: whether the inducing points move.
            progress_bar: whether to show one.

        Returns:
            The object itself. If anything raises, it is as it was before, and so is the model.

        Raises:
            DataError: if a loader yields nothing, or data do not fit the model or the likelihood.
            OutputError: if outputs have the wrong shape or are not finite.
            UnsupportedError: if the kernel does not take the inputs, or its last layer is none.
            TrainingDivergedError: if numbers are no longer finite; its `best` is an `FMGP` in the best state before.
        """
        positive("lr", lr)
        options = TrainingOptions(n_steps, every, patience, max_seconds)
        fingerprint = Fingerprint.of(self.model)
        with random_state_kept(device_of(self.model)):  # loaders draw from the default generator
            loader = Counted(Labelled(train_loader, self.dict_key_y))
            pool = Pool.of(loader, "train_loader", N_FIRST)
            first = self._points.in_parts(pool.x, "the first samples")
            sample_shape = self._points.sample_tensor(pool.x, "the first samples").shape[1:]
            gp = self._begun(
                loader,
                pool.x,
                sample_shape,
                first,
                optimize_inducing=optimize_inducing,
                optimize_noise=optimize_noise and self.likelihood.has_noise,
            )
            n_data, history = loader.n_data, TrainingHistory()
            objective = FixedMeanObjective(self._points, gp, self.likelihood, n_data)

            shape = _shape_of_one(first.outputs)

            def fitted() -> FixedMeanFitted:
                return FixedMeanFitted(gp, gp.covariance(), shape, sample_shape, fingerprint, history, n_data)

            optimizer = torch.optim.Adam([p for p in gp.parameters() if p.requires_grad], lr)
            try:
                self._train(
                    optimizer,
                    objective.loss,
                    loader,
                    options,
                    history,
                    fitted,
                    validation_loader,
                    progress_bar,
                )
            finally:
                gp.requires_grad_(False)
        return self

    def _begun(
        self, loader: Counted, x: Any, sample_shape: torch.Size, first: Seen, **options: bool
    ) -> FixedMeanGP:
        """The process before any step; `first` is what was seen of the samples x."""
        n_outputs, shape = first.rows.shape[1], first.outputs.shape
        by_class = self.likelihood.has_classes and len(shape) == 2 and n_outputs > 1
        own = frozen(self._generator, torch.device("cpu"))()
        device = first.points.device
        where = placed(self.inducing, self.n_inducing, loader, n_outputs, by_class, device, own)
        inputs = self._points.sample_tensor(where.inputs, "the inducing inputs")
        if inputs.shape[1:] != sample_shape:
            raise DataError(
                f"inducing inputs must have shape {('M', *sample_shape)} like samples of train_loader, found "
                f"{tuple(inputs.shape)}"
            )
        Z = self._points.in_parts(map_tensors(lambda _: inputs, x), "the inducing inputs").points
        kernel = kernels.made(self._kernel, first.points, first.n_inputs)
        noise = self._sigma_noise
        if noise.ndim and len(noise) != (expected := self.likelihood.terms(first.outputs[:1]).shape[-1]):
            raise ValueError(
                f"sigma_noise must have {expected} entries, one for each output, found {len(noise)}"
            )
        return FixedMeanGP(kernel, n_outputs, Z, where.outputs, noise, **options)

    @property
    def gp(self) -> FixedMeanGP:
        """The process: its kernel and covariance of outputs, inducing points and A, as a module."""
        return self._fit.gp

    @property
    def kernel(self) -> Kernel:
        """The kernel of flat inputs as it was learned, B left out; gpytorch's, in float64."""
        return self._fit.gp.kernel

    @classmethod
    @outside_inference_mode()
    def load(
        cls,
        path: StrPath,
        model: nn.Module,
        *,
        likelihood: str | nn.Module | Likelihood | None = None,
        kernel: Kernel | None = None,
    ) -> FMGP:
        """The object that was saved; predictions are as they would have been.

        Args:
            path: of the file.
            model: the model that it was fitted to, with the same parameters and buffers.
            likelihood: the one it had, needed only where no name stands for it.
            kernel: one like the one it had, needed only where no name stands for it. Its parts and options count, and
                are compared; its hyperparameters come from the file.

        Raises:
            FileNotFoundError: if there is no such file.
            StorageError: if it is damaged, of another kind, or a likelihood or a kernel like the stored one must be
                given.
            StaleModelError: if the model is another one, or holds other values.
        """
        state = read(path, stored.KIND)
        fm = cls(model, **stored.arguments(state, likelihood, kernel))
        fm._fitted = stored.fitted(state, model, fm._kernel)
        if isinstance(state["inducing"], str):
            fm.inducing = state["inducing"]
        return fm

    def _stored(self) -> tuple[str, dict[str, Any]]:
        return stored.KIND, stored.state_of(self)

    def _outputs(self, progress_bar: bool) -> FixedMean:
        return FixedMean(self._seen, self._fit.covariance, progress_bar)

    def _seen(self, x: Any) -> Seen:
        """Outputs and points, if they are as they were in `fit`."""
        fit, seen = self._fit, self._points(x)
        if seen.points.shape[1] != fit.gp.points.shape[1]:
            raise DataError(
                f"the input must have {fit.n_inputs} numbers for each sample as in fit, found {seen.n_inputs}"
            )
        if _shape_of_one(seen.outputs) != fit.output_shape:
            raise OutputError(
                f"model outputs must have shape {('N', *fit.output_shape)} as in fit, found {tuple(seen.outputs.shape)}"
            )
        return seen


def _shape_of_one(outputs: Tensor) -> tuple[int, ...]:
    """Of the outputs of one sample; one number counts as an axis of length one."""
    return tuple(outputs.shape[1:]) or (1,)
