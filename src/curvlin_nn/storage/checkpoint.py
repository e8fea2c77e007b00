"""Checkpoints of a fit: the sums, how many batches are in them, and what these looked like.

A fit that begins again is given the same batches again. Those that the sums hold are only looked at: each adds to a
running hash, which must be the stored one when the last of them has gone by. So nothing is lost or counted twice, and a
loader that yields other data, or the same in another order, is noticed before anything is added.

What a loader draws from torch's default generators is drawn again: their state at the beginning of each pass is stored,
and that after the last batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from curvlin._check import positive_integer
from curvlin_nn.capture.inputs import tensors_of
from curvlin_nn.capture.state import device_of, random_state, set_random_state
from curvlin_nn.columns import Columns
from curvlin_nn.errors import StorageError
from curvlin_nn.fingerprint import Fingerprint, check_same, checksum
from curvlin_nn.storage import options, plain
from curvlin_nn.storage.files import StrPath, read, remove, write

KIND = "curvlin_nn checkpoint"
"""What a file of this kind says that it is."""

Batch = tuple[int, tuple[Any, Tensor]]
"""The number of a batch in its pass, its inputs and its targets."""


class Sums(Protocol):
    """What is stored: the sums of an accumulation."""

    model: nn.Module
    columns: Columns
    pass_index: int

    def state_dict(self) -> dict[str, Any]:
        """All of it as tensors and plain values."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another one was."""


class Checkpoint:
    """A file that a fit writes as it goes along, and goes on from where it is found.

    Args:
        path: of the file, in a folder that exists.
        every: how many batches there are between two writes.
        choices: what the fit was asked for, by the names of the arguments; another answer is another fit.

    Raises:
        ValueError: if `every` is no positive integer.
    """

    def __init__(self, path: StrPath, every: int, choices: dict[str, Any]) -> None:
        self._path, self._every = Path(path), positive_integer("every", every)
        self._choices = options.without_randomness(choices)
        self._model: dict[str, Any] = {}
        self._stored: dict[str, Any] | None = None
        self._digest = hashlib.sha256()
        self._n_batches = 0
        self._random: list[list[Tensor]] = []  # at the beginning of each pass

    def resume(self, sums: Sums) -> None:
        """Take the sums from the file, if there is one.

        Raises:
            StorageError: if it is damaged, no checkpoint, or that of a fit that was asked for something else.
            StaleModelError: if it is that of another model.
        """
        self._model = Fingerprint.of(sums.model).state_dict()
        if not self._path.exists():
            return
        stored = read(self._path, KIND)
        check_same(stored["model"], sums.model)
        for name, choice in self._choices.items():
            if not plain.equal(choice, stored["choices"].get(name)):
                raise StorageError(
                    f"checkpoint {self._path} is that of a fit with another {name}; give the same as before, or delete "
                    "the file"
                )
        sums.load_state_dict(stored.pop("sums"))  # which copies them
        self._stored, self._random = stored, stored["random"]

    def unseen(self, stream: Iterable[Batch], pass_index: int, sums: Sums) -> Iterator[Batch]:
        """The batches of a pass that the sums do not hold; what they hold is stored now and then.

        Raises:
            StorageError: if the batches that they hold are not those of the stream, or cannot be stored.
        """
        device = device_of(sums.model)
        if pass_index < len(self._random):
            set_random_state(device, self._random[pass_index])
        else:
            self._random.append(random_state(device))
        for index, (x, targets) in stream:
            self._n_batches += 1
            self._look_at(f"{pass_index} {index}", x, targets)
            if self._is_stored(self._n_batches):
                if not self._is_stored(self._n_batches + 1):
                    self._arrive(sums)
                continue
            yield index, (x, targets)
            if self._n_batches == 1:
                plain.split(sums.state_dict())  # says now what cannot be stored
            if self._n_batches % self._every == 0:
                write(self._path, KIND, self._contents(sums))
        if pass_index == sums.pass_index and self._is_stored(self._n_batches + 1):
            raise self._other_batches()

    def remove(self) -> None:
        """Once the fit has ended, there is nothing to go on with."""
        remove(self._path)

    def _is_stored(self, n_batches: int) -> bool:
        """Whether the file has the batch that is this many from the beginning, over all passes."""
        return self._stored is not None and n_batches <= self._stored["n_batches"]

    def _look_at(self, where: str, x: Any, targets: Tensor) -> None:
        for tensor in (*tensors_of(x), targets):
            seen = where, tuple(tensor.shape), tensor.dtype, checksum(tensor).tolist()
            self._digest.update(repr(seen).encode())

    def _arrive(self, sums: Sums) -> None:
        """Where the other fit stopped: with the same batches behind, and the same random numbers before it."""
        assert self._stored is not None
        if self._digest.hexdigest() != self._stored["digest"]:
            raise self._other_batches()
        set_random_state(device_of(sums.model), self._stored["random_now"])
        if sums.columns.generator is not None and self._stored["generator"] is not None:
            sums.columns.generator.set_state(self._stored["generator"].cpu())

    def _contents(self, sums: Sums) -> dict[str, Any]:
        generator = sums.columns.generator
        return {
            "choices": self._choices,
            "model": self._model,
            "n_batches": self._n_batches,
            "digest": self._digest.hexdigest(),
            "random": self._random,
            "random_now": random_state(device_of(sums.model)),
            "generator": None if generator is None else generator.get_state(),
            "sums": sums.state_dict(),
        }

    def _other_batches(self) -> StorageError:
        return StorageError(
            f"the loader yields other batches than those in checkpoint {self._path}, or another order; give the same "
            "data in the same order (shuffle=False, or a seeded generator), or delete the file"
        )
