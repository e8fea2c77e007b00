"""The passes of a fit of a Hessian: what the log-likelihood needs to know of the data, and then the products."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from curvlin_nn.capture.state import device_of, random_state, random_state_kept, set_random_state
from curvlin_nn.columns import EXACT, Columns
from curvlin_nn.curvature import Accumulated, Accumulation, accumulate, run_passes
from curvlin_nn.likelihoods import Likelihood
from curvlin_nn.parameters import ParameterSpace, Selection
from curvlin_nn.products.hessian import Hessian
from curvlin_nn.products.hessian_states import hessian_state
from curvlin_nn.products.hessian_sums import HessianSum, check_size
from curvlin_nn.storage.checkpoint import Checkpoint


def accumulate_hessian(
    model: nn.Module,
    likelihood: Likelihood,
    loader: Iterable[Any],
    subset_of_weights: Selection,
    structure: str,
    indefinite: str,
    *,
    columns: Columns = EXACT,
    feature_reduction: str | None = None,
    progress_bar: bool = False,
    checkpoint: Checkpoint | None = None,
) -> Accumulated:
    """What `curvlin_nn.curvature.accumulate` finds, with the Hessian of the data as its state.

    Args:
        model: as there.
        likelihood: likewise.
        loader: likewise.
        subset_of_weights: likewise.
        structure: ``"full"``, ``"block"``, ``"diag"`` or ``"lowrank"``.
        indefinite: what negative eigenvalues do: ``"raise"``, ``"clip"`` or ``"abs"``.
        columns: whose generator is the source of randomness for ``"lowrank"``.
        feature_reduction: as there.
        progress_bar: likewise.
        checkpoint: likewise; None for ``"lowrank"``, whose passes sum nothing that could be gone on with.

    Raises:
        UnsupportedError: for more than 10,000 parameters, but for ``"lowrank"``.
    """
    if structure != "lowrank":
        sums = HessianAccumulation(
            model, likelihood, subset_of_weights, structure, indefinite, columns, feature_reduction
        )
        return run_passes(sums, loader, progress_bar, checkpoint)
    assert checkpoint is None
    found = accumulate(
        model,
        likelihood,
        loader,
        subset_of_weights,
        [],
        columns=columns,
        feature_reduction=feature_reduction,
        progress_bar=progress_bar,
    )
    H = Hessian(model, likelihood, loader, list(found.space.names), progress_bar)
    with random_state_kept(device_of(model)):  # loaders draw from the default generator
        state = hessian_state(H, structure, indefinite, generator=columns.generator)
    H.passes.check_count(found.n_data)
    return replace(found, states=(state,))


class HessianAccumulation(Accumulation):
    """Sums in the making of a Hessian: in its second pass each batch is multiplied out and added.

    What loaders draw from torch's default generators is the same in both passes, so that the log-likelihood and its
    second derivatives are those of the same data where these are augmented at random.

    Args:
        model: as in `accumulate_hessian`.
        likelihood: likewise.
        subset_of_weights: likewise.
        structure: likewise, but for ``"lowrank"``, which is no sum.
        indefinite: likewise.
        columns: likewise.
        feature_reduction: likewise.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood,
        subset_of_weights: Selection,
        structure: str,
        indefinite: str,
        columns: Columns,
        feature_reduction: str | None = None,
    ) -> None:
        super().__init__(model, likelihood, subset_of_weights, [], columns, feature_reduction)
        self._structure, self._indefinite = structure, indefinite
        self._random: list[Tensor] | None = None  # at the beginning of either pass

    @property
    def passes(self) -> int:
        """Two: of the log-likelihood, which also says what the parameters are, and of the products."""
        return 2

    def begin(self, pass_index: int) -> None:
        """Called before each pass."""
        super().begin(pass_index)
        device = device_of(self.model)
        if self._random is None:
            self._random = random_state(device)
        set_random_state(device, self._random)

    def add(self, x: Any, targets: Tensor, where: str) -> None:
        """One batch."""
        if self.pass_index == 0:
            super().add(x, targets, where)
            return
        self._hessian.add(self._products.of_batch(x, targets, where))
        self._n_data += len(targets)

    def state_dict(self) -> dict[str, Any]:
        """All of it as tensors and plain values, after a batch of any pass."""
        return {**super().state_dict(), "random": self._random}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another one was."""
        super().load_state_dict(state)
        self._random = state["random"]

    def _start(self, space: ParameterSpace) -> None:
        check_size(space)
        super()._start(space)
        self._hessian = HessianSum.empty(space, self._structure, self._indefinite)
        self._products = Hessian(self.model, self._likelihood, (), list(space.names))
        self._sums = replace(self.found, states=(self._hessian,))
