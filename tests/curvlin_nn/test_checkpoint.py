"""Fits that go on from a checkpoint: whatever interrupts them, they end as if nothing had."""

import random
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from networks import problem
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from curvlin_nn import Laplace, structures
from curvlin_nn.errors import (
    DataError,
    IndefiniteHessianError,
    StaleModelError,
    StorageError,
    UnsupportedError,
)
from curvlin_nn.products.hessian_sums import HessianSum
from curvlin_nn.storage import checkpoint as checkpoints

STRUCTURES = {
    "full": "full",
    "kron": "kron",
    "diag": "diag",
    "block": "block",
    "ekfac": "ekfac",
    "kfoc": partial(structures.KFOC, iterations=1),
    "lowrank": partial(structures.LowRank, rank=5, passes=3),
    "kron-lowrank": "kron-lowrank",
    "by layer": {"0": "ekfac", "2": partial(structures.LowRank, rank=3), "*": "full"},
}

HESSIANS = ("full", "block", "diag")


class Stop(BaseException):
    """What `kill` does to a process, as far as Python can do it."""


class Loader:
    """Batches in one order; stops for good after some, counted over all passes."""

    def __init__(self, batches, stop=None):
        self.batches, self.left = batches, stop

    def __iter__(self):
        for batch in self.batches:
            if self.left is not None:
                if self.left == 0:
                    raise Stop
                self.left -= 1
            yield batch


def make(name="kron", model=None, **options):
    p = problem("mlp", "classification", n=10)
    return p, Laplace(model or p.model, p.likelihood, "all", STRUCTURES.get(name, name), **options)


def make_hessian(name, **options):
    return make(name, curvature="hessian", **{"indefinite": "abs"} | options)


def make_of(name):
    """As above, ``"hessian full"`` and the like included."""
    of_hessian = name.startswith("hessian ")
    return make_hessian(name.removeprefix("hessian ")) if of_hessian else make(name)


