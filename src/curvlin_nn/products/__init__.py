"""Curvature known by its products only: nothing of P x P is made."""
