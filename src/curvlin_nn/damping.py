"""The Kronecker-damped posterior, another way to combine the curvature of a weight and its prior (Ritter et al., 2018).

    P = (sqrt(s) B + sqrt(delta) I) (x) (sqrt(s) A + sqrt(delta) I),   s = 1 / (sigma^2 T)

in the place of ``s B (x) A + delta I``, to which it adds ``sqrt(s delta) (B (x) I + I (x) A)`` (Martens & Grosse, 2015,
section 6.3, with damping split evenly). It is no sum of a curvature and a prior, so it asks for one prior precision for
each Kronecker block. Dense and diagonal blocks (biases) get their prior added as ever.

In the eigenbases of the factors, the eigenvalues of P are ``delta (1 + r_i) (1 + q_j)`` with ``r = sqrt(s / delta) b``
and ``q = sqrt(s / delta) a``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from curvlin import BlockDiag, Dense, Diagonal, KroneckerSum, SpectralKronecker
from curvlin.index import IndexSet
from curvlin.precision.base import PrecisionOperator
from curvlin_nn.errors import UnsupportedError, one_of
from curvlin_nn.prior import GroupedPrior, Prior
from curvlin_nn.spectrum import Spectrum, eigenpairs, spectrum
from curvlin_nn.structures import StructureChoice

STRUCTURES = ("kron", "kfoc")
"""The structures by name whose blocks are Kronecker products; others are found out when they are fitted."""


def check_damping(damping: object, curvature: str, structure: StructureChoice) -> bool:
    """Whether damping is asked for, and not of a structure that is known to have no Kronecker product.

    Raises:
        UnsupportedError: if it is.
        TypeError: if `damping` is neither True nor False.
    """
    if not isinstance(damping, bool):
        raise TypeError(f"damping must be True or False, found {damping!r}; its strength is prior_precision")
    if damping and curvature == "hessian":
        raise UnsupportedError(
            "damping=True needs Kronecker products, found curvature='hessian'; leave it out"
        )
    if damping and isinstance(structure, str) and structure not in STRUCTURES:
        raise UnsupportedError(
            f"damping=True needs Kronecker products, found hessian_structure={structure!r}, expected "
            f"{one_of(STRUCTURES)}; leave damping out"
        )
    return damping


@dataclass(frozen=True)
class _Product:
    """``(QL diag(left) QL^T) (x) (QR diag(right) QR^T)``, the factors of one block; float64."""

    QL: Float[Tensor, "a a"]
    QR: Float[Tensor, "b b"]
    left: Float[Tensor, " a"]
    right: Float[Tensor, " b"]

    @classmethod
    def of(cls, H: KroneckerSum) -> _Product:
        ((left, right),) = H.terms
        assert left is not None and right is not None
        l, QL = eigenpairs("KroneckerSum.left", left, H.resolution)
        r, QR = eigenpairs("KroneckerSum.right", right, H.resolution)
        return cls(QL, QR, l, r)

    def damped(self, scale: Float[Tensor, ""], delta: Float[Tensor, ""]) -> SpectralKronecker:
        """P."""
        left, right = (scale.sqrt() * values + delta.sqrt() for values in (self.left, self.right))
        return SpectralKronecker(self.QL, self.QR, torch.outer(left, right))

    def eigenvalues(self) -> Float[Tensor, "2 ab"]:
        """Those of either factor for each coordinate."""
        return torch.stack(torch.meshgrid(self.left, self.right, indexing="ij")).flatten(1)


@dataclass(frozen=True)
class DampedCurvature:
    """A curvature with Kronecker blocks, to be combined with a prior by damping.

    Attributes:
        H: the curvature, float64.
    """

    H: BlockDiag

    @classmethod
    def of(cls, H: PrecisionOperator) -> DampedCurvature:
        """The curvature, if damping has a meaning for it.

        Raises:
            UnsupportedError: naming an operator for which it has none.
        """
        whole = H if isinstance(H, BlockDiag) else BlockDiag([H], IndexSet.of_sizes([H.size]))
        others = [part for part in whole.blocks if not _is_product(part)]
        refused = next(
            (type(part).__name__ for part in others if not isinstance(part, (Dense, Diagonal))), None
        )
        if refused is None and len(others) == len(whole.blocks):
            refused = "none"
        if refused is not None:
            raise UnsupportedError(
                f"damping=True needs blocks that are Kronecker products of two factors, found {refused}; take 'kron' "
                "or 'kfoc' for the weights, or leave damping out"
            )
        return cls(whole.to(torch.float64))

    @cached_property
    def _parts(self) -> tuple[_Product | PrecisionOperator, ...]:
        return tuple(_Product.of(part) if isinstance(part, KroneckerSum) else part for part in self.H.blocks)

    def check(self, prior: Prior) -> None:
        """Whether P exists for this prior: one with a single precision for each Kronecker block.

        Raises:
            UnsupportedError: if it does not.
        """
        if not isinstance(prior, GroupedPrior):
            raise UnsupportedError(
                "damping=True needs prior precisions as numbers, found an operator; give numbers, or leave damping out"
            )
        for part, groups in zip(self.H.blocks, self.H.indices.split(prior.groups, dim=0), strict=True):
            if isinstance(part, KroneckerSum) and bool((groups != groups[0]).any()):
                raise UnsupportedError(
                    f"damping=True needs one prior precision for all of a Kronecker block, found several for "
                    f"{prior.label(int(groups[0]))}; use prior_structure='scalar' or 'modulewise' (or 'layerwise' "
                    "without joint_bias), or leave damping out"
                )

    def precision(self, prior: Prior, scale: Float[Tensor, ""]) -> BlockDiag:
        """P, for ``s = scale``."""
        self.check(prior)
        assert isinstance(prior, GroupedPrior)
        blocks: list[PrecisionOperator] = []
        for part, groups in zip(self._parts, self.H.indices.split(prior.groups, dim=0), strict=True):
            if isinstance(part, _Product):
                blocks.append(part.damped(scale, prior.precision[groups[0]]))
            else:
                blocks.append(scale * part + Diagonal(prior.precision[groups]))
        return BlockDiag(blocks, self.H.indices)

    def spectrum(self) -> Spectrum:
        """What the evidence needs to know."""
        H = self.H
        eigenvalues = torch.zeros(2, H.size, dtype=torch.float64, device=H.device)
        power, floor = torch.ones_like(eigenvalues[0]), torch.zeros_like(eigenvalues[0])
        block = torch.empty(H.size, dtype=torch.long, device=H.device)
        for part, coordinates in zip(self._parts, H.indices.blocks, strict=True):
            index = coordinates.to(H.device)
            if isinstance(part, _Product):
                eigenvalues[:, index], power[index], block[index] = part.eigenvalues(), 0.5, index[0]
            else:
                inner = spectrum(part)
                assert inner is not None  # it is dense or diagonal
                eigenvalues[0, index], block[index], floor[index] = (
                    inner.eigenvalues,
                    index[inner.block],
                    inner.floor,
                )
        return Spectrum(eigenvalues, block, floor, power)


def _is_product(H: PrecisionOperator) -> bool:
    """Whether it is one Kronecker product of two matrices."""
    return isinstance(H, KroneckerSum) and len(H.terms) == 1 and H.shift is None and None not in H.terms[0]
