"""`VaLLA`: a sparse variational posterior of the linearised network (Ortega et al., ICML 2024).

    P      = delta I + J_Z^T A J_Z                              A = L L^T, M x M, learned
    f(x)   ~ N(f_MAP(x), J_x P^-1 J_x^T)                        the mean is the network's output
    bound  = sum_n log E p(y_n | f_n) - KL                      KL = log|H| / 2 - tr(I - H^-1) / 2
    H      = I + L^T kappa_Z L / delta                          kappa = J J^T

Row m of J_Z is the gradient of one output c_m at an input z_m, and the z_m are learned, too. The Gaussian over the
P weights is a Woodbury operator; training looks only at kernels between a batch and the inducing points.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from curvlin.precision.base import PrecisionOperator
from curvlin_nn.batches import Labelled, Passes, choose
from curvlin_nn.capture import Recorder
from curvlin_nn.capture.inputs import split_batch
from curvlin_nn.capture.state import device_of, random_state_kept
from curvlin_nn.errors import UnsupportedError
from curvlin_nn.feature_maps import JacobianMap
from curvlin_nn.fingerprint import Fingerprint
from curvlin_nn.inference_mode import outside_inference_mode
from curvlin_nn.likelihoods import Likelihood
from curvlin_nn.parameters import Selection
from curvlin_nn.predictive import Predictive
from curvlin_nn.prior import check_precision
from curvlin_nn.randomness import frozen
from curvlin_nn.storage.files import StrPath, read
from curvlin_nn.variational import stored
from curvlin_nn.variational.bound import Variables, mean_curvature
from curvlin_nn.variational.fitted import Fitted
from curvlin_nn.variational.inducing import Counted, Inducing, placed
from curvlin_nn.variational.posterior import VariationalPosterior
from curvlin_nn.variational.training import TrainingHistory, TrainingOptions, positive


class VaLLA(VariationalPosterior[Fitted]):
    """A variational posterior of the linearised network, around its trained parameters.

    Like `Laplace` it has the network's output for its mean, and a Gaussian over all weights behind its covariance. Its
    precision is not summed over the data but learned from batches: the posterior is conditioned on M rows of a Jacobian
    at inducing inputs, whose places and weights are found by stochastic gradients. The model is never changed.

    Args:
        model: a trained network that maps one argument to outputs ``(N, C)``.
        likelihood: ``"classification"``, ``"binary"``, ``"regression"``, a loss of torch or a `Likelihood` of these.
        n_inducing: M; None is 100, or as many as are given.
        inducing: ``"kmeans"``, centres of the training inputs (of each class by itself, where targets are classes);
            ``"random"``, some of the inputs; or a pair ``(Z, outputs)``, inputs and a LongTensor with an index into the
            flattened outputs for each. Placed by at most `curvlin_nn.variational.inducing.POOL` samples.
        subset_of_weights: ``"all"``, ``"last_layer"``, names of parameters or modules, or a predicate.
        prior_precision: delta, one number; `fit` begins there.
        sigma_noise: the standard deviation of observations; likewise.
        dict_key_y: the name of the targets in loaders that yield mappings.
        generator: source of randomness for the placement of inducing points; None is torch's default generator.

    Raises:
        UnsupportedError: for a likelihood or a placement that is not served.
        TypeError, ValueError: for an argument of the wrong kind, or out of range.
        ImportError: for ``"kmeans"`` without the extra ``metrics``.
    """

    _over, _is_process = "the linearised network", False

    def __init__(
        self,
        model: nn.Module,
        likelihood: str | nn.Module | Likelihood,
        n_inducing: int | None = None,
        inducing: Inducing = "kmeans",
        *,
        subset_of_weights: Selection = "all",
        prior_precision: float | Tensor = 1.0,
        sigma_noise: float | Tensor = 1.0,
        dict_key_y: str = "labels",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(model, likelihood, n_inducing, inducing, sigma_noise, dict_key_y, generator)
        self.subset_of_weights = subset_of_weights
        self._prior_precision = _one_precision(prior_precision)

    @property
    def prior_precision(self) -> Float[Tensor, ""]:
        """delta: as it was given, or as `fit` found it."""
        return self._prior_precision if self._fitted is None else self._fitted.sparse.prior_precision

    @outside_inference_mode()
    def fit(
        self,
        train_loader: Iterable[Any],
        *,
        n_steps: int = 2000,
        lr: float = 1e-2,
        validation_loader: Iterable[Any] | None = None,
        every: int = 100,
        patience: int | None = None,
        max_seconds: float | None = None,
        optimize_prior_precision: bool = True,
        optimize_noise: bool = True,
        optimize_inducing: bool = True,
        progress_bar: bool = False,
    ) -> VaLLA:
        """Learn the posterior from batches, around the model's present parameters; an earlier fit is forgotten.

        Args:
            train_loader: batches ``(inputs, targets)``, or mappings with targets under `dict_key_y`; gone through once
                to count the samples and to place the inducing points, and then as often as it takes.
            n_steps: the most steps of Adam, one batch each.
            lr: its learning rate; ten times that for the logarithms of delta and sigma.
            validation_loader: other data, whose mean negative log-likelihood decides which state stays; without it,
                the last one does.
            every: how many steps there are between two evaluations.
            patience: how many evaluations in a row may be no better than the best before the fit ends.
            max_seconds: after which it ends as well.
            optimize_prior_precision: whether delta is learned.
            optimize_noise: whether the noise scale is, where the likelihood has one.
            optimize_inducing: whether the inducing inputs move.
            progress_bar: whether to show one.

        Returns:
            The object itself. If anything raises, it is as it was before, and so is the model.

        Raises:
            DataError: if a loader yields nothing, or data do not fit the model or the likelihood.
            UnsupportedError: if inducing inputs are to move that are no tensor of real numbers.
            TrainingDivergedError: if numbers are no longer finite; its `best` is a `VaLLA` in the best state before.
        """
        positive("lr", lr)
        options = TrainingOptions(n_steps, every, patience, max_seconds)
        device, own = device_of(self.model), frozen(self._generator, torch.device("cpu"))()
        fingerprint = Fingerprint.of(self.model)
        with random_state_kept(device):  # loaders draw from the default generator
            loader = Counted(Labelled(train_loader, self.dict_key_y))
            x, targets = split_batch(next(iter(loader)), "batch 0")
            space = choose(self.model, self.subset_of_weights, x, "batch 0")
            recorder = Recorder(self.model, space)
            recording = recorder(x, "batch 0")
            curvature = mean_curvature(self.likelihood, recording, targets.to(device), self._sigma_noise)
            shape = recording.outputs.shape
            by_class = self.likelihood.has_classes and len(shape) == 2 and shape[1] > 1
            points = placed(
                self.inducing, self.n_inducing, loader, max(1, shape[1:].numel()), by_class, device, own
            )
            if optimize_inducing and not points.movable:
                raise UnsupportedError(
                    "optimize_inducing=True needs inputs that are one tensor of real numbers, along which the inducing "
                    "points can move; take optimize_inducing=False"
                )
            n_data, history = loader.n_data, TrainingHistory()
            each = curvature * n_data / len(points)  # a point stands for so much of the data at first
            variables = Variables(recorder, points, self._prior_precision, self._sigma_noise, each)
            groups = variables.groups(
                lr,
                prior_precision=optimize_prior_precision,
                noise=optimize_noise and self.likelihood.has_noise,
                inducing=optimize_inducing,
            )

            def loss(x: Any, targets: Tensor, where: str) -> Tensor:
                q = variables.sparse()
                fit = q.expected_likelihood(recorder, self.likelihood, x, targets, where)
                return q.dual.divergence() - n_data * fit.mean()

            def fitted() -> Fitted:
                return Fitted(variables.sparse(), variables.points, recorder, fingerprint, history, n_data)

            optimizer = torch.optim.Adam(groups)
            self._train(optimizer, loss, loader, options, history, fitted, validation_loader, progress_bar)
        return self

    @property
    def posterior_precision(self) -> PrecisionOperator:
        """P of the weights, factored: a `Woodbury` of J_Z with the core A, in the dtype of the model."""
        return self._fit.precision

    @outside_inference_mode()
    @torch.no_grad()
    def elbo(self, loader: Iterable[Any]) -> Float[Tensor, ""]:
        """``sum_n log E p(y_n | f_n) - KL`` over the data of a loader, in nats: what `fit` maximises.

        The logarithm stands outside of the expectation (``alpha = 1``): this is the objective of the method, and no
        lower bound of the evidence.

        Raises:
            DataError: if the loader yields nothing, or targets do not fit.
            StaleModelError: if the model changed since `fit`.
        """
        fit = self._checked()
        total = torch.zeros((), dtype=torch.float64, device=device_of(self.model))
        with random_state_kept(total.device):
            for where, x, targets in Passes(Labelled(loader, self.dict_key_y), self.model):
                found = fit.sparse.expected_likelihood(fit.recorder, self.likelihood, x, targets, where)
                total = total + found.sum()
        return total - fit.sparse.dual.divergence()

    @classmethod
    @outside_inference_mode()
    def load(
        cls, path: StrPath, model: nn.Module, *, likelihood: str | nn.Module | Likelihood | None = None
    ) -> VaLLA:
        """The object that was saved; predictions are as they would have been.

        Args:
            path: of the file.
            model: the model that it was fitted to, with the same parameters and buffers.
            likelihood: the one it had, needed only where no name stands for it.

        Raises:
            FileNotFoundError: if there is no such file.
            StorageError: if it is damaged, of another kind, or a likelihood must be given.
            StaleModelError: if the model is another one, or holds other values.
        """
        state = read(path, stored.KIND)
        va = cls(model, **stored.arguments(state, likelihood))
        va._fitted = stored.fitted(state, model)
        return va

    def _stored(self) -> tuple[str, dict[str, Any]]:
        return stored.KIND, stored.state_of(self)

    def _outputs(self, progress_bar: bool) -> Predictive:
        return Predictive(JacobianMap.of(self._fit.recorder), self.posterior_precision, progress_bar)


def _one_precision(value: float | Tensor) -> Float[Tensor, ""]:
    precision = check_precision(value)
    if precision.numel() != 1:
        raise UnsupportedError(
            f"prior_precision must be one number for VaLLA, found shape {tuple(precision.shape)}"
        )
    return precision.reshape(()).double()
