"""Posteriors and unfinished fits in files: safetensors beside JSON, no pickle, whole or not at all."""
