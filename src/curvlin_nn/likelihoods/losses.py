"""Likelihoods of torch's loss modules.

Reductions are undone: a likelihood is about the sum over the data. With L the sum of a loss's terms, weights included,
what torch reports with ``reduction="mean"`` on a batch is L divided by

    CrossEntropyLoss, labels          the sum of ``weight[y]`` over the terms that are not ignored
    CrossEntropyLoss, probabilities   the number of terms (N, or N times that of tokens), weighted or not
    all others                        the number of outputs, ``N C``

so that curvature and log-likelihood are that divisor times those of the reported mean, for each batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from curvlin_nn.errors import UnsupportedError, one_of
from curvlin_nn.likelihoods.base import Likelihood
from curvlin_nn.likelihoods.bernoulli import Bernoulli
from curvlin_nn.likelihoods.categorical import Categorical
from curvlin_nn.likelihoods.gaussian import Gaussian
from curvlin_nn.likelihoods.poisson import Poisson


def from_loss(loss: nn.Module) -> Likelihood:
    """The likelihood whose negative logarithm is a torch loss, summed and normalised.

        CrossEntropyLoss    `Categorical`, classes along axis 1 as in torch; `ignore_index` counts, -100 unless given
        BCEWithLogitsLoss   `Bernoulli`; `weight` and `pos_weight` of the outputs of a sample
        MSELoss             `Gaussian` with noise variance 1/2 at ``sigma = 1``: the Hessian of ``(f - y)^2`` is 2
        PoissonNLLLoss      `Poisson`; `full` and `eps` change constants only

    Args:
        loss: one of these; its `reduction` is undone as the module's docstring says.

    Raises:
        UnsupportedError: for another loss, or one whose options have no likelihood.
    """
    convert = _CONVERTERS.get(type(loss))
    if convert is None:
        name = type(loss).__name__
        known = one_of(kind.__name__ for kind in _CONVERTERS)
        mend = _MENDS.get(name, "write it as a curvlin_nn.likelihoods.Custom")
        raise UnsupportedError(f"the loss {name} is not supported; expected {known}; {mend}")
    return convert(loss)


def _cross_entropy(loss: Any) -> Categorical:
    return Categorical(loss.weight, loss.label_smoothing, loss.ignore_index, class_dim=1)


def _binary(loss: Any) -> Bernoulli:
    return Bernoulli(loss.weight, loss.pos_weight)


def _squared_error(loss: Any) -> Gaussian:
    return Gaussian(variances=0.5)


def _poisson(loss: Any) -> Poisson:
    if not loss.log_input:
        raise UnsupportedError(
            "PoissonNLLLoss with log_input=False is not supported; expected log_input=True and a model whose outputs "
            "are logarithms of rates"
        )
    return Poisson()


_CONVERTERS: dict[type[nn.Module], Callable[[Any], Likelihood]] = {
    nn.CrossEntropyLoss: _cross_entropy,
    nn.BCEWithLogitsLoss: _binary,
    nn.MSELoss: _squared_error,
    nn.PoissonNLLLoss: _poisson,
}

_MENDS = {
    "NLLLoss": "leave log_softmax out of the model and use CrossEntropyLoss",
    "BCELoss": "leave the sigmoid out of the model and use BCEWithLogitsLoss",
    "GaussianNLLLoss": "its variance is an argument, no output: use likelihoods.Gaussian(variances=...) for a fixed "
    "one, likelihood='heteroscedastic' for one that the model gives",
}
"""What to do instead, for losses whose inputs are no model outputs."""
