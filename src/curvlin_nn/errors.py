"""The errors of curvlin_nn: one line that names what was found, what was expected, and the mend."""

from __future__ import annotations

from collections.abc import Iterable

from curvlin.errors import NotPositiveDefiniteError

__all__ = [
    "ConvergenceError",
    "CouplingError",
    "DataError",
    "IndefiniteHessianError",
    "LostPriorError",
    "ModifiedInputError",
    "NoFiniteOptimumError",
    "NotFittedError",
    "NotSelectedError",
    "OutputError",
    "StaleModelError",
    "StochasticModelError",
    "StorageError",
    "TrainingDivergedError",
    "UnsupportedError",
    "UnsupportedUseError",
    "one_of",
]


def one_of(names: Iterable[str]) -> str:
    """The names as messages list them."""
    return f"one of {', '.join(map(repr, names))}"


class UnsupportedError(ValueError):
    """An option, structure or model that is not served; the message says what is."""


_SERVED = (
    "uses by linear maps, convolutions, embeddings, normalisations and attention (functional ones included) only; "
    "serve it by per-sample autodiff with fallback=True, or leave it out with subset_of_weights"
)


class UnsupportedUseError(UnsupportedError):
    """A parameter takes part in the model in a way that no layer rule covers.

    Attributes:
        parameter: the name of the parameter.
    """

    def __init__(self, parameter: str, found: str, expected: str = _SERVED) -> None:
        self.parameter = parameter
        super().__init__(f"parameter {parameter!r} {found}, expected {expected}")


class CouplingError(ValueError):
    """Samples of a batch influence each other's outputs, so that no per-sample curvature exists."""


class StochasticModelError(ValueError):
    """The model draws random numbers in evaluation mode: its outputs are not a function of its input."""


class ModifiedInputError(ValueError):
    """A layer's input was changed in place after the layer used it."""


class StaleModelError(RuntimeError):
    """The model's parameters or buffers are no longer the ones the posterior was fitted around."""


class NotFittedError(RuntimeError):
    """A posterior was asked for before `fit`."""


class NotSelectedError(RuntimeError, AttributeError):
    """The coordinates of a subnetwork mask were asked for before `select`."""


class DataError(ValueError):
    """A batch that cannot be used: its targets, or a loader that yields nothing."""


class IndefiniteHessianError(NotPositiveDefiniteError):
    """The Hessian of a negative log-likelihood has a negative eigenvalue: the parameters are at no minimum of it.

    Attributes:
        where: which structure or block has it.
        value: the least eigenvalue.
    """

    def __init__(self, where: str, value: float, suggested_damping: float | None = None) -> None:
        super().__init__(where, value, suggested_damping)
        self.args = (
            f"{where} is not positive semidefinite: found a least eigenvalue of {value:.3e}, expected >= 0; train "
            "further, take kind='ggn', or name what to do with indefinite='clip' or 'abs'",
        )


class LostPriorError(NotPositiveDefiniteError):
    """A prior precision below the rounding of the curvature that it is added to, so that their sum is singular.

    Attributes:
        where: which operator or block is.
        value: its least eigenvalue or pivot.
    """

    def __init__(self, where: str, value: float, suggested_damping: float | None = None) -> None:
        super().__init__(where, value, suggested_damping)
        self.args = (
            f"{where} is not positive definite in float64: found eigenvalue or pivot {value:.3e}, expected one above "
            "the rounding of the curvature; raise prior_precision, or take hessian_structure='gp' or 'diag', which "
            "add it to no dense matrix",
        )


class OutputError(ValueError):
    """Model outputs of the wrong shape, or not finite.

    Attributes:
        best: in a surrogate's training, the `SurrogateMap` with the least held-out error before it; None elsewhere.
    """

    best: object = None


class NoFiniteOptimumError(ValueError):
    """The log marginal likelihood has no maximum at finite hyperparameters."""


class ConvergenceError(RuntimeError):
    """An iteration did not reach its tolerance."""


class TrainingDivergedError(ConvergenceError):
    """A training ended in numbers that are not finite, or a surrogate's in a kernel far from its target.

    Attributes:
        step: at which that was noticed.
        best: what was trained, in the best state before it: a `SurrogateMap`, or a fitted variational posterior.
    """

    def __init__(self, step: int, found: str, best: object = None) -> None:
        self.step, self.best = step, best
        super().__init__(
            f"training diverged at step {step}: {found}, expected a falling error; lower lr (the best state so far is "
            "this error's attribute best)"
        )


class StorageError(RuntimeError):
    """A file that cannot be written, or what was stored and cannot be taken up again."""
