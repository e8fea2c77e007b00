"""The user's model and torch's state come back as they were: after every call, and after every failure."""

import copy
from collections import deque

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from network_oracle import jacobian_row_by_row
from networks import assert_same, state
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from curvlin_nn import Laplace, curvature, feature_maps, low_rank, matrix_free
from curvlin_nn.errors import DataError, OutputError, UnsupportedError
from curvlin_nn.variational import FMGP


class Model(nn.Module):
    """Batch norm, dropout, a frozen layer, a buffer written in forward, and gradients from training."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(4, 6),
            nn.BatchNorm1d(6, affine=False),
            nn.ReLU(inplace=True),
            nn.Dropout(),
            nn.Linear(6, 5),
        )
        self.head = nn.Linear(5, 3)
        self.register_buffer("calls", torch.zeros(()))
        self.body[0].weight.requires_grad_(False)

    def forward(self, x):
        self.calls += 1
        return self.head(torch.tanh(self.body(x)))


def trained(seed: int = 0) -> Model:
    torch.manual_seed(seed)
    model = Model()
    nn.functional.cross_entropy(model(torch.randn(16, 4)), torch.randint(3, (16,))).backward()
    model.body[3].eval()  # a mixture of modes
    model.head.register_forward_hook(lambda module, args, output: output)
    return model


def data(n: int = 12) -> TensorDataset:
    return TensorDataset(torch.randn(n, 4), torch.randint(3, (n,)))


def _multiplied(H):
    return H @ torch.ones(H.size)


CALLS = {
    "curvature": lambda model, loader, x: curvature(model, "classification", loader, "diag"),
    "empirical": lambda model, loader, x: curvature(model, "classification", loader, "diag", "empirical"),
    "hessian": lambda model, loader, x: curvature(
        model, "classification", loader, "diag", kind="hessian", indefinite="abs"
    ),
    "hessian blocks": lambda model, loader, x: curvature(
        model, "classification", loader, "block", kind="hessian", indefinite="clip"
    ),
    "hessian fit": lambda model, loader, x: Laplace(
        model, "classification", "all", "full", curvature="hessian", indefinite="abs"
    ).fit(loader),
    "low rank": lambda model, loader, x: low_rank(
        model, "classification", loader, 3, generator=torch.Generator()
    ),
    "products": lambda model, loader, x: _multiplied(matrix_free(model, "classification", loader)),
    "products anew": lambda model, loader, x: _multiplied(
        matrix_free(model, "classification", loader, cache=False)
    ),
    "hessian products": lambda model, loader, x: _multiplied(
        matrix_free(model, "classification", loader, kind="hessian")
    ),
    "fit": lambda model, loader, x: Laplace(model, "classification", "all", "kron").fit(loader),
    "last layer": lambda model, loader, x: Laplace(model, "classification").fit(loader),
    "jacobian": lambda model, loader, x: feature_maps.JacobianMap(model)(x),
    "predict": lambda model, loader, x: Laplace(model, "classification", "all", "full").fit(loader)(x),
    "evidence": lambda model, loader, x: (
        Laplace(model, "classification").fit(loader).optimize_prior_precision()
    ),
}


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_the_model_is_as_it_was_after_a_call(call, shuffle):
    model, loader, x = trained(), DataLoader(data(), batch_size=5, shuffle=shuffle), torch.randn(3, 4)
    before = state(model)
    call(model, loader, x)
    assert_same(before, state(model))


def test_the_model_is_as_it_was_after_sampling_from_a_generator():
    model, x = trained(), torch.randn(3, 4)
    la = Laplace(model, "classification", "all", "kron").fit(DataLoader(data(), batch_size=5))
    before = state(model)
    la(x, link_approx="mc", generator=torch.Generator())
    la.functional_samples(x, generator=torch.Generator())
    assert_same(before, state(model))


@given(bad=st.integers(0, 3), kind=st.sampled_from(["loader", "label", "nan", "shape"]), warm=st.booleans())
def test_everything_is_as_it_was_after_a_failure_at_any_batch(bad, kind, warm):
    model, x = trained(), torch.randn(3, 4)
    la = Laplace(model, "classification", "all", "kron")
    if warm:
        la.fit(DataLoader(data(), batch_size=5))
        log_evidence, prediction = la.log_marginal_likelihood(), la(x)

    def batches():
        for index in range(4):
            inputs, labels = torch.randn(3, 4), torch.randint(3, (3,))
            if index == bad:
                if kind == "loader":
                    raise OSError("the disk is gone")
                if kind == "label":
                    labels = labels + 3
                if kind == "nan":
                    inputs[1, 2] = float("nan")
                if kind == "shape":
                    labels = labels[:2]
            yield inputs, labels

    expected = {"loader": OSError, "label": DataError, "nan": DataError, "shape": DataError}[kind]
    torch.manual_seed(bad)
    before = state(model)
    with pytest.raises(expected, match="disk is gone" if kind == "loader" else f"batch {bad}"):
        la.fit(batches(), override=False)
    assert_same(before, state(model))
    if warm:
        assert torch.equal(la.log_marginal_likelihood(), log_evidence)
        assert torch.equal(la(x), prediction)
        assert la.n_data == 12
    else:
        la.fit(DataLoader(data(), batch_size=5))
        assert la.n_data == 12


def test_a_module_under_two_names_keeps_its_parameters():
    layer, head = nn.Linear(4, 4), nn.Linear(4, 4)
    model, x = nn.Sequential(layer, nn.Tanh(), layer, nn.BatchNorm1d(4), nn.Tanh(), head), torch.randn(3, 4)
    model.add_module("again", nn.Sequential(head, nn.Linear(4, 3)))
    before = state(model)
    for subset in ("all", ["again"], ["2", "5.bias"]):
        feature_maps.JacobianMap(model, subset)(x)
        assert_same(before, state(model))
        assert all(isinstance(p, nn.Parameter) for p in model.parameters())


@given(
    bad=st.integers(0, 2),
    kind=st.sampled_from(["loader", "label", "nan"]),
    call=st.sampled_from(
        ["hessian", "hessian blocks", "low rank", "products", "products anew", "hessian products"]
    ),
    later=st.booleans(),
)
def test_everything_is_as_it_was_after_a_failure_at_any_batch_of_any_pass(bad, kind, call, later):
    model = trained()

    class Loader:
        """Good in the first pass, if the failure is to come later."""

        passes = 0

        def __iter__(self):
            self.passes += 1
            for index in range(3):
                inputs, labels = torch.randn(3, 4), torch.randint(3, (3,))
                if index == bad and (not later or self.passes > 1):
                    if kind == "loader":
                        raise OSError("the disk is gone")
                    labels = labels + 3 if kind == "label" else labels
                    inputs = inputs * float("nan") if kind == "nan" else inputs
                yield inputs, labels

    assume(not later or call in ("low rank", "products anew", "hessian products"))  # those of several passes
    before = state(model)
    with pytest.raises(OSError if kind == "loader" else DataError):
        CALLS[call](model, Loader(), None)
    assert_same(before, state(model))


def test_a_failure_inside_the_forward_pass_leaves_nothing_behind():
    model, loader = trained(), DataLoader(data(), batch_size=5)

    def fail(module, args):
        raise RuntimeError("boom")

    handle = model.body[4].register_forward_pre_hook(fail)
    before = state(model)
    with pytest.raises(RuntimeError, match="boom"):
        curvature(model, "classification", loader)
    assert_same(before, state(model))
    handle.remove()
    curvature(model, "classification", loader)


def bend(fired: list):
    """A hook that reads a gradient, as logging does, and changes it, as clipping does; of modules and of tensors."""

    def hook(*args):
        gradient = args[-1] if isinstance(args[-1], torch.Tensor) else args[-1][0]
        fired.append(float(gradient.norm()))
        if len(args) == 3:  # grad_input, grad_output of a module
            return tuple(None if g is None else 2 * g for g in args[1])
        return 2 * gradient if isinstance(args[-1], torch.Tensor) else tuple(2 * g for g in args[-1])

    return hook


HOOKS = {
    "module": lambda model, hook: model.head.register_full_backward_hook(hook),
    "module before": lambda model, hook: model.head.register_full_backward_pre_hook(hook),
    "everywhere": lambda model, hook: torch.nn.modules.module.register_module_full_backward_hook(hook),
    "frozen tensor": lambda model, hook: model.body[0].register_forward_hook(
        lambda module, args, output: output.register_hook(hook) and None
    ),
    "tensor": lambda model, hook: model.head.register_forward_hook(
        lambda module, args, output: output.register_hook(hook) and None
    ),
}


@pytest.mark.parametrize("where", HOOKS)
@pytest.mark.parametrize("call", ["fit", "last layer", "jacobian", "predict"])
def test_backward_hooks_are_left_out_and_left_in_place(call, where):
    model, loader, x = trained(), DataLoader(data(), batch_size=5), torch.randn(3, 4)
    features = feature_maps.JacobianMap(model)
    expected = features(x)[1].to_dense()
    fired: list[float] = []
    handle = HOOKS[where](model, bend(fired))
    try:
        before = state(model)
        CALLS[call](model, loader, x)
        assert torch.equal(features(x)[1].to_dense(), expected)
        assert fired == []
        assert_same(before, state(model))
        model.head(torch.randn(4, 5, requires_grad=True)).sum().backward()
        model.body[0](torch.randn(4, 4, requires_grad=True)).sum().backward()
        assert len(fired) > 0
    finally:
        handle.remove()


@pytest.mark.parametrize("context", [torch.no_grad, torch.enable_grad])
def test_the_callers_gradient_mode_does_not_matter(context):
    model, x = trained(), torch.randn(3, 4)
    loader = DataLoader(data(), batch_size=5)
    expected = Laplace(model, "classification", "all", "kron").fit(loader)(x)
    with context():
        torch.testing.assert_close(Laplace(model, "classification", "all", "kron").fit(loader)(x), expected)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_every_call_works_in_inference_mode(call):
    model, loader = trained(), DataLoader(data(), batch_size=5)
    before = state(model)
    with torch.inference_mode():
        call(model, loader, torch.ones(3, 4))
    assert_same(before, state(model))


def test_nothing_is_kept_from_inference_mode():
    """What is made there, of inputs made there, serves outside: gradients of the evidence included."""
    model, x = trained(), torch.randn(3, 4)
    loader = DataLoader(data(), batch_size=5)
    la = Laplace(model, "classification", "all", "kron", prior_precision=0.5).fit(loader)
    expected = la(x), la.functional_samples(x, 2, torch.Generator().manual_seed(0))
    with torch.inference_mode():
        inside = Laplace(model, "classification", "all", "kron", prior_precision=torch.ones(()) / 2)
        inside.fit(loader)
        assert torch.equal(inside(x.clone()), expected[0])
        inside.prior_mean = torch.zeros(inside.n_params)
        inside.log_marginal_likelihood()
    assert torch.equal(inside(x), expected[0])
    with torch.inference_mode():
        draws = inside.functional_samples(x.clone(), 2, torch.Generator().manual_seed(0))
    assert torch.equal(draws, expected[1])
    delta = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    inside.log_marginal_likelihood(delta).backward()
    assert delta.grad is not None
    with torch.inference_mode():
        inside.optimize_prior_precision()
    la.optimize_prior_precision()
    assert torch.equal(inside(x), la(x))
    assert inside.prior_precision.is_inference() is False


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        ([], "the loader yielded no batch"),
        ([torch.zeros(3, 4)], r"batch 0 must be a pair \(inputs, targets\)"),
        ([(torch.zeros(3, 4),)], r"batch 0 must be a pair \(inputs, targets\)"),
        (
            [(torch.zeros(3, 4), [0, 1, 2])],
            r"batch 0 must be a pair \(inputs, targets\) with targets a tensor",
        ),
        ([{"x": torch.zeros(3, 4), "y": torch.zeros(3)}], "batch 0 must be a pair .*, found dict"),
        ([(torch.zeros(3, 4).numpy(), torch.zeros(3).numpy())], "found tuple of ndarray, ndarray"),
        (
            TensorDataset(torch.zeros(3, 4), torch.zeros(3).long()),
            "targets of batch 0 .*, found a single number; give",
        ),
        ([{"x": torch.zeros(4), "labels": torch.tensor(1)}], "targets of batch 0 .* DataLoader"),
    ],
)
def test_loaders_that_yield_no_pairs_are_refused(loader, message):
    with pytest.raises(DataError, match=message):
        Laplace(trained(), "classification").fit(loader)


def test_samples_are_counted_as_they_come():
    """A sampler that takes some data, and the last incomplete batch dropped: what was seen counts."""
    sampler = torch.utils.data.RandomSampler(data(100), replacement=True, num_samples=17)
    loader = DataLoader(data(100), batch_size=4, sampler=sampler, drop_last=True)
    assert Laplace(trained(), "classification").fit(loader).n_data == 16


def test_outputs_that_change_their_number_are_refused():
    class Widening(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(2, 3)

        def forward(self, x):
            return self.a(x)[:, : len(x)]

    batches = [(torch.randn(n, 2), torch.zeros(n, dtype=torch.long)) for n in (2, 3)]
    with pytest.raises(OutputError, match=r"model outputs on batch 1 must have shape \(N, 2\) as before"):
        Laplace(Widening(), "classification", "all", "diag").fit(batches)


def test_progress_bar_is_shown_on_request_only(capfd):
    loader = DataLoader(data(), batch_size=5)
    la = Laplace(trained(), "classification").fit(loader)
    x = next(iter(loader))[0]
    asked = {
        "curvature": (la.fit, loader),
        "Newton steps": (la.optimize_prior_precision,),
        "prediction": (la, x),
    }
    for shown, (action, *arguments) in asked.items():
        action(*arguments)
        assert capfd.readouterr().err == ""
        action(*arguments, progress_bar=True)
        assert shown in capfd.readouterr().err


class Caching(nn.Module):
    """Holds a table for the longest sequence so far, a row made of its parameters, and its last outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.register_buffer("table", torch.arange(2.0).cos()[:, None])
        self.register_buffer("made", None)
        self.longest = 2
        self.row: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] > self.longest:
            self.longest = x.shape[1]
            self.table = torch.arange(self.longest).to(x).cos()[:, None]
        if self.row is None:
            self.row = torch.tanh(self.layer(torch.ones(3).to(x)))
            self.made = torch.ones(2).to(x)
        self.last = (self.layer(x) * self.table[: x.shape[1]]).sum(1) + self.row * self.made
        return self.last


