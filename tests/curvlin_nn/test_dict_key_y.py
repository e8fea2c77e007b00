"""Loaders of mappings whose targets have a name of their own: every entry point reads them as it reads pairs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import curvlin_nn
from curvlin_nn import Laplace, marglik_training, metrics
from curvlin_nn.early_stopping import fit_early_stopped
from curvlin_nn.errors import DataError
from curvlin_nn.feature_maps import NystromMap, SurrogateMap
from curvlin_nn.likelihoods import resolve
from curvlin_nn.subnetwork import (
    LargestVarianceDiagLaplaceSubnetMask,
    LargestVarianceSWAGSubnetMask,
    LastLayerSubnetMask,
)
from curvlin_nn.swag import diagonal_swag_variance
from curvlin_nn.variational import FMGP, VaLLA

N, D, C = 12, 3, 2


class OfMapping(nn.Module):
    """Takes all of a batch but its targets."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(D, 4), nn.Tanh(), nn.Linear(4, C))

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        (x,) = batch.values()  # neither targets nor anything else
        found: Tensor = self.net(x)
        return found


def network() -> OfMapping:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return OfMapping().double()


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


X, Y = normal(N, D), normal(N, 1).squeeze(1) > 0
AT = {"x": normal(4, D, seed=2)}
PAIRS = [({"x": x}, y) for x, y in zip(X.split(5), Y.long().split(5), strict=True)]
NAMED = [{**x, "y": y} for x, y in PAIRS]


def matrix_free(loader: Any, kind: str, **key: str) -> Tensor:
    H = curvlin_nn.matrix_free(network(), "classification", loader, kind=kind, **key)
    return H @ torch.eye(H.shape[-1], dtype=torch.float64)


def laplace(structure: str = "kron", **options: Any) -> Laplace:
    return Laplace(network(), "classification", "all", structure, **options)


def fitted() -> Laplace:
    return laplace().fit(PAIRS)


def held_out(method: str, dict_key_y: str = "labels", **loader: Any) -> Tensor:
    la = laplace(dict_key_y=dict_key_y).fit(PAIRS)
    return la.optimize_prior_precision(method, grid_size=3, **loader).scores


def bound(loader: Any, **key: str) -> Tensor:
    model = network()
    feature_map = NystromMap(model, {"x": X}, rank=3, generator=generator())
    la = Laplace(model, "classification", feature_map=feature_map, **key).fit(PAIRS)
    return la.log_marginal_likelihood_bound(loader)


def early_stopped(loader: Any, **key: str) -> Any:
    found = fit_early_stopped(laplace(**key), loader, loader, every=6)
    return torch.tensor(list(found.scores.values()))


def valla(loader: Any, **key: str) -> Tensor:
    va = VaLLA(network(), "classification", 4, "random", generator=generator(), **key)
    va.fit(loader, n_steps=2, optimize_inducing=False, validation_loader=loader)
    return torch.cat([va(AT).flatten(), va.elbo(loader).reshape(1)])


def fmgp(loader: Any, **key: str) -> Tensor:
    fm = FMGP(network(), "classification", 4, "random", generator=generator(), **key)
    found = fm.fit(loader, n_steps=2, validation_loader=loader)(AT)
    assert isinstance(found, Tensor)
    return found


def diagonal_mask(loader: Any, **key: str) -> Tensor:
    return LargestVarianceDiagLaplaceSubnetMask(network(), 9, laplace("diag")).select(loader, **key)


def mask_of_a_posterior_with_the_name(loader: Any, **key: str) -> Tensor:
    return LargestVarianceDiagLaplaceSubnetMask(network(), 9, laplace("diag", **key)).select(loader)


def swag_mask(loader: Any, **key: str) -> Tensor:
    return LargestVarianceSWAGSubnetMask(network(), 9, swag_n_snapshots=3).select(loader, **key)


def surrogate(loader: Any, **key: str) -> Tensor:
    feature_map = SurrogateMap.fit(
        network(), loader, loader, rank=2, n_steps=3, n_held_out=2, generator=generator(), **key
    )
    return feature_map(AT)[1].to_dense()


def online(loader: Any, **key: str) -> Tensor:
    found = marglik_training(network(), loader, n_epochs=2, **key)
    return torch.tensor([*found.margliks, *found.losses])


