"""Precision operators: one structure per file, the contract in `base`."""
