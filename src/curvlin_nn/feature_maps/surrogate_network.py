"""The network of a surrogate: the user's own, or the target with its head widened."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from curvlin_nn.capture import last_layer
from curvlin_nn.capture.inputs import called
from curvlin_nn.capture.state import random_state_kept
from curvlin_nn.errors import OutputError, UnsupportedError
from curvlin_nn.feature_maps.surrogate_head import WidenedHead
from curvlin_nn.feature_maps.surrogate_tangents import Tangents, WithTangents

HIDDEN = 1024
"""The most hidden units that a head has, besides its inputs."""

_GIVE = "give a network of your own with surrogate="


class Scaled(nn.Module):
    """Features ``scale * network(x)``.

    Args:
        network: maps an input to ``(N, C, K)``.
        scale: by which its outputs are multiplied, so that they begin near the size of the kernel's root.
    """

    scale: Tensor

    def __init__(self, network: nn.Module, scale: float) -> None:
        super().__init__()
        self.network = network
        dtype = next((p.dtype for p in network.parameters()), torch.get_default_dtype())
        device = next((p.device for p in network.parameters()), None)
        self.register_buffer("scale", torch.tensor(scale, dtype=dtype, device=device))

    def forward(self, x: Any) -> Tensor:
        """The features; `x` is spread over the network's arguments as a model's input is."""
        outputs = called(self.network, x)
        if not isinstance(outputs, Tensor):
            raise OutputError(
                f"the surrogate must return a tensor (N, C, K), found {type(outputs).__name__}; unflatten its last "
                "layer with nn.Unflatten(1, (C, K))"
            )
        return self.scale * outputs


def widened(
    model: nn.Module, x: Any, n_outputs: int, rank: int, *, fresh: bool, seed: int, n_tangents: int = 0
) -> nn.Module:
    """A copy of the model whose last layer has K features in the place of each output.

    Args:
        model: what is copied; in evaluation mode, whatever mode the model is in.
        x: an input that the model takes.
        n_outputs: C.
        rank: K.
        fresh: whether all layers are initialised anew, and the head is linear, as published; if not, the rest begins as
            it is, and the head has hidden units.
        seed: of what is drawn for that; torch's default generators are left as they are.
        n_tangents: in how many directions of weights the features see tangents of the last layer's inputs besides;
            which, the network is to be told (`tangents_of`).

    Raises:
        UnsupportedError: if the model does not end in one linear layer.
    """
    names = last_layer(model, x).names
    last = {id(model.get_parameter(name)) for name in names}  # a tied weight has the name of its first owner
    found_layers = [
        (path, module)
        for path, module in model.named_modules()
        if type(module) is nn.Linear and id(module.weight) in last
    ]
    if len(found_layers) != 1:
        raise UnsupportedError(
            "the default surrogate widens the last layer, which must be one nn.Linear, found another use of "
            f"{names[0]!r}; {_GIVE}"
        )
    ((path, layer),) = found_layers
    with seeded(seed, layer.weight.device):
        network = _copied(model)
        if fresh:
            for module in network.modules():
                if callable(reset := getattr(module, "reset_parameters", None)):
                    reset()
        n_hidden = 0 if fresh else min(HIDDEN, 4 * layer.in_features)
        kind: dict[str, Any] = {"dtype": layer.weight.dtype, "device": layer.weight.device}
        head = WidenedHead(layer.in_features, layer.out_features, rank, n_hidden, **kind)
        network = nn.Sequential(head) if not path else network
        if path:
            network.set_submodule(path, head)
        for parameter in network.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        if n_tangents and (trunk := _before(model, path)) is not None:
            of_tangents = WidenedHead(n_tangents * layer.in_features, layer.out_features, rank, **kind)
            network = WithTangents(network, Tangents(trunk, n_tangents), of_tangents)
    network.eval()
    try:
        with torch.no_grad():
            found = called(network, x)
    except (RuntimeError, TypeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise _not_the_last(path, f"fails ({reason})", n_outputs, rank) from error
    if not isinstance(found, Tensor) or found.shape[1:] != (n_outputs, rank):
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise _not_the_last(path, f"returns {shape}", n_outputs, rank)
    return network


def _not_the_last(path: str, found: str, n_outputs: int, rank: int) -> UnsupportedError:
    return UnsupportedError(
        f"the model does more with the outputs of its last layer {path!r} than return them: widened, it {found}, "
        f"expected to return (N, {n_outputs}, {rank}); {_GIVE}"
    )


def _before(model: nn.Module, path: str) -> nn.Module | None:
    """A copy of what stands before the last layer; None if that has no weights."""
    if not path:
        return None
    trunk = _copied(model)
    trunk.set_submodule(path, nn.Identity())
    return None if next(trunk.parameters(), None) is None else trunk


def _copied(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except (RuntimeError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise UnsupportedError(f"the model cannot be copied ({reason}); {_GIVE}") from error


def tangents_of(network: nn.Module) -> Tangents | None:
    """Those that a network of `widened` sees."""
    return network.tangents if isinstance(network, WithTangents) else None


def check_surrogate(surrogate: object) -> None:
    """Whether this can be called as a network is.

    Raises:
        UnsupportedError: if it is no module.
    """
    if not isinstance(surrogate, nn.Module):
        raise UnsupportedError(f"surrogate must be a torch.nn.Module, found {type(surrogate).__name__}")


def features_of(
    surrogate: nn.Module, x: Any, n_samples: int, n_outputs: int, rank: int | None, where: str
) -> Float[Tensor, "N C K"]:
    """What a surrogate returns, if it has the one shape that it may have.

    Args:
        surrogate: the network.
        x: what it is called on.
        n_samples: N.
        n_outputs: C.
        rank: K; None for any.
        where: what to call x in messages.

    Raises:
        OutputError: if the features have another shape.
        UnsupportedError: if the network fails on x.
    """
    try:
        features = surrogate(x)
    except (RuntimeError, TypeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        reason = str(error).partition("\n")[0]
        raise UnsupportedError(
            f"the surrogate must take what the model takes, in the model's dtype; on {where} it says: {reason}"
        ) from error
    if not isinstance(features, Tensor):
        raise OutputError(
            f"the surrogate must return a tensor (N, C, K) on {where}, found {type(features).__name__}"
        )
    K = "K" if rank is None else rank
    fits = features.ndim == 3 and features.shape[:2] == (n_samples, n_outputs) and features.shape[2] > 0
    if not fits or rank not in (None, features.shape[2]):
        raise OutputError(
            f"the surrogate must return features of shape (N, C, K) = ({n_samples}, {n_outputs}, {K}) on {where}, "
            f"found {tuple(features.shape)}; end it in nn.Unflatten(1, ({n_outputs}, {K}))"
        )
    return features


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Torch's default generators begin at a seed inside, and are as they were outside."""
    with random_state_kept(device):
        torch.manual_seed(seed)
        yield
