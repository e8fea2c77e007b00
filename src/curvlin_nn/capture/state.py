"""Running a user's model without leaving a trace on it."""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.module import _global_backward_hooks, _global_backward_pre_hooks
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from curvlin_nn.capture.detours import (
    GROUP_NORMS,
    INSTANCE_NORMS,
    apart,
    attention_unfused,
    checkpoints_run_directly,
    compiled_code_as_written,
    contiguous_first,
    recurrent_layers_without_cudnn,
)
from curvlin_nn.capture.inputs import arguments, dtypes_of, map_tensors, outputs_of, tensors_of
from curvlin_nn.errors import DataError, StochasticModelError, UnsupportedError
from curvlin_nn.parameters import check_model


def device_of(model: nn.Module) -> torch.device:
    """Where the model's parameters are.

    Raises:
        UnsupportedError: if it is no model that can be run, has no parameters, or has them on several devices or
            without values.
    """
    check_model(model)
    devices = {p.device for p in model.parameters()}
    if len(devices) != 1:
        found = ", ".join(sorted(map(str, devices))) or "no parameter"
        raise UnsupportedError(f"the model must have parameters, all on one device, found {found}")
    (device,) = devices
    if device.type == "meta":
        raise UnsupportedError(
            "the model is on the device 'meta', which holds no values, expected one that does; call "
            "model.to_empty(device='cpu') and load its parameters"
        )
    return device


@contextmanager
def capturing(model: nn.Module, parameters: Iterable[Tensor]) -> Iterator[torch.device]:
    """How a model is run: in evaluation mode, with autograd, as the function that it computes; as before outside.

    Args:
        model: the model.
        parameters: those of its own tensors whose direct use autograd has to notice.

    Yields:
        Where the model is.
    """
    device = device_of(model)
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        evaluation_mode(model),
        attributes_kept(model),
        module_hooks_suspended(model),
        attention_unfused(),
        recurrent_layers_without_cudnn(model),
        checkpoints_run_directly(),
        compiled_code_as_written(),
        gradients_required(parameters),
        random_state_kept(device),
    ):
        yield device


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Every module in evaluation mode inside, and in the mode it had outside.

    The flags are set directly: `nn.Module.eval` may be overridden to do more than set a flag.
    """
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def attributes_kept(model: nn.Module) -> Iterator[None]:
    """Every module has the attributes and buffers outside that it had before, whatever a forward pass assigns.

    So have the lists, dictionaries, sets and deques among them the entries. What a model caches (a table for the
    longest sequence so far, a weight made of parameters) would else be of tensors that stood in for its own, and no
    longer fit buffers that come back.
    """
    held = [(own, dict(own)) for module in model.modules() for own in (vars(module), module._buffers)]
    collected = [
        (value, copy.copy(value))
        for _, before in held
        for name, value in before.items()
        if type(value) in _COLLECTIONS and name not in _OF_EVERY_MODULE
    ]
    try:
        yield
    finally:
        for own, before in held:
            for added in own.keys() - before.keys():
                del own[added]
            own.update(before)
        for collection, entries in collected:
            collection.clear()
            add = collection.extend if isinstance(collection, (list, deque)) else collection.update
            add(entries)


_COLLECTIONS = (list, dict, OrderedDict, defaultdict, set, deque)

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
"""Names of attributes in which a module holds its parameters, buffers, modules and hooks."""


@contextmanager
def module_hooks_suspended(model: nn.Module) -> Iterator[None]:
    """No module has backward hooks inside, and all have those they had outside.

    They watch (or bend) the gradients of training; the backward passes of a capture are no such thing.
    """
    registries = [_global_backward_hooks, _global_backward_pre_hooks]
    for module in model.modules():
        registries += [module._backward_hooks, module._backward_pre_hooks]
    held = [(registry, dict(registry)) for registry in registries if registry]
    try:
        for registry, _ in held:
            registry.clear()
        yield
    finally:
        for registry, hooks in held:
            registry.update(hooks)


class FunctionsForCaptures(TorchFunctionMode):
    """While active, some of torch's functions do what a capture needs.

    `Tensor.register_hook` does nothing: what a forward pass attaches would act on a capture. `instance_norm` returns a
    tensor of its own, and `group_norm` takes one in the usual order of memory; see `detours`.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is Tensor.register_hook:
            return RemovableHandle(OrderedDict())
        kwargs = kwargs or {}
        if func in GROUP_NORMS:
            args, kwargs = contiguous_first(args, kwargs)
        output = func(*args, **kwargs)
        return apart(output) if func in INSTANCE_NORMS else output


