"""Curvature structures, one per file; a new structure is a new file (or package) that registers itself."""

from curvlin_nn.structures.base import Structure
from curvlin_nn.structures.diagonal import Diagonal
from curvlin_nn.structures.full import Full
from curvlin_nn.structures.kronecker import Kronecker
from curvlin_nn.structures.low_rank import LowRank
from curvlin_nn.structures.registry import ENTRY_POINTS, available, register, resolve

__all__ = [
    "ENTRY_POINTS",
    "Diagonal",
    "Full",
    "Kronecker",
    "LowRank",
    "Structure",
    "available",
    "register",
    "resolve",
]
