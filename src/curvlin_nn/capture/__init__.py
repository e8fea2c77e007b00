"""Interception of layer uses in one forward pass: factored per-sample Jacobians without weight gradients.

One file per layer family; a new family is a new file that registers a `LayerRule`.
"""

from curvlin_nn.capture import conv, linear
from curvlin_nn.capture.last_layer import last_layer
from curvlin_nn.capture.recorder import Block, Captures, Recorder, Recording
from curvlin_nn.capture.rules import RULES, Call, LayerRule, Piece, register

__all__ = [
    "RULES",
    "Block",
    "Call",
    "Captures",
    "LayerRule",
    "Piece",
    "Recorder",
    "Recording",
    "conv",
    "last_layer",
    "linear",
    "register",
]
