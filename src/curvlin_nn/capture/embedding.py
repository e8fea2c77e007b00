"""Embeddings: ``y = W[token]``, which is a linear layer on one-hot vectors.

Each token is a position: left is its gradient, right its one-hot vector, held as the token, and W stands as (tokens,
features).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from curvlin_nn.capture.one_hot import OneHot
from curvlin_nn.capture.rules import Call, LayerRule, NotServable, Piece, register


@register
class EmbeddingRule(LayerRule):
    """`torch.nn.functional.embedding`, and with it `torch.nn.Embedding`; the row at `padding_idx` is constant."""

    functions = (F.embedding,)
    batched_columns = True
    is_layer = False

    def bind(self, *args: Any, **kwargs: Any) -> Call:
        """See `LayerRule.bind`."""

        def arguments(
            input: Tensor,
            weight: Tensor,
            padding_idx: int | None = None,
            max_norm: float | None = None,
            norm_type: float = 2.0,
            scale_grad_by_freq: bool = False,
            sparse: bool = False,
        ) -> Call:
            for option, value in (("scale_grad_by_freq", scale_grad_by_freq), ("sparse", sparse)):
                if value:
                    raise NotServable(
                        f"with {option}=True, so that autograd gives no dense derivative",
                        f"{option}=False, which leaves the outputs as they are",
                    )
            # A negative index counts from the end.
            constant = padding_idx if padding_idx is None else padding_idx % len(weight)
            return Call(input, {"weight": weight}, {"constant": constant, "tokens": len(weight)})

        return arguments(*args, **kwargs)

    def pieces(self, call: Call, gradient: Tensor) -> Iterator[Piece]:
        """See `LayerRule.pieces`."""
        tokens, constant = call.input.long(), call.options["constant"]
        if constant is not None:
            tokens = torch.where(tokens == constant, -1, tokens)
        inputs = OneHot(tokens, call.options["tokens"])
        yield Piece("weight", 0, gradient, None, transposed=True, compact=inputs)
