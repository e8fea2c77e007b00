"""Regression on UCI data with prior and noise tuned by the evidence, beside laplace-torch.

    python benchmarks/uci.py --data-dir DATA [--datasets yacht energy concrete power-plant] [--splits 20]

DATA holds ``uci/NAME/data.txt`` (default: the folder of CURVLIN_DATA), whose last used column is the target. The splits
are the standard ones: 90 % for training, drawn in order from ``numpy.random.RandomState(1)``. Inputs and targets are
standardised; results are in the units of the targets.

One network with one hidden layer of 50 tanh units is trained for each split, twice: at prior precision 1 and the noise
of its residuals, and again at the hyperparameters that have the largest evidence around the first. Both libraries then
take this network and its full curvature over all weights, in float64. Ours finds prior precision (for each parameter
tensor, and one for all) and noise by `optimize_prior_precision(optimize_noise=True)`; laplace-torch, without a search
with noise in it, by L-BFGS on its differentiable `log_marginal_likelihood` until the gradient is below 1e-6 of the
number of data. Its network and therefore the RMSE are the same.
"""

from __future__ import annotations

import functools
import importlib.util
import time
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from _uci import Row, Split, arguments, folder_of, nll, report, rmse, splits, write
from curvlin_nn import Laplace

STRUCTURES = ("scalar", "layerwise")


def ours(model: nn.Module, x: Tensor, y: Tensor, structure: str) -> tuple[Any, float]:
    la = Laplace(model, "regression", "all", "full").fit([(x, y)])
    optimum = la.optimize_prior_precision(prior_structure=structure, optimize_noise=True)
    return la, optimum.log_marginal_likelihood


def peer(model: nn.Module, x: Tensor, y: Tensor, structure: str) -> tuple[Any, float]:
    import laplace

    la = laplace.Laplace(model, "regression", subset_of_weights="all", hessian_structure="full")
    la.fit(DataLoader(TensorDataset(x, y), batch_size=len(x)))
    n_groups = 1 if structure == "scalar" else len(list(model.parameters()))
    logs = torch.zeros(n_groups + 1, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS(
        [logs],
        max_iter=500,
        tolerance_grad=1e-6 * len(x),
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        optimiser.zero_grad()
        value: Tensor = -la.log_marginal_likelihood(logs[:-1].exp(), logs[-1].exp())
        value.backward()
        return value

    optimiser.step(loss)
    la.prior_precision, la.sigma_noise = logs[:-1].detach().exp(), logs[-1].detach().exp()
    return la, -float(loss())


def evaluate(model: nn.Module, split: Split, number: int, with_peer: bool) -> Row:
    row = {"RMSE": rmse(model, split)}
    libraries = {"curvlin": ours, "laplace-torch": peer} if with_peer else {"curvlin": ours}
    for structure in STRUCTURES:
        for library, fit in libraries.items():
            start = time.perf_counter()
            la, evidence = fit(model, split.x, split.y, structure)
            key = f"{library}, {structure}"
            row[f"{key}: seconds"] = time.perf_counter() - start
            mean, covariance = la(split.x_test)
            row[f"{key}: NLL"] = nll(mean, covariance.squeeze(-1) + float(la.sigma_noise) ** 2, split)
            row[f"{key}: evidence"] = evidence
    return row


def main() -> None:
    options = arguments(__doc__)
    chosen = options.parse_args()
    folder = folder_of(options, chosen)
    warnings.simplefilter("ignore")
    with_peer = importlib.util.find_spec("laplace") is not None
    scored = functools.partial(evaluate, with_peer=with_peer)
    rows = {
        name: report(name, splits(folder, name, chosen.splits), chosen.steps, scored)
        for name in chosen.datasets
    }
    write(chosen.json, rows)


if __name__ == "__main__":
    main()
