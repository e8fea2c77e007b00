"""Block Lanczos with full reorthogonalisation: ``Q^T S Q = T`` on the Krylov space of a block of vectors.

With ``Z = Q_1 C`` for the first block, every function of a symmetric S acts on Z as ``f(S) Z ~ Q f(T) E_1 C``, and
its quadratic forms are ``Z^T f(S) Z ~ C^T [f(T)]_11 C``: exact for polynomials of degree 2m - 1 after m products,
in which all columns share each other's directions (Golub & Underwood 1977; Golub & Meurant 2010).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from curvlin.errors import NotPositiveDefiniteError
from curvlin.iterative.krylov import ROUNDINGS, LinearMap, Settings, bar, norms
from curvlin.iterative.results import CONVERGED, ITERATION_LIMIT, Solution


@dataclass(frozen=True)
class KrylovSpace:
    """An orthonormal basis, the matrix in it, and the first block in it.

    Attributes:
        blocks: Q, as blocks ``(D, b_j)``.
        T: ``Q^T S Q``, ``(m, m)`` in float64.
        C: coordinates of Z in the first block, ``(b_1, b)`` in float64.
        exhausted: whether S maps the space into itself, so that nothing is approximate.
    """

    blocks: tuple[Tensor, ...]
    T: Tensor
    C: Tensor
    exhausted: bool

    def spectrum(self) -> tuple[Tensor, Tensor, Tensor]:
        """Ritz values ``(m,)``, their vectors in Q ``(m, m)``, and the coordinates of Z along those ``(m, b)``."""
        theta, V = torch.linalg.eigh(self.T)
        return theta, V, V[: len(self.C)].mT @ self.C

    def apply(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        """``f(S) Z``, ``(D, b)``."""
        theta, V, along = self.spectrum()
        coordinates = V @ (function(theta).unsqueeze(-1) * along)
        parts = coordinates.to(self.blocks[0].dtype).split([Q.shape[-1] for Q in self.blocks])
        return torch.stack([Q @ c for Q, c in zip(self.blocks, parts, strict=True)]).sum(0)


def block_lanczos(product: LinearMap, Z: Tensor) -> Iterator[KrylovSpace]:
    """The Krylov spaces of Z, ``(D, b)``, one product with a block at a time, until they are exhausted.

    Raises:
        ValueError: if the product is not symmetric, or not finite.
    """
    Q, C = _orthonormal(Z, ROUNDINGS * torch.finfo(Z.dtype).eps * float(torch.linalg.matrix_norm(Z)))
    blocks, largest = [Q], 0.0
    T = torch.zeros(0, 0, dtype=torch.float64, device=Z.device)
    coupling = torch.zeros(Q.shape[-1], 0, dtype=torch.float64, device=Z.device)
    while True:
        W = product(blocks[-1])
        size = float(torch.linalg.matrix_norm(W))
        largest = max(largest, size)
        alpha = (blocks[-1].mT @ W).double()
        _refuse_asymmetry(alpha, largest, W.dtype)
        T = _bordered(T, coupling, (alpha + alpha.mT) / 2)
        W = _projected_out(blocks, W)
        Q, coupling = _orthonormal(W, ROUNDINGS * torch.finfo(W.dtype).eps * size)
        exhausted = Q.shape[-1] == 0
        yield KrylovSpace(tuple(blocks), T, C, exhausted)
        if exhausted:
            return
        # Normalising blew the rounding of short directions up; the second pass removes it.
        Q, change = _orthonormal(_projected_out(blocks, Q), 0.0)
        blocks.append(Q)
        coupling = change @ coupling


def inverse_root(product: LinearMap, Z: Tensor, settings: Settings) -> Solution:
    """``S^-1/2 Z`` in the Krylov space of Z, until no column may change by more than `rtol` of its length.

    What is left is judged from the last changes, as if they went on to fall at the same rate.

    Raises:
        NotPositiveDefiniteError: if a Ritz value, hence an eigenvalue, is not positive.
    """
    if Z.shape[-1] == 0:
        return Solution(Z, norms(Z), 0, CONVERGED)
    before, ended = Z, ITERATION_LIMIT
    changes: list[Tensor] = []
    with bar(settings.progress_bar, "lanczos") as progress:
        for step, space in enumerate(block_lanczos(product, Z), start=1):
            roots = space.apply(lambda theta: positive(theta).rsqrt())
            changes.append(norms(roots - before) / norms(roots))
            left = torch.zeros_like(changes[-1]) if space.exhausted else remaining(changes)
            progress.update()
            if bool((left <= settings.rtol).all()):
                ended = CONVERGED
            if ended == CONVERGED or step >= settings.max_iterations:
                break
            before = roots
    return Solution(roots, left, step, ended)


def remaining(changes: list[Tensor]) -> Tensor:
    """What a sequence that converges geometrically still has to go, from the rate of its last changes."""
    steps = min(4, len(changes) - 1)
    if steps == 0:
        return torch.full_like(changes[-1], float("inf"))
    first, last = changes[-1 - steps], changes[-1]
    ratio = (last / torch.where(first > 0, first, 1.0)).pow(1 / steps).clamp(max=1 - 1e-3)
    return last * torch.clamp(ratio / (1 - ratio), min=1.0)


def positive(theta: Tensor) -> Tensor:
    """Ritz values, refused if one is not positive: the least eigenvalue is no larger."""
    if bool(theta.min() <= 0):
        raise NotPositiveDefiniteError(
            "IterativePrecision (in units of its preconditioner, if any)", float(theta.min())
        )
    return theta


def _bordered(T: Tensor, coupling: Tensor, alpha: Tensor) -> Tensor:
    """T with one more block: `coupling` ``(b_new, b_last)`` beside the last, `alpha` on the diagonal."""
    m, b, last = len(T), len(alpha), coupling.shape[-1]
    larger = T.new_zeros(m + b, m + b)
    larger[:m, :m] = T
    larger[m:, m:] = alpha
    larger[m:, m - last : m] = coupling
    larger[m - last : m, m:] = coupling.mT
    return larger


def _projected_out(blocks: list[Tensor], W: Tensor) -> Tensor:
    """W less its parts along all blocks, twice: once leaves rounding of the size of what was removed."""
    for _ in range(2):
        for Q in blocks:
            W = W - Q @ (Q.mT @ W)
    return W


def _orthonormal(W: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    """``W = Q C`` with orthonormal Q, without the directions of W that are no longer than `floor`."""
    Q, R = torch.linalg.qr(W)
    U, s, Vh = torch.linalg.svd(R, full_matrices=False)
    kept = s > floor
    C = (s[kept, None] * Vh[kept]).double()
    return Q @ U[:, kept], C


def _refuse_asymmetry(alpha: Tensor, size: float, dtype: torch.dtype) -> None:
    gap = float((alpha - alpha.mT).abs().max()) if alpha.numel() else 0.0
    if gap > torch.finfo(dtype).eps ** 0.5 * size:
        raise ValueError(f"the product must be symmetric, found an asymmetry of {gap / size:.1e} of its size")