@contextmanager
def gradients_required(parameters: Iterable[Tensor]) -> Iterator[None]:
    """All of these require a gradient inside, so that autograd knows whether they were used; as before outside."""
    frozen = [p for p in parameters if not p.requires_grad]
    try:
        for p in frozen:
            p.requires_grad_()
        yield
    finally:
        for p in frozen:
            p.requires_grad_(False)


@contextmanager
def random_state_kept(device: torch.device) -> Iterator[None]:
    """Torch's default generators come back as they were (on the CPU, and on `device` if that is a GPU)."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        yield


@contextmanager
def nothing_drawn(device: torch.device, where: str) -> Iterator[None]:
    """Inside, the model must leave torch's default generators as they are.

    Raises:
        StochasticModelError: if it does not.
    """
    before = random_state(device)
    yield
    if not all(map(torch.equal, before, random_state(device))):
        raise StochasticModelError(
            f"the model drew random numbers on {where}, expected the same outputs each time in evaluation mode; is "
            "dropout applied with training=True?"
        )


def random_state(device: torch.device) -> list[Tensor]:
    """Of torch's default generators: on the CPU, and on `device` if that is a GPU."""
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def set_random_state(device: torch.device, states: Sequence[Tensor]) -> None:
    """Put torch's default generators where they were."""
    torch.set_rng_state(states[0].cpu())
    if device.type == "cuda" and len(states) > 1:
        torch.cuda.set_rng_state(states[1].cpu(), device)


def prepared(model: nn.Module, x: Any, where: str) -> Any:
    """The input on the model's device.

    Raises:
        DataError: if it holds no sample, or NaN.
        UnsupportedError: if autocast is on, under which layers compute in another dtype than that of their parameters.
    """
    device = device_of(model)
    if torch.is_autocast_enabled(device.type):
        raise UnsupportedError(
            f"torch.autocast is on for {device.type}, expected it off; leave its context, or convert the model "
            "and its inputs to the lower precision"
        )
    for tensor in tensors_of(x):
        if tensor.shape[:1] == (0,):
            raise DataError(f"{where} must hold at least one sample, found shape {tuple(tensor.shape)}")
        # Inf may stand in an additive mask. A sum is NaN where a term is, at the cost of one pass and no mask.
        if tensor.is_floating_point() and bool(torch.isnan(tensor.sum())) and bool(torch.isnan(tensor).any()):
            raise DataError(f"{where} must hold numbers, found NaN among the inputs")
    return map_tensors(lambda tensor: tensor.to(device), x)


def forward(model: nn.Module, parameters: Mapping[str, Tensor], x: Any, where: str) -> Any:
    """The model's outputs at the given parameters, the other ones detached, the buffers and the input copied.

    The model's own tensors, and the caller's input, are never handed to it, so that nothing can accumulate gradients
    or be changed in place.

    Raises:
        DataError: if the model fails on an input of another dtype than that of its parameters. Whether it takes such
            an input (token indices, bytes of an image that it converts) only the model can say.
    """
    args, kwargs = arguments(model, map_tensors(torch.clone, x))
    try:
        stand_ins = _stand_ins(model, parameters)
        with FunctionsForCaptures():
            outputs = functional_call(model, stand_ins, args, kwargs, tie_weights=False)
        return outputs_of(outputs)
    except RuntimeError as error:
        dtypes, found = {p.dtype for p in model.parameters()}, dtypes_of(x)
        if found <= dtypes or isinstance(error, torch.OutOfMemoryError):
            raise
        raise DataError(
            f"{where} has dtype {_listed(found)} and the model {_listed(dtypes)}, expected one that the "
            f"model takes; it says: {str(error).partition(chr(10))[0]}"
        ) from error


def _stand_ins(model: nn.Module, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What to put in the place of every parameter and buffer, each place under one name.

    `functional_call` leaves behind what it was given where a place has two names, as in a module that is used twice.
    """
    by_identity: dict[int, Tensor] = {id(b): b.clone() for b in model.buffers()}
    by_identity |= {id(p): parameters.get(name, p.detach()) for name, p in model.named_parameters()}
    return {
        f"{prefix}.{name}" if prefix else name: by_identity[id(tensor)]
        for prefix, module in model.named_modules()
        for name, tensor in (*module._parameters.items(), *module._buffers.items())
        if tensor is not None
    }


def _listed(dtypes: Iterable[torch.dtype]) -> str:
    return ", ".join(sorted(map(str, dtypes)))
