"""What an `FMGP` object is made of, as tensors and plain values; the model itself is not part of it.

A kernel is stored by its tensors. What makes it of them, a file cannot hold: that is a name, or a kernel that is given
again. Whether it is the same is asked of its parts, of the names and shapes of its tensors, and of its values at the
inducing points, which options that are no tensors (the smoothness of a Matern kernel) change too.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from gpytorch.kernels import Kernel
from torch import Tensor, nn

from curvlin_nn.capture.state import device_of
from curvlin_nn.errors import StorageError
from curvlin_nn.fingerprint import Fingerprint, check_same
from curvlin_nn.likelihoods import Likelihood
from curvlin_nn.storage import options
from curvlin_nn.variational import kernels
from curvlin_nn.variational.fixed_mean_fitted import FixedMeanFitted
from curvlin_nn.variational.fixed_mean_gp import FixedMeanGP
from curvlin_nn.variational.training import TrainingHistory

if TYPE_CHECKING:
    from curvlin_nn.variational.fmgp import FMGP

KIND = "curvlin_nn.FMGP"
"""What a file of this kind says that it is."""

ROUNDING = 1e-8
"""What values of a kernel may differ by from one machine to another, relative to the largest."""


def state_of(fm: FMGP) -> dict[str, Any]:
    """All that predictions are made of, and what a further `fit` begins with."""
    fit = fm._fit
    placement = fm.inducing
    return {
        "likelihood": options.of_likelihood(fm.likelihood),
        "kernel": fm._kernel if isinstance(fm._kernel, str) else None,
        "kernel_parts": _parts(fit.gp.kernel),
        "kernel_values": kernels.gram(fit.gp.kernel, fit.gp.points, fit.gp.points),
        "inducing": placement if isinstance(placement, str) else list(placement),
        "n_inducing": fm.n_inducing if isinstance(placement, str) else None,
        "sigma_noise": fm._sigma_noise,
        "dict_key_y": fm.dict_key_y,
        "gp": dict(fit.gp.state_dict()),
        "output_shape": list(fit.output_shape),
        "sample_shape": list(fit.sample_shape),
        "history": asdict(fit.history),
        "n_data": fit.n_data,
        "model": fit.fingerprint.state_dict(),
    }


def arguments(
    state: dict[str, Any], likelihood: str | nn.Module | Likelihood | None, kernel: Kernel | None
) -> dict[str, Any]:
    """What the constructor takes to make an object that a state fits.

    Raises:
        StorageError: if a likelihood or a kernel must be given and is not, or is and its name is known.
    """
    if kernel is not None and state["kernel"] is not None:
        raise StorageError(
            f"kernel was {state['kernel']!r}, found one of class {type(kernel).__name__} in its place; leave kernel out"
        )
    if kernel is None and state["kernel"] is None:
        raise StorageError(
            f"kernel was of class {state['kernel_parts'][0][1]}, which no name stands for; give one like it again with "
            "FMGP.load(..., kernel=...)"
        )
    by_name = isinstance(state["inducing"], str)
    return {
        "likelihood": options.to_likelihood(state["likelihood"], likelihood),
        "n_inducing": state["n_inducing"],
        # By any name: one that needs an extra is asked for it where points are placed.
        "inducing": "random" if by_name else tuple(state["inducing"]),
        "kernel": state["kernel"] if kernel is None else kernel,
        "sigma_noise": state["sigma_noise"],
        "dict_key_y": state["dict_key_y"],
    }


@torch.no_grad()
def fitted(state: dict[str, Any], model: nn.Module, kernel: str | Kernel) -> FixedMeanFitted:
    """What a fit left, around the same model.

    Args:
        state: what `state_of` returned.
        model: the model.
        kernel: one of the name or of the structure that was stored.

    Raises:
        StaleModelError: if the model is another one, or holds other values.
        StorageError: if the kernel is another one.
        UnsupportedError: if it does not take such points.
    """
    check_same(state["model"], model)
    device, sample_shape = device_of(model), torch.Size(state["sample_shape"])
    numbers: dict[str, Tensor] = {name: tensor.to(device) for name, tensor in state["gp"].items()}
    points = numbers["points"]
    own = kernels.made(kernel, points, sample_shape.numel())
    _check_kernel(own, state)
    n_outputs = len(numbers["output_kernel.covar_factor"])
    gp = FixedMeanGP(own, n_outputs, points, numbers["outputs"], numbers["log_sigma"].exp())
    gp.load_state_dict(numbers)
    gp.requires_grad_(False)
    found, expected = kernels.gram(own, gp.points, gp.points), state["kernel_values"].to(points)
    if not bool(((found - expected).abs() <= ROUNDING * expected.abs().max()).all()):
        raise StorageError(
            "kernel has other values at the inducing points than the one that was stored; give one with the same "
            "options"
        )
    history = TrainingHistory(**state["history"])
    shape, fingerprint = tuple(state["output_shape"]), Fingerprint.of(model)
    return FixedMeanFitted(gp, gp.covariance(), shape, sample_shape, fingerprint, history, state["n_data"])


def _parts(kernel: Kernel) -> list[list[str]]:
    """The kernels that a kernel is made of: where they stand in it, and their classes."""
    return [[name, type(part).__name__] for name, part in kernel.named_modules() if isinstance(part, Kernel)]


def _check_kernel(kernel: Kernel, state: dict[str, Any]) -> None:
    """Whether a kernel has the parts, and tensors of the names and shapes, that were stored."""
    found, expected = (" of ".join(c for _, c in parts) for parts in (_parts(kernel), state["kernel_parts"]))
    if _parts(kernel) != state["kernel_parts"]:
        raise StorageError(f"kernel is made of {found}, expected {expected} as it was stored; give that")
    mine = {name: tuple(tensor.shape) for name, tensor in kernel.state_dict().items()}
    stored = {
        name.removeprefix("kernel."): tuple(tensor.shape)
        for name, tensor in state["gp"].items()
        if name.startswith("kernel.")
    }
    for name in sorted({*mine, *stored}):
        if mine.get(name) != stored.get(name):
            raise StorageError(
                f"{name!r} of the kernel has shape {mine.get(name)}, expected {stored.get(name)} as it was stored; "
                "give a kernel with the same options"
            )