def assert_same_sums(first, second):
    """To rounding: products are bit by bit the same where memory is aligned alike, which is not ours to say."""
    assert first.n_data == second.n_data
    for of in (lambda la: la.curvature.to_dense(), lambda la: la.log_marginal_likelihood()):
        torch.testing.assert_close(of(first), of(second), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("name", "columns"),
    [*((name, "ggn") for name in STRUCTURES), ("kron", "fisher_mc"), ("ekfac", "fisher_mc")],
)
def test_a_fit_that_is_stopped_anywhere_ends_as_if_it_had_not_been(name, columns, tmp_path):
    path = tmp_path / "fit"
    p, whole = make(name, curvature=columns, generator=torch.Generator().manual_seed(4))
    batches = p.batches(2)
    torch.manual_seed(8)  # which low rank draws from
    whole.fit(batches)
    n_batches = len(batches) * whole._fit.accumulated.states[0].passes
    for stop, every in [(1, 1), (3, 2), (min(len(batches), n_batches - 1), 1), (n_batches - 1, 3)]:
        _, la = make(name, curvature=columns, generator=torch.Generator().manual_seed(4))
        torch.manual_seed(8)
        with pytest.raises(Stop):
            la.fit(Loader(batches, stop), checkpoint=path, every=every)
        assert la._fitted is None
        assert path.exists() == (stop >= every)
        _, la = make(name, curvature=columns, generator=torch.Generator().manual_seed(4))
        torch.manual_seed(8 if stop < every else 9)  # what was drawn is in the file
        la.fit(Loader(batches), checkpoint=path, every=every)
        assert_same_sums(la, whole)
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", HESSIANS)
def test_the_sums_of_a_hessian_are_bit_by_bit_those_of_a_fit_that_was_not_stopped(
    name, tmp_path, monkeypatch
):
    """What comes from the file is only ever added to, element by element, so that its memory does not matter."""
    added, add = [], HessianSum.add
    monkeypatch.setattr(HessianSum, "add", lambda self, batch: (added.append(1), add(self, batch)))
    p, whole = make_hessian(name)
    batches = p.batches(2)
    whole.fit(batches)
    for stop, every in [(1, 1), (4, 3), (5, 5), (6, 4), (9, 2)]:  # of two passes of five
        _, la = make_hessian(name)
        with pytest.raises(Stop):
            la.fit(Loader(batches, stop), checkpoint=tmp_path / "fit", every=every)
        assert la._fitted is None and (tmp_path / "fit").exists()
        added.clear()
        la.fit(Loader(batches), checkpoint=tmp_path / "fit", every=every)
        assert len(added) == min(10 - stop // every * every, 5)
        assert not list(tmp_path.iterdir())
        mine, theirs = la._fit.accumulated, whole._fit.accumulated
        assert mine.n_data == theirs.n_data == 10
        assert torch.equal(mine.statistics, theirs.statistics)
        for block, expected in zip(mine.states[0].blocks, theirs.states[0].blocks, strict=True):
            assert torch.equal(block, expected)


@pytest.mark.parametrize("stop", [3, 7])
def test_both_passes_of_a_hessian_see_the_same_draws_of_the_loader(stop, tmp_path):
    """The log-likelihood and its second derivatives are of the same data, where these are augmented at random."""

    class Noisy(Loader):
        def __iter__(self):
            for x, y in super().__iter__():
                yield x + 0.1 * torch.randn_like(x), y

    p, expected = make_hessian("full")
    torch.manual_seed(1)
    expected.fit(list(Noisy(p.batches(2))))
    _, whole = make_hessian("full")
    torch.manual_seed(1)
    before = torch.get_rng_state()
    assert_same_sums(whole.fit(Noisy(p.batches(2))), expected)
    assert torch.equal(torch.get_rng_state(), before)
    _, la = make_hessian("full")
    torch.manual_seed(1)
    with pytest.raises(Stop):
        la.fit(Noisy(p.batches(2), stop), checkpoint=tmp_path / "fit", every=1)
    torch.manual_seed(2)
    assert_same_sums(la.fit(Noisy(p.batches(2)), checkpoint=tmp_path / "fit", every=1), expected)


def test_an_indefinite_hessian_that_was_refused_need_not_be_multiplied_out_again(tmp_path):
    p, whole = make_hessian("full")
    batches = p.batches(2)
    whole.fit(batches)
    _, la = make_hessian("full", indefinite="raise")
    with pytest.raises(IndefiniteHessianError):
        la.fit(batches, checkpoint=tmp_path / "fit", every=1)
    assert la._fitted is None
    _, la = make_hessian("full")
    la.model.register_forward_pre_hook(lambda *_: pytest.fail("the model was run"))
    la.fit(batches, checkpoint=tmp_path / "fit", every=1)
    assert torch.equal(la._fit.accumulated.states[0].blocks[0], whole._fit.accumulated.states[0].blocks[0])


def test_a_hessian_too_large_to_be_multiplied_out_is_refused_at_the_first_batch():
    la = Laplace(nn.Linear(2501, 4), "classification", "all", "diag", curvature="hessian")
    batches = [(torch.randn(2, 2501), torch.tensor([0, 1]))] * 2
    with pytest.raises(UnsupportedError, match="less than the 10008 parameters"):
        la.fit(Loader(batches, 1))


def test_a_fit_that_is_stopped_again_and_again_gets_there(tmp_path):
    p, whole = make("ekfac")
    batches = p.batches(1)
    whole.fit(batches)
    total = 2 * len(batches)
    _, la = make("ekfac")
    for stop in range(2, total, 2):
        with pytest.raises(Stop):
            la.fit(Loader(batches, stop), checkpoint=tmp_path / "fit", every=1)
    assert_same_sums(la.fit(Loader(batches), checkpoint=tmp_path / "fit", every=1), whole)


def test_batches_that_are_in_the_sums_are_not_run_again(tmp_path):
    p, la = make("ekfac")
    batches = p.batches(2)
    calls = []
    model = nn.Sequential(*p.model)
    model.register_forward_pre_hook(lambda module, x: calls.append(len(x[0])))
    _, la = make("ekfac", model)
    with pytest.raises(Stop):
        la.fit(Loader(batches, 8), checkpoint=tmp_path / "fit", every=1)
    calls.clear()
    la.fit(batches, checkpoint=tmp_path / "fit", every=1)
    assert 0 < sum(calls) < 20  # two batches of two, and the checks of the first of them


@pytest.mark.parametrize("name", ["kron", "hessian diag"])
def test_a_fit_that_continues_goes_on_too(name, tmp_path):
    p, whole = make_of(name)
    batches = p.batches(1)
    whole.fit(batches[:4]).fit(batches[4:], override=False)
    _, la = make_of(name)
    la.fit(batches[:4], checkpoint=tmp_path / "fit", every=2)
    with pytest.raises(Stop):
        la.fit(Loader(batches[4:], 5), override=False, checkpoint=tmp_path / "fit", every=2)
    assert la.n_data == 4
    la.fit(batches[4:], override=False, checkpoint=tmp_path / "fit", every=2)
    assert_same_sums(la, whole)


def test_a_loader_that_shuffles_yields_the_same_order_again(tmp_path):
    """It draws its order from torch's default generator, or from one of its own with the same seed."""

    def shuffled(p, own, stop=None):
        generator = torch.Generator().manual_seed(3) if own else None
        data = TensorDataset(p.x, p.y)
        return Loader(DataLoader(data, batch_size=2, shuffle=True, generator=generator), stop)

    for own in (False, True):
        p, whole = make("ekfac")
        torch.manual_seed(1)
        whole.fit(shuffled(p, own))
        _, la = make("ekfac")
        torch.manual_seed(1)
        with pytest.raises(Stop):
            la.fit(shuffled(p, own, 8), checkpoint=tmp_path / "fit", every=1)
        torch.manual_seed(2)
        before = torch.get_rng_state()
        la.fit(shuffled(p, own), checkpoint=tmp_path / "fit", every=1)
        assert torch.equal(torch.get_rng_state(), before)
        assert_same_sums(la, whole)


def test_draws_of_columns_go_on_beside_those_of_the_loader(tmp_path):
    def loader(p, stop=None):
        return Loader(DataLoader(TensorDataset(p.x, p.y), batch_size=2, shuffle=True), stop)

    p, whole = make("ekfac", curvature="fisher_mc")
    torch.manual_seed(1)
    whole.fit(loader(p))
    _, la = make("ekfac", curvature="fisher_mc")
    torch.manual_seed(1)
    with pytest.raises(Stop):
        la.fit(loader(p, 7), checkpoint=tmp_path / "fit", every=1)
    assert_same_sums(la.fit(loader(p), checkpoint=tmp_path / "fit"), whole)


def stopped(path, name="ekfac", stop=7):
    p, la = make_of(name)
    with pytest.raises(Stop):
        la.fit(Loader(p.batches(2), stop), checkpoint=path, every=1)
    return p


@pytest.mark.parametrize("structure", ["ekfac", "hessian block"])
def test_other_batches_are_refused(structure, tmp_path):
    p = stopped(tmp_path / "fit", structure)
    batches = p.batches(2)
    others = {
        "another order": [*batches[1:], batches[0]],
        "another number": [(p.x[0].clone()[None], p.y[:1]), *batches],
        "fewer": batches[:3],
        "none": [],
        "another label": [(batches[0][0], (batches[0][1] + 1) % 3), *batches[1:]],
        "cut otherwise": p.batches(1),
        "another value": [(batches[0][0] + 1e-12, batches[0][1]), *batches[1:]],
    }
    content = (tmp_path / "fit").read_bytes()
    for name, other in others.items():
        _, la = make_of(structure)
        error = (StorageError, DataError)
        with pytest.raises(error, match=r"other batches than those in checkpoint|no batch|yielded"):
            la.fit(other, checkpoint=tmp_path / "fit", every=1)
        assert la._fitted is None, name
        assert (tmp_path / "fit").read_bytes() == content, name


def test_another_fit_is_refused_by_name(tmp_path):
    p = stopped(tmp_path / "fit")
    batches = p.batches(2)
    fit = {"checkpoint": tmp_path / "fit", "every": 1}
    others = {
        "hessian_structure": Laplace(p.model, p.likelihood, "all", "kron"),
        "subset_of_weights": Laplace(p.model, p.likelihood, "last_layer", "ekfac"),
        "likelihood": Laplace(p.model, nn.CrossEntropyLoss(label_smoothing=0.1), "all", "ekfac"),
        "curvature": Laplace(p.model, p.likelihood, "all", "ekfac", curvature="fisher_mc"),
    }
    assert_refused_by_name(others, batches, fit)
    _, la = make("ekfac")
    with torch.no_grad():
        la.model[0].bias[0] += 1
    with pytest.raises(StaleModelError, match=r"'0.bias' of the model holds other values"):
        la.fit(batches, **fit)


def test_another_fit_than_that_of_a_hessian_is_refused_by_name(tmp_path):
    p = stopped(tmp_path / "fit", "hessian full")
    others = {
        "hessian_structure": make_hessian("diag")[1],
        "subset_of_weights": Laplace(p.model, p.likelihood, "last_layer", "full", curvature="hessian"),
    }
    assert_refused_by_name(others, p.batches(2), {"checkpoint": tmp_path / "fit", "every": 1})


def assert_refused_by_name(others, batches, fit):
    for name, la in others.items():
        with pytest.raises(StorageError, match=f"fit with another {name}; give the same"):
            la.fit(batches, **fit)


def test_files_that_are_no_checkpoint_are_refused_and_kept(tmp_path):
    p, la = make("kron")
    la.fit(p.batches(2)).save(tmp_path / "la")
    saved = (tmp_path / "la").read_bytes()
    with pytest.raises(StorageError, match="expected 'curvlin_nn checkpoint'"):
        la.fit(p.batches(2), checkpoint=tmp_path / "la")
    assert (tmp_path / "la").read_bytes() == saved
    stopped(tmp_path / "fit", "kron", 3)
    content = (tmp_path / "fit").read_bytes()
    (tmp_path / "fit").write_bytes(content[:-9])
    with pytest.raises(StorageError, match="no whole safetensors file"):
        la.fit(p.batches(2), checkpoint=tmp_path / "fit")
    (tmp_path / "fit").write_bytes(content)
    with pytest.raises(StorageError, match=r"expected 'curvlin_nn\.Laplace'"):
        Laplace.load(tmp_path / "fit", p.model)


def test_options_out_of_range(tmp_path):
    p, la = make("kron")
    for every in (0, -1, 1.5):
        with pytest.raises((TypeError, ValueError), match="every"):
            la.fit(p.batches(2), checkpoint=tmp_path / "fit", every=every)
    with pytest.raises(UnsupportedError, match="'lowrank' of a Hessian, whose passes sum nothing; leave it"):
        Laplace(p.model, p.likelihood, "all", "lowrank", curvature="hessian").fit(
            Loader([], 0), checkpoint=tmp_path / "fit"
        )


def test_a_structure_that_cannot_be_stored_is_refused_after_the_first_batch(tmp_path):
    class Mine(structures.Diagonal):
        name = "mine"
        state_dict = structures.Structure.state_dict

    p, _ = make("kron")
    la = Laplace(p.model, p.likelihood, "all", Mine)
    loader = Loader(p.batches(2), 1)
    with pytest.raises(UnsupportedError, match="structure Mine cannot be stored"):
        la.fit(loader, checkpoint=tmp_path / "fit", every=1000)


def test_on_a_full_disk_the_last_checkpoint_survives(tmp_path, monkeypatch):
    path = tmp_path / "fit"
    p, la = make("kron")
    n_writes, save = 0, checkpoints.write

    def write(*args):
        nonlocal n_writes
        n_writes += 1
        if n_writes == 3:
            monkeypatch.setattr("curvlin_nn.storage.files.os.fsync", _full_disk)
        save(*args)

    monkeypatch.setattr(checkpoints, "write", write)
    with pytest.raises(StorageError, match="No space left"):
        la.fit(p.batches(1), checkpoint=path, every=2)
    monkeypatch.undo()
    assert [file.name for file in tmp_path.iterdir()] == ["fit"] and la._fitted is None
    _, whole = make("kron")
    assert_same_sums(la.fit(p.batches(1), checkpoint=path, every=2), whole.fit(p.batches(1)))


def _full_disk(*_):
    raise OSError(28, "No space left on device")


def test_the_progress_bar_counts_what_was_there_before(tmp_path, capsys):
    stopped(tmp_path / "fit", "kron", 4)
    p, la = make("kron")
    la.fit(p.batches(2), progress_bar=True, checkpoint=tmp_path / "fit")
    assert "5/5" in capsys.readouterr().err


class Squares(Dataset):
    """Ten pairs, made by worker processes."""

    def __init__(self, p):
        self.x, self.y = p.x, p.y

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i], self.y[i]


