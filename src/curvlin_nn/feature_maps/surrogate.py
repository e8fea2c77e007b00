"""A network that stands in for the Jacobian: the features of ScaLLA."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from curvlin import DenseFeatures
from curvlin._check import positive_integer
from curvlin_nn.capture import Recorder, last_layer
from curvlin_nn.capture.checks import checked_outputs
from curvlin_nn.capture.state import capturing, device_of, evaluation_mode, forward, prepared
from curvlin_nn.errors import (
    DataError,
    NotFittedError,
    OutputError,
    TrainingDivergedError,
    UnsupportedError,
    UnsupportedUseError,
)
from curvlin_nn.feature_maps.base import FeatureMap
from curvlin_nn.feature_maps.jacobian import JacobianMap
from curvlin_nn.feature_maps.pool import Pool
from curvlin_nn.feature_maps.recording import FeatureRecording
from curvlin_nn.feature_maps.surrogate_network import Scaled, check_surrogate, features_of, widened
from curvlin_nn.feature_maps.surrogate_options import SurrogateOptions
from curvlin_nn.feature_maps.surrogate_training import (
    SurrogateHistory,
    SurrogateTraining,
    stored,
)
from curvlin_nn.inference_mode import outside_inference_mode
from curvlin_nn.parameters import ParameterSpace
from curvlin_nn.storage.files import StrPath


class SurrogateMap(FeatureMap):
    """Features ``g(x)`` of a network g that was trained so that ``g g^T`` is near the tangent kernel ``J J^T``.

    No derivative is taken at prediction: a pass through g is all (ScaLLA, arXiv 2601.21835).

    Args:
        surrogate: maps what the model takes to ``(N, C, K)``; used as it is, in evaluation mode.
        model: whose outputs the features linearise; it comes back as it was.

    Attributes:
        surrogate: the network.
        history: how `fit` went; None for a network that was trained elsewhere.
    """

    def __init__(self, surrogate: nn.Module, model: nn.Module) -> None:
        check_surrogate(surrogate)
        self.surrogate, self._model = surrogate, model
        self._jacobian = JacobianMap(model)
        self._size: int | None = None
        self._output_shape: tuple[int, ...] | None = None
        self.history: SurrogateHistory | None = None

    @classmethod
    @outside_inference_mode()
    def fit(
        cls,
        model: nn.Module,
        train_loader: Iterable[Any],
        context_loader: Iterable[Any] | None = None,
        *,
        rank: int = 100,
        surrogate: nn.Module | None = None,
        protocol: str = "ours",
        targets: str | None = None,
        biased: bool = False,
        n_probes: int = 1,
        n_tangents: int | None = None,
        n_steps: int | None = None,
        max_seconds: float | None = None,
        batch_size: int | None = None,
        context_size: int | None = None,
        context_weight: float | None = None,
        lr: float | None = None,
        pool_size: int | None = 10_000,
        n_held_out: int | None = None,
        evaluate_every: int = 100,
        patience: int | None = None,
        dict_key_y: str = "labels",
        generator: torch.Generator | None = None,
        progress_bar: bool = False,
        checkpoint: StrPath | None = None,
        every: int = 1000,
    ) -> SurrogateMap:
        """Train a surrogate of a model's tangent kernel.

        ``protocol="published"`` is that of the paper: a batch of 5 samples and 5 of context, one Rademacher probe of
        the Jacobian in forward mode (Eqs. 3 and 8), the mean of squares, features scaled by ``sqrt(P / K)``, Adam with
        a constant learning rate of 5e-5, a network that begins at random.

        ``protocol="ours"`` knows the kernel without noise, gives samples and context each a kernel of size one, lets
        the learning rate warm up and fall, begins at the model's own weights, and keeps the state that is best on
        held-out samples. Its targets are:

        - ``"distilled"`` (the default): the kernel in its K leading directions, ``Y = J V``, computed once for every
          sample in the pool; a step costs no derivative of the model. The head begins at the regression of Y on its
          inputs, among which are tangents of the model along the first `n_tangents` directions, which the kernel is
          mostly made of: differences of copies of the model, at the price of a forward pass each. V has P K numbers.
        - ``"exact"``: the kernel of each batch, layer by layer.
        - ``"jvp"``: `n_probes` random probes; the default where layers cannot be captured. The history tells.

        Args:
            model: maps one argument to outputs ``(N, C)``; it comes back as it was.
            train_loader: batches ``(inputs, targets)``, or mappings with targets under `dict_key_y`, of any size;
                targets are not looked at.
            context_loader: the same, or batches of inputs alone, from elsewhere. None makes context of the training
                inputs, each of whose coordinates is that of another sample; ``context_size=0`` does without.
            rank: K.
            surrogate: the network, ``(N, C, K)`` out; a copy is trained, in the mode it is in. None takes a copy of the
                model with K features in the place of each output of its last layer, and hidden units before it (none in
                the published protocol), in evaluation mode.
            protocol: ``"ours"`` or ``"published"``.
            targets: ``"distilled"``, ``"exact"`` or ``"jvp"``.
            biased: whether the kernel between samples and context is taken to be zero (Eq. 9).
            n_probes: S, of ``targets="jvp"``.
            n_tangents: of the default surrogate with distilled targets: 4, fewer if the last layer has more than 512
                inputs, none above 2048; 0 does without.
            n_steps: when to stop; 5000, or 10^6 of the published protocol, if there is no `max_seconds`.
            max_seconds: when to stop, by the time, the preparation included.
            batch_size: training samples in a step; 64, or 5.
            context_size: context samples in a step; 16, or 5.
            context_weight: of the context's kernel against that of training samples, also where states are compared;
                0.25. The published protocol has none: both count as they are.
            lr: the largest learning rate; 1e-4 with tangents, 1e-3 without, or 5e-5.
            pool_size: training inputs held in memory, the first of the loader; None for all. Of context, as many. Each
                has C K numbers of distilled targets besides.
            n_held_out: samples of each kind whose exact kernel tells how good the surrogate is; never trained on. At
                most 64 (16 where layers cannot be captured) and a tenth of the samples by default.
            evaluate_every: steps between two looks at them.
            patience: looks without progress before stopping; 20, or none. The best state counts anyway.
            dict_key_y: the name of the targets in loaders that yield mappings.
            generator: source of randomness, drawn from once; None is torch's default generator.
            progress_bar: whether to show one.
            checkpoint: a file that the training is stored in, and goes on from if it is there, to other `n_steps`,
                `max_seconds` and `patience` if these are given; removed at the end.
            every: steps between two writes.

        Raises:
            DataError: if a loader yields nothing, context samples are of another kind, or the samples do not support
                K features.
            OutputError: if the surrogate's outputs do not have shape ``(N, C, K)``, or outputs or their derivatives are
                not finite; from a step of the training on it holds the best map so far.
            UnsupportedError: if an option is unknown or contradicts another, the surrogate does not take the samples,
                or the default one cannot be made of the model.
            TrainingDivergedError: if the training diverged; it holds the best map so far.
            StorageError: if the checkpoint is that of another training, or cannot be written.
        """
        options = SurrogateOptions(
            rank=rank,
            protocol=protocol,
            targets=targets,
            biased=biased,
            n_probes=n_probes,
            n_tangents=n_tangents,
            n_steps=n_steps,
            max_seconds=max_seconds,
            batch_size=batch_size,
            context_size=context_size,
            context_weight=context_weight,
            lr=lr,
            pool_size=pool_size,
            n_held_out=n_held_out,
            evaluate_every=evaluate_every,
            patience=patience,
        )
        positive_integer("every", every)
        state = None
        if checkpoint is not None and Path(checkpoint).exists():
            state = stored(checkpoint)
        training = _prepared(
            model, train_loader, context_loader, dict_key_y, surrogate, options, generator, state
        )
        if state is not None and checkpoint is not None:
            training.load_state_dict(state, checkpoint)
        fitted = cls(training.surrogate, model)
        fitted._size, fitted.history = rank, training.history
        try:
            training.run(progress_bar, checkpoint, every)
        except (TrainingDivergedError, OutputError) as error:
            error.best = fitted if training.restore_best() else None
            raise
        finally:
            fitted.surrogate.eval()
        return fitted

    @property
    def size(self) -> int:
        """K.

        Raises:
            NotFittedError: for a network from elsewhere, before the map has seen an input.
        """
        if self._size is None:
            raise NotFittedError("K is not known yet; call this SurrogateMap on an input first")
        return self._size

    @property
    def jacobian(self) -> JacobianMap:
        """J, whose kernel the features' is near."""
        return self._jacobian

    @property
    def output_shape(self) -> tuple[int, ...] | None:
        """See `FeatureMap.output_shape`."""
        return self._output_shape

    def __call__(self, x: Any) -> tuple[Float[Tensor, "N C"], DenseFeatures]:
        """See `FeatureMap.__call__`."""
        outputs, Phi = self._at(x, "the input")
        return outputs.reshape(len(outputs), -1), Phi

    def record(self, x: Any, where: str = "the input") -> FeatureRecording:
        """See `FeatureMap.record`."""
        return FeatureRecording(*self._at(x, where))

    @outside_inference_mode()
    @torch.no_grad()
    def _at(self, x: Any, where: str) -> tuple[Float[Tensor, N * C], DenseFeatures]:
        x = prepared(self._model, x, where)
        with capturing(self._model, ()), torch.no_grad():
            outputs = checked_outputs(forward(self._model, {}, x, where), where)
        with evaluation_mode(self.surrogate):
            features = features_of(self.surrogate, x, len(outputs), outputs[0].numel(), self._size, where)
        if not bool(torch.isfinite(features).all()):
            raise OutputError(f"features of the surrogate on {where} must be finite, found NaN or Inf")
        self._size, self._output_shape = features.shape[2], tuple(outputs.shape[1:])
        return outputs, DenseFeatures(features.detach().to(outputs.dtype))

    def tensors(self) -> Mapping[str, Tensor]:
        """See `FeatureMap.tensors`: what the surrogate holds."""
        return {**dict(self.surrogate.named_parameters()), **dict(self.surrogate.named_buffers())}


