"""Ways in which torch runs a model past what can be intercepted, and the straight way in their place.

    fused attention     one kernel instead of the layers, in evaluation mode; the layers compute the same
    attention           one function that calls `linear` where no function mode sees it
    attention           by kernels whose gradients have none; its matrix products have
    recurrent layers    in cuDNN, which has no backward pass in evaluation mode
    checkpoints         run again in the backward pass, when the model is no longer as it was in the forward pass
    instance norms      of one sample, whose backward pass misreads a gradient in another order of memory
    group norms         of channels last, whose backward pass may end the process
    compiled code       of `torch.compile`, which would be compiled anew for every way that a capture runs the model in

The flags and functions are torch's own, for the whole process, and are put back.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel


@contextmanager
def attention_unfused() -> Iterator[None]:
    """Attention runs layer by layer inside."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


@contextmanager
def attention_by_matrix_products() -> Iterator[None]:
    """Scaled dot-product attention can be differentiated twice inside."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


@contextmanager
def recurrent_layers_without_cudnn(model: nn.Module) -> Iterator[None]:
    """A model with recurrent layers runs without cuDNN inside."""
    enabled = torch.backends.cudnn.enabled
    if any(isinstance(module, nn.RNNBase) for module in model.modules()):
        torch.backends.cudnn.enabled = False
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = enabled


@contextmanager
def linear_replaced(by: Callable[..., Any]) -> Iterator[None]:
    """`torch.nn.functional.linear` is another function inside."""
    linear = F.linear
    F.linear = by
    try:
        yield
    finally:
        F.linear = linear


@contextmanager
def checkpoints_run_directly() -> Iterator[None]:
    """`torch.utils.checkpoint.checkpoint` does nothing but call the function inside, in both of its variants."""
    module = torch.utils.checkpoint
    kept = module.CheckpointFunction, module._checkpoint_without_reentrant_generator
    module.CheckpointFunction = _Direct  # type: ignore[assignment,misc]
    module._checkpoint_without_reentrant_generator = _direct_generator
    try:
        yield
    finally:
        module.CheckpointFunction, module._checkpoint_without_reentrant_generator = kept  # type: ignore[misc]  # a class


@contextmanager
def compiled_code_as_written() -> Iterator[None]:
    """What `torch.compile` made runs as the Python code that it was made of inside."""
    if "torch._dynamo" not in sys.modules:  # which takes a second to import: nothing was compiled
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


@contextmanager
def loops_of_vmap_unannounced() -> Iterator[None]:
    """No warning inside where torch batches an operation (fused attention) by a loop, as one would do otherwise."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop", category=UserWarning)
        yield


INSTANCE_NORMS = (F.instance_norm, torch.instance_norm)
"""The functions whose results `apart` is for."""


def apart(output: Tensor) -> Tensor:
    """The result of an instance normalisation, to which gradients come in the order of memory that it has.

    Of one picture, and a gradient with channels last, torch's backward pass takes entries of other channels (seen in
    2.13 on a CPU). A view through a flat tensor orders the gradient; the copy is no view itself, so that an activation
    that works in place leaves the result's place in the graph.
    """
    return output.flatten().view_as(output).clone()


GROUP_NORMS = (F.group_norm, torch.group_norm)
"""The functions whose arguments `contiguous_first` is for."""


def contiguous_first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a group normalisation, with its input in the usual order of memory.

    With channels last, and an input that requires no gradient, torch's backward pass ends the process (seen in 2.13 on
    a CPU).
    """
    if args:
        return (args[0].contiguous(), *args[1:]), kwargs
    return args, kwargs | {"input": kwargs["input"].contiguous()}


class _Direct:
    """In the place of the autograd function of the variant that is re-entrant."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
        return function(*args)


def _direct_generator(*args: Any, **kwargs: Any) -> Iterator[None]:
    """In the place of what the other variant does before the call (up to the yield) and after it."""
    yield
