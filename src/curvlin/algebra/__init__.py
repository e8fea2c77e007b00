"""The tables of the algebra: sums, congruences, trace-solves and inverses, filled on import."""

from curvlin.algebra import congruence, inverses, sums, traces

__all__ = ["congruence", "inverses", "sums", "traces"]
