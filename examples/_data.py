"""The data sets of the examples: scikit-learn's digits, or Fashion-MNIST from a folder of IDX files."""

from __future__ import annotations

import gzip
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor


@dataclass(frozen=True)
class Images:
    """Images ``(N, 1, H, W)`` in [0, 1] with labels, and images of something else."""

    name: str
    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    x_ood: Tensor
    ood_name: str

    @property
    def n_classes(self) -> int:
        return int(self.y_train.max()) + 1


def digits(held_out: tuple[int, ...] = (8, 9), *, noise: float, seed: int) -> Images:
    """8x8 digits in pixel noise of this standard deviation; noise and split follow from the seed.

    The `held_out` classes are never trained on: they, in the same noise, are the out-of-distribution images.
    """
    images, labels = load_digits(return_X_y=True)
    clean = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    x = clean + noise * torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed))
    is_out = torch.isin(torch.tensor(labels), torch.tensor(held_out))
    known = [digit for digit in range(10) if digit not in held_out]
    y = torch.searchsorted(torch.tensor(known), torch.tensor(labels)[~is_out])
    train, test = train_test_split(range(len(y)), test_size=0.4, random_state=seed, stratify=y)
    return Images(
        f"digits in noise of {noise:g}",
        *(x[~is_out][train], y[train]),
        *(x[~is_out][test], y[test]),
        x_ood=x[is_out],
        ood_name=f"digits {' and '.join(map(str, held_out))}, never trained on",
    )


def fashion_mnist(folder: Path, n_train: int = 4_000, n_test: int = 2_000) -> Images:
    """Fashion-MNIST from IDX files in `folder` or ``folder/fashion-mnist``."""
    here = folder / "fashion-mnist" if (folder / "fashion-mnist").is_dir() else folder
    x_train, y_train = _idx_pair(here, "train", n_train)
    x_test, y_test = _idx_pair(here, "t10k", n_test)
    for name in ("kmnist", "mnist"):
        for other in (folder / name, here.parent / name):
            if (other / "t10k-images-idx3-ubyte.gz").is_file():
                x_ood, _ = _idx_pair(other, "t10k", n_test)
                return Images("Fashion-MNIST", x_train, y_train, x_test, y_test, x_ood, name.upper())
    upside_down = x_test.flip(-2)
    return Images("Fashion-MNIST", x_train, y_train, x_test, y_test, upside_down, "test images upside down")


def _idx_pair(folder: Path, part: str, n: int) -> tuple[Tensor, Tensor]:
    images = _read_idx(folder / f"{part}-images-idx3-ubyte.gz")[:n]
    labels = _read_idx(folder / f"{part}-labels-idx1-ubyte.gz")[:n]
    x = torch.from_numpy(images.astype(np.float32) / 255).unsqueeze(1)
    return x, torch.from_numpy(labels.astype(np.int64))


def _read_idx(path: Path) -> NDArray[np.uint8]:
    """One IDX file: two zero bytes, the type (8 = unsigned byte), the number of dimensions, their sizes."""
    if not path.is_file():
        raise SystemExit(f"--data-dir: {path} does not exist; expected an IDX .gz file of Fashion-MNIST")
    with gzip.open(path) as file:
        zero, kind, ndim = struct.unpack(">HBB", file.read(4))
        if zero != 0 or kind != 8:
            raise SystemExit(f"--data-dir: {path} is not an IDX file of unsigned bytes")
        shape = struct.unpack(f">{ndim}I", file.read(4 * ndim))
        return np.frombuffer(file.read(), dtype=np.uint8).reshape(shape)
