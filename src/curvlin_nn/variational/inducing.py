"""Inducing points of a tangent kernel: inputs z with an output c each, whose features are row c of J(z)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from curvlin import FeatureOperator
from curvlin._check import positive_integer
from curvlin_nn._extras import import_extra
from curvlin_nn.capture import Recorder
from curvlin_nn.capture.inputs import map_tensors, only_tensor, select_samples, split_batch, tensors_of
from curvlin_nn.data_subset import random_subset
from curvlin_nn.errors import DataError, UnsupportedError, one_of
from curvlin_nn.feature_maps.jacobian import features
from curvlin_nn.feature_maps.pool import joined
from curvlin_nn.variational.training import no_batches

PLACEMENTS = ("kmeans", "random")
"""How inducing points are placed, by name."""

POOL = 20_000
"""Training samples that inducing points are placed by, drawn at random where there are more."""

Inducing = str | tuple[Any, Tensor]
"""A placement by name, or inputs and the output of each."""


@dataclass(frozen=True)
class InducingPoints:
    """M inputs, and for each an index into the flattened outputs of a sample.

    Attributes:
        inputs: what the model takes.
        outputs: on the model's device.
    """

    inputs: Any
    outputs: Int[Tensor, " M"]

    def __len__(self) -> int:
        """M."""
        return len(self.outputs)

    @property
    def movable(self) -> bool:
        """Whether the inputs are one tensor of real numbers, which has gradients."""
        return isinstance(self.inputs, Tensor) and self.inputs.is_floating_point()

    def rows(self, recorder: Recorder, *, differentiable: bool = False) -> FeatureOperator:
        """Row c of J(z) of each, ``(M, 1, P)``, by one backward pass.

        Args:
            recorder: of the model.
            differentiable: whether they have gradients with respect to the inputs.

        Raises:
            OutputError: if outputs or gradients are not finite.
        """
        recording = recorder(self.inputs, "the inducing points", differentiable=differentiable)
        shape = recording.outputs.shape
        unit = torch.nn.functional.one_hot(self.outputs, max(1, shape[1:].numel()))
        return features(recording.captures(unit.to(recording.outputs).reshape(1, *shape)))


def check_inducing(inducing: object, n_inducing: int | None) -> None:
    """Whether inducing points are named or given, and as many as asked for.

    Raises:
        UnsupportedError: for an unknown name.
        TypeError, ValueError: if what is given is no pair of inputs and outputs, or they are fewer or more.
    """
    if n_inducing is not None:
        positive_integer("n_inducing", n_inducing)
    if isinstance(inducing, str):
        if inducing not in PLACEMENTS:
            raise UnsupportedError(
                f"inducing={inducing!r} is not supported; expected {one_of(PLACEMENTS)}, or a pair (Z, outputs)"
            )
        if inducing == "kmeans":
            import_extra("sklearn.cluster", "metrics", "inducing='kmeans'")  # say now that it is missing
        return
    if not (isinstance(inducing, tuple) and len(inducing) == 2 and isinstance(inducing[1], Tensor)):
        raise TypeError(
            f"inducing must be {one_of(PLACEMENTS)}, or a pair (Z, outputs) with outputs a tensor, found "
            f"{type(inducing).__name__}"
        )
    inputs, outputs = inducing
    if outputs.ndim != 1 or outputs.dtype != torch.long or not len(outputs):
        raise TypeError(
            f"outputs of the inducing points must be a 1-D LongTensor with at least one entry, found shape "
            f"{tuple(outputs.shape)} of {outputs.dtype}"
        )
    if not any(len(tensor) == len(outputs) for tensor in tensors_of(inputs) if tensor.ndim):
        raise ValueError(f"Z must hold {len(outputs)} inputs, as many as outputs, found another number")
    if n_inducing not in (None, len(outputs)):
        raise ValueError(
            f"n_inducing={n_inducing} does not fit the {len(outputs)} points given; leave it out"
        )


class Counted:
    """A loader that knows, once it has been gone through, how many samples it yielded."""

    def __init__(self, loader: Iterable[Any]) -> None:
        self._loader, self.n_data = loader, 0
        self._begun = False

    def __iter__(self) -> Iterator[Any]:
        """The batches.

        Raises:
            DataError: if there are none, or none any more.
        """
        again, self._begun = self._begun, True
        self.n_data = 0
        for index, batch in enumerate(self._loader):
            self.n_data += len(split_batch(batch, f"batch {index}")[1])
            yield batch
        if not self.n_data:
            raise no_batches(again)


def placed(
    inducing: Inducing,
    n_inducing: int,
    loader: Iterable[Any],
    n_outputs: int,
    by_class: bool,
    device: torch.device,
    generator: torch.Generator,
) -> InducingPoints:
    """Inducing points as they are before they move.

    Where targets are classes, each has as many points as any other, up to one, among its own samples, and its own
    logit as their output. Elsewhere the outputs take turns.

    Args:
        inducing: as `check_inducing` lets pass.
        n_inducing: M, unless they are given.
        loader: the training data; gone through once.
        n_outputs: of a sample.
        by_class: whether targets may be labels of as many classes.
        device: of the model.
        generator: source of randomness.

    Raises:
        DataError: if the loader yields nothing, or fewer usable samples than points.
        UnsupportedError: for k-means on inputs that are no tensor of real numbers.
        ValueError: for given outputs out of range.
    """
    if not isinstance(inducing, str):
        for _ in loader:  # counts
            pass
        inputs, outputs = inducing
        if bool(((outputs < 0) | (outputs >= n_outputs)).any()):
            raise ValueError(
                f"outputs of the inducing points must lie in 0 .. {n_outputs - 1}, found {outputs.tolist()}"
            )
        return InducingPoints(
            map_tensors(lambda t: t.detach().clone().to(device), inputs), outputs.to(device)
        )
    pool = random_subset(loader, POOL, device, generator)
    x = joined([(x, len(targets)) for x, targets in pool], "the loader")
    targets = torch.cat([targets for _, targets in pool])
    labels = None
    if by_class and targets.ndim == 1 and not targets.is_floating_point():
        labels = targets.cpu()
        usable = ((labels >= 0) & (labels < n_outputs)).nonzero().squeeze(1)
    else:
        usable = torch.arange(len(targets))
    if len(usable) < n_inducing:
        raise DataError(
            f"n_inducing must be at most the number of training samples, {len(usable)}, found {n_inducing}"
        )
    groups = [usable] if labels is None else [(labels == c).nonzero().squeeze(1) for c in range(n_outputs)]
    counts = _balanced([len(group) for group in groups], n_inducing)
    parts = [
        (_within(inducing, x, group, k, generator), k) for group, k in zip(groups, counts, strict=True) if k
    ]
    if labels is None:
        outputs = torch.arange(n_inducing) % n_outputs
    else:
        outputs = torch.arange(n_outputs).repeat_interleave(torch.tensor(counts))
    inputs = joined(parts, "the loader")
    return InducingPoints(map_tensors(lambda t: t.to(device), inputs), outputs.to(device))


def _balanced(available: list[int], total: int) -> list[int]:
    """As many of each kind as of any other, up to one, as far as there are any."""
    counts = [0] * len(available)
    while total:
        least = min(count for count, most in zip(counts, available, strict=True) if count < most)
        kind = next(k for k, most in enumerate(available) if counts[k] == least and least < most)
        counts[kind] += 1
        total -= 1
    return counts


def _within(inducing: str, x: Any, group: Tensor, k: int, generator: torch.Generator) -> Any:
    """k inputs for some samples: centres, or some of them."""
    n_samples = next(len(t) for t in tensors_of(x))
    if inducing == "random":
        chosen = group[torch.randperm(len(group), generator=generator)[:k]]
        return map_tensors(torch.clone, select_samples(x, chosen, n_samples))
    tensor = only_tensor(x)
    if tensor is None or not tensor.is_floating_point():
        raise UnsupportedError(
            "inducing='kmeans' needs inputs that are one tensor of real numbers; take inducing='random', or give "
            "(Z, outputs)"
        )
    cluster = import_extra("sklearn.cluster", "metrics", "inducing='kmeans'")
    seed = int(torch.randint(2**31, (), generator=generator))
    own = tensor[group].flatten(1).cpu()
    centres = cluster.KMeans(k, n_init=1, random_state=seed).fit(own.double().numpy()).cluster_centers_
    found = torch.from_numpy(centres).to(tensor).reshape(k, *tensor.shape[1:])
    return map_tensors(lambda _: found, x)
