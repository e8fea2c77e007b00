"""Nystrom and sketched features against the dense Jacobian: kernels, bases, distributions, and what is refused."""

import network_oracle as oracle
import pytest
import torch
from networks import problem
from torch import nn

from curvlin_nn.errors import DataError, NotFittedError, OutputError, UnsupportedError
from curvlin_nn.feature_maps import (
    FeatureMap,
    JacobianMap,
    LastLayerMap,
    NystromMap,
    SketchMap,
    directions,
    nystrom,
    projected,
)
from curvlin_nn.products.dual import kernel

TIGHT = {"rtol": 1e-9, "atol": 1e-11}


def exact(p, x):
    J = oracle.jacobian(p.model, x).flatten(0, 1)
    return J @ J.mT


def of_features(feature_map: FeatureMap, x: torch.Tensor) -> torch.Tensor:
    rows = feature_map(x)[1].to_dense().flatten(0, 1)
    return rows @ rows.mT


@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_the_gram_matrix_is_that_of_all_rows_within_batches_too(kind, monkeypatch):
    """The published code leaves the blocks of each batch with itself at zero."""
    p = problem(kind, "regression")
    monkeypatch.setattr(nystrom, "ROW_BUDGET", 4000 if kind == "cnn" else 400)
    jacobian = JacobianMap(p.model)
    rows = list(nystrom._rows(jacobian, p.x, torch.arange(8), "all", None))
    assert len(rows) > 2 and max(Psi.n_samples for Psi in rows) > 1
    torch.testing.assert_close(kernel(rows), exact(p, p.x), **TIGHT)
    torch.testing.assert_close(
        of_features(NystromMap(p.model, p.x, outputs="all"), p.x), exact(p, p.x), rtol=1e-8, atol=1e-9
    )


@pytest.mark.parametrize("kind", ["mlp", "cnn"])
@pytest.mark.parametrize("flat", [True, False])
def test_features_are_the_jacobian_in_orthonormal_directions(kind, flat, monkeypatch):
    p = problem(kind, "classification")
    if not flat:
        monkeypatch.setattr(directions.SpannedDirections, "cheaper", lambda V: V)
    else:
        monkeypatch.setattr(directions.SpannedDirections, "cheaper", lambda V: V.orthonormal_basis())
    monkeypatch.setattr(projected, "ROW_BUDGET", 1)
    m = NystromMap(p.model, p.x, rank=5, outputs="all")
    f, Phi = m(p.x_test)
    J = oracle.jacobian(p.model, p.x_test)
    leading = torch.linalg.svd(oracle.jacobian(p.model, p.x).flatten(0, 1), full_matrices=False)[2][:5]
    torch.testing.assert_close(f, p.model(p.x_test).detach())
    V = m.project(torch.eye(m.jacobian.size).double()).mT
    torch.testing.assert_close(V.mT @ V, torch.eye(5).double(), **TIGHT)
    torch.testing.assert_close(V @ V.mT, leading.mT @ leading, **TIGHT)
    torch.testing.assert_close(Phi.to_dense(), J @ V, **TIGHT)
    _, Psi, factored = m.with_jacobian(p.x_test)
    torch.testing.assert_close(Psi.to_dense(), J @ V, **TIGHT)
    torch.testing.assert_close(factored.to_dense(), J, **TIGHT)
    assert m.size == 5 and m.orthonormal and m.space.size == 5


def test_directions_are_kept_in_the_form_of_fewer_numbers():
    wide = nn.Sequential(nn.Linear(50, 60), nn.Tanh(), nn.Linear(60, 2)).double()
    x = torch.randn(20, 50).double()
    for rank, n_samples, kind in [(1, 20, directions.FlatDirections), (6, 8, directions.SpannedDirections)]:
        m = NystromMap(wide, x, n_samples=n_samples, rank=rank)
        assert isinstance(m._directions, kind)
        numbers = sum(t.numel() for t in m.tensors().values())
        assert numbers <= min(
            m.jacobian.size * rank, n_samples * (50 + 60 + 60 + 2 + 60 + 2) + n_samples * rank
        )


def test_one_output_of_each_sample_is_spanned_each_as_often():
    p = problem("mlp", "classification", n=4)
    diagonal = exact(p, p.x).diagonal().view(4, 3)
    counts, generator = torch.zeros(4, 3), torch.Generator().manual_seed(0)
    for _ in range(45):
        m = NystromMap(p.model, p.x, generator=generator)
        assert m.size == 4
        left_out = diagonal - m(p.x)[1].to_dense().square().sum(-1)
        spanned = left_out < 1e-9 * diagonal
        assert (spanned.sum(1) == 1).all()
        counts += spanned
    z = (counts - 15) / (45 * 2 / 9) ** 0.5
    assert z.abs().max() < 4


