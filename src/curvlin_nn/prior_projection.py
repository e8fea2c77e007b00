"""A prior in a form whose sum with the curvature is closed: the nearest one, by name, with its error.

A Kronecker product adds to a multiple of the identity or to one other product, and to nothing else: not to a precision
for each parameter, nor to an earlier posterior, which is a product and a prior already.
"""

from __future__ import annotations

import torch

from curvlin import BlockDiag, Diagonal, Isotropic, KroneckerSum, SpectralKronecker
from curvlin.precision.base import PrecisionOperator
from curvlin.projection import Projection, project, squared_norm
from curvlin_nn.errors import UnsupportedError, one_of
from curvlin_nn.prior import OperatorPrior, Prior

PROJECTIONS = ("kronecker", "isotropic")
"""Onto one Kronecker product, or a multiple of the identity, in each block that needs it."""


def check_projection(onto: str | None) -> None:
    """Whether a projection has that name.

    Raises:
        UnsupportedError: if none has.
    """
    if onto is not None and onto not in PROJECTIONS:
        raise UnsupportedError(
            f"prior_projection={onto!r} is not supported; expected {one_of(PROJECTIONS)} or None"
        )


def closed(prior: Prior, H: PrecisionOperator, onto: str | None) -> Prior:
    """The prior itself where its sum with H is closed or no projection is named, else the projected one."""
    if onto is None:
        return prior
    P0 = prior.operator(H)
    found = project_prior(P0, H, onto)
    return prior if found.operator is P0 else OperatorPrior(found.operator, prior.deviation)


def project_prior(P0: PrecisionOperator, H: PrecisionOperator, onto: str = "kronecker") -> Projection:
    """The nearest prior precision, in the Frobenius norm, whose sum with H is closed.

    Blocks of H that are dense or diagonal take a prior as it is. What a prior couples between blocks of H is left out.

    Args:
        P0: a prior precision.
        H: a curvature, of Kronecker products and other blocks.
        onto: ``"kronecker"``, one product for each block (Van Loan & Pitsianis, 1993), or ``"isotropic"``, a
            multiple of the identity.

    Returns:
        The operator, P0 itself where nothing had to be projected, and ``|P0 - operator|_F / |P0|_F``.

    Raises:
        UnsupportedError: if H has a block that takes no such prior.
        NotClosedError: if P0 cannot give what the projection needs without a dense matrix.
    """
    check_projection(onto)
    if isinstance(H, BlockDiag):
        blocks = _cut(P0, H)
        found = [_on_block(p, h, onto) for p, h in zip(blocks.blocks, H.blocks, strict=True)]
        same = blocks is P0 and all(p is q for p, q in zip(blocks.blocks, found, strict=True))
        exact = isinstance(P0, (Isotropic, Diagonal)) and all(
            p is q for p, q in zip(blocks.blocks, found, strict=True)
        )
        operator = P0 if same else blocks.with_blocks(found)
    else:
        operator = _on_block(P0, H, onto)
        exact = same = operator is P0
    if same or exact:
        return Projection(operator, torch.zeros(P0.batch_shape, dtype=P0.dtype, device=P0.device))
    # Every projection here is orthogonal: what is lost is orthogonal to what is kept.
    total = squared_norm(P0)
    lost = (total - squared_norm(operator)).clamp(min=0.0)
    return Projection(operator, (lost / total).sqrt().to(P0.dtype))


def _cut(P0: PrecisionOperator, H: BlockDiag) -> BlockDiag:
    """P0 on the blocks of H."""
    if isinstance(P0, BlockDiag) and P0.indices == H.indices:
        return P0
    if isinstance(P0, Isotropic):
        return H.with_blocks([Isotropic(P0.value, block.size) for block in H.blocks])
    if isinstance(P0, Diagonal):
        return H.with_blocks([Diagonal(part) for part in H.indices.split(P0.diagonal(), dim=-1)])
    cut = project(P0, BlockDiag, indices=H.indices).operator
    assert isinstance(cut, BlockDiag)
    return cut


def _on_block(P0: PrecisionOperator, H: PrecisionOperator, onto: str) -> PrecisionOperator:
    """What is nearest to P0 among the priors of one block."""
    if not isinstance(H, (KroneckerSum, SpectralKronecker)) or isinstance(P0, Isotropic):
        return P0
    if onto == "isotropic":
        return project(P0, Isotropic).operator
    if isinstance(H, SpectralKronecker):
        raise UnsupportedError(
            "prior_projection='kronecker' does not serve a curvature in a fixed eigenbasis ('ekfac'), expected "
            "'isotropic'; or use hessian_structure='kron'"
        )
    if isinstance(P0, KroneckerSum) and len(P0.terms) == 1 and P0.shift is None and P0.sizes == H.sizes:
        return P0
    return project(P0, KroneckerSum, sizes=H.sizes).operator
