"""Posteriors in files: what comes back is what was saved, and what is damaged or does not fit is refused."""

import copy
import io
import pickle
import resource
import signal
from functools import partial

import pytest
import torch
from networks import Tied, problem
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from curvlin import BlockDiag, Dense, Diagonal, Isotropic, KroneckerSum, LowRankPlusDiag, Woodbury
from curvlin_nn import Laplace, likelihoods, structures
from curvlin_nn.errors import NotFittedError, StaleModelError, StorageError, UnsupportedError
from curvlin_nn.storage import files

STRUCTURES = {
    "full": "full",
    "kron": "kron",
    "reduce": partial(structures.Kronecker, approximation="reduce", dtype=torch.float32),
    "joint": partial(structures.Kronecker, joint_bias=True),
    "diag": "diag",
    "ekfac": "ekfac",
    "kfoc": partial(structures.KFOC, iterations=2),
    "kron-lowrank": partial(structures.KroneckerLowRank, rank=3),
    "block": "block",
    "gp": "gp",
    "by module": partial(structures.Block, by_module=True),
    "lowrank": partial(structures.LowRank, rank=4, generator=torch.Generator().manual_seed(3)),
    "by layer": {"0": "ekfac", "2.bias": "diag", "*": partial(structures.Kronecker, max_block=99)},
}
MERGING = ["full", "gp", "kron", "reduce", "joint", "diag", "block", "kron-lowrank"]


def fitted(name="kron", likelihood="classification", **options):
    p = problem("mlp", likelihood)
    la = Laplace(p.model, p.likelihood, "all", STRUCTURES.get(name, name), **options)
    return p, la.fit(p.batches())


def assert_alike(first, second, x):
    """In everything, bit by bit."""
    assert first.n_data == second.n_data and first.n_params == second.n_params
    for a, b in zip(_results(first, x), _results(second, x), strict=True):
        assert torch.equal(a, b)


