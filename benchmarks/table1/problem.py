"""What every row of the table is given."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from table1.fashion import Data, trained

PROTOCOLS = ("ours", "published")


@dataclass(frozen=True)
class Size:
    """How much is done: all, or little to see that it works.

    Attributes:
        n_epochs: of the network.
        n_train: the most training images, of context as well; None takes all.
        n_test: the most test images of each data set; None takes all.
        n_validation: held out in protocol ``"ours"``.
        n_pool: training images that our surrogate is trained on.
        seconds: of processor time that a method which is trained is given, if nothing else is said.
    """

    n_epochs: int
    n_train: int | None
    n_test: int | None
    n_validation: int
    n_pool: int
    seconds: float


FULL = Size(40, None, None, 5_000, 10_000, 1_800)
QUICK = Size(5, 10_000, 2_000, 1_000, 2_000, 20)


@dataclass(frozen=True)
class Problem:
    """A network, data, and what is allowed.

    Attributes:
        data_dir: with a folder for each data set.
        protocol: ``"ours"`` holds images out to choose hyperparameters by, and has no others; ``"published"`` is that
            of the paper's repository.
        seed: of the network and of what is drawn.
        size: how much is done.
        seconds: of processor time for each method that is trained.
        cache: a folder for trained networks.
    """

    data_dir: Path
    protocol: str
    seed: int
    size: Size
    seconds: float
    cache: Path

    @property
    def published(self) -> bool:
        return self.protocol == "published"

    @cached_property
    def data(self) -> Data:
        n_validation = 0 if self.published else self.size.n_validation
        return Data.load(self.data_dir, n_validation, self.size.n_train, self.size.n_test)

    @cached_property
    def model(self) -> nn.Sequential:
        x, y = self.data.train
        return trained(x, y, self.size.n_epochs, self.seed, self.cache / f"map-{len(x)}-seed{self.seed}.pt")

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    def train_loader(self) -> DataLoader[tuple[Tensor, ...]]:
        """In the order of the files."""
        return DataLoader(TensorDataset(*self.data.train), 500)

    def shuffled_loader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(TensorDataset(*self.data.train), 500, shuffle=True, generator=self.generator())

    def validation_loader(self) -> DataLoader[tuple[Tensor, ...]] | None:
        """Of what is held out; None where nothing is."""
        return None if self.published else DataLoader(TensorDataset(*self.data.validation), 500)

    def context_loader(self) -> DataLoader[tuple[Tensor, ...]] | None:
        """Of images from elsewhere, which the published protocol has."""
        return DataLoader(TensorDataset(self.data.context), 500) if self.published else None

    def test_sets(self) -> Iterator[tuple[str, Tensor]]:
        """Images by name, those in distribution first."""
        yield "test", self.data.test[0]
        yield from self.data.outside.items()
