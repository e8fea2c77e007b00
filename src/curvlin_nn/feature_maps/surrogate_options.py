"""What a surrogate's training is asked for, checked and with the defaults of its protocol."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from curvlin._check import positive_integer
from curvlin_nn.errors import UnsupportedError, one_of

N_TANGENTS = 4
"""Directions of tangents that the default surrogate sees, by default."""

TANGENT_WIDTH = 2048
"""The most numbers that these have in all, by default: what the regression's time and memory are the square of."""

PROTOCOLS = ("ours", "published")
TARGETS = ("distilled", "exact", "jvp")


@dataclass(frozen=True)
class SurrogateOptions:
    """See `SurrogateMap.fit`; None where the protocol decides."""

    rank: int
    protocol: str = "ours"
    targets: str | None = None
    biased: bool = False
    n_probes: int = 1
    n_tangents: int | None = None
    n_steps: int | None = None
    max_seconds: float | None = None
    batch_size: int | None = None
    context_size: int | None = None
    context_weight: float | None = None
    lr: float | None = None
    pool_size: int | None = 10_000
    n_held_out: int | None = None
    evaluate_every: int = 100
    patience: int | None = None

    def resolved(self) -> SurrogateOptions:
        """With the defaults of the protocol.

        Raises:
            UnsupportedError: if a name is unknown, or two options contradict each other.
            TypeError: if a number is no integer.
            ValueError: if a number is out of its range.
        """
        for name, value, known in (
            ("protocol", self.protocol, PROTOCOLS),
            ("targets", self.targets, (*TARGETS, None)),
        ):
            if value not in known:
                names = one_of(k for k in known if k is not None)
                raise UnsupportedError(f"{name}={value!r} is not supported; expected {names}")
        published = self.protocol == "published"
        if published and self.targets not in (None, "jvp"):
            raise UnsupportedError(
                f"the published protocol has targets='jvp', found {self.targets!r}; take protocol='ours'"
            )
        for name in ("rank", "n_probes", "evaluate_every"):
            positive_integer(name, getattr(self, name))
        for name in ("n_steps", "batch_size", "pool_size", "n_held_out", "patience"):
            if getattr(self, name) is not None:
                positive_integer(name, getattr(self, name))
        for name in ("context_size", "n_tangents"):
            if getattr(self, name) not in (None, 0):
                positive_integer(name, getattr(self, name))
        if self.biased and self.context_size == 0:
            raise UnsupportedError("biased=True needs context, found context_size=0; leave one of them")
        for name in ("max_seconds", "context_weight", "lr"):
            value = getattr(self, name)
            if value is not None and not (
                isinstance(value, (int, float)) and math.isfinite(value) and value > 0
            ):
                raise ValueError(f"{name} must be a positive number, found {value!r}")
        n_steps = self.n_steps
        if n_steps is None and self.max_seconds is None:
            n_steps = 1_000_000 if published else 5_000
        defaults: dict[str, Any] = (
            {"batch_size": 5, "context_size": 5, "context_weight": 1.0, "lr": 5e-5, "patience": None}
            if published
            else {"batch_size": 64, "context_size": 16, "context_weight": 0.25, "patience": 20}
        )
        chosen = {name: value for name in defaults if (value := getattr(self, name)) is not None}
        return replace(self, n_steps=n_steps, **(defaults | chosen))

    def for_model(self, n_samples: int, captured: bool, width: int | None) -> SurrogateOptions:
        """With the defaults that the model and the number of samples decide.

        Args:
            n_samples: in the pool.
            captured: whether layers of the model are.
            width: the inputs of its last layer; None for a surrogate of the user.

        Raises:
            UnsupportedError: if there are to be tangents, and no use for them.
        """
        targets = self.targets
        if targets is None:
            targets = "distilled" if captured and self.protocol == "ours" else "jvp"
        n_held_out = self.n_held_out or min(64 if captured else 16, max(1, n_samples // 10))
        served = targets == "distilled" and width is not None
        n_tangents = self.n_tangents
        if n_tangents and (not served or n_tangents > self.rank):
            raise UnsupportedError(
                f"n_tangents={n_tangents} is at most rank={self.rank}, of the default surrogate with "
                f"targets='distilled', found targets={targets!r}"
                f"{'' if width else ' and a surrogate of your own'}; leave it out"
            )
        if n_tangents is None:
            n_tangents = min(N_TANGENTS, self.rank, TANGENT_WIDTH // width) if served and width else 0
        # The nearer the start is, the sooner steps lead away from it.
        lr = self.lr or (1e-4 if n_tangents else 1e-3)
        return replace(self, targets=targets, n_held_out=n_held_out, n_tangents=n_tangents, lr=lr)

    @property
    def scheduled(self) -> bool:
        """Whether the learning rate warms up and falls; the published one is constant."""
        return self.protocol == "ours"

    def plain(self) -> dict[str, Any]:
        """As a file holds them."""
        return asdict(self)

    def learning_rate(self, step: int, progress: float) -> float:
        """That of a step (from 0), at a part in [0, 1] of the way: a linear warm-up and half a cosine."""
        assert self.lr is not None
        if not self.scheduled:
            return self.lr
        return self.lr * min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
