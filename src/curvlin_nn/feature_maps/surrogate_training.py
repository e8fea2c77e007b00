"""The training of a surrogate: steps, held-out errors, the best state, and a file to go on from."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm import tqdm

from curvlin_nn.capture.state import device_of, evaluation_mode, prepared, random_state, set_random_state
from curvlin_nn.errors import OutputError, StorageError, TrainingDivergedError, UnsupportedError
from curvlin_nn.feature_maps.jacobian import JacobianMap
from curvlin_nn.feature_maps.kernel_loss import least_error, relative_error
from curvlin_nn.feature_maps.pool import Pool
from curvlin_nn.feature_maps.surrogate_head import heads_of, solve_heads
from curvlin_nn.feature_maps.surrogate_network import Scaled, features_of, tangents_of
from curvlin_nn.feature_maps.surrogate_options import SurrogateOptions
from curvlin_nn.feature_maps.surrogate_targets import (
    DistilledTargets,
    ExactTargets,
    KernelTargets,
    ProbedTargets,
    exact_gram,
    inputs,
)
from curvlin_nn.fingerprint import Fingerprint, check_same
from curvlin_nn.storage import plain
from curvlin_nn.storage.files import StrPath, read, remove, write

KIND = "curvlin_nn surrogate training"
"""What a checkpoint of this kind says that it is."""

CHUNK = 256
"""Samples that a surrogate is evaluated on at a time."""

clock: Callable[[], float] = time.perf_counter
"""What `max_seconds` is measured by."""


@dataclass
class SurrogateHistory:
    """How a training went, evaluation by evaluation.

    Attributes:
        targets: what was trained on: ``"distilled"``, ``"exact"`` or ``"jvp"``.
        optimum: the least relative error that a kernel of rank K has on the held-out samples (Eckart and Young).
        steps: at which there was an evaluation.
        seconds: since the beginning, the preparation included.
        losses: the mean training loss since the evaluation before; NaN at the beginning.
        errors: ``|kernel - F F^T|_F / |kernel|_F`` on the held-out samples.
        context_errors: the same on held-out context samples; empty without context.
        context_weight: of these, when states are compared.
    """

    targets: str
    optimum: float
    steps: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)
    context_errors: list[float] = field(default_factory=list)
    context_weight: float = 0.0

    def score(self, evaluation: int) -> float:
        """``sqrt(error^2 + (context_weight context_error)^2)``, as in the loss: the kept state has the least."""
        of_context = self.context_errors[evaluation] if self.context_errors else 0.0
        found = math.hypot(self.errors[evaluation], self.context_weight * of_context)
        return math.inf if math.isnan(found) else found

    @property
    def best(self) -> int:
        """The number of the evaluation whose state was kept."""
        return min(range(len(self.errors)), key=self.score)

    @property
    def since_best(self) -> int:
        """How many evaluations there have been since."""
        return len(self.errors) - 1 - self.best


@dataclass
class _HeldOut:
    pool: Pool
    gram: Float[Tensor, "R R"]

    @property
    def size(self) -> float:
        """The root of the mean square of the kernel's entries."""
        return float(self.gram.double().norm()) / len(self.gram)


