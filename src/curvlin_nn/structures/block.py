"""Exact dense blocks, one for each parameter tensor or module: sum_b P_b^2 memory."""

from __future__ import annotations

from curvlin_nn.errors import UnsupportedError
from curvlin_nn.parameters import ParameterSpace
from curvlin_nn.structures.full import Full
from curvlin_nn.structures.kronecker import MAX_BLOCK
from curvlin_nn.structures.mixed import SideBySide
from curvlin_nn.structures.registry import register


@register
class Block(SideBySide):
    """The diagonal blocks of the full matrix.

    Args:
        space: all parameters.
        by_module: one block for all parameters that a module owns directly, instead of one for each parameter.
        max_block: the most coordinates a block may have.

    Raises:
        UnsupportedError: if a block has more.
    """

    name = "block"

    def __init__(self, space: ParameterSpace, *, by_module: bool = False, max_block: int = MAX_BLOCK) -> None:
        groups = list(space.modules.values()) if by_module else [(name,) for name in space.names]
        spans = space.spans
        for names in groups:
            size = sum(len(spans[name]) for name in names)
            if size > max_block:
                raise UnsupportedError(
                    f"the dense block of {', '.join(names)} has {size} coordinates, expected at most "
                    f"max_block={max_block}; raise max_block, or use another structure there"
                )
        super().__init__(space, [(names, Full) for names in groups])
