"""What a model held at some time: enough to tell later whether its parameters or buffers are still the same."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor, nn

from curvlin_nn.errors import StaleModelError

WIDTH = 256
"""Columns of the matrix that a checksum is taken of: 2 KiB of words."""


@dataclass(frozen=True)
class Fingerprint:
    """The kinds and checksums of a model's parameters and buffers.

    Values are summed, not version counters compared: writes through ``.data`` leave no trace in a counter, and a model
    that was changed and restored is the same model.

    Attributes:
        kinds: shape, dtype and device of each tensor, by name.
        checksums: one row for each, in the same order.
    """

    kinds: dict[str, tuple[torch.Size, torch.dtype, torch.device]]
    checksums: Int[Tensor, "K 3"]

    @classmethod
    def of(cls, model: nn.Module) -> Fingerprint:
        """The fingerprint of what `model` holds now."""
        tensors = dict(_tensors(model))
        kinds = {name: (t.shape, t.dtype, t.device) for name, t in tensors.items()}
        return cls(kinds, torch.stack([checksum(t).cpu() for t in tensors.values()]))

    def difference(self, model: nn.Module) -> str | None:
        """The name of a parameter or buffer that `model` holds otherwise now, or None."""
        now = Fingerprint.of(model)
        if self.kinds != now.kinds:
            return min(name for name, _ in self.kinds.items() ^ now.kinds.items())
        differing = (self.checksums != now.checksums).any(dim=1).nonzero()
        return list(self.kinds)[int(differing[0])] if len(differing) else None

    def check_unchanged(self, model: nn.Module) -> None:
        """Whether `model` still holds what it held.

        Raises:
            StaleModelError: if it does not.
        """
        name = self.difference(model)
        if name is not None:
            raise StaleModelError(f"{name!r} of the model changed since fit; call fit again, or restore it")

    def state_dict(self) -> dict[str, Any]:
        """As plain values: shapes and dtypes by name, and the checksums; devices are left out."""
        kinds = {name: [list(shape), str(dtype)] for name, (shape, dtype, _) in self.kinds.items()}
        return {"kinds": kinds, "checksums": self.checksums}


def check_same(stored: Any, model: nn.Module) -> None:
    """Whether `model` holds what a model held whose `Fingerprint.state_dict` was stored, wherever its memory is.

    Raises:
        StaleModelError: if it does not.
    """
    now = Fingerprint.of(model)
    mine, kinds = now.state_dict()["kinds"], stored["kinds"]
    if lost := [name for name in kinds if name not in mine] or [name for name in mine if name not in kinds]:
        where = "the stored one has" if lost[0] in kinds else "the model has"
        raise StaleModelError(
            f"another model was stored: only {where} {lost[0]!r}; give the model that the posterior was fitted to"
        )
    for name, kind in mine.items():
        found, expected = ((tuple(shape), dtype) for shape, dtype in (kind, kinds[name]))
        if found != expected:
            raise StaleModelError(
                f"another model was stored: {name!r} has shape {found[0]} of {found[1]}, expected {expected[0]} of "
                f"{expected[1]}; give the model that the posterior was fitted to"
            )
    checksums = dict(zip(kinds, stored["checksums"].cpu(), strict=True))
    for name, checksum in zip(mine, now.checksums, strict=True):
        if not torch.equal(checksum, checksums[name]):
            raise StaleModelError(
                f"{name!r} of the model holds other values than the posterior was fitted around; load the trained "
                "weights first"
            )


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def checksum(tensor: Tensor) -> Int[Tensor, " 3"]:
    """Of the memory as a matrix of 64-bit words w: ``(sum w_ij, sum i w_ij, sum j w_ij)`` modulo 2^64.

    The first sum notices a change of one entry, the others an exchange of two.
    """
    memory = tensor.detach().reshape(-1).contiguous().view(torch.uint8)  # reshaped, a broadcast one stays so
    words = F.pad(memory, (0, -len(memory) % (8 * WIDTH))).view(torch.int64)
    words = words.reshape(len(words) // WIDTH, WIDTH)
    by_row, by_column = words.sum(1), words.sum(0)
    return torch.stack([by_row.sum(), *((torch.arange(len(s)).to(s) * s).sum() for s in (by_row, by_column))])
