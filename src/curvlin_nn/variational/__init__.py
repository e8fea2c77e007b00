"""Variational posteriors: Gaussians over functions that are trained on a bound of the evidence, batch by batch.

training    steps over batches, held-out scores, and the best state
"""
