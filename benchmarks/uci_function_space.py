"""Regression on UCI data in function space, beside weight space: the same networks, prior and noise by the evidence.

    python benchmarks/uci_function_space.py --data-dir DATA [--datasets yacht energy concrete] [--splits 5] [--gaps]
        [--methods MAP full kron gp nystrom surrogate] [--rank 100] [--surrogate-steps 1000]

Data, splits and networks are those of ``benchmarks/uci.py``. With ``--gaps`` there is one split for each input instead:
the third of the data in the middle of its range is for testing, and the network has not seen it (Foong et al., 2019).

Every method keeps the network's mean, so that there is one RMSE, and finds one prior precision and the noise by its own
evidence; MAP has the noise of its training residuals. The Nystrom map has the leading K directions of at most 1,000
training samples, the surrogate is a widened copy of the network. "alone" is the posterior on these features as
published, "residual" keeps the prior variance that they leave out. The K x K evidence knows nothing of that variance:
"bound" has the residual too, at the maximum of `Laplace.log_marginal_likelihood_bound` (orthonormal features only).
Reported are the mean negative log-likelihood of test targets and the root mean square of the standard deviation of the
function there, in the units of the targets, and seconds for features, fit and tuning.
"""

from __future__ import annotations

import functools
import time
import warnings
from argparse import Namespace
from collections.abc import Iterator

import torch
from torch import nn

from _uci import Row, Split, arguments, folder_of, gaps, nll, report, rmse, splits, write
from curvlin_nn import Laplace
from curvlin_nn.feature_maps import FeatureMap, NystromMap, SurrogateMap

STRUCTURES = ("full", "kron", "gp")
MAPS = ("nystrom", "surrogate")
METHODS = ("MAP", *STRUCTURES, *MAPS)

N_FOR_NYSTROM = 1000


def features(method: str, model: nn.Module, split: Split, chosen: Namespace, seed: int) -> FeatureMap:
    """The K features of a method."""
    generator = torch.Generator().manual_seed(seed)
    if method == "nystrom":
        n_samples = min(N_FOR_NYSTROM, len(split.x))
        return NystromMap(model, split.x, n_samples=n_samples, rank=chosen.rank, generator=generator)
    data, n_steps = [(split.x, split.y)], chosen.surrogate_steps
    return SurrogateMap.fit(model, data, rank=chosen.rank, n_steps=n_steps, generator=generator)


def posteriors(
    method: str, model: nn.Module, split: Split, chosen: Namespace, seed: int
) -> Iterator[tuple[str, Laplace]]:
    """What a method comes to, by name, tuned; what several have in common is made once, in the time of the first."""
    data = [(split.x, split.y)]
    if method in STRUCTURES:
        la = Laplace(model, "regression", "all", method).fit(data)
        la.optimize_prior_precision(optimize_noise=True)
        yield method, la
        return
    feature_map = features(method, model, split, chosen, seed)
    for name, residual in (("alone", False), ("residual", True)):
        la = Laplace(model, "regression", feature_map=feature_map, residual=residual).fit(data)
        la.optimize_prior_precision(optimize_noise=True)
        yield f"{method}, {name}", la
    if feature_map.orthonormal:
        la.optimize_prior_precision("bound", train_loader=data, optimize_noise=True)
        yield f"{method}, bound", la


def evaluate(model: nn.Module, split: Split, number: int, chosen: Namespace) -> Row:
    row = {"RMSE": rmse(model, split)}
    with torch.no_grad():
        outputs, noise = model(split.x_test), (model(split.x) - split.y).square().mean()
    for method in chosen.methods:
        if method == "MAP":
            row["MAP: NLL"] = nll(outputs, noise.expand_as(outputs), split)
            continue
        begin = time.perf_counter()
        for name, la in posteriors(method, model, split, chosen, number):
            row[f"{name}: seconds"] = time.perf_counter() - begin
            mean, variance = la(split.x_test, diagonal_output=True)
            row[f"{name}: NLL"] = nll(mean, variance + float(la.sigma_noise) ** 2, split)
            row[f"{name}: deviation"] = float(variance.mean().sqrt()) * split.spread
            begin = time.perf_counter()
    return row


def main() -> None:
    options = arguments(__doc__)
    options.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    options.add_argument("--rank", type=int, default=100, help="K of the feature maps (default 100)")
    options.add_argument("--surrogate-steps", type=int, default=1000, help="default 1000")
    options.add_argument("--gaps", action="store_true", help="test on the middle of each input instead")
    chosen = options.parse_args()
    folder = folder_of(options, chosen)
    warnings.simplefilter("ignore")
    scored = functools.partial(evaluate, chosen=chosen)
    rows = {}
    for name in chosen.datasets:
        tried = gaps(folder, name) if chosen.gaps else splits(folder, name, chosen.splits)
        rows[name] = report(name, tried, chosen.steps, scored)
    write(chosen.json, rows)


if __name__ == "__main__":
    main()
