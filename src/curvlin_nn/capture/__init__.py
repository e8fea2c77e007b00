"""Interception of layer uses in one forward pass: factored per-sample Jacobians without weight gradients.

One file per layer family; a new family is a new file that registers a `LayerRule`.
"""

from curvlin_nn.capture import conv, conv_transpose, elementwise, embedding, linear, norms
from curvlin_nn.capture.blocks import Block, Captures, JointBlock, Place, partition
from curvlin_nn.capture.last_layer import last_layer
from curvlin_nn.capture.one_hot import OneHot
from curvlin_nn.capture.patches import Patches
from curvlin_nn.capture.recorder import Recorder, Recording
from curvlin_nn.capture.rules import RULES, Call, LayerRule, Piece, register

__all__ = [
    "RULES",
    "Block",
    "Call",
    "Captures",
    "JointBlock",
    "LayerRule",
    "OneHot",
    "Patches",
    "Piece",
    "Place",
    "Recorder",
    "Recording",
    "conv",
    "conv_transpose",
    "elementwise",
    "embedding",
    "last_layer",
    "linear",
    "norms",
    "partition",
    "register",
]
