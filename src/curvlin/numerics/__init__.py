"""Kernels on tensors: factorisations, and the derivatives of what is computed from them."""
