"""Matvec-only precisions: solves with residuals, estimates with standard errors."""

from curvlin.iterative.precision import IterativePrecision
from curvlin.iterative.results import Estimate, LowRankApproximation, Solution

__all__ = ["Estimate", "IterativePrecision", "LowRankApproximation", "Solution"]
