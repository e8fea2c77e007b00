"""The tables of the algebra: sums, congruences and trace-solves, filled on import."""

from curvlin.algebra import congruence, sums, traces

__all__ = ["congruence", "sums", "traces"]