def _results(la, x):
    found = la(x)
    yield from found if isinstance(found, tuple) else (found,)
    yield la.log_marginal_likelihood()
    yield la.mean
    yield la.curvature.diagonal()
    yield la.posterior_precision.diagonal()
    yield la.sample(3, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", STRUCTURES)
def test_a_posterior_comes_back_as_it_was(name, tmp_path):
    p, la = fitted(name, prior_precision=0.7, prior_mean=0.1, temperature=1.3)
    la.save(tmp_path / "la.safetensors")
    loaded = Laplace.load(tmp_path / "la.safetensors", copy.deepcopy(p.model))
    assert_alike(la, loaded, p.x_test)
    assert loaded.temperature == 1.3 and float(loaded.prior_precision) == 0.7
    assert [file.name for file in tmp_path.iterdir()] == ["la.safetensors"]


@pytest.mark.parametrize("name", MERGING)
def test_a_fit_goes_on_after_loading_as_if_it_had_never_stopped(name, tmp_path):
    p = problem("mlp", "classification")
    batches = p.batches(2)
    whole, first = (Laplace(p.model, p.likelihood, "all", STRUCTURES[name]) for _ in range(2))
    whole.fit(batches)
    first.fit(batches[:2]).save(tmp_path / "la")
    loaded = Laplace.load(tmp_path / "la", p.model).fit(batches[2:], override=False)
    assert loaded.n_data == whole.n_data == len(p.x)
    assert_alike(loaded, first.fit(batches[2:], override=False), p.x_test)
    rtol = 1e-6 if name == "reduce" else 1e-10  # whose products are float32
    for of in (lambda la: la.curvature.to_dense(), lambda la: la.log_marginal_likelihood()):
        torch.testing.assert_close(of(loaded), of(whole), rtol=rtol, atol=1e-2 * rtol)


def test_tied_weights_used_both_ways_come_back(tmp_path):
    torch.manual_seed(1)
    model, x = Tied().double(), torch.randint(5, (6, 4))
    y = torch.randint(5, (6, 4))
    la = Laplace(model, "classification", "all", "kron").fit([(x[:3], y[:3]), (x[3:], y[3:])])
    la.save(tmp_path / "la")
    loaded = Laplace.load(tmp_path / "la", model)
    assert_alike(la, loaded, x)
    again = [(x.flip(1), y)]
    assert_alike(la.fit(again, override=False), loaded.fit(again, override=False), x)


@pytest.mark.parametrize("structure", ["full", "block", "diag"])
def test_a_hessian_comes_back(structure, tmp_path):
    p, la = fitted(structure, "regression", curvature="hessian", indefinite="clip", sigma_noise=0.3)
    la.save(tmp_path / "la")
    loaded = Laplace.load(tmp_path / "la", p.model)
    assert_alike(la, loaded, p.x_test)
    assert_alike(la.fit(p.batches(4), override=False), loaded.fit(p.batches(4), override=False), p.x_test)


def test_the_leading_eigenpairs_of_a_hessian_come_back(tmp_path):
    p = problem("mlp", "regression")
    options = {"curvature": "hessian", "indefinite": "clip", "generator": torch.Generator().manual_seed(0)}
    la = Laplace(p.model, p.likelihood, "all", "lowrank", **options).fit(p.batches())
    la.save(tmp_path / "la")
    assert_alike(la, Laplace.load(tmp_path / "la", p.model), p.x_test)


def test_damping_comes_back(tmp_path):
    p, la = fitted("kron", damping=True)
    la.save(tmp_path / "la")
    assert_alike(la, Laplace.load(tmp_path / "la", p.model), p.x_test)


P = problem("mlp", "regression", n_outputs=2).model
SIZE = sum(p.numel() for p in P.parameters())


def _priors():
    torch.manual_seed(2)
    A = torch.randn(SIZE, SIZE).double()
    d, U = torch.rand(SIZE).double() + 0.5, torch.randn(SIZE, 2).double()
    B = torch.eye(5).double() * 2
    return {
        "isotropic": Isotropic(torch.tensor(2.0).double(), SIZE),
        "diagonal": Diagonal(d),
        "dense": Dense(A @ A.mT + torch.eye(SIZE).double()),
        "low rank": LowRankPlusDiag(d, U),
        "nested": Woodbury(Woodbury(Diagonal(d), U), U.flip(0)),
        "blocks": BlockDiag(
            [KroneckerSum([(torch.eye(2).double(), B)]), Diagonal(d[10:])],
            [torch.arange(SIZE - 10, SIZE), torch.arange(SIZE - 10)],
        ),
    }


@pytest.mark.parametrize("kind", _priors())
def test_a_prior_that_is_an_operator_comes_back(kind, tmp_path):
    p = problem("mlp", "regression", n_outputs=2)
    prior = _priors()[kind]
    la = Laplace(p.model, "regression", "all", "full", prior_precision=prior).fit(p.batches())
    la.save(tmp_path / "la")
    loaded = Laplace.load(tmp_path / "la", p.model)
    assert type(loaded.prior_precision) is type(prior)
    assert torch.equal(loaded.prior_precision.to_dense(), prior.to_dense())
    assert_alike(la, loaded, p.x_test)


def test_a_posterior_that_is_the_next_prior_comes_back(tmp_path):
    p, la = fitted("full")
    la.prior_precision = la.posterior_precision
    la.save(tmp_path / "la")
    loaded = Laplace.load(tmp_path / "la", p.model)
    torch.testing.assert_close(
        loaded.log_marginal_likelihood(), la.log_marginal_likelihood(), rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("structure", ["scalar", "layerwise", "modulewise", "diag"])
def test_hyperparameters_come_back(structure, tmp_path):
    p, la = fitted("full", "regression")
    la.prior_mean = torch.linspace(-0.1, 0.1, la.n_params)
    la.optimize_prior_precision(prior_structure="layerwise", optimize_noise=True)
    la.prior_precision = 3.0
    n = {"scalar": 1, "layerwise": 6, "modulewise": 3, "diag": la.n_params}[structure]
    la.prior_precision = torch.rand(n) + 0.5
    la.save(tmp_path / "la")
    loaded = Laplace.load(tmp_path / "la", p.model)
    assert torch.equal(loaded.prior_mean, la.prior_mean) and torch.equal(loaded.sigma_noise, la.sigma_noise)
    assert_alike(la, loaded, p.x_test)
    assert torch.equal(
        la.optimize_prior_precision(prior_structure="scalar").prior_precision,
        loaded.optimize_prior_precision(prior_structure="scalar").prior_precision,
    )


LIKELIHOODS = {
    "classification": (lambda: "classification", True),
    "weights": (lambda: nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 0.5]), label_smoothing=0.1), True),
    "squared error": (nn.MSELoss, False),
    "variances": (lambda: likelihoods.Gaussian(variances=torch.tensor([0.5, 1.0, 2.0])), False),
    "covariance": (lambda: likelihoods.Gaussian(covariance=torch.eye(3).double() + 0.1), False),
    "bits": (lambda: nn.BCEWithLogitsLoss(pos_weight=torch.tensor([1.0, 2.0, 0.5])), None),
    "counts": (lambda: "poisson", None),
}


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_likelihoods_come_back_by_name_and_options(name, tmp_path):
    make, labels = LIKELIHOODS[name]
    p = problem("mlp", "classification" if labels else "regression")
    y = (p.y > 0).double() if labels is None else p.y
    la = Laplace(p.model, make(), "all", "kron").fit([(p.x, y)])
    la.save(tmp_path / "la")
    loaded = Laplace.load(tmp_path / "la", p.model)
    assert type(loaded.likelihood) is type(la.likelihood)
    assert_alike(la, loaded, p.x_test)
    assert_alike(la.fit([(p.x, y)], override=False), loaded.fit([(p.x, y)], override=False), p.x_test)


