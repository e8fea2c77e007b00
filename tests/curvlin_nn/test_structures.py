import itertools

import network_oracle as oracle
import pytest
import torch
from networks import Problem, Sequences, problem
from torch import nn

from curvlin import BlockDiag, Dense, Diagonal, KroneckerSum
from curvlin_nn import ParameterSpace, curvature, structures
from curvlin_nn.capture import Captures, Recorder, graph
from curvlin_nn.errors import DataError, UnsupportedError

STRUCTURES = ("full", "diag", "kron")
CASES = list(itertools.product(("mlp", "cnn"), ("classification", "regression")))


def fit(p: Problem, structure: str, size: int = 3, subset: object = "all"):
    return curvature(p.model, p.likelihood, p.batches(size), structure, subset_of_weights=subset)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize(("kind", "likelihood"), CASES)
def test_curvature_equals_the_per_sample_oracle(kind, likelihood, structure):
    p = problem(kind, likelihood)
    expected = oracle.curvature(p.model, p.x, p.y, likelihood, structure)
    torch.testing.assert_close(fit(p, structure).to_dense(), expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("structure", ("full", "diag", "kron", "ekfac", "kfoc", "block"))
@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_columns_may_reach_a_structure_one_at_a_time(kind, structure, monkeypatch):
    p = problem(kind, "regression")
    together = fit(p, structure).to_dense()
    monkeypatch.setattr(graph, "COLUMN_BUDGET", 1)
    torch.testing.assert_close(fit(p, structure).to_dense(), together, rtol=1e-10, atol=1e-12)


def test_a_finished_diagonal_stays_when_data_are_added():
    p = problem("mlp", "regression")
    captures = Recorder(p.model, ParameterSpace.of(p.model))(p.x).captures(
        torch.ones(1, len(p.x), 3).double()
    )
    state = structures.Diagonal(ParameterSpace.of(p.model))
    state.update(captures)
    finished = state.finish()
    before = finished.diagonal().clone()
    state.update(captures)
    assert torch.equal(finished.diagonal(), before)
    assert torch.equal(state.finish().diagonal(), 2 * before)


@pytest.mark.parametrize("structure", ("full", "diag"))
def test_exact_structures_are_exact_under_weight_sharing(structure):
    model = Sequences().double()
    x, y = torch.randn(6, 3, 4).double(), torch.randint(2, (6,))
    H = curvature(model, "classification", [(x[:4], y[:4]), (x[4:], y[4:])], structure)
    expected = oracle.curvature(model, x, y, "classification", structure)
    torch.testing.assert_close(H.to_dense(), expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_curvature_depends_on_neither_batches_nor_order(kind, structure):
    p = problem(kind, "classification")
    whole = fit(p, structure, size=8).to_dense()
    order = torch.randperm(8)
    shuffled = Problem(p.model, p.likelihood, p.x[order], p.y[order], p.x_test)
    for other in (fit(p, structure, size=1), fit(p, structure, size=5), fit(shuffled, structure)):
        torch.testing.assert_close(other.to_dense(), whole, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_rows_in_pieces_are_the_rows(kind, monkeypatch):
    p = problem(kind, "classification")
    whole = fit(p, "full", size=8).to_dense()
    n_parameters = len(whole)
    monkeypatch.setattr("curvlin_nn.structures.full.ROW_BUDGET", 2 * 3 * n_parameters)  # three samples each
    torch.testing.assert_close(fit(p, "full", size=8).to_dense(), whole, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_data_seen_twice_count_twice(structure):
    p = problem("cnn", "classification")
    twice = curvature(p.model, p.likelihood, p.batches() * 2, structure).to_dense()
    torch.testing.assert_close(twice, 2 * fit(p, structure).to_dense(), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_states_of_disjoint_data_merge_to_the_state_of_all(structure):
    p = problem("cnn", "regression")
    space = ParameterSpace.of(p.model)
    recorder, factory = Recorder(p.model, space), structures.resolve(structure)
    states = [factory(space) for _ in range(3)]
    for state, part in ((states[0], p.x[:5]), (states[1], p.x[5:]), (states[2], p.x)):
        state.update(jacobian_captures(recorder, part))
    untouched = states[1].finish().to_dense()
    states[0].merge(states[1])
    torch.testing.assert_close(
        states[0].finish().to_dense(), states[2].finish().to_dense(), rtol=1e-12, atol=1e-14
    )
    assert torch.equal(states[1].finish().to_dense(), untouched)
    fresh = factory(space)
    fresh.merge(states[0])
    states[0].merge(factory(space))
    torch.testing.assert_close(fresh.finish().to_dense(), states[0].finish().to_dense(), rtol=0, atol=0)
    fresh.merge(states[1])  # and the sum that was copied is not the copy
    torch.testing.assert_close(
        states[0].finish().to_dense(), states[2].finish().to_dense(), rtol=1e-12, atol=1e-14
    )


def test_structures_are_the_operators_they_are_said_to_be():
    p = problem("mlp", "classification")
    assert isinstance(fit(p, "full"), Dense)
    assert isinstance(fit(p, "diag"), Diagonal)
    kron = fit(p, "kron")
    assert isinstance(kron, BlockDiag)
    assert [type(block) for block in kron.blocks] == [KroneckerSum, Dense] * 3
    assert [block.size for block in kron.blocks] == [t.numel() for t in p.model.parameters()]


# -- where KFAC is exact -------------------------------------------------------------------------------------


def blocks_of(H: torch.Tensor, model: nn.Module) -> torch.Tensor:
    """H with everything outside the diagonal blocks of single parameters set to zero."""
    result, start = torch.zeros_like(H), 0
    for p in model.parameters():
        span = slice(start, start + p.numel())
        result[span, span] = H[span, span]
        start += p.numel()
    return result


@pytest.mark.parametrize("likelihood", ["classification", "regression"])
def test_kfac_is_exact_for_one_sample_without_sharing(likelihood):
    p = problem("mlp", likelihood, n=1)
    expected = blocks_of(oracle.ggn(p.model, p.x, p.y, oracle.LOSSES[likelihood]), p.model)
    torch.testing.assert_close(fit(p, "kron").to_dense(), expected, rtol=1e-12, atol=1e-16)


@pytest.mark.parametrize("size", [2, 8])
def test_kfac_is_exact_for_deep_linear_networks_under_squared_error(size):
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(3, 2)).double()
    p = Problem(model, "regression", torch.randn(8, 4).double(), torch.randn(8, 2).double(), torch.empty(0))
    expected = blocks_of(oracle.ggn(model, p.x, p.y, oracle.half_squared_error), model)
    torch.testing.assert_close(fit(p, "kron", size).to_dense(), expected, rtol=1e-12, atol=1e-14)


def test_kfac_is_exact_after_the_last_nonlinearity_under_squared_error():
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4), nn.Linear(4, 2)).double()
    x, y = torch.randn(8, 4).double(), torch.randn(8, 2).double()
    exact = blocks_of(oracle.ggn(model, x, y, oracle.half_squared_error), model)
    found = curvature(model, "regression", [(x, y)], "kron").to_dense()
    torch.testing.assert_close(found[25:, 25:], exact[25:, 25:], rtol=1e-12, atol=1e-14)
    assert not torch.allclose(found[:20, :20], exact[:20, :20], rtol=1e-3)  # before it, KFAC approximates


@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_bias_blocks_are_exact_always(kind):
    p = problem(kind, "classification")
    exact = oracle.ggn(p.model, p.x, p.y, oracle.cross_entropy)
    H, spans = fit(p, "kron").to_dense(), ParameterSpace.of(p.model).spans
    for name, span in spans.items():
        if name.endswith("bias"):
            s = slice(span.start, span.stop)
            torch.testing.assert_close(H[s, s], exact[s, s], rtol=1e-11, atol=1e-14)


def test_kfac_of_one_sample_has_the_trace_of_the_exact_block_without_sharing():
    """With N = 1 and S = 1 traces agree exactly; the diagonal structure gives the exact trace always."""
    p = problem("mlp", "classification", n=1)
    full, diag, kron = (fit(p, s).diagonal() for s in ("full", "diag", "kron"))
    for span in ParameterSpace.of(p.model).spans.values():
        traces = torch.stack([d[span.start : span.stop].sum() for d in (full, diag, kron)])
        torch.testing.assert_close(traces, traces[:1].expand(3), rtol=1e-12, atol=0)


@pytest.mark.parametrize(("kind", "likelihood"), CASES)
def test_diagonal_structure_is_the_diagonal_of_the_full_one(kind, likelihood):
    p = problem(kind, likelihood)
    torch.testing.assert_close(fit(p, "diag").diagonal(), fit(p, "full").diagonal(), rtol=1e-12, atol=1e-16)


# -- last layer ----------------------------------------------------------------------------------------------


def test_last_layer_curvature_equals_the_closed_form():
    """Linear head on features phi: H = sum Lambda_n (x) phi phi^T; its factors and diagonal follow."""
    p = problem("mlp", "classification")
    with torch.no_grad():
        phi = p.model[:-1](p.x)
        probabilities = torch.softmax(p.model(p.x), -1)
    Lambda = torch.diag_embed(probabilities) - probabilities[:, :, None] * probabilities[:, None, :]
    weight = torch.einsum("ncd,ni,nj->cidj", Lambda, phi, phi).reshape(15, 15)
    cross = torch.einsum("ncd,ni->cid", Lambda, phi).reshape(15, 3)
    bias = Lambda.sum(0)
    full = torch.cat([torch.cat([weight, cross], 1), torch.cat([cross.T, bias], 1)])
    kron = torch.block_diag(torch.kron(Lambda.sum(0), phi.T @ phi / 8), bias)
    for structure, expected in (("full", full), ("diag", torch.diag(full.diagonal())), ("kron", kron)):
        found = fit(p, structure, subset="last_layer").to_dense()
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-15)


def test_last_layer_needs_no_backward_pass_through_the_network():
    class NoBackward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return torch.tanh(x)

        @staticmethod
        def backward(ctx, g):
            raise AssertionError("a backward pass went through the body")

    class Body(nn.Module):
        def forward(self, x):
            return NoBackward.apply(x)

    model = nn.Sequential(nn.Linear(4, 5), Body(), nn.Linear(5, 3)).double()
    curvature(
        model,
        "classification",
        [(torch.randn(4, 4).double(), torch.randint(3, (4,)))],
        "kron",
        subset_of_weights="last_layer",
    )


# -- plug-ins ------------------------------------------------------------------------------------------------


class Trace(structures.Structure):
    """A structure of two passes from outside: the trace, spread evenly; the second pass recomputes it."""

    name = "trace-of-this-test"
    passes = 2

    def __init__(self, space):
        super().__init__(space)
        self.begun, self.totals = [], [0.0, 0.0]

    def begin(self, pass_index):
        self.begun.append(pass_index)

    def update(self, captures: Captures):
        squares = [
            torch.einsum(
                "nvso,nsi->nvoi", b.left, b.left.new_ones(len(b.left), 1, 1) if b.right is None else b.right
            )
            for b in captures.blocks
        ]
        self.totals[self.begun[-1]] += sum(float(s.square().sum()) for s in squares)

    def merge(self, other):
        self.totals = [mine + theirs for mine, theirs in zip(self.totals, other.totals, strict=True)]

    def finish(self):
        assert self.begun == [0, 1]
        assert self.totals[0] == self.totals[1]
        return Diagonal(torch.full((self.space.size,), self.totals[0] / self.space.size, dtype=torch.float64))


def test_a_structure_class_of_several_passes_is_taken_as_it_is():
    p = problem("cnn", "classification")
    H = curvature(p.model, p.likelihood, p.batches(), Trace)
    exact = oracle.ggn(p.model, p.x, p.y, oracle.cross_entropy)
    torch.testing.assert_close(H.diagonal().sum(), exact.trace(), rtol=1e-11, atol=0)


def test_several_passes_need_a_loader_that_can_be_iterated_again():
    p = problem("mlp", "classification")
    with pytest.raises(DataError, match="pass 1 over the loader yielded 0 samples, expected 8"):
        curvature(p.model, p.likelihood, iter(p.batches()), Trace)


def test_entry_points_offer_structures_by_name(monkeypatch):
    class Point:
        name = "trace"

        def load(self):
            return Trace

    def entry_points(group, name=None):
        return [Point()] if group == "curvlin.structures" and name in (None, "trace") else []

    monkeypatch.setattr("curvlin_nn.structures.registry.entry_points", entry_points)
    assert structures.resolve("trace") is Trace
    assert "trace" in structures.available()
    with pytest.raises(
        UnsupportedError,
        match="one of 'block', 'diag', 'ekfac', 'full', 'gp', 'kfoc', 'kron', 'kron-lowrank', 'lowrank', 'trace'",
    ):
        structures.resolve("ekfax")


def test_two_structures_of_one_name_are_an_error():
    with pytest.raises(ValueError, match="named 'kron' is already registered"):
        structures.register(type("Other", (Trace,), {"name": "kron"}))


def test_columns_of_unknown_kind_are_refused():
    p = problem("mlp", "classification")
    with pytest.raises(
        UnsupportedError, match="columns='all' is not supported; expected one of 'exact', 'mc'"
    ):
        curvature(p.model, p.likelihood, p.batches(), columns="all")


def test_a_weight_used_differently_in_a_later_batch_is_refused():
    class Switching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 2, 1, 1))

        def forward(self, x):
            groups = 2 if x.shape[1] == 4 else 1
            return torch.nn.functional.conv2d(x, self.w, groups=groups).mean((2, 3))

    data = [(torch.randn(3, c, 2, 2), torch.randn(3, 4)) for c in (4, 2)]
    with pytest.raises(UnsupportedError, match="has rows of another form than in earlier data"):
        curvature(Switching(), "regression", data, "kron")


def jacobian_captures(recorder: Recorder, x: torch.Tensor) -> Captures:
    recording = recorder(x)
    n, c = recording.outputs.shape
    return recording.captures(torch.eye(c).to(recording.outputs)[:, None].expand(c, n, c))
