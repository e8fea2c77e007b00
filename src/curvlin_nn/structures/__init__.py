"""Curvature structures, one per file; a new structure is a new file (or package) that registers itself."""

from curvlin_nn.structures.base import Structure, StructureFactory
from curvlin_nn.structures.block import Block
from curvlin_nn.structures.diagonal import Diagonal
from curvlin_nn.structures.ekfac import EKFAC
from curvlin_nn.structures.full import Full
from curvlin_nn.structures.function_space import FunctionSpace
from curvlin_nn.structures.kfoc import KFOC
from curvlin_nn.structures.kronecker import Kronecker
from curvlin_nn.structures.kronecker_low_rank import KroneckerLowRank, Truncation
from curvlin_nn.structures.low_rank import LowRank
from curvlin_nn.structures.mixed import Mixed
from curvlin_nn.structures.registry import ENTRY_POINTS, StructureChoice, available, register, resolve

__all__ = [
    "EKFAC",
    "ENTRY_POINTS",
    "KFOC",
    "Block",
    "Diagonal",
    "Full",
    "FunctionSpace",
    "Kronecker",
    "KroneckerLowRank",
    "LowRank",
    "Mixed",
    "Structure",
    "StructureChoice",
    "StructureFactory",
    "Truncation",
    "available",
    "register",
    "resolve",
]
