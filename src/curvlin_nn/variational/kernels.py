"""The kernels of `curvlin_nn.variational.FMGP`: gpytorch's, over points, and a covariance of the outputs beside them.

    k((x, c), (x', c')) = k(x, x') B_cc'

rbf                 ``exp(-|(x - x') / l|^2 / 2)``, one lengthscale l for each entry of a flat input
rbf_x_last_layer    the same times ``(h . h' + 1) / delta``: with ``B = I`` the kernel of a last layer linear in h whose
                    weights have the prior precision delta, faded out with the distance of the inputs; delta makes
                    ``k(x, x)`` 1 on average (the published code begins at delta = 1, where that is some hundreds,
                    and lets all classes share one h)
"""

from __future__ import annotations

import copy

import gpytorch
import torch
from gpytorch.kernels import IndexKernel, Kernel, LinearKernel, RBFKernel
from jaxtyping import Float
from torch import Tensor

from curvlin_nn.capture.state import random_state_kept
from curvlin_nn.errors import UnsupportedError, one_of

KERNELS = ("rbf", "rbf_x_last_layer")
"""The kernels by name."""


def checked(kernel: str | Kernel) -> str | Kernel:
    """A name, or a kernel of gpytorch's.

    Raises:
        UnsupportedError: if it is neither.
    """
    if isinstance(kernel, Kernel):
        if kernel.batch_shape != torch.Size():
            raise UnsupportedError(
                f"kernel must be one kernel, found a batch of shape {tuple(kernel.batch_shape)}; outputs have "
                "covariances of their own"
            )
    elif not (isinstance(kernel, str) and kernel in KERNELS):
        found = repr(kernel) if isinstance(kernel, str) else type(kernel).__name__
        raise UnsupportedError(
            f"kernel={found} is not supported; expected {one_of(KERNELS)} or a gpytorch.kernels.Kernel"
        )
    return kernel


def made(kernel: str | Kernel, points: Float[Tensor, "N D"], n_inputs: int) -> Kernel:
    """The kernel of points, in float64: made by name, or a copy.

    Args:
        kernel: checked.
        points: some, which decide about the first lengthscale.
        n_inputs: how many of their entries are the flat input.

    Raises:
        UnsupportedError: if a kernel does not take points of this width.
    """
    if isinstance(kernel, Kernel):
        own = copy.deepcopy(kernel).to(points)
        _check_fits(own, points[:2])
        return own
    rbf = RBFKernel(ard_num_dims=n_inputs, active_dims=tuple(range(n_inputs))).to(points)
    rbf.lengthscale = median_distance(points[:, :n_inputs]) / 2**0.5
    if kernel == "rbf":
        return rbf
    last_layer = LinearKernel(active_dims=tuple(range(n_inputs, points.shape[1]))).to(points)
    last_layer.variance = 1 / points[:, n_inputs:].square().sum(1).mean()
    last_layer.requires_grad_(False)  # the covariance of the outputs has a scale that is learned
    return rbf * last_layer


def median_distance(points: Float[Tensor, "N D"]) -> Float[Tensor, ""]:
    """Between two different samples; 1 where most of them are equal."""
    distances = torch.nn.functional.pdist(points)
    found = distances.median() if len(distances) else points.new_zeros(())
    return torch.where(found > 0, found, 1.0)


def of_outputs(n_outputs: int, like: Tensor) -> IndexKernel:
    """``B = F F^T + diag(v)`` of full rank, the identity at first."""
    with random_state_kept(like.device):  # its constructor draws from torch's default generator
        B = IndexKernel(num_tasks=n_outputs, rank=n_outputs).to(like)
    with torch.no_grad():
        B.covar_factor.copy_(torch.eye(n_outputs).to(like) * 0.5**0.5)
    B.var = torch.full((n_outputs,), 0.5).to(like)
    return B


def log_prior(kernel: Kernel) -> Float[Tensor, ""] | float:
    """The log-density of the priors that are registered on a kernel's parameters."""
    return sum(prior.log_prob(value(module)).sum() for _, module, prior, value, _ in kernel.named_priors())


def gram(kernel: Kernel, x: Float[Tensor, "N D"], y: Float[Tensor, "M D"]) -> Float[Tensor, "N M"]:
    """``k(x, y)``, evaluated in full."""
    with gpytorch.settings.lazily_evaluate_kernels(False):
        return kernel(x, y).to_dense()


def _check_fits(kernel: Kernel, points: Float[Tensor, "N D"]) -> None:
    n, width = points.shape
    try:
        with torch.no_grad():
            found: object = tuple(gram(kernel, points, points).shape)
    except (RuntimeError, IndexError, ValueError) as error:
        found = str(error).partition("\n")[0]
    if found != (n, n):
        raise UnsupportedError(
            f"kernel must take flat inputs of {width} numbers and give one number for a pair of them, found {found}"
        )
