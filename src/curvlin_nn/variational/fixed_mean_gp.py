"""A sparse Gaussian process with a covariance that is learned, around a mean that is not.

    Cov[f(x), f(x')] = k(x, x') - k_xZ (A^-1 + k_Z)^-1 k_Zx',  A = L L^T

(Ortega et al., 2024, arXiv 2412.04177), in the dual form of `curvlin_nn.variational.dual`: what is factored is
``H = I + L^T k_Z L``, whose eigenvalues are at least one, and no jitter is added to anything.

Kernels, their constraints and priors are gpytorch's. Its variational strategies are not used: with the network as mean
module they could hold this covariance (their S is ``(I + K^T A K)^-1`` for ``k_Z = K K^T``), but only by way of a
Cholesky factor of ``k_Z``, which may be singular, so that they add a jitter to its diagonal.

With the mean fixed, no term of the objective says how large a prior the data ask for, and a kernel would fall to
nothing. A companion does, a process of the same covariance with a mean ``m(x) = k_xZ a`` of its own; see
`curvlin_nn.variational.fixed_mean_objective`. The published code has ``a = (k_Z + 0.001 I)^-1 q`` and learns q; the
dual weights a need no inverse.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from gpytorch.kernels import Kernel
from jaxtyping import Float, Int
from torch import Tensor, nn

from curvlin._random import standard_normal
from curvlin_nn.predictive.draws import some_at_a_time
from curvlin_nn.variational import kernels
from curvlin_nn.variational.dual import Dual


class FixedMeanGP(nn.Module):
    """The numbers that are learned, all float64.

    Args:
        kernel: of points.
        n_outputs: C.
        points: Z at first.
        outputs: which output of the process each inducing variable is.
        sigma_noise: the noise scale at first.
        optimize_inducing: whether Z is learned.
        optimize_noise: whether the noise scale is.
    """

    outputs: Tensor

    def __init__(
        self,
        kernel: Kernel,
        n_outputs: int,
        points: Float[Tensor, "M D"],
        outputs: Int[Tensor, " M"],
        sigma_noise: Float[Tensor, "*E"],
        *,
        optimize_inducing: bool = True,
        optimize_noise: bool = True,
    ) -> None:
        super().__init__()
        self.kernel = kernel
        self.output_kernel = kernels.of_outputs(n_outputs, points)
        self.points = nn.Parameter(points.clone(), requires_grad=optimize_inducing)
        self.register_buffer("outputs", outputs)
        self.root = nn.Parameter(torch.eye(len(points)).to(points))
        self.companion = nn.Parameter(points.new_zeros(len(points)))
        self.log_sigma = nn.Parameter(sigma_noise.to(points).log(), requires_grad=optimize_noise)

    @property
    def sigma_noise(self) -> Float[Tensor, "*E"]:
        """The noise scale."""
        return self.log_sigma.exp()

    def covariance(self) -> SparseCovariance:
        """That of the posterior as the numbers are now; NaN where they have gone too far."""
        B = self.output_kernel.covar_matrix.to_dense()
        k_Z = kernels.gram(self.kernel, self.points, self.points) * B[self.outputs][:, self.outputs]
        return SparseCovariance(self.kernel, B, self.points, self.outputs, Dual(k_Z, self.root.tril()))


@dataclass(frozen=True)
class SparseCovariance:
    """The posterior covariance as a function of points.

    Attributes:
        kernel: k of points; that of the process is ``k(x, x') B``.
        B: of outputs.
        points: Z.
        outputs: of each inducing variable.
        dual: what the inducing variables take from the prior.
    """

    kernel: Kernel
    B: Float[Tensor, "C C"]
    points: Float[Tensor, "M D"]
    outputs: Int[Tensor, " M"]
    dual: Dual

    def cross(self, x: Float[Tensor, "N D"]) -> Float[Tensor, "N C M"]:
        """``k_xZ``."""
        return kernels.gram(self.kernel, x, self.points).unsqueeze(1) * self.B[:, self.outputs]

    def variance(self, x: Float[Tensor, "N D"], cross: Float[Tensor, "N C M"]) -> Float[Tensor, "N C"]:
        """Of each output; `cross` is the one at x."""
        prior = self.kernel(x, diag=True).unsqueeze(1) * self.B.diagonal()
        return (prior - self.dual.explained(cross).square().sum(-1)).clamp(min=0)

    def by_sample(self, x: Float[Tensor, "N D"], cross: Float[Tensor, "N C M"]) -> Float[Tensor, "N C C"]:
        """Of the outputs of each sample; `cross` is the one at x."""
        E = self.dual.explained(cross)
        return self.kernel(x, diag=True)[:, None, None] * self.B - E @ E.mT

    def joint(self, x: Float[Tensor, "N D"]) -> Float[Tensor, "NC NC"]:
        """Of all outputs of all samples, sample-major."""
        E = self.dual.explained(self.cross(x)).flatten(0, 1)
        return torch.kron(kernels.gram(self.kernel, x, x), self.B) - E @ E.mT

    def samples(
        self, x: Float[Tensor, "N D"], n_samples: int, generator: torch.Generator | None
    ) -> Iterator[Float[Tensor, "s N C"]]:
        """Draws of ``N(0, joint(x))``, some at a time, from draws g of the prior at x and Z (Matheron's rule).

        With e standard normal, ``u = L^T g(Z) + e`` has the covariance H, and ``g(x) - k_xZ L H^-1 u`` that of the
        posterior. The prior is a Kronecker product: nothing with N C rows is factored.
        """
        M = len(self.points)
        everywhere = torch.cat([self.points, x])
        root, of_outputs = _root(kernels.gram(self.kernel, everywhere, everywhere)), _root(self.B)
        explained = self.dual.explained(self.cross(x))
        shape = torch.Size((len(root), len(self.B)))
        for some in some_at_a_time(n_samples, shape.numel()):
            g = root @ standard_normal((some,), shape, generator, root) @ of_outputs
            u = g[:, torch.arange(M), self.outputs] @ self.dual.root
            u = u + standard_normal((some,), torch.Size((M,)), generator, root)
            yield g[:, M:] - (explained @ self.dual.whitened(u).mT).movedim(-1, 0)


def _root(K: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """The symmetric root of a matrix that may be singular, as where two points meet."""
    values, vectors = torch.linalg.eigh(K)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.mT