def test_several_worker_processes_yield_the_same_again(tmp_path):
    p, whole = make("ekfac")
    whole.fit(p.batches(2))
    loader = DataLoader(Squares(p), batch_size=2, num_workers=2)
    _, la = make("ekfac")
    with pytest.raises(Stop):
        la.fit(Loader(loader, 7), checkpoint=tmp_path / "fit", every=1)
    assert_same_sums(la.fit(loader, checkpoint=tmp_path / "fit"), whole)


CHILD = """
import sys, time
sys.path.insert(0, sys.argv[1])
from test_checkpoint import long_fit
def slowly(batches):
    class Slow:
        def __iter__(self):
            for batch in batches:
                print("batch", flush=True)
                time.sleep(0.005)
                yield batch
    return Slow()
la, batches = long_fit(sys.argv[3])
la.fit(slowly(batches), checkpoint=sys.argv[2], every=3)
print("end", flush=True)
"""


def long_fit(curvature):
    """Two passes of thirty batches."""
    p = problem("mlp", "classification", n=60)
    weights, structure = (["4"], "full") if curvature == "hessian" else ("all", "ekfac")
    la = Laplace(p.model, p.likelihood, weights, structure, curvature=curvature, indefinite="abs")
    return la, p.batches(2)


@pytest.mark.parametrize("curvature", ["ggn", "hessian"])
def test_a_process_that_is_killed_loses_nothing_and_counts_nothing_twice(curvature, tmp_path):
    whole, batches = long_fit(curvature)
    whole.fit(batches)
    killed_at = random.randrange(5, 2 * len(batches) - 5)
    command = [sys.executable, "-c", CHILD, str(Path(__file__).parent), str(tmp_path / "fit"), curvature]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        for _ in range(killed_at):
            assert child.stdout.readline() == "batch\n"
        child.kill()
        rest = child.stdout.read()
    assert "end" not in rest and child.returncode == -9
    assert (tmp_path / "fit").exists(), killed_at
    calls = []
    la, _ = long_fit(curvature)
    la.model.register_forward_pre_hook(lambda *_: calls.append(1))
    la.fit(batches[:1])
    checks = len(calls) - 2  # of the first batch that a recorder sees, beside its two passes
    la, _ = long_fit(curvature)
    la.model.register_forward_pre_hook(lambda *_: calls.append(1))
    calls.clear()
    la.fit(batches, checkpoint=tmp_path / "fit", every=3)
    assert_same_sums(la, whole)
    assert 0 < len(calls) <= 2 * len(batches) - killed_at + 3 + checks, killed_at
