"""The inputs that a surrogate is trained on, held in memory, and inputs from elsewhere that are made of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from curvlin_nn.capture.inputs import map_tensors, select_samples, split_batch, tensors_of
from curvlin_nn.errors import DataError
from curvlin_nn.fingerprint import checksum


@dataclass(frozen=True)
class Pool:
    """N samples of inputs, whatever these are nested in.

    Attributes:
        x: what the model takes, for all samples at once.
        size: N.
    """

    x: Any
    size: int

    @classmethod
    def of(
        cls, loader: Iterable[Any], name: str, at_most: int | None = None, dict_key_y: str = "labels"
    ) -> Pool:
        """The first samples of a loader, without their targets.

        Args:
            loader: yields ``(inputs, targets)``, mappings with targets under `dict_key_y`, or bare tensors of inputs.
            name: of the argument, for messages.
            at_most: how many samples are taken; None takes all.
            dict_key_y: the name of the targets in mappings.

        Raises:
            DataError: if it yields no sample, or samples that do not go together.
        """
        parts: list[tuple[Any, int]] = []
        size = 0
        if isinstance(loader, Tensor):
            raise DataError(f"{name} must yield batches of inputs, found a tensor; give [x]")
        for index, batch in enumerate(loader):
            where = f"batch {index} of {name}"
            x = batch if isinstance(batch, Tensor) else _inputs(batch, where, dict_key_y)
            n_samples = _n_samples(x, where)
            taken = n_samples if at_most is None else min(n_samples, at_most - size)
            if taken > 0:
                parts.append((select_samples(x, slice(0, taken), n_samples), taken))
                size += taken
            if size == at_most:
                break
        if not parts:
            raise DataError(f"{name} yielded no sample, expected at least one")
        return cls(joined(parts, name), size)

    def __getitem__(self, index: slice | Int[Tensor, " n"]) -> Any:
        """The inputs of some samples."""
        return select_samples(self.x, index, self.size)

    def split(self, n_first: int) -> tuple[Pool, Pool]:
        """The first samples and the rest."""
        return Pool(self[:n_first], n_first), Pool(self[n_first:], self.size - n_first)

    def batches(self, size: int) -> Iterator[Any]:
        """All samples in order, at most `size` at a time."""
        for start in range(0, self.size, size):
            yield self[start : start + size]

    def draw(self, n: int, generator: torch.Generator | None) -> Int[Tensor, " n"]:
        """The indices of n samples, drawn with replacement."""
        device = "cpu" if generator is None else generator.device
        return torch.randint(self.size, (n,), generator=generator, device=device).cpu()

    def mixed(self, n: int, generator: torch.Generator | None) -> Pool:
        """Samples of which every coordinate is that of another sample: all marginals are kept, nothing else.

        Numbers stay in their range, pixel by pixel, and token indices valid ones.
        """

        def mix(tensor: Tensor) -> Tensor:
            if tensor.shape[:1] != (self.size,):
                return tensor
            flat = tensor.reshape(self.size, -1)
            device = "cpu" if generator is None else generator.device
            rows = torch.randint(self.size, (n, flat.shape[1]), generator=generator, device=device)
            return flat.gather(0, rows.to(flat.device)).reshape(n, *tensor.shape[1:])

        return Pool(map_tensors(mix, self.x), n)

    def check_like(self, other: Pool, name: str, other_name: str) -> None:
        """Whether samples of another pool are what these are.

        Raises:
            DataError: if they are nested otherwise, or shapes or dtypes differ.
        """
        nested, wanted = _nesting(self.x), _nesting(other.x)
        if nested != wanted:
            raise DataError(f"{name} yields {nested} as inputs, expected {wanted} as {other_name} does")
        mine, theirs = self._kinds(), other._kinds()
        if mine != theirs:
            raise DataError(
                f"{name} yields samples of {_listed(mine)}, expected {_listed(theirs)} as {other_name} does"
            )

    def checksum(self) -> Int[Tensor, "T 3"]:
        """What tells this pool from another one."""
        return torch.stack([checksum(t.cpu()) for t in tensors_of(self.x)])

    def _kinds(self) -> list[tuple[tuple[int, ...], torch.dtype]]:
        return [(tuple(t.shape[1:]), t.dtype) for t in tensors_of(self.x) if t.shape[:1] == (self.size,)]


def _inputs(batch: Any, where: str, dict_key_y: str) -> Any:
    if isinstance(batch, (tuple, list)) and len(batch) == 1 and isinstance(batch[0], Tensor):
        return batch[0]  # a TensorDataset of inputs alone
    return split_batch(batch, where, dict_key_y)[0]


def _nesting(x: Any) -> str:
    """How tensors are nested in an input."""
    if isinstance(x, Tensor):
        return "a tensor"
    if isinstance(x, Mapping):
        return "{" + ", ".join(f"{key!r}: {_nesting(value)}" for key, value in x.items()) + "}"
    if isinstance(x, (tuple, list)):
        return "(" + ", ".join(map(_nesting, x)) + ")"
    return type(x).__name__


def _n_samples(x: Any, where: str) -> int:
    sizes = [len(t) for t in tensors_of(x) if t.ndim]
    if not sizes:
        raise DataError(f"{where} must hold a tensor with samples along axis 0, found {type(x).__name__}")
    return sizes[0]


def joined(parts: Sequence[tuple[Any, int]], name: str) -> Any:
    """The inputs of several batches as one; what is shared by the samples of a batch is that of the first.

    Args:
        parts: the inputs of each batch, and how many samples they are.
        name: where they come from, for messages.

    Raises:
        DataError: if samples of different kinds come together.
    """
    columns = [list(tensors_of(x)) for x, _ in parts]
    if len({len(column) for column in columns}) > 1:
        raise DataError(
            f"{name} yields inputs of {len(columns[0])} tensors and of another number, expected one"
        )
    whole = []
    for tensors in zip(*columns, strict=True):
        if any(t.shape[:1] != (n,) for t, (_, n) in zip(tensors, parts, strict=True)):
            whole.append(tensors[0])
            continue
        kinds = {(tuple(t.shape[1:]), t.dtype) for t in tensors}
        if len(kinds) > 1:
            raise DataError(f"{name} yields samples of {_listed(sorted(kinds, key=str))}, expected one kind")
        whole.append(torch.cat(tensors))
    rest = iter(whole)
    return map_tensors(lambda _: next(rest), parts[0][0])


def _listed(kinds: Sequence[tuple[tuple[int, ...], torch.dtype]]) -> str:
    return " and ".join(f"shape {shape} of {dtype}" for shape, dtype in kinds) or "no tensor"