def test_what_a_model_caches_is_as_it_was_and_out_of_date_in_no_batch():
    torch.manual_seed(4)
    model = Caching().double()
    table = model.table
    batches = [(torch.randn(3, length, 3).double(), torch.randn(3, 2).double()) for length in (2, 5, 4)]
    found = curvature(model, "regression", batches, "full").to_dense()
    assert model.table is table and model.longest == 2
    assert model.row is None and model.made is None and not hasattr(model, "last")
    J = torch.cat(
        [
            jacobian_row_by_row(copy.deepcopy(model), [(sample,)])[0]
            for x, _ in batches
            for sample in x.split(1)
        ]
    )
    expected = J.mT @ J
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)


class Collecting(nn.Module):
    """Holds a weight that it makes once in a dictionary, and what it has seen in a list, a deque and a set."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.made: dict[str, Tensor] = {}
        self.outputs: list[Tensor] = []
        self.recent: deque[Tensor] = deque(maxlen=2)
        self.lengths = {1}

    def forward(self, x: Tensor) -> Tensor:
        if "weight" not in self.made:
            self.made["weight"] = torch.tanh(self.layer.weight)
        self.outputs.append(x @ self.made["weight"].mT + self.layer.bias)
        self.recent.append(x)
        self.lengths.add(len(x))
        return self.outputs[-1]


def test_what_a_model_collects_is_as_it_was_and_out_of_date_in_no_batch():
    torch.manual_seed(4)
    model = Collecting().double()
    batches = [(torch.randn(3, 3).double(), torch.randn(3, 2).double()) for _ in range(3)]
    collected = model.made, model.outputs, model.recent, model.lengths
    seen = torch.zeros(1, 3).double()
    model.recent.append(seen)
    la = Laplace(model, "regression", "all", "full").fit(batches)
    rows = [jacobian_row_by_row(copy.deepcopy(model), [(one,)])[0] for x, _ in batches for one in x.split(1)]
    J = torch.cat(rows)
    torch.testing.assert_close(la.curvature.to_dense(), J.mT @ J, rtol=1e-10, atol=0)
    covariance = (
        torch.cat(rows[:3]) @ torch.linalg.inv(la.posterior_precision.to_dense()) @ torch.cat(rows[:3]).mT
    )
    torch.testing.assert_close(la(batches[0][0], joint=True)[1], covariance, rtol=1e-10, atol=1e-14)
    la(batches[0][0], pred_type="nn", n_samples=2)
    assert (model.made, model.outputs, model.lengths) == ({}, [], {1})
    assert len(model.recent) == 1 and model.recent[0] is seen
    assert all(
        now is before
        for now, before in zip(
            (model.made, model.outputs, model.recent, model.lengths), collected, strict=True
        )
    )


def test_parameters_that_no_input_has_given_a_shape_are_refused_by_name():
    with pytest.raises(UnsupportedError, match=r"parameter 'weight' is uninitialized.* call the model once"):
        curvature(nn.LazyLinear(2), "regression", [(torch.randn(3, 2), torch.randn(3, 2))])


def test_parameters_without_values_are_refused():
    with pytest.raises(UnsupportedError, match=r"the model is on the device 'meta'.*to_empty"):
        curvature(nn.Linear(2, 2, device="meta"), "regression", [(torch.randn(3, 2), torch.randn(3, 2))])


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.activation, self.head = nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.activation(self.body(x)))


@pytest.mark.parametrize("make", ["wrapped", "in place", "inside"])
def test_compiled_code_runs_as_written_and_is_compiled_for_its_caller_only(make):
    torch.manual_seed(0)
    plain = Plain().double()
    x, y = torch.randn(6, 4).double(), torch.randint(3, (6,))
    expected = Laplace(plain, "classification", "all", "full").fit([(x, y)])
    compiled = []

    def backend(graph, _):
        compiled.append(graph)
        return graph.forward

    model: nn.Module = copy.deepcopy(plain)
    if make == "wrapped":
        model = torch.compile(model, backend=backend)
    elif make == "in place":
        model.compile(backend=backend)
    else:
        model.activation.forward = torch.compile(lambda z: torch.tanh(z), backend=backend)
    la = Laplace(model, "classification", "all", "full").fit([(x, y)])
    draws = {"pred_type": "nn", "n_samples": 3}
    for options in ({}, draws):
        found, by_hand = (
            posterior(x, generator=torch.Generator().manual_seed(1), **options)
            for posterior in (la, expected)
        )
        torch.testing.assert_close(found, by_hand, rtol=1e-10, atol=1e-14)
    fm = FMGP(model, "classification", n_inducing=3, generator=torch.Generator().manual_seed(0))
    fm.fit([(x, y)], n_steps=1)
    assert not compiled
    with torch.no_grad():
        model(x)
    assert compiled
    torch._dynamo.reset()
