"""Random probes of a Jacobian by forward-mode autodiff: ``J v`` with nothing of J kept.

For ``E v v^T = I``, ``E (J v)(J v)^T = J J^T``. With Rademacher v the entry of rows a and b has the variance
``|a|^2 |b|^2 + (a b)^2 - 2 sum_p a_p^2 b_p^2``, which Gaussian v has without the last sum (ScaLLA, arXiv 2601.21835,
Eqs. 4 to 6).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import jvp, vjp
from torch.nn.attention import SDPBackend, sdpa_kernel

from curvlin_nn.capture.checks import checked_outputs
from curvlin_nn.capture.state import capturing, forward, prepared
from curvlin_nn.errors import OutputError, UnsupportedError
from curvlin_nn.parameters import ParameterSpace


def probed(
    model: nn.Module,
    space: ParameterSpace,
    x: Any,
    n_probes: int,
    generator: torch.Generator | None,
    where: str = "the input",
) -> Float[Tensor, "R S"]:
    """``J V / sqrt(S)`` with S columns of random signs: ``Y Y^T`` is the kernel in expectation.

    Args:
        model: comes back as it was.
        space: the parameters of the columns of J.
        x: what the model takes; R = N C rows, one for each output.
        n_probes: S, each at the cost of about two forward passes.
        generator: source of randomness; None is torch's default generator.
        where: what to call this input in error messages.

    Raises:
        OutputError: if the outputs or their derivatives are not finite.
    """
    draws = (signs((space.size,), torch.get_default_dtype(), generator) for _ in range(n_probes))
    return tangents(model, space, x, draws, where) / n_probes**0.5


def tangents(
    model: nn.Module,
    space: ParameterSpace,
    x: Any,
    directions: Iterable[Float[Tensor, " P"]],
    where: str = "the input",
) -> Float[Tensor, "R S"]:
    """``J v`` for some directions v, each by one forward pass in forward mode; see `probed`."""
    x = prepared(model, x, where)
    values = space.tensors(model)
    columns = []
    with capturing(model, ()), torch.no_grad(), _forward_mode():
        for v in directions:
            vectors = {name: piece.to(values[name]) for name, piece in space.unflatten(v).items()}
            outputs, Jv, *_ = jvp(lambda values: forward(model, values, x, where), (values,), (vectors,))
            checked_outputs(outputs, where)
            columns.append(_finite(Jv.reshape(-1), where))
    return torch.stack(columns, 1)


def gram_by_products(
    model: nn.Module, space: ParameterSpace, x: Any, where: str = "the input"
) -> Float[Tensor, "R R"]:
    """``J J^T`` by one product with J^T and one with J for each output: memory of P, whatever N is."""
    x = prepared(model, x, where)
    values = space.tensors(model)
    columns = []
    with capturing(model, ()), _forward_mode():
        outputs, transposed, *_ = vjp(lambda values: forward(model, values, x, where), values)
        outputs = checked_outputs(outputs, where)
        for row in range(outputs.numel()):
            unit = torch.zeros_like(outputs).flatten()
            unit[row] = 1
            (gradient,) = transposed(unit.view_as(outputs))
            with torch.no_grad():
                _, column, *_ = jvp(lambda values: forward(model, values, x, where), (values,), (gradient,))
            columns.append(_finite(column.reshape(-1), where))
    gram = torch.stack(columns, 1).detach()
    return (gram + gram.mT) / 2


@contextmanager
def _forward_mode() -> Iterator[None]:
    """Attention in the form that has derivatives in forward mode.

    Raises:
        UnsupportedError: if an operation of the model has none.
    """
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    except NotImplementedError as error:
        reason = str(error).partition(". ")[0].partition("\n")[0]
        raise UnsupportedError(
            f"targets='jvp' needs forward-mode autodiff of the model, found an operation without ({reason}); take "
            "targets='exact'"
        ) from error


def signs(
    shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator | None
) -> Float[Tensor, " ..."]:
    """Independent random signs, drawn a byte each on the device of the generator."""
    device = None if generator is None else generator.device
    return 2 * torch.randint(2, shape, dtype=torch.int8, device=device, generator=generator).to(dtype) - 1


def _finite(rows: Tensor, where: str) -> Tensor:
    if not bool(torch.isfinite(rows).all()):
        raise OutputError(f"the derivatives of the outputs on {where} must be finite, found NaN or Inf")
    return rows.detach()
