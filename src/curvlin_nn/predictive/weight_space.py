"""The network itself at draws of its weights (``pred_type="nn"``)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from curvlin.precision.base import PrecisionOperator
from curvlin_nn.capture.checks import checked_outputs
from curvlin_nn.capture.detours import loops_of_vmap_unannounced
from curvlin_nn.capture.inputs import select_samples
from curvlin_nn.capture.state import attributes_kept, capturing, device_of, forward, nothing_drawn, prepared
from curvlin_nn.input_parts import PROBED, by_parts, count
from curvlin_nn.parameters import ParameterSpace
from curvlin_nn.predictive.draws import deviations

ACTIVATION_BUDGET = 2**24
"""Entries of the largest intermediate result of all draws and samples that run at once: 64 MiB in float32."""

Run = Callable[[Mapping[str, Tensor]], Tensor]


def _as_they_are(draws: Tensor) -> Tensor:
    return draws


@dataclass(frozen=True)
class WeightSpace:
    """A model at draws of some of its parameters; it is never changed.

    Draws run side by side (`torch.vmap`), or one after another where the model has an operation that cannot be mapped:
    the numbers are the same but for rounding.

    Attributes:
        model: runs in evaluation mode, through `torch.func.functional_call`.
        space: the parameters that are drawn.
        mean: of the draws, flat.
        precision: of the draws, factored.
        differentiable: whether outputs have gradients with respect to inputs (while autograd records).
        progress_bar: whether to show one over the draws.
        whole: from draws to flat vectors of the parameters in `space`, of which a subnetwork is a part.
    """

    model: nn.Module
    space: ParameterSpace
    mean: Float[Tensor, " P"]
    precision: PrecisionOperator
    differentiable: bool = False
    progress_bar: bool = False
    whole: Callable[[Float[Tensor, "s k"]], Float[Tensor, "s P"]] = _as_they_are

    def outputs(
        self, x: Any, n_samples: int, generator: torch.Generator | None = None
    ) -> Iterator[Float[Tensor, "s N C"]]:
        """Outputs at x at some draws at a time; one generator state gives the same weights at any x.

        Raises:
            DataError: if x holds no sample, or has a dtype that the model does not take.
            OutputError: if the outputs at a draw are not finite.
            StochasticModelError: if the model draws random numbers.
        """
        with tqdm(total=n_samples, desc="prediction", disable=not self.progress_bar) as bar:
            for draws in deviations(self.precision, n_samples, generator):
                yield self.at(self.whole(self.mean + draws), x)
                bar.update(len(draws))

    def at(self, theta: Float[Tensor, "s P"], x: Any) -> Float[Tensor, "s N C"]:
        """Outputs at x for each of some flat parameter vectors."""
        x = prepared(self.model, x, "the input")
        recording = self.differentiable and torch.is_grad_enabled()
        with capturing(self.model, ()), torch.set_grad_enabled(recording), loops_of_vmap_unannounced():
            n_samples = count(x, lambda x: len(self._at_mean(x)))
            can_be_cut = n_samples > PROBED
            first = select_samples(x, slice(0, PROBED), n_samples) if can_be_cut else x
            with _Largest(self.model) as largest:
                found = len(self._at_mean(first))
            if not can_be_cut or found != PROBED:
                return self._at_once(theta, x, largest.size, _SideBySide())
            each = -(-largest.size // PROBED)
            mapped = _SideBySide()

            def at(part: Any, expected: int) -> Tensor:
                return self._at_once(theta, part, each * expected, mapped)

            parts = by_parts(
                x, n_samples, max(1, ACTIVATION_BUDGET // each), at, lambda outputs: outputs.shape[1]
            )
            return torch.cat(list(parts), dim=1)

    def _at_once(
        self, theta: Float[Tensor, "s P"], x: Any, entries: int, mapped: _SideBySide
    ) -> Float[Tensor, "s N C"]:
        """Outputs at all of x, as many draws side by side as the budget has room for."""

        def run(parameters: Mapping[str, Tensor]) -> Tensor:
            with attributes_kept(self.model):  # what depends on the weights is not kept from draw to draw
                outputs: Tensor = forward(self.model, parameters, x, "the input")
                return outputs

        side_by_side = max(1, ACTIVATION_BUDGET // entries)
        parts = []
        with nothing_drawn(device_of(self.model), "the input"):
            for some in theta.split(side_by_side):
                outputs = mapped(run, self.space.unflatten(some))
                parts.append(checked_outputs(outputs, "a draw of the weights"))
        outputs = torch.cat(parts)
        return outputs.reshape(*outputs.shape[:2], -1)

    def _at_mean(self, x: Any) -> Tensor:
        with torch.no_grad(), attributes_kept(self.model):
            return checked_outputs(forward(self.model, {}, x, "the input"), "the input")


class _SideBySide:
    """Runs at each of several sets of parameters: all in one, until that turns out not to be possible."""

    def __init__(self) -> None:
        self._possible = True

    def __call__(self, run: Run, parameters: Mapping[str, Tensor]) -> Float[Tensor, "s N ..."]:
        n_draws = len(next(iter(parameters.values())))
        if self._possible and n_draws > 1:
            try:
                return torch.vmap(run)(dict(parameters))
            except Exception:  # whatever is no fault of the map happens again below
                self._possible = False
        one_by_one = [
            run({name: tensor[index] for name, tensor in parameters.items()}) for index in range(n_draws)
        ]
        return torch.stack(one_by_one)


class _Largest(TorchDispatchMode):
    """While active, finds the size of the largest intermediate result that is no parameter or view of one."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.size = 1

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self._own:
                self.size = max(self.size, tensor.numel())
        return result
