"""Operators of every kind on 12 or 900 rows, and a guard against every approximation that linear_operator has."""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from curvlin import (
    BlockDiag,
    Dense,
    Diagonal,
    Isotropic,
    KroneckerSum,
    LowRankPlusDiag,
    PrecisionOperator,
    SpectralKronecker,
    Woodbury,
)

F64 = torch.float64
Batch = tuple[int, ...]


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def spd(seed: int, n: int, batch: Batch = ()) -> Tensor:
    X = randn(seed, *batch, n, 2 * n)
    return X @ X.mT / (2 * n)


def positive(seed: int, *shape: int) -> Tensor:
    return 0.5 + randn(seed, *shape).square()


def _spectral(n: int, batch: Batch) -> SpectralKronecker:
    a, b = sides(n)
    QL, QR = (torch.linalg.qr(spd(s, m, batch)).Q for s, m in ((3, a), (4, b)))
    return SpectralKronecker(QL, QR, positive(5, *batch, a, b))


def _blocks(n: int, batch: Batch) -> BlockDiag:
    a, b = n // 3, n // 2
    order = torch.randperm(n, generator=torch.Generator().manual_seed(1))
    parts = [
        Dense(spd(6, a, batch)),
        Diagonal(positive(7, *batch, b)),
        Isotropic(positive(8, *batch), n - a - b),
    ]
    return BlockDiag(parts, list(order.split([a, b, n - a - b])))


def sides(n: int) -> tuple[int, int]:
    return {12: (3, 4), 900: (30, 30)}[n]


KINDS: dict[str, Callable[[int, Batch], PrecisionOperator]] = {
    "isotropic": lambda n, b: Isotropic(positive(1, *b), n),
    "diagonal": lambda n, b: Diagonal(positive(2, *b, n)),
    "dense": lambda n, b: Dense(spd(3, n, b)),
    "kronecker": lambda n, b: KroneckerSum([(spd(3, sides(n)[0], b), spd(4, sides(n)[1]))]),
    "shifted": lambda n, b: KroneckerSum.shifted(spd(3, sides(n)[0], b), spd(4, sides(n)[1]), 0.5),
    "two terms": lambda n, b: KroneckerSum(
        [(spd(3, sides(n)[0], b), spd(4, sides(n)[1])), (spd(5, sides(n)[0]), spd(6, sides(n)[1], b))]
    ),
    "spectral": _spectral,
    "blocks": _blocks,
    "low rank": lambda n, b: LowRankPlusDiag(positive(2, *b, n), randn(9, *b, n, 5)),
    "woodbury": lambda n, b: Woodbury(
        KroneckerSum.shifted(spd(3, sides(n)[0], b), spd(4, sides(n)[1]), 0.5), randn(9, n, 5)
    ),
}
MEANINGS = ("precision", "covariance")


def dense(P: PrecisionOperator, as_: str) -> Tensor:
    return P.to_dense() if as_ == "precision" else torch.linalg.inv(P.to_dense())


def close(found: Tensor, expected: Tensor, rtol: float = 1e-9) -> None:
    """Equal shapes, and entries equal to `rtol` of the largest."""
    assert found.shape == expected.shape, (found.shape, expected.shape)
    gap = (found - expected).abs().max() if found.numel() else torch.zeros(())
    assert float(gap) <= rtol * float(expected.abs().max()), float(gap / expected.abs().max())


@pytest.fixture
def no_approximation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes every iterative, stochastic, low-rank or jittered algorithm of linear_operator an error."""
    for owner, name in _approximations():
        monkeypatch.setattr(owner, name, _forbidden)


def _forbidden(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("an approximation of linear_operator ran")


@functools.cache
def _approximations() -> list[tuple[Any, str]]:
    """Where linear_operator and gpytorch hold them: modules with a copy of the function, and autograd functions."""
    import gpytorch  # noqa: F401
    from linear_operator import functions

    # By module: linear_operator.utils hides some of its modules behind functions of the same name.
    targets = [
        getattr(importlib.import_module(f"linear_operator.utils.{module}"), name)
        for module, names in {
            "linear_cg": ["linear_cg"],
            "lanczos": ["lanczos_tridiag", "lanczos_tridiag_to_diag"],
            "cholesky": ["psd_safe_cholesky"],
            "contour_integral_quad": ["contour_integral_quad"],
            "minres": ["minres"],
            "stochastic_lq": ["StochasticLQ"],
        }.items()
        for name in names
    ]
    found: list[tuple[Any, str]] = []
    for module in [m for n, m in sys.modules.items() if n.split(".")[0] in ("linear_operator", "gpytorch")]:
        for name, value in vars(module).items():
            if any(value is target for target in targets):
                found.append((module, name))
    assert {name for _, name in found} >= {target.__name__ for target in targets}
    classes = [
        value
        for module in (
            importlib.import_module(m.name)
            for m in pkgutil.iter_modules(functions.__path__, functions.__name__ + ".")
        )
        for value in vars(module).values()
        if inspect.isclass(value)
        and issubclass(value, torch.autograd.Function)
        and value.__module__ == module.__name__
    ]
    assert len(classes) >= 8
    return [*found, *((cls, "apply") for cls in classes)]


each_kind = pytest.mark.parametrize("kind", list(KINDS))
each_meaning = pytest.mark.parametrize("as_", MEANINGS)
each_batch = pytest.mark.parametrize("batch", [(), (2, 3)], ids=str)