def test_subsets_come_back_and_a_predicate_as_the_names_that_it_chose(tmp_path):
    p = problem("mlp", "classification")
    for subset in (None, "all", ["0", "4.weight"], lambda name, _: name.endswith("bias")):
        la = Laplace(p.model, p.likelihood, subset, "full").fit(p.batches())
        la.save(tmp_path / "la")
        loaded = Laplace.load(tmp_path / "la", p.model)
        assert loaded.parameters == la.parameters
        assert_alike(la, loaded, p.x_test)
        assert_alike(la.fit(p.batches(2)), loaded.fit(p.batches(2)), p.x_test)


def test_a_generator_goes_on_where_it_was(tmp_path):
    p, la = fitted("full", curvature="fisher_mc", generator=torch.Generator().manual_seed(5))
    la.save(tmp_path / "la")
    loaded = Laplace.load(tmp_path / "la", p.model)
    assert_alike(la.fit(p.batches()), loaded.fit(p.batches()), p.x_test)


class Trace(structures.Structure):
    """``(tr H / P) I``, of a package of one's own."""

    name = "trace of ours"
    total = 0.0

    def update(self, captures):
        self.total += sum(float(block.rows().square().sum()) for block in captures.blocks)

    def merge(self, other):
        self.total += other.total

    def finish(self):
        return Isotropic(torch.tensor(self.total / self.space.size).double(), self.space.size)


class StoredTrace(Trace):
    def state_dict(self):
        return {"total": self.total}

    def load_state_dict(self, state):
        self.total = state["total"]


def test_what_no_name_stands_for_is_given_again(tmp_path):
    p = problem("mlp", "regression")
    family = likelihoods.Custom(lambda f, y: -(f - y).square().sum() / 2, target_ndim=1)
    la = Laplace(p.model, family, "all", StoredTrace).fit(p.batches())
    la.save(tmp_path / "la")
    loaded = Laplace.load(tmp_path / "la", p.model, likelihood=family, hessian_structure=StoredTrace)
    assert_alike(la, loaded, p.x_test)
    with pytest.raises(StorageError, match=r"likelihood was a Custom .* give it again .*likelihood=\.\.\."):
        Laplace.load(tmp_path / "la", p.model, hessian_structure=StoredTrace)
    with pytest.raises(StorageError, match=r"hessian_structure was a StoredTrace .*hessian_structure=\.\.\."):
        Laplace.load(tmp_path / "la", p.model, likelihood=family)
    with pytest.raises(StorageError, match="another likelihood"):
        Laplace.load(tmp_path / "la", p.model, likelihood="regression", hessian_structure=StoredTrace)