def _prepared(
    model: nn.Module,
    train_loader: Iterable[Any],
    context_loader: Iterable[Any] | None,
    dict_key_y: str,
    surrogate: nn.Module | None,
    asked: SurrogateOptions,
    generator: torch.Generator | None,
    state: Mapping[str, Any] | None,
) -> SurrogateTraining:
    """A training at its beginning; what it draws comes from the seed of a stored one."""
    options = asked.resolved()
    if surrogate is not None:
        check_surrogate(surrogate)
    if context_loader is not None and options.context_size == 0:
        raise UnsupportedError("context_loader is given, and context_size=0 leaves it out; give one of them")
    pool = Pool.of(train_loader, "train_loader", options.pool_size, dict_key_y)
    device = None if generator is None else generator.device
    seed = (
        int(torch.randint(2**62, (), generator=generator, device=device)) if state is None else state["seed"]
    )
    own = torch.Generator().manual_seed(seed)
    pool = Pool(pool[torch.randperm(pool.size, generator=own)], pool.size)
    context: Pool | None = None
    if options.context_size:
        if context_loader is None:
            context = pool.mixed(max(2, pool.size // 4), own)
        else:
            context = Pool.of(context_loader, "context_loader", options.pool_size, dict_key_y)
            context.check_like(pool, "context_loader", "train_loader")
            context = Pool(context[torch.randperm(context.size, generator=own)], context.size)
    _check_size(pool, "train_loader", options.n_held_out)
    if context is not None:
        _check_size(context, "context_loader", None)
    space = ParameterSpace.of(model, "all")
    few = pool[: min(4, pool.size)]
    recorder, captured = Recorder(model, space, fallback=False), True
    try:
        outputs = recorder(few).outputs
    except UnsupportedUseError:
        captured = False
        recorder = Recorder(model, space)
        with capturing(model, ()), torch.no_grad():
            x = prepared(model, few, "the first samples")
            outputs = checked_outputs(forward(model, {}, x, "the first samples"), "the first samples")
    n_outputs = outputs[0].numel()
    width = None if surrogate is not None else last_layer(model, few).shapes[0][-1]
    options = options.for_model(pool.size, captured, width)
    supported = min((pool.size - (options.n_held_out or 0)) * n_outputs, space.size)
    if options.rank > supported:
        raise DataError(
            f"rank must be at most {supported}, as the kernel of {pool.size - (options.n_held_out or 0)} training "
            f"samples with {n_outputs} outputs of {space.size} parameters, found {options.rank}; lower it, or give "
            "more samples"
        )
    if surrogate is None:
        fresh = options.protocol == "published"
        x = prepared(model, few, "the first samples")
        n_tangents = options.n_tangents or 0
        network = widened(
            model, x, n_outputs, options.rank, fresh=fresh, seed=seed % 2**31, n_tangents=n_tangents
        )
    else:
        network = copy.deepcopy(surrogate).to(device_of(model))
    scaled = Scaled(network, (space.size / options.rank) ** 0.5)
    scaled.training = network.training
    return SurrogateTraining(model, JacobianMap.of(recorder), captured, scaled, pool, context, options, seed)


def _check_size(pool: Pool, name: str, n_held_out: int | None) -> None:
    """Whether there are samples left where some are held out."""
    least = 2 if n_held_out is None else n_held_out + 1
    if pool.size < least:
        raise DataError(
            f"{name} must have at least {least} samples, as some are held out, found {pool.size}; give more, or lower "
            "n_held_out"
        )
