"""The Jacobian in the leading directions of the tangent kernel on some data (ELLA)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from curvlin import BlockFeatures
from curvlin._check import positive_integer
from curvlin_nn.capture.inputs import select_samples, tensors_of
from curvlin_nn.errors import DataError, UnsupportedError, one_of
from curvlin_nn.feature_maps.directions import Directions, SpannedDirections
from curvlin_nn.feature_maps.jacobian import JacobianMap, features
from curvlin_nn.feature_maps.projected import ROW_BUDGET, ProjectedMap
from curvlin_nn.inference_mode import outside_inference_mode
from curvlin_nn.parameters import Selection
from curvlin_nn.products.dual import kernel

OUTPUTS = ("one", "all")
"""Which outputs of a sample have their rows among those that span the directions."""


class NystromMap(ProjectedMap):
    """``Phi = J V`` with the K leading right singular vectors V of M rows of the Jacobian.

    With ``J_M J_M^T = U diag(s) U^T``, ``V = J_M^T U_K s_K^-1/2`` is orthonormal, and ``Phi Phi^T`` the Nystrom
    approximation of the tangent kernel: the features of ELLA (Deng et al., 2022). V is kept as K flat vectors, or as
    the rows that span it where these are fewer numbers.

    Args:
        model: maps one argument to outputs ``(N, C)``; it comes back as it was.
        x: inputs of at least M samples, such as the training data's.
        n_samples: how many of them are drawn, each at most once; None takes all.
        rank: K, at most the rank of the rows up to rounding; None takes that.
        subset_of_weights: ``"all"``, names of parameters or modules, or a predicate.
        outputs: ``"one"``, a row for each sample, of an output drawn at random, as ELLA has it; or those of ``"all"``.
        labels: the class of each sample; then every class is drawn as often as any other, up to one sample.
        generator: source of randomness; None is torch's default generator.

    Raises:
        DataError: if x has fewer samples than asked for, or of some class, or `labels` are not theirs.
        UnsupportedError: if the rows do not have the rank that is asked for.
    """

    orthonormal = True

    @outside_inference_mode()
    def __init__(
        self,
        model: nn.Module,
        x: Any,
        *,
        n_samples: int | None = None,
        rank: int | None = None,
        subset_of_weights: Selection = "all",
        outputs: str = "one",
        labels: Int[Tensor, " N"] | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        if outputs not in OUTPUTS:
            raise UnsupportedError(f"outputs={outputs!r} is not supported; expected {one_of(OUTPUTS)}")
        rank = None if rank is None else positive_integer("rank", rank)
        chosen = _chosen(_count(x), n_samples, labels, generator)
        jacobian = JacobianMap(model, subset_of_weights)
        rows = list(_rows(jacobian, x, chosen, outputs, generator))
        super().__init__(jacobian, _leading(rows, rank))


def _leading(rows: list[BlockFeatures], rank: int | None) -> Directions:
    """The leading right singular vectors of rows."""
    values, U = torch.linalg.eigh(kernel(rows))
    values, U = values.flip(0), U.flip(1)
    supported = int((values > len(values) * torch.finfo(values.dtype).eps * values[0]).sum())
    if supported == 0:
        raise UnsupportedError(
            "the Jacobian is zero at all the samples, expected some that outputs depend on"
        )
    if rank is not None and rank > supported:
        raise UnsupportedError(
            f"rank must be at most {supported}, that of the {len(values)} rows of the Jacobian, found {rank}; draw "
            "more samples, or take outputs='all'"
        )
    K = supported if rank is None else rank
    return SpannedDirections(rows, U[:, :K] / values[:K].sqrt()).cheaper()


def _rows(
    jacobian: JacobianMap,
    x: Any,
    chosen: Int[Tensor, " M"],
    outputs: str,
    generator: torch.Generator | None,
) -> Iterator[BlockFeatures]:
    """Rows of the chosen samples, some at a time."""
    n_samples, chunk = _count(x), 1
    start = 0
    while start < len(chosen):
        batch = chosen[start : start + chunk]
        start += len(batch)
        recording = jacobian.record(_of_batch(x, batch, n_samples))
        shape = recording.outputs.flatten(1).shape if recording.outputs.ndim > 1 else (len(batch), 1)
        unit = torch.eye(shape[1], dtype=recording.outputs.dtype, device=recording.outputs.device)
        if outputs == "all":
            columns = unit[:, None, :].expand(shape[1], *shape)
        else:
            device = None if generator is None else generator.device
            drawn = torch.randint(shape[1], (len(batch),), device=device, generator=generator)
            columns = unit[drawn.to(unit.device)][None]
        Psi = features(recording.captures(columns))
        yield Psi
        per_sample = sum(tensor.numel() for tensor, _ in Psi._tensors()) // len(batch)
        chunk = max(1, ROW_BUDGET // max(1, per_sample))


def _of_batch(x: Any, index: Tensor, n_samples: int) -> Any:
    """Some samples of an input; every tensor is indexed where it is."""
    devices = {tensor.device for tensor in tensors_of(x)}
    return select_samples(x, index.to(devices.pop()) if len(devices) == 1 else index, n_samples)


def _count(x: Any) -> int:
    """N, the length of axis 0 of the first tensor of an input."""
    for tensor in tensors_of(x):
        if tensor.ndim and len(tensor):
            return len(tensor)
        break
    raise DataError("x must hold samples along axis 0 of its first tensor, found none")


def _chosen(
    n_given: int, n_samples: int | None, labels: Tensor | None, generator: torch.Generator | None
) -> Int[Tensor, " M"]:
    """Which samples are drawn, in random order."""
    M = n_given if n_samples is None else positive_integer("n_samples", n_samples)
    if n_given < M:
        raise DataError(f"n_samples must be at most {n_given}, the number of samples in x, found {M}")
    device = None if generator is None else generator.device
    order = torch.randperm(n_given, device=device, generator=generator).cpu()
    if labels is None:
        return order[:M]
    if not isinstance(labels, Tensor) or labels.shape != (n_given,) or labels.is_floating_point():
        found = (
            f"{tuple(labels.shape)} of {labels.dtype}"
            if isinstance(labels, Tensor)
            else type(labels).__name__
        )
        raise DataError(f"labels must be {n_given} integers, one for each sample of x, found {found}")
    return _balanced(order, labels.to(order.device)[order], M, generator)


def _balanced(
    order: Int[Tensor, " N"], labels: Int[Tensor, " N"], M: int, generator: torch.Generator | None
) -> Int[Tensor, " M"]:
    """The first samples in this order of each class; which classes have one more is random."""
    kinds, kind = labels.unique(return_inverse=True)
    place = torch.empty_like(order)
    for k in range(len(kinds)):
        mine = (kind == k).nonzero().squeeze(1)
        place[mine] = torch.arange(len(mine))
    device = None if generator is None else generator.device
    turn = torch.randperm(len(kinds), device=device, generator=generator).cpu()
    chosen = (place * len(kinds) + turn[kind]).argsort()[:M]
    counts = torch.bincount(kind[chosen], minlength=len(kinds))
    if int(counts.max() - counts.min()) > 1:
        raise DataError(
            f"n_samples={M} needs as many samples of each class, up to one, found {int(counts.min())} of class "
            f"{int(kinds[counts.argmin()])}; give more of it, or leave labels at None"
        )
    return order[chosen]
