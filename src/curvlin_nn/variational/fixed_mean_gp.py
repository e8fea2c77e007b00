"""A sparse Gaussian process with a covariance that is learned, around a mean that is not.

In the feature space of a kernel k, with inducing points Z and a lower triangular L,

    q = N(., (I + Phi_Z^T A Phi_Z)^-1),  A = L L^T,  H = I + L^T k_Z L
    Cov[f(x), f(x')] = k(x, x') - k_xZ L H^-1 L^T k_Zx'
    KL[q || p] = (log|H| + tr H^-1 - M) / 2, the term of the mean left out

(Ortega et al., 2024, arXiv 2412.04177.) Eigenvalues of H are at least one, so that it is factored without a jitter.

Kernels, their constraints and priors are gpytorch's. Its variational strategies are not used: they hold such a covariance
only in terms of a factor of ``k_Z``, to which they add a jitter first, and which has none where two inducing points meet;
and their divergence has the term of the mean, for which a network is no element of the kernel's space.

That term is what keeps kernels honest: without it the variances of the prior would fall to those of the posterior. Its
place takes a companion, a process with the same covariance and a mean ``m(x) = k_xZ a`` of its own. Both bounds are
maximised together; the companion's has the KL above plus ``a^T k_Z a / 2``. The dual weights a need no inverse either.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from gpytorch.kernels import Kernel
from jaxtyping import Float, Int
from torch import Tensor, nn

from curvlin._random import standard_normal
from curvlin_nn.variational import kernels


class FixedMeanGP(nn.Module):
    """The parameters, all float64: those of the kernel, Z, L, a and the noise scale.

    Args:
        kernel: of points.
        n_outputs: C.
        points: Z.
        outputs: which output of the process each inducing variable is.
        sigma_noise: the noise scale at first.
        optimize_noise: whether it is learned.
    """

    def __init__(
        self,
        kernel: Kernel,
        n_outputs: int,
        points: Float[Tensor, "M D"],
        outputs: Int[Tensor, " M"],
        sigma_noise: Float[Tensor, "*C"],
        optimize_noise: bool,
    ) -> None:
        super().__init__()
        self.kernel = kernel
        self.output_kernel = kernels.of_outputs(n_outputs, points)
        self.points = nn.Parameter(points.clone())
        self.register_buffer("outputs", outputs)
        self.factor = nn.Parameter(torch.eye(len(points)).to(points))
        self.companion = nn.Parameter(points.new_zeros(len(points)))
        self.log_sigma = nn.Parameter(sigma_noise.to(points).log(), requires_grad=optimize_noise)

    outputs: Tensor

    @property
    def sigma_noise(self) -> Float[Tensor, "*C"]:
        """The noise scale."""
        return self.log_sigma.exp()

    def core(self) -> Core:
        """The covariance with the present parameters.

        Raises:
            FloatingPointError: if they are not finite.
        """
        B = self.output_kernel.covar_matrix.to_dense()
        K_Z = kernels.gram(self.kernel, self.points, self.points) * B[self.outputs][:, self.outputs]
        L = self.factor.tril()
        H = torch.eye(len(L)).to(L) + L.mT @ K_Z @ L
        R, info = torch.linalg.cholesky_ex(H)
        if int(info) or not bool(torch.isfinite(R).all()):
            raise FloatingPointError("found a covariance that is not finite")
        return Core(self.kernel, B, self.points, self.outputs, K_Z, L, R)

    def log_prior(self) -> Float[Tensor, ""] | float:
        """Of the kernel's parameters."""
        return kernels.log_prior(self.kernel)


@dataclass(frozen=True)
class Core:
    """The covariance as a function of points.

    Attributes:
        kernel: k of points.
        B: of outputs.
        points: Z.
        outputs: of each inducing variable.
        K_Z: ``k_Z``, of inducing variables.
        L: of ``A = L L^T``.
        R: lower triangular, ``H = R R^T``.
    """

    kernel: Kernel
    B: Float[Tensor, "C C"]
    points: Float[Tensor, "M D"]
    outputs: Int[Tensor, " M"]
    K_Z: Float[Tensor, "M M"]
    L: Float[Tensor, "M M"]
    R: Float[Tensor, "M M"]

    def cross(self, x: Float[Tensor, "N D"]) -> Float[Tensor, "N C M"]:
        """``k_xZ``."""
        return kernels.gram(self.kernel, x, self.points).unsqueeze(1) * self.B[:, self.outputs]

    def known(self, cross: Float[Tensor, "N C M"]) -> Float[Tensor, "N C M"]:
        """Rows U with ``U U^T = k_xZ L H^-1 L^T k_Zx``: what the posterior knows of the prior's variance."""
        rows = (cross @ self.L).flatten(0, 1)
        return torch.linalg.solve_triangular(self.R, rows.mT, upper=False).mT.reshape(cross.shape)

    def variance(self, x: Float[Tensor, "N D"], cross: Float[Tensor, "N C M"]) -> Float[Tensor, "N C"]:
        """Of each output."""
        prior = self.kernel(x, diag=True).unsqueeze(1) * self.B.diagonal()
        return prior - self.known(cross).square().sum(-1)

    def covariance(self, x: Float[Tensor, "N D"], cross: Float[Tensor, "N C M"]) -> Float[Tensor, "N C C"]:
        """Of the outputs of each sample."""
        U = self.known(cross)
        return self.kernel(x, diag=True)[:, None, None] * self.B - U @ U.mT

    def joint(self, x: Float[Tensor, "N D"]) -> Float[Tensor, "NC NC"]:
        """Of all outputs of all samples, sample-major."""
        U = self.known(self.cross(x)).flatten(0, 1)
        return torch.kron(kernels.gram(self.kernel, x, x), self.B) - U @ U.mT

    def samples(
        self, x: Float[Tensor, "N D"], n_samples: int, generator: torch.Generator | None
    ) -> Float[Tensor, "S N C"]:
        """Draws of ``N(0, joint(x))`` from draws of the prior at x and Z, by Matheron's rule.

        With ``u = L^T g(Z) + e``, e standard normal, ``g(x) - k_xZ L H^-1 u`` has the covariance: H is that of u. The
        prior is a Kronecker product, so that nothing of NC rows is factored.
        """
        M = len(self.points)
        everywhere = torch.cat([self.points, x])
        root = _root(kernels.gram(self.kernel, everywhere, everywhere))
        noise = standard_normal((n_samples,), torch.Size((len(root), len(self.B))), generator, root)
        prior = root @ noise @ _root(self.B)
        u = prior[:, torch.arange(M), self.outputs] @ self.L
        u = u + standard_normal((n_samples,), torch.Size((M,)), generator, root)
        whitened = torch.linalg.solve_triangular(self.R, u.mT, upper=False)
        return prior[:, M:] - (self.known(self.cross(x)) @ whitened).movedim(-1, 0)

    def divergence(self) -> Float[Tensor, ""]:
        """``KL[q || p]`` without the term of the mean."""
        inverse = torch.linalg.solve_triangular(self.R, torch.eye(len(self.R)).to(self.R), upper=False)
        logdet = 2 * self.R.diagonal().log().sum()
        return (logdet + inverse.square().sum() - len(self.R)) / 2


def _root(K: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """The symmetric root of a matrix that may be singular, as where two points meet."""
    values, vectors = torch.linalg.eigh(K)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.mT
