"""What forbids a faster curvature: arithmetic at the rates that this machine reaches, in seconds for one batch.

The matrix products that a structure cannot do without, half of a symmetric one, at the rate of a large product; the
forward pass, and a backward pass to the layers' outputs for each column, as torch runs them; for a diagonal, patches of
convolutions written and read at the rate of a copy. No checks, conversions or sums, and a cache that never misses: no
program reaches it.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Layer:
    """A linear map from `inputs` to `out` numbers at each of S positions of N samples.

    Of `pairs` of inputs the product must be known at each position: of a convolution, whose inputs are those of its
    neighbours, one for each distance between two pixels of a patch.
    """

    N: int
    S: int
    inputs: int
    out: int
    pairs: int


def kfac(model: nn.Module, x: Tensor, n_columns: int, dtype: torch.dtype) -> float:
    """Both factors of each layer, from products in `dtype`."""
    layers, passes = _passes(model, x, n_columns)
    products = sum(a.N * a.S * (a.pairs + n_columns * a.out**2) for a in layers)
    return passes + products / gemm_rate(dtype)


def diagonal(model: nn.Module, x: Tensor, n_columns: int) -> float:
    """Columns fold before anything of the size of a weight where a layer sees one position; else each is made."""
    layers, passes = _passes(model, x, n_columns)
    products = sum(2 * a.N * a.out * a.inputs * (1 if a.S == 1 else n_columns * a.S) for a in layers)
    return passes + products / gemm_rate(torch.float32) + _patches(layers)


def ggn_product(model: nn.Module, x: Tensor, n_columns: int) -> float:
    """Each weight times its part of the matrix, and back; the matrix read, and the product written, once."""
    layers, _ = _passes(model, x, 1)
    weights = sum(a.out * a.inputs for a in layers)
    products = sum(4 * a.N * a.S * a.out * a.inputs for a in layers) * n_columns
    return products / gemm_rate(torch.float32) + 8 * weights * n_columns / bandwidth()


def _passes(model: nn.Module, x: Tensor, n_columns: int) -> tuple[list[Layer], float]:
    """The layers; seconds for a forward pass and `n_columns` backward passes that stop at their outputs."""
    seen: list[tuple[nn.Module, Tensor]] = []
    modules = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    handles = [m.register_forward_hook(lambda m, _, output: seen.append((m, output))) for m in modules]
    outputs = model(x)
    for handle in handles:
        handle.remove()
    layers = [
        Layer(len(x), output[0, 0].numel(), module.weight[0].numel(), output.shape[1], _pairs(module))  # type: ignore[index]
        for module, output in seen
    ]
    edges, ones = [output for _, output in seen], torch.ones_like(outputs)
    backward = _seconds(lambda: torch.autograd.grad(outputs, edges, ones, retain_graph=True))
    return layers, _seconds(lambda: model(x)) + n_columns * backward


def _pairs(module: nn.Module) -> int:
    """For a kernel of k pixels along an axis, 2 k - 1 distances; a stride of one is taken for granted."""
    channels = module.weight.shape[1]  # type: ignore[index,union-attr]
    kernel = module.weight.shape[2:]  # type: ignore[index,union-attr]
    return channels**2 * math.prod(2 * k - 1 for k in kernel)


def _patches(layers: list[Layer]) -> float:
    return sum(8 * a.N * a.S * a.inputs for a in layers if a.S > 1) / bandwidth()


@functools.cache
def gemm_rate(dtype: torch.dtype) -> float:
    """Floating-point operations a second of a product of 2048 x 1000 and 1000 x 1000."""
    X, Y = torch.randn(2048, 1000, dtype=dtype), torch.randn(1000, 1000, dtype=dtype)
    return 2 * 2048 * 1000**2 / _seconds(lambda: X @ Y)


@functools.cache
def bandwidth() -> float:
    """Bytes a second, read or written, of a copy of 64 MB."""
    source, target = torch.zeros(2**24), torch.zeros(2**24)
    return 8 * 2**24 / _seconds(lambda: target.copy_(source))


def rates() -> str:
    """The rates, in words."""
    double, single = (gemm_rate(dtype) / 1e9 for dtype in (torch.float64, torch.float32))
    copies = bandwidth() / 1e9
    return (
        f"matrix products {double:.0f} (float64) and {single:.0f} (float32) GFLOP/s, copies {copies:.0f} GB/s"
    )


def _seconds(call: Callable[[], Any], repeats: int = 7) -> float:
    """The least CPU seconds of several."""
    call()
    found = []
    for _ in range(repeats):
        started = time.process_time()
        call()
        found.append(time.process_time() - started)
    return min(found)
