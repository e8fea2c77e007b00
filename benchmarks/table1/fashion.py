"""The data and the network of the ScaLLA paper's first table."""

from __future__ import annotations

import gzip
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

OUT_OF_DISTRIBUTION = ("kmnist", "mnist")


def images(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    """Pixels in [0, 1], ``(N, 1, 28, 28)``, and labels, from files in the IDX format.

    Args:
        folder: of one data set.
        part: ``"train"`` or ``"t10k"``.
    """
    pixels = _idx(folder / f"{part}-images-idx3-ubyte.gz").float().div(255).unsqueeze(1)
    return pixels, _idx(folder / f"{part}-labels-idx1-ubyte.gz").long()


def _idx(path: Path) -> Tensor:
    if not path.is_file():
        raise SystemExit(f"--data-dir: {path} does not exist, expected a file in the IDX format")
    with gzip.open(path) as file:
        content = file.read()
    n_dimensions = content[3]
    shape = [int.from_bytes(content[4 + 4 * i : 8 + 4 * i], "big") for i in range(n_dimensions)]
    values = np.frombuffer(content, np.uint8, offset=4 + 4 * n_dimensions)
    return torch.from_numpy(values.reshape(shape).copy())


@dataclass(frozen=True)
class Data:
    """Fashion-MNIST, and images of something else.

    Attributes:
        train: of the network and of every posterior.
        validation: held out of `train`; empty in the published protocol, which has none.
        test: the 10,000 test images.
        outside: test images of other data sets, by name.
        context: training images of MNIST, which the published biased surrogate is given.
    """

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    outside: dict[str, Tensor]
    context: Tensor

    @classmethod
    def load(
        cls, folder: Path, n_validation: int, most: int | None = None, most_tests: int | None = None
    ) -> Data:
        """From folders ``fashion-mnist``, ``mnist`` and ``kmnist``.

        Args:
            folder: holds them.
            n_validation: how many of the last training images to hold out.
            most: the most training images; None takes all.
            most_tests: the most test images of each data set; None takes all.
        """
        x, y = images(folder / "fashion-mnist", "train")
        n_train = len(x) - n_validation
        test_x, test_y = images(folder / "fashion-mnist", "t10k")
        outside = {name: images(folder / name, "t10k")[0][:most_tests] for name in OUT_OF_DISTRIBUTION}
        return cls(
            (x[:n_train][:most], y[:n_train][:most]),
            (x[n_train:], y[n_train:]),
            (test_x[:most_tests], test_y[:most_tests]),
            outside,
            images(folder / "mnist", "train")[0][:most],
        )


def network() -> nn.Sequential:
    """That of the paper's repository: three convolutions and two linear layers, 140,594 parameters."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((1, 16), (16, 32), (32, 64)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(576, 200), nn.ReLU(), nn.Linear(200, 10))


def trained(x: Tensor, y: Tensor, n_epochs: int, seed: int, cache: Path) -> nn.Sequential:
    """The network after the published recipe, from a file if there is one.

    Adam at 1e-3, times 0.7 after every epoch, batches of 64 in the order of the files, no weight decay.
    """
    if not cache.exists():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = network().to(memory_format=torch.channels_last)  # a fifth faster
        optimizer = torch.optim.Adam(model.parameters(), 1e-3)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.7)
        for _ in range(n_epochs):
            for start in range(0, len(x), 64):
                optimizer.zero_grad()
                inputs = x[start : start + 64].to(memory_format=torch.channels_last)
                F.cross_entropy(model(inputs), y[start : start + 64]).backward()
                optimizer.step()
            schedule.step()
        cache.parent.mkdir(parents=True, exist_ok=True)
        unfinished = cache.with_suffix(".unfinished")
        torch.save({k: v.contiguous() for k, v in model.state_dict().items()}, unfinished)
        os.replace(unfinished, cache)
    fresh = network()
    fresh.load_state_dict(torch.load(cache, weights_only=True))
    return fresh.eval()