ENTRY_POINTS: dict[str, Callable[..., Tensor]] = {
    "curvature": lambda data, **key: curvlin_nn.curvature(
        network(), "classification", data, "full", **key
    ).to_dense(),
    "curvature of two passes": lambda data, **key: curvlin_nn.curvature(
        network(), "classification", data, "ekfac", **key
    ).to_dense(),
    "a Hessian": lambda data, **key: curvlin_nn.curvature(
        network(), "classification", data, "full", kind="hessian", indefinite="abs", **key
    ).to_dense(),
    "matrix_free": lambda data, **key: matrix_free(data, "ggn", **key),
    "matrix_free of a Hessian": lambda data, **key: matrix_free(data, "hessian", **key),
    "low_rank": lambda data, **key: (
        curvlin_nn.low_rank(network(), "classification", data, 3, generator=generator(), **key).U
    ),
    "low_rank of the dual": lambda data, **key: (
        curvlin_nn.low_rank(network(), "classification", data, 3, method="dual", **key).U
    ),
    "hessian_eigenpairs": lambda data, **key: (
        curvlin_nn.hessian_eigenpairs(
            network(), "classification", data, 3, generator=generator(), **key
        ).vectors
    ),
    "Laplace": lambda data, **key: laplace(**key).fit(data).posterior_precision.to_dense(),
    "Laplace of a subset": lambda data, **key: (
        laplace(n_subset=4, generator=generator(), **key).fit(data).curvature.to_dense()
    ),
    "bound of the evidence": bound,
    "held-out search": lambda data, **key: held_out("gridsearch", val_loader=data, **key),
    "cross-validation": lambda data, **key: held_out("cv", train_loader=data, **key),
    "fit_early_stopped": early_stopped,
    "marglik_training": online,
    "evaluate": lambda data, **key: torch.tensor(metrics.evaluate(fitted(), data, ["nll"], **key)["nll"]),
    "VaLLA": valla,
    "FMGP": fmgp,
    "SWAG": lambda data, **key: diagonal_swag_variance(
        network(), resolve("classification"), data, n_snapshots=3, **key
    ),
    "mask by SWAG": swag_mask,
    "mask by diagonal Laplace": diagonal_mask,
    "mask by a Laplace with the name": mask_of_a_posterior_with_the_name,
    "mask of the last layer": lambda data, **key: LastLayerSubnetMask(network()).select(data, **key),
    "SurrogateMap": surrogate,
}


@pytest.mark.parametrize("name", ENTRY_POINTS)
def test_mappings_are_read_as_pairs_are(name: str) -> None:
    found = ENTRY_POINTS[name](NAMED, dict_key_y="y")
    expected = ENTRY_POINTS[name](PAIRS)
    assert torch.equal(found, expected) and bool(expected.count_nonzero())
    assert all(batch.keys() == {"x", "y"} for batch in NAMED)
    with pytest.raises(
        DataError, match=r"a tensor under 'labels', found dict with x, y; .*dict_key_y"
    ) as caught:
        ENTRY_POINTS[name](NAMED)
    assert "\n" not in str(caught.value)


def test_a_stored_process_keeps_the_name(tmp_path: Path) -> None:
    fm = FMGP(network(), "classification", 4, "random", dict_key_y="y", generator=generator())
    fm.fit(NAMED, n_steps=1).save(tmp_path / "fm")
    again = FMGP.load(tmp_path / "fm", fm.model)
    assert again.dict_key_y == "y"
    assert metrics.evaluate(again, NAMED) == metrics.evaluate(fm, PAIRS)


@pytest.mark.parametrize("nest", [dict, lambda x: x["x"]])
def test_inducing_inputs_of_a_process_come_as_the_model_takes_them_or_as_their_tensor(nest: Any) -> None:
    Z, outputs = {"x": normal(4, D, seed=3)}, torch.arange(4) % C
    options: dict[str, Any] = {"kernel": "rbf_x_last_layer", "dict_key_y": "y"}
    fm = FMGP(network(), "classification", inducing=(nest(Z), outputs), **options).fit(NAMED, n_steps=1)
    plain = FMGP(network().net, "classification", inducing=(Z["x"], outputs), kernel="rbf_x_last_layer")
    plain.fit([(x["x"], y) for x, y in PAIRS], n_steps=1)
    assert torch.equal(fm(AT), plain(AT["x"]))


def test_centres_of_inputs_in_mappings_are_those_of_their_tensors() -> None:
    pytest.importorskip("sklearn")
    fm = FMGP(network(), "classification", 4, dict_key_y="y", generator=generator()).fit(NAMED, n_steps=1)
    plain = FMGP(network().net, "classification", 4, generator=generator())
    plain.fit([(x["x"], y) for x, y in PAIRS], n_steps=1)
    assert torch.equal(fm(AT), plain(AT["x"]))