def test_a_structure_that_does_not_say_what_it_holds_is_refused_by_name(tmp_path):
    p = problem("mlp", "regression")
    la = Laplace(p.model, "regression", "all", Trace).fit(p.batches())
    with pytest.raises(UnsupportedError, match="structure Trace cannot be stored"):
        la.save(tmp_path / "la")
    assert not list(tmp_path.iterdir())


def test_what_is_no_plain_value_is_refused_by_its_path(tmp_path):
    class Odd(StoredTrace):
        def state_dict(self):
            return {"parts": [1, {"file": tmp_path}]}

    p = problem("mlp", "regression")
    la = Laplace(p.model, "regression", "all", Odd).fit(p.batches())
    with pytest.raises(UnsupportedError, match=r"sums\.states\.0\.parts\.1\.file is a PosixPath"):
        la.save(tmp_path / "la")


# -- state_dict, deepcopy, pickle ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["kron", "kfoc", "by layer", "lowrank"])
def test_a_state_dict_needs_no_pickled_code(name):
    p, la = fitted(name)
    buffer = io.BytesIO()
    torch.save(la.state_dict(), buffer)
    buffer.seek(0)
    other = Laplace(p.model, p.likelihood, "all", STRUCTURES[name])
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert_alike(la, other, p.x_test)


def test_a_state_dict_that_is_taken_up_shares_no_memory():
    p, la = fitted("full")
    other = Laplace(p.model, p.likelihood, "all", "full")
    state = la.state_dict()
    other.load_state_dict(state)
    before = other.curvature.to_dense()
    state["sums"]["states"][0]["upper"].zero_()
    other.fit(p.batches(), override=False)
    torch.testing.assert_close(other.curvature.to_dense(), 2 * before, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["kron", "by layer"])
@pytest.mark.parametrize("through", [copy.deepcopy, lambda la: pickle.loads(pickle.dumps(la))])
def test_copies_and_pickles_are_objects_of_their_own(name, through):
    p, la = fitted(name)
    la(p.x_test)
    other = through(la)
    assert_alike(la, other, p.x_test)
    with torch.no_grad():
        p.model[0].weight += 1
    other(p.x_test)  # has a model of its own


def test_a_state_of_other_choices_is_refused_by_name():
    p, la = fitted("kron")
    state = la.state_dict()
    others = {
        "hessian_structure": Laplace(p.model, p.likelihood, "all", "ekfac"),
        "subset_of_weights": Laplace(p.model, p.likelihood, "last_layer", "kron"),
        "likelihood": Laplace(p.model, "regression", "all", "kron"),
        "curvature": Laplace(p.model, p.likelihood, "all", "kron", curvature="ef"),
    }
    for name, other in others.items():
        with pytest.raises(StorageError, match=f"another {name}; .*Laplace.load"):
            other.load_state_dict(state)
        with pytest.raises(NotFittedError):
            _ = other.mean
    with pytest.raises(StorageError, match="no 'curvature'"):
        la.load_state_dict(p.model.state_dict())
    with pytest.raises(StorageError, match="no 'curvature'"):
        la.load_state_dict(None)
    with pytest.raises(StorageError, match="version 99"):
        la.load_state_dict({**state, "version": 99})


def test_a_state_that_does_not_fit_leaves_the_object_as_it_was():
    _, la = fitted("kron")
    before = dict(vars(la))
    state = la.state_dict()
    for change in ({"temperature": -1.0}, {"prior_precision": torch.ones(7)}, {"prior_mean": torch.ones(7)}):
        with pytest.raises(ValueError, match=next(iter(change))):
            la.load_state_dict({**state, "prior_structure": None, **change})
        assert vars(la) == before


# -- bad input -----------------------------------------------------------------------------------------------