def test_samples_are_drawn_without_repetition_and_balanced_on_request():
    labels = torch.tensor([0] * 20 + [1] * 5 + [2] * 15)
    generator, times = torch.Generator().manual_seed(0), torch.zeros(40)
    for _ in range(300):
        chosen = nystrom._chosen(40, 14, labels, generator)
        assert len(chosen.unique()) == 14
        counts = torch.bincount(labels[chosen], minlength=3)
        assert counts.max() - counts.min() <= 1
        times[chosen] += 1
    share = torch.tensor([14 / 3 / n for n in (20, 5, 15)])[labels]
    z = (times / 300 - share) / (share * (1 - share) / 300).sqrt()
    assert z.abs().max() < 4
    with pytest.raises(DataError, match="found 5 of class 1"):
        nystrom._chosen(40, 30, labels, generator)
    plain = nystrom._chosen(40, None, None, generator)
    assert torch.equal(plain.sort().values, torch.arange(40)) and not torch.equal(plain, torch.arange(40))


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
def test_sketched_kernel_is_unbiased_with_the_variance_of_the_formula(distribution):
    p = problem("mlp", "regression", n_outputs=2)
    x, rank, n = p.x[:3], 3, 2000
    J = oracle.jacobian(p.model, x).flatten(0, 1)
    kappa, norms = J @ J.mT, J.square().sum(1)
    variance = torch.outer(norms, norms) + kappa.square()
    if distribution == "rademacher":
        variance = variance - 2 * J.square() @ J.square().mT
    variance = variance / rank
    generator = torch.Generator().manual_seed(0)
    many = SketchMap(p.model, rank * n, distribution=distribution, generator=generator)
    # Its columns are those of n independent maps, scaled by one over the root of their number.
    features = many(x)[1].to_dense().flatten(0, 1).view(len(J), n, rank).movedim(1, 0) * n**0.5
    draws = features @ features.mT
    assert ((draws.mean(0) - kappa) / (variance / n).sqrt()).abs().max() < 4
    squares = (draws - kappa).square()
    assert ((squares.mean(0) - variance) / (squares.std(0) / n**0.5)).abs().max() < 4
    m = SketchMap(p.model, rank, generator=generator)
    assert m.size == rank and not m.orthonormal
    with pytest.raises(UnsupportedError, match="has no orthonormal columns"):
        m.project(torch.ones(m.jacobian.size, 1).double())


def test_one_generator_state_gives_one_map_in_the_dtype_of_the_network():
    p = problem("cnn", "regression")
    model, x = p.model.float(), p.x.float()
    for make in (
        lambda g: NystromMap(model, x, n_samples=5, rank=3, generator=g),
        lambda g: SketchMap(model, 3, generator=g),
    ):
        first, second, other = (make(torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
        f, Phi = first(x)
        assert f.dtype == Phi.dtype == torch.float32
        assert torch.equal(Phi.to_dense(), second(x)[1].to_dense())
        assert not torch.equal(Phi.to_dense(), other(x)[1].to_dense())


def test_maps_of_parameters_say_so():
    p = problem("cnn", "classification")
    m, last = JacobianMap(p.model), LastLayerMap(p.model)
    assert m.size == sum(q.numel() for q in p.model.parameters())
    assert m.jacobian is m and m.model is p.model and m.orthonormal
    for attribute in ("size", "space", "jacobian"):
        with pytest.raises(NotFittedError, match="call this LastLayerMap on an input first"):
            getattr(last, attribute)
    last(p.x)
    assert last.size == 33 * 3 and last.jacobian.space.names == ("7.weight", "7.bias")


def test_bad_input_is_refused():
    p = problem("mlp", "regression")
    dead = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2, bias=False)).double()
    with torch.no_grad():
        dead[0].bias.fill_(-1e3)
    for make, error, message in [
        (lambda: NystromMap(p.model, p.x, n_samples=9), DataError, "n_samples must be at most 8"),
        (lambda: NystromMap(p.model, p.x[:0]), DataError, "x must hold samples"),
        (lambda: NystromMap(p.model, p.x, n_samples=0), ValueError, "n_samples must be a positive integer"),
        (lambda: NystromMap(p.model, p.x, rank=0), ValueError, "rank must be a positive integer"),
        (
            lambda: NystromMap(p.model, p.x, rank=9),
            UnsupportedError,
            "rank must be at most 8, that of the 8 rows of the Jacobian, found 9",
        ),
        (
            lambda: NystromMap(p.model, p.x[:1].expand(8, 4), rank=4, outputs="all"),
            UnsupportedError,
            "rank must be at most 3, that of the 24 rows",
        ),
        (lambda: NystromMap(p.model, p.x, outputs="two"), UnsupportedError, "outputs='two'"),
        (lambda: NystromMap(p.model, p.x, labels=p.y[:, 0]), DataError, "labels must be 8 integers"),
        (lambda: NystromMap(p.model, p.x, labels=torch.zeros(3).long()), DataError, "labels must be 8 integ"),
        (lambda: NystromMap(dead, p.x), UnsupportedError, "the Jacobian is zero at all the samples"),
        (lambda: NystromMap(p.model, p.x * float("inf")), OutputError, "finite"),
        (lambda: SketchMap(p.model, 0), ValueError, "rank must be a positive integer"),
        (lambda: SketchMap(p.model, 2, distribution="cauchy"), UnsupportedError, "distribution='cauchy'"),
        (lambda: SketchMap(p.model, 2, subset_of_weights=["no"]), UnsupportedError, "names 'no'"),
    ]:
        with pytest.raises(error, match=message):
            make()
