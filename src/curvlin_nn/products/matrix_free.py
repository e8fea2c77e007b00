"""`matrix_free`: curvature as an `IterativePrecision`; `from_linear_operator`: another library's operator as one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from curvlin import IterativePrecision
from curvlin.precision.base import PrecisionOperator
from curvlin_nn import likelihoods
from curvlin_nn.batches import Labelled
from curvlin_nn.capture.state import device_of, random_state_kept
from curvlin_nn.columns import Columns
from curvlin_nn.errors import UnsupportedError, one_of
from curvlin_nn.inference_mode import outside_inference_mode
from curvlin_nn.likelihoods import Likelihood
from curvlin_nn.parameters import Selection
from curvlin_nn.products.hessian import Hessian
from curvlin_nn.products.rows import RecordedRows, product_with, root_of

KINDS = ("ggn", "hessian")
"""What `curvature` and `matrix_free` can be the matrix of."""


def check_kind(kind: str, columns: str) -> None:
    """Whether there is such a matrix.

    Raises:
        UnsupportedError: if there is not.
    """
    if kind not in KINDS:
        raise UnsupportedError(f"kind={kind!r} is not supported; expected {one_of(KINDS)}")
    if kind == "hessian" and columns != "exact":
        raise UnsupportedError(
            f"columns={columns!r} is not supported with kind='hessian', which has no columns; leave it at 'exact'"
        )


@outside_inference_mode()
def matrix_free(
    model: nn.Module,
    likelihood: str | Likelihood,
    loader: Iterable[Any],
    columns: str = "exact",
    subset_of_weights: Selection = "all",
    *,
    kind: str = "ggn",
    cache: bool = True,
    n_columns: int = 1,
    generator: torch.Generator | None = None,
    preconditioner: PrecisionOperator | None = None,
    dict_key_y: str = "labels",
    progress_bar: bool = False,
) -> IterativePrecision:
    """The curvature of the negative log-likelihood, summed over the data, known by its products.

    It is around the parameters that the model has now if `cache`, and else around those it has at each product.
    Curvature alone is singular where there are more parameters than rows: add a prior before solving,
    ``(matrix_free(...) + Isotropic(delta, P)).preconditioned_by(kfac + Isotropic(delta, P))``.

    Args:
        model: maps one argument to outputs ``(N, *T, C)``; it comes back as it was.
        likelihood: ``"classification"``, ``"regression"`` or a `Likelihood`.
        loader: batches ``(inputs, targets)``, or mappings with targets under `dict_key_y`.
        columns: as in `curvature`; "mc" and "sketch" need `cache`, for each product to be with one matrix.
        subset_of_weights: as in `curvature`.
        kind: "ggn", which has a root to draw samples with; or "hessian", of the negative log-likelihood itself, two
            backward passes a column, possibly indefinite: solve with ``method="minres"``.
        cache: of "ggn", whether captures are kept (memory as in `curvlin_nn.products.rows`) or recorded again for
            each product.
        n_columns: how many for "mc" and "sketch", for each sample.
        generator: source of randomness for these.
        preconditioner: a positive definite operator nearby.
        dict_key_y: the name of the targets in loaders that yield mappings.
        progress_bar: whether to show one for each pass over the data.

    Raises:
        UnsupportedError: for a model or option that is not served.
        DataError: for a batch that cannot be used.
        OutputError: for outputs of the wrong shape, or not finite.
    """
    check_kind(kind, columns)
    device, family = device_of(model), likelihoods.resolve(likelihood)
    loader = Labelled(loader, dict_key_y)
    if kind == "hessian":
        H = Hessian(model, family, loader, subset_of_weights, progress_bar)
        with random_state_kept(device):
            H.check()
        return IterativePrecision(
            H,
            size=H.space.size,
            dtype=H.dtype,
            device=device,
            preconditioner=preconditioner,
        )
    if columns in ("mc", "sketch") and not cache:
        raise UnsupportedError(
            f"columns={columns!r} draws at random, and anew for each product with cache=False; expected cache=True"
        )
    recorded = RecordedRows(
        model, family, loader, subset_of_weights, Columns(columns, n_columns, generator), progress_bar
    )
    kept, n_rows, size, dtype = [], 0, 0, torch.float64
    with random_state_kept(device):
        for Phi in recorded:
            n_rows, size, dtype = n_rows + Phi.n_samples * Phi.n_rows, Phi.size, Phi.dtype
            if cache:
                kept.append(Phi)
    rows = kept if cache else recorded
    return IterativePrecision(
        product_with(rows, device),
        size=size,
        dtype=dtype,
        device=device,
        root=root_of(rows, size, device),
        root_size=n_rows,
        preconditioner=preconditioner,
    )


def from_linear_operator(
    operator: Any, like: Tensor, *, preconditioner: PrecisionOperator | None = None
) -> IterativePrecision:
    """A symmetric linear operator of another library, such as ``curvlinops.GGNLinearOperator``.

    Args:
        operator: has a square ``shape`` and multiplies columns, ``operator @ X`` for X of shape ``(P, K)``. Its
            coordinates must be in the flat order of `ParameterSpace`, which is curvlinops' for parameters in the order
            of ``model.named_parameters()``; its scale is its own (a loss of reduction "mean" divides by N).
        like: a tensor of the dtype and device of its products.
        preconditioner: a positive definite operator nearby.

    Raises:
        UnsupportedError: if it is no square operator.
        ValueError: if its products are not finite or not symmetric.
    """
    shape = tuple(getattr(operator, "shape", ()))
    if len(shape) != 2 or shape[0] != shape[1] or not hasattr(operator, "__matmul__"):
        raise UnsupportedError(
            f"operator must be a square linear operator with @, found {type(operator).__name__} of shape {shape}"
        )

    def multiply(X: Tensor) -> Tensor:
        product: Tensor = operator @ X
        return product.detach()

    return IterativePrecision(
        multiply, size=int(shape[0]), dtype=like.dtype, device=like.device, preconditioner=preconditioner
    )