def test_an_object_that_is_not_fitted_has_nothing_to_store(tmp_path):
    p = problem("mlp", "classification")
    la = Laplace(p.model, p.likelihood)
    for ask in (la.state_dict, lambda: la.save(tmp_path / "la")):
        with pytest.raises(NotFittedError, match="call fit"):
            ask()
    assert not list(tmp_path.iterdir())


def test_another_model_is_refused_by_name(tmp_path):
    p, la = fitted("kron")
    la.save(tmp_path / "la")

    def refuse(model, match):
        with pytest.raises(StaleModelError, match=match) as caught:
            Laplace.load(tmp_path / "la", model)
        assert "\n" not in str(caught.value)

    refuse(nn.Sequential(nn.Linear(4, 6)).double(), "only the stored one has '2.weight'")
    refuse(nn.Sequential(*p.model, nn.Linear(3, 3)).double(), "only the model has '5.weight'")
    refuse(copy.deepcopy(p.model).float(), r"'0.weight' has shape \(6, 4\) of torch.float32")
    other = copy.deepcopy(p.model)
    other[4] = nn.Linear(5, 4).double()
    refuse(other, r"'4.weight' has shape \(4, 5\)")
    other = copy.deepcopy(p.model)
    with torch.no_grad():
        other[2].bias[3] += 1e-9
    refuse(other, "'2.bias' of the model holds other values")
    other.load_state_dict(p.model.state_dict())
    assert_alike(la, Laplace.load(tmp_path / "la", other), p.x_test)


def test_buffers_count(tmp_path):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)).double()
    x, y = torch.randn(6, 4).double(), torch.randint(2, (6,))
    Laplace(model, "classification").fit([(x, y)]).save(tmp_path / "la")
    Laplace.load(tmp_path / "la", model)
    model(x)  # in training mode, running means move
    with pytest.raises(StaleModelError, match=r"'1.running_mean'.*other values"):
        Laplace.load(tmp_path / "la", model)


def test_files_that_are_damaged_are_refused(tmp_path):
    p, la = fitted("kron")
    path, bad = tmp_path / "la", tmp_path / "bad"
    la.save(path)
    whole = path.read_bytes()

    def refuse(content, match):
        bad.write_bytes(content)
        with pytest.raises(StorageError, match=match) as caught:
            Laplace.load(bad, p.model)
        assert "\n" not in str(caught.value)

    for length in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        refuse(whole[:length], "no whole safetensors file")
    for place in (len(whole) - 3, len(whole) // 2, whole.index(b"temperature") + 18):
        flipped = bytearray(whole)
        flipped[place] ^= 1
        refuse(bytes(flipped), "was changed|no whole safetensors file")
    refuse(b"not at all", "no whole safetensors file")
    with pytest.raises(FileNotFoundError):
        Laplace.load(tmp_path / "nothing", p.model)
    Laplace.load(path, p.model)


def test_numbers_that_were_changed_are_noticed(tmp_path):
    p, la = fitted("diag")
    path = tmp_path / "la"
    la.save(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    next(t for name, t in tensors.items() if name.endswith("diagonal"))[3] *= 2
    save_file(tensors, path, metadata)
    with pytest.raises(StorageError, match="checksum"):
        Laplace.load(path, p.model)
    save_file(tensors, path, {**metadata, "content": metadata["content"].replace("1.0", "2.0")})
    with pytest.raises(StorageError, match="checksum"):
        Laplace.load(path, p.model)


def test_other_files_and_later_versions_are_refused(tmp_path):
    p, _ = fitted("diag")
    save_file({"x": torch.ones(2)}, tmp_path / "other")
    with pytest.raises(StorageError, match=r"holds 'other tensors', expected 'curvlin_nn.Laplace'"):
        Laplace.load(tmp_path / "other", p.model)
    save_file({"x": torch.ones(2)}, tmp_path / "later", {"kind": "curvlin_nn.Laplace", "version": "2"})
    with pytest.raises(StorageError, match=r"version '2', expected at most 1; upgrade"):
        Laplace.load(tmp_path / "later", p.model)


def _full_disk(*_):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_on_a_full_disk_the_old_file_survives(step, tmp_path, monkeypatch):
    p, la = fitted("kron")
    path = tmp_path / "la"
    la.save(path)
    before = path.read_bytes()
    la.prior_precision = 5.0
    monkeypatch.setattr(files.os, step, _full_disk)
    with pytest.raises(StorageError, match=r"la cannot be written .*No space left") as caught:
        la.save(path)
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["la"]
    assert float(Laplace.load(path, p.model).prior_precision) == 1.0


def test_where_the_system_stops_in_the_middle_of_a_file_the_old_one_survives(tmp_path):
    _, la = fitted("kron")
    path = tmp_path / "la"
    la.save(path)
    before, limit = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limit[1]))
        with pytest.raises(StorageError, match="cannot be written"):
            la.save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["la"]