class SurrogateTraining:
    """A training under way.

    Args:
        model: the target.
        jacobian: of it.
        captured: whether its layers are.
        surrogate: what is trained, in place.
        pool: of training inputs, in random order.
        context: of other inputs; None for none.
        options: resolved.
        seed: of all that is drawn.
    """

    def __init__(
        self,
        model: nn.Module,
        jacobian: JacobianMap,
        captured: bool,
        surrogate: Scaled,
        pool: Pool,
        context: Pool | None,
        options: SurrogateOptions,
        seed: int,
    ) -> None:
        self._began = clock()
        self._model, self._jacobian, self.surrogate, self._options = model, jacobian, surrogate, options
        self._seed, self._checksums = seed, [p.checksum() for p in (pool, context) if p is not None]
        self._generator = torch.Generator().manual_seed(seed)
        n_held_out = options.n_held_out
        assert n_held_out is not None
        self._held_out: list[_HeldOut] = []
        self._pools: list[Pool] = []
        of_context = 0 if context is None else context.size // 2
        for name, whole, n in (
            ("train_loader", pool, n_held_out),
            ("context_loader", context, min(n_held_out, of_context)),
        ):
            if whole is not None:
                held_out, rest = whole.split(n)
                by_layers = captured or options.targets != "jvp"
                gram = exact_gram(model, jacobian, held_out, by_layers, f"the held-out samples of {name}")
                self._held_out.append(_HeldOut(held_out, gram))
                self._pools.append(rest)
        self.n_outputs = len(self._held_out[0].gram) // self._held_out[0].pool.size
        scales = [1.0, math.sqrt(options.context_weight or 0.0)]
        self._weights = [
            scale / math.sqrt(h.size) if options.scheduled else 1.0
            for scale, h in zip(scales, self._held_out, strict=False)
        ]
        if options.scheduled:
            surrogate.scale.fill_(self._scale())
        self._targets = self._make_targets()
        self._begin_at_regression()
        self._parameters = [p for p in surrogate.parameters() if p.requires_grad]
        if not self._parameters:
            raise UnsupportedError("the surrogate has no parameter that requires a gradient, expected some")
        assert options.lr is not None
        self._adam = torch.optim.Adam(self._parameters, options.lr)
        optimum = least_error(self._held_out[0].gram, options.rank)
        self.history = SurrogateHistory(
            options.targets or "", optimum, context_weight=options.context_weight or 0.0
        )
        self.step = 0
        self.best: dict[str, Tensor] = {}
        self._losses: list[float] = []

    def _scale(self) -> float:
        """What makes ``F F^T`` as large as the kernel on the diagonal, for outputs of mean square one."""
        return math.sqrt(float(self._held_out[0].gram.diagonal().mean()) / self._options.rank)

    def _make_targets(self) -> KernelTargets:
        options = self._options
        if options.targets == "exact":
            return ExactTargets(self._jacobian)
        if options.targets == "jvp":
            return ProbedTargets(self._model, self._jacobian, options.n_probes, self._generator)
        return DistilledTargets(self._jacobian, self._pools, self._weights, options.rank, self._generator)

    def _begin_at_regression(self) -> None:
        """The heads of a widened network where they are nearest to the features to be distilled."""
        network, targets = self.surrogate.network, self._targets
        if not (isinstance(targets, DistilledTargets) and heads_of(network)):
            return
        pool = self._pools[0]
        if (tangents := tangents_of(network)) is not None:
            leading = targets.directions.V[:, : len(tangents.scales)].mT
            directions = [self._jacobian.space.unflatten(v) for v in leading]
            tangents.point(directions, prepared(self._model, pool[:CHUNK], "the training samples"))
        solve_heads(network, self._examples(targets))

    def _examples(self, targets: DistilledTargets) -> Iterator[tuple[Any, Tensor, float]]:
        """Inputs and the network's outputs that are wanted there, with the weight of the pool that they are from."""
        for pool, weight, where in zip(self._pools, self._weights, ("training", "context"), strict=False):
            for x, wanted in targets.examples(pool, CHUNK):
                x = prepared(self._model, x, f"the {where} samples")
                yield x, wanted / self.surrogate.scale, weight / self._weights[0]

    # -- steps -----------------------------------------------------------------------------------------------

    def run(self, progress_bar: bool = False, checkpoint: StrPath | None = None, every: int = 1000) -> None:
        """Go on until the steps, the time or the patience are at their end; the best state is the surrogate's then.

        Raises:
            TrainingDivergedError: if it diverged.
            OutputError: if targets or features are not finite, or of the wrong shape.
            StorageError: if the checkpoint cannot be written.
        """
        options = self._options
        if not self.history.steps:
            self._evaluate()
        with tqdm(
            total=options.n_steps, initial=self.step, desc="surrogate", disable=not progress_bar
        ) as bar:
            while not self._at_end():
                self._take_step()
                bar.update()
                if self.step % options.evaluate_every == 0:
                    self._evaluate()
                    bar.set_postfix(
                        error=f"{self.history.errors[-1]:.3f}",
                        best=f"{self.history.errors[self.history.best]:.3f}",
                    )
                if checkpoint is not None and self.step % every == 0:
                    write(checkpoint, KIND, self.state_dict())
        if self.history.steps[-1] != self.step:
            self._evaluate()
        self.restore_best()
        if checkpoint is not None:
            remove(checkpoint)

    def restore_best(self) -> bool:
        """Set the surrogate to its best state; False if there has been none."""
        if self.best:
            self.surrogate.load_state_dict(self.best)
        return bool(self.best)

    def _at_end(self) -> bool:
        options = self._options
        return (
            (options.n_steps is not None and self.step >= options.n_steps)
            or (options.max_seconds is not None and self.elapsed() >= options.max_seconds)
            or (options.patience is not None and self.history.since_best >= options.patience)
        )

    def elapsed(self) -> float:
        """Seconds of this training, the parts before an interruption included."""
        return clock() - self._began

    def _progress(self) -> float:
        options = self._options
        of_steps = 0.0 if options.n_steps is None else self.step / options.n_steps
        of_time = 0.0 if options.max_seconds is None else self.elapsed() / options.max_seconds
        return max(of_steps, of_time)

    def _take_step(self) -> None:
        options = self._options
        assert options.batch_size is not None and options.context_size is not None
        sizes = (options.batch_size, options.context_size)
        batch = [
            (pool, pool.draw(size, self._generator)) for pool, size in zip(self._pools, sizes, strict=False)
        ]
        groups = [len(index) * self.n_outputs for _, index in batch]
        where = f"the batch of step {self.step + 1}"
        with torch.inference_mode(False), torch.enable_grad():
            F = self._features(inputs(batch), sum(len(index) for _, index in batch), where).flatten(0, 1)
            weights = torch.cat(
                [F.new_full((n,), weight) for n, weight in zip(groups, self._weights, strict=True)]
            )
            distance = self._targets.distance(F, weights, batch, groups if options.biased else (), where)
            loss = distance / len(F) ** 2
            self._adam.zero_grad()
            loss.backward()
        value = float(loss.detach())
        self.step += 1
        if not math.isfinite(value):
            self._diverged(f"found a loss of {value}")
        self._losses.append(value)
        for group in self._adam.param_groups:
            group["lr"] = options.learning_rate(self.step - 1, self._progress())
        self._adam.step()

    def _features(self, x: Any, n_samples: int, where: str) -> Float[Tensor, "N C K"]:
        x = prepared(self._model, x, where)
        return features_of(self.surrogate, x, n_samples, self.n_outputs, self._options.rank, where)

    # -- evaluation ------------------------------------------------------------------------------------------

    def _evaluate(self) -> None:
        errors = [self._error(h) for h in self._held_out]
        history = self.history
        history.steps.append(self.step)
        history.seconds.append(self.elapsed())
        history.losses.append(sum(self._losses) / len(self._losses) if self._losses else math.nan)
        history.errors.append(errors[0])
        history.context_errors += errors[1:]
        self._losses = []
        if self.step == 0 and not math.isfinite(errors[0]):
            raise OutputError(
                "features of the surrogate on held-out samples must be finite, found NaN or Inf"
            )
        if not math.isfinite(errors[0]) or errors[0] > 10 * max(1.0, history.errors[0]):
            self._diverged(f"found a held-out kernel error of {errors[0]:.3g}")
        if history.since_best == 0 and math.isfinite(history.score(-1)):
            self.best = {name: t.detach().clone() for name, t in self.surrogate.state_dict().items()}

    @torch.no_grad()
    def _error(self, held_out: _HeldOut) -> float:
        parts: list[Tensor] = []
        with evaluation_mode(self.surrogate):
            for x in held_out.pool.batches(CHUNK):
                n = min(CHUNK, held_out.pool.size - CHUNK * len(parts))
                parts.append(self._features(x, n, "the held-out samples").flatten(0, 1))
        return relative_error(torch.cat(parts), held_out.gram)

    def _diverged(self, found: str) -> None:
        raise TrainingDivergedError(self.step, found)

    # -- storage ---------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """All that a training goes on from; what was prepared is prepared again, from the seed."""
        adam = [
            {key: torch.as_tensor(value) for key, value in self._adam.state[p].items()}
            for p in self._parameters
        ]
        return {
            "options": self._options.plain(),
            "model": Fingerprint.of(self._model).state_dict(),
            "pools": self._checksums,
            "seed": self._seed,
            "step": self.step,
            "seconds": self.elapsed(),
            "surrogate": dict(self.surrogate.state_dict()),
            "adam": adam,
            "best": self.best,
            "losses": self._losses,
            "history": asdict(self.history),
            "generator": self._generator.get_state(),
            "random": random_state(device_of(self._model)),
        }

    def load_state_dict(self, state: dict[str, Any], path: StrPath) -> None:
        """Go on where another training was.

        Raises:
            StorageError: if it was asked for something else, or had other data or another surrogate.
            StaleModelError: if it was that of another model.
        """
        check_same(state["model"], self._model)
        mine = self._options.plain()
        for name, value in mine.items():
            if name not in ("n_steps", "max_seconds", "patience") and state["options"].get(name) != value:
                raise StorageError(f"{path} is that of a training with another {name}; {_SAME}")
        if not plain.equal(state["pools"], self._checksums):
            raise StorageError(f"{path} is that of a training on other samples; {_SAME}")
        try:
            self.surrogate.load_state_dict(state["surrogate"])
        except RuntimeError as error:
            raise StorageError(f"{path} is that of a training of another surrogate; {_SAME}") from error
        for p, stored in zip(self._parameters, state["adam"], strict=True):
            # Adam counts its steps on the CPU.
            self._adam.state[p] = {
                key: value if key == "step" else value.to(p.device) for key, value in stored.items()
            }
        device = device_of(self._model)
        self.best = {name: t.to(device) for name, t in state["best"].items()}
        self.step, self._losses = state["step"], state["losses"]
        self.history = SurrogateHistory(**state["history"])
        self._generator.set_state(state["generator"])
        set_random_state(device, state["random"])
        self._began = clock() - state["seconds"]


_SAME = "give the same as before, or delete the file"


def stored(path: StrPath) -> dict[str, Any]:
    """What a checkpoint holds.

    Raises:
        StorageError: if it is damaged, or no checkpoint of a training.
    """
    state: dict[str, Any] = read(path, KIND)
    return state
