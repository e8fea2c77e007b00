"""Products with the Hessian of the negative log-likelihood, by double backward (Pearlmutter, 1994)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from curvlin_nn.batches import Passes, choose
from curvlin_nn.capture.checks import check_independent, checked_outputs
from curvlin_nn.capture.inputs import can_be_cut
from curvlin_nn.capture.state import capturing, device_of, forward, nothing_drawn, prepared, random_state_kept
from curvlin_nn.errors import OutputError, UnsupportedError
from curvlin_nn.inference_mode import outside_inference_mode
from curvlin_nn.likelihoods import Likelihood
from curvlin_nn.parameters import ParameterSpace, Selection


@dataclass(frozen=True)
class BatchHessian:
    """The Hessian of one batch: its gradient, with the graph that it was made by."""

    _space: ParameterSpace
    _leaves: tuple[Tensor, ...]
    _gradients: tuple[Tensor, ...]
    _where: str

    def __matmul__(self, X: Float[Tensor, "P K"]) -> Float[Tensor, "P K"]:
        """``H X``, column by column.

        Raises:
            OutputError: if the product is not finite.
            UnsupportedError: if a function of the model has no second derivative.
        """
        product = torch.stack([self._column(x) for x in X.unbind(1)], dim=1)
        if not bool(torch.isfinite(product).all()):
            raise OutputError(f"second derivatives on {self._where} must be finite, found NaN or Inf")
        return product

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters, and of products."""
        return self._leaves[0].dtype

    def columns(self, start: int, stop: int, at_once: int) -> Iterator[tuple[int, Float[Tensor, "P k"]]]:
        """Columns `start` to `stop` of H, some at a time, each time with the number of the first."""
        for first in range(start, stop, at_once):
            chosen = torch.arange(first, min(first + at_once, stop), device=self._leaves[0].device)
            unit = self._leaves[0].new_zeros(self._space.size, len(chosen))
            unit[chosen, chosen - first] = 1
            yield first, self @ unit

    def _column(self, x: Float[Tensor, " P"]) -> Float[Tensor, " P"]:
        parts = self._space.unflatten(x).values()
        live = [(g, part) for g, part in zip(self._gradients, parts, strict=True) if g.requires_grad]
        if not live:
            return torch.zeros_like(x)
        gradients, cotangents = zip(*live, strict=True)
        columns = _derivatives(gradients, self._leaves, cotangents, create_graph=False)
        return torch.cat([column.reshape(-1) for column in columns])


class Hessian:
    """``- d^2 log p(y | f(x; theta)) / d theta^2``, summed over the data, at ``sigma_noise = 1``.

    Attention runs with torch's "math" kernel, the one that can be differentiated twice.

    Args:
        model: maps one argument to outputs; it comes back as it was.
        likelihood: of the outputs; its `statistics` must be differentiable.
        loader: batches ``(inputs, targets)``.
        subset_of_weights: see `curvlin_nn.curvature`.
        progress_bar: whether to show one.

    Attributes:
        passes: over the data.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood,
        loader: Iterable[Any],
        subset_of_weights: Selection,
        progress_bar: bool = False,
    ) -> None:
        self._model, self._likelihood, self._subset = model, likelihood, subset_of_weights
        self._space: ParameterSpace | None = None
        self._independent = False
        self.passes = Passes(loader, model, progress_bar)

    @property
    def space(self) -> ParameterSpace:
        """The parameters, known once a batch was seen."""
        assert self._space is not None
        return self._space

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters, and of products."""
        return self.space.dtype(self._model)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return device_of(self._model)

    def check(self) -> None:
        """One pass over the data that only looks at it.

        Raises:
            DataError, OutputError, StochasticModelError, CouplingError, UnsupportedError: for what has no Hessian.
        """
        for _ in self:
            pass

    @outside_inference_mode()
    def __call__(self, X: Float[Tensor, "P K"]) -> Float[Tensor, "P K"]:
        """``H X``, summed over batches in float64."""
        total = torch.zeros(X.shape, dtype=torch.float64, device=X.device)
        with random_state_kept(device_of(self._model)):  # loaders draw from the default generator
            for H in self:
                total += H @ X
        return total.to(X.dtype)

    def __iter__(self) -> Iterator[BatchHessian]:
        """The Hessians of the batches.

        Raises:
            DataError: if the loader yields nothing, or another number of samples than the first time.
        """
        for where, x, targets in self.passes:
            yield self.of_batch(x, targets, where)

    def of_batch(self, x: Any, targets: Tensor, where: str) -> BatchHessian:
        """The Hessian of a batch, of the loader or not; `where` is what to call it."""
        if self._space is None:
            self._space = choose(self._model, self._subset, x, where)
        model, space = self._model, self.space
        x = prepared(model, x, where)
        leaves = {name: p.clone().requires_grad_() for name, p in space.tensors(model).items()}
        with capturing(model, ()) as device, sdpa_kernel(SDPBackend.MATH):
            with nothing_drawn(device, where):
                outputs = checked_outputs(forward(model, leaves, x, where), where)
            if not self._independent and len(outputs) > 1 and can_be_cut(x, len(outputs)):
                check_independent(
                    lambda x: checked_outputs(forward(model, leaves, x, where), where).detach(), x, outputs
                )
            self._independent = True  # as far as the first batch shows
            targets = self._likelihood.check(outputs.detach(), targets, where)
            loss = self._loss(outputs, targets)
            gradients = _derivatives([loss], tuple(leaves.values()), None, create_graph=True)
        return BatchHessian(space, tuple(leaves.values()), gradients, where)

    def _loss(self, outputs: Tensor, targets: Tensor) -> Float[Tensor, ""]:
        """The negative log-likelihood, whose gradient must be the `score` of the family.

        Raises:
            UnsupportedError: if it is not.
        """
        family = self._likelihood
        one = torch.ones((), dtype=torch.float64, device=outputs.device)
        loss = -family.log_likelihood(family.statistics(outputs, targets), one)
        terms = family.terms(outputs.detach())
        weights, score = family.weights(terms, targets), family.score(terms, targets)
        score = family.outputs(score if weights is None else weights[..., None] * score, outputs).detach()
        found = torch.autograd.grad(loss, outputs, retain_graph=True)[0] if loss.requires_grad else None
        scale = torch.finfo(outputs.dtype).eps ** 0.5 * score.abs().max()
        if found is None or not bool(((found - score).abs() <= scale).all()):
            raise UnsupportedError(
                f"likelihood {family.name!r} has no Hessian here: its score must be the gradient, by autograd, of its "
                "log-likelihood; take kind='ggn'"
            )
        return loss


def _derivatives(
    values: Iterable[Tensor], leaves: tuple[Tensor, ...], cotangents: Any, create_graph: bool
) -> tuple[Tensor, ...]:
    try:
        return torch.autograd.grad(
            tuple(values),
            leaves,
            grad_outputs=cotangents,
            retain_graph=True,
            create_graph=create_graph,
            materialize_grads=True,
        )
    except RuntimeError as error:
        if not any(words in str(error) for words in ("not implemented", "once_differentiable", "twice")):
            raise
        raise UnsupportedError(
            f"the model must be twice differentiable for its Hessian, found: {str(error).partition(chr(10))[0]}; take "
            "kind='ggn'"
        ) from error