def test_a_folder_that_is_not_there_is_named(tmp_path):
    _, la = fitted("diag")
    with pytest.raises(StorageError, match=r"nowhere/la cannot be written"):
        la.save(tmp_path / "nowhere" / "la")


def test_a_fit_that_is_interrupted_leaves_the_object_as_it_was():
    p, la = fitted("ekfac")
    before = dict(vars(la))
    for error in (KeyboardInterrupt, RuntimeError):

        def batches(error=error):
            yield p.batches()[0]
            raise error

        with pytest.raises(error):
            la.fit(batches())
        assert vars(la) == before
    la(p.x_test)


def test_a_subnetwork_comes_back_and_is_told_from_another(tmp_path):
    p = problem("mlp", "classification")
    indices = torch.tensor([3, 40, 17, 60, 61])
    for structure in ("full", "kron", "diag"):
        options = {"subset_of_weights": "subnetwork", "hessian_structure": structure}
        la = Laplace(p.model, p.likelihood, subnetwork_indices=indices, **options).fit(p.batches())
        la.save(tmp_path / structure)
        loaded = Laplace.load(tmp_path / structure, p.model)
        assert_alike(la, loaded, p.x_test)
        assert_alike(la.fit(p.batches(), override=False), loaded.fit(p.batches(), override=False), p.x_test)
        other = Laplace(p.model, p.likelihood, subnetwork_indices=indices + 1, **options)
        with pytest.raises(StorageError, match="subnetwork_indices"):
            other.load_state_dict(la.state_dict())


@pytest.mark.parametrize("structure", ["full", "kron", "diag"])
def test_noise_of_each_output_comes_back(structure, tmp_path):
    p, la = fitted(structure, "regression", sigma_noise=torch.tensor([0.3, 0.5, 0.9]))
    la.sigma_noise = torch.tensor([0.2, 0.5, 0.4])
    la.save(tmp_path / "la")
    loaded = Laplace.load(tmp_path / "la", p.model)
    assert_alike(la, loaded, p.x_test)
    assert_alike(la.fit(p.batches(), override=False), loaded.fit(p.batches(), override=False), p.x_test)
    la.sigma_noise = 0.5  # the curvature of each output is kept
    la.save(tmp_path / "la")
    assert_alike(la, Laplace.load(tmp_path / "la", p.model), p.x_test)


def test_settings_come_back(tmp_path):
    p = problem("mlp", "classification")
    settings = {"prior_projection": "isotropic", "enable_backprop": True, "n_subset": 5, "dict_key_y": "y"}
    prior = torch.linspace(0.5, 1.5, sum(q.numel() for q in p.model.parameters()))
    la = Laplace(p.model, p.likelihood, "all", "kron", prior_precision=prior, **settings).fit(p.batches())
    la.save(tmp_path / "la")
    loaded = Laplace.load(tmp_path / "la", p.model)
    assert_alike(la, loaded, p.x_test)
    assert la(p.x_test.clone().requires_grad_()).requires_grad
    assert loaded(p.x_test.clone().requires_grad_()).requires_grad
    assert (loaded.n_subset, loaded.dict_key_y) == (5, "y")
