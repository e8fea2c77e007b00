"""What no rule captures from a batch is served exactly sample by sample, said so, and refused on request."""

import warnings
from collections import UserDict
from dataclasses import dataclass
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from network_oracle import ggn, half_squared_error, jacobian_row_by_row
from networks import assert_close, assert_same, state
from torch import Tensor, nn
from torch.nn.utils import prune

from curvlin_nn import Laplace, ParameterSpace, curvature, feature_maps
from curvlin_nn.capture import Recorder
from curvlin_nn.errors import (
    CouplingError,
    ModifiedInputError,
    OutputError,
    UnsupportedError,
    UnsupportedUseError,
)

RULE, SHARED, AUTODIFF = "rule", "rule on each sample", "autodiff on each sample"


class Net(nn.Module):
    """Layers by name, and a function of them."""

    def __init__(self, forward, **parts) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.function = forward
        self.double()

    def forward(self, x):
        return self.function(self, x)


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape).double())


class Product(torch.autograd.Function):
    """``x W`` with a backward pass of its own, which no vmap gets through."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        assert float(g.abs().sum()) >= 0
        return g @ w.mT, x.mT @ g


def last(result):
    return result[0][:, -1]


def kept(how: str) -> Net:
    """A weight that is used past its module."""
    a = nn.Linear(3, 3).double()
    listed, view = [a.weight], a.weight[:, :]
    function = {
        "list": lambda net, x: net.b(torch.tanh(F.linear(x, listed[0]))),
        "view": lambda net, x: net.b(torch.tanh(F.linear(x, view))),
        "both": lambda net, x: net.b(torch.tanh(net.a(x) + F.linear(x, listed[0]))),
    }[how]
    return Net(function, a=a, b=nn.Linear(3, 2))


def weight_normed() -> nn.Linear:
    return nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))


def weight_normed_by_hooks() -> nn.Linear:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(nn.Linear(3, 2))


def model_of(name: str) -> tuple[nn.Module, tuple[int, ...], set[str]]:
    """A model, the shape of one of its inputs, and its parameters that autodiff serves."""
    lstm = {f"cell.{kind}_{half}_l0" for kind in ("weight", "bias") for half in ("ih", "hh")}
    model, shape, by_autodiff = {
        "lstm": lambda: (
            Net(
                lambda net, x: net.head(last(net.cell(net.body(x)))),
                body=nn.Linear(3, 3),
                cell=nn.LSTM(3, 4, batch_first=True),
                head=nn.Linear(4, 2),
            ),
            (5, 3),
            lstm,
        ),
        "gru": lambda: (
            Net(
                lambda net, x: net.head(last(net.cell(x))),
                cell=nn.GRU(3, 4, batch_first=True),
                head=nn.Linear(4, 2),
            ),
            (5, 3),
            lstm,
        ),
        "einsum": lambda: (
            Net(
                lambda net, x: net.head(torch.einsum("ni,oij,nj->no", x, net.w, x)),
                w=weight(4, 3, 3),
                head=nn.Linear(4, 2),
            ),
            (3,),
            {"w"},
        ),
        "bilinear": lambda: (
            Net(lambda net, x: net.b(x, x.sin()), b=nn.Bilinear(3, 3, 2)),
            (3,),
            {"b.weight", "b.bias"},
        ),
        "powers": lambda: (
            Net(lambda net, x: net.a(x.abs() ** net.p), p=weight(3), a=nn.Linear(3, 2)),
            (3,),
            {"p"},
        ),
        "prelu": lambda: (
            Net(lambda net, x: net.r(net.a(x)), r=nn.PReLU(), a=nn.Linear(3, 2)),
            (3,),
            {"r.weight"},
        ),
        "weight norm": lambda: (
            Net(lambda net, x: net.a(x), a=weight_normed()),
            (3,),
            {"a.parametrizations.weight.original0", "a.parametrizations.weight.original1"},
        ),
        "embedding bag": lambda: (
            Net(
                lambda net, x: net.a(net.e((x.abs() * 3).long() % 5)),
                e=nn.EmbeddingBag(5, 3),
                a=nn.Linear(3, 2),
            ),
            (4,),
            {"e.weight"},
        ),
        "own function": lambda: (
            Net(lambda net, x: net.a(torch.tanh(Product.apply(x, net.w))), w=weight(3, 3), a=nn.Linear(3, 2)),
            (3,),
            {"w"},
        ),
        "own function beside a layer": lambda: (
            Net(lambda net, x: net.a(torch.tanh(Product.apply(x, net.a.weight.mT))), a=nn.Linear(3, 3)),
            (3,),
            {"a.weight"},
        ),
        "recurrent cells": lambda: (
            Net(lambda net, x: net.b(net.a(x), x[:, :2]), a=nn.RNNCell(3, 3), b=nn.GRUCell(3, 2)),
            (3,),
            {
                f"{cell}.{kind}_{half}"
                for cell in "ab"
                for kind in ("weight", "bias")
                for half in ("ih", "hh")
            },
        ),
        "weight norm by hooks": lambda: (
            Net(lambda net, x: net.a(x), a=weight_normed_by_hooks()),
            (3,),
            {"a.weight_g", "a.weight_v"},
        ),
        "spectral norm": lambda: (
            Net(lambda net, x: net.a(x), a=nn.utils.parametrizations.spectral_norm(nn.Linear(3, 2))).eval(),
            (3,),
            {"a.parametrizations.weight.original"},
        ),
        "pruned": lambda: (
            Net(lambda net, x: net.a(x), a=prune.l1_unstructured(nn.Linear(3, 2), "weight", 2)),
            (3,),
            {"a.weight_orig"},
        ),
        "column slice": lambda: (Net(lambda net, x: F.linear(x, net.w[:, 1:]), w=weight(2, 4)), (3,), {"w"}),
        "overlapping rows": lambda: (
            Net(lambda net, x: torch.tanh(F.linear(x, net.w[:2])) * F.linear(x, net.w[1:]), w=weight(3, 3)),
            (3,),
            {"w"},
        ),
        "some rows only": lambda: (Net(lambda net, x: F.linear(x, net.w[1:]), w=weight(3, 3)), (3,), {"w"}),
        "whole and in parts": lambda: (
            Net(lambda net, x: F.linear(x, net.w).sin() + F.linear(x.cos(), net.w[:1]), w=weight(2, 3)),
            (3,),
            {"w"},
        ),
        "vector": lambda: (Net(lambda net, x: F.linear(x, net.w)[:, None], w=weight(3)), (3,), {"w"}),
        "as an input": lambda: (
            Net(lambda net, x: net.a(x) @ net.a(net.a.weight).mT, a=nn.Linear(3, 3)),
            (3,),
            {"a.weight"},
        ),
        "list": lambda: (kept("list"), (3,), {"a.weight"}),
        "view": lambda: (kept("view"), (3,), {"a.weight"}),
        "both": lambda: (kept("both"), (3,), {"a.weight"}),
    }[name]()
    return model, shape, by_autodiff


MODELS = [
    *("lstm", "gru", "einsum", "bilinear", "powers", "prelu", "weight norm", "embedding bag", "own function"),
    *(
        "own function beside a layer",
        "column slice",
        "overlapping rows",
        "some rows only",
        "whole and in parts",
    ),
    *("recurrent cells", "weight norm by hooks", "spectral norm", "pruned"),
    *("vector", "as an input", "list", "view", "both"),
]


@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("name", MODELS)
def test_what_no_rule_serves_is_exact_by_autodiff(name, n):
    model, shape, by_autodiff = model_of(name)
    x = torch.randn(n, *shape).double()
    names = [name for name, _ in model.named_parameters()]
    recorder = Recorder(model, ParameterSpace.of(model))
    before = state(model)
    outputs, features = feature_maps.JacobianMap.of(recorder)(x)
    assert_same(before, state(model))
    assert_close(outputs, model(x).detach())
    assert_close(features.to_dense(), oracle(model, x))
    expected = dict.fromkeys(names, RULE) | dict.fromkeys(by_autodiff, AUTODIFF)
    if name == "as an input" and n > 1:
        expected["a.bias"] = SHARED  # once of the samples, once of all of them
    assert recorder.served == expected


@pytest.mark.parametrize("name", MODELS)
def test_without_a_fallback_it_is_refused_by_name(name):
    model, shape, by_autodiff = model_of(name)
    x = torch.randn(3, *shape).double()
    before = state(model)
    recorder = Recorder(model, ParameterSpace.of(model), fallback=False)
    with pytest.raises(
        UnsupportedUseError, match=r"expected uses by linear maps.*with fallback=True, or"
    ) as caught:
        recorder(x)
    assert caught.value.parameter in by_autodiff
    assert recorder.served == {}
    assert_same(before, state(model))


@pytest.mark.parametrize("name", ["lstm", "bilinear", "list"])
def test_curvature_of_what_autodiff_serves(name):
    model, shape, _ = model_of(name)
    x, y = torch.randn(5, *shape).double(), torch.zeros(5, 2).double()
    J = oracle(model, x).flatten(0, 1)
    H = J.mT @ J
    loader = [(x[:3], y[:3]), (x[3:], y[3:])]
    assert_close(curvature(model, "regression", loader, "full").to_dense(), H)
    assert_close(curvature(model, "regression", loader, "diag").to_dense().diagonal(), H.diagonal())
    Laplace(model, "regression", "all", "kron").fit(loader)(x)


def test_a_head_behind_an_lstm_needs_no_autodiff():
    model, shape, _ = model_of("lstm")
    recorder = Recorder(model, ParameterSpace.of(model, ["body", "head"]), fallback=False)
    x = torch.randn(4, *shape).double()
    _, features = feature_maps.JacobianMap.of(recorder)(x)
    names = ["body.weight", "body.bias", "head.weight", "head.bias"]
    assert_close(features.to_dense(), oracle(model, x, names))


POSITIONS = {
    "embedding of positions": (
        lambda net, x: net.a(x + net.p(torch.arange(x.shape[1]))).sin().sum(1),
        nn.Embedding(4, 3),
    ),
    "embedding of positions, repeated": (
        lambda net, x: net.a(x + net.p(torch.arange(x.shape[1])[None])).sin().sum(1),
        nn.Embedding(4, 3),
    ),
    "layer on a constant": (
        lambda net, x: net.a(x * net.p(torch.ones(2).double())).sin().sum(1),
        nn.Linear(2, 3),
    ),
}


@pytest.mark.parametrize("n", [2, 3, 4])
@pytest.mark.parametrize("name", POSITIONS)
def test_what_samples_share_is_served_by_its_rule_on_each_sample(name, n):
    """Factored as everywhere else: rows that are multiplied out would be as long as the parameter."""
    forward, part = POSITIONS[name]
    model, x = Net(forward, p=part, a=nn.Linear(3, 2)), torch.randn(n, 4, 3).double()
    recorder = Recorder(model, ParameterSpace.of(model))
    recording = recorder(x)
    assert recorder.served["p.weight"] == SHARED
    unit = torch.eye(2).double()[:, None].expand(2, n, 2)
    blocks = recording.captures(unit).blocks
    assert recorder.served["p.weight"] == SHARED
    assert recorder.served["a.weight"] == RULE
    assert all(block.right is not None for block in blocks if block.parameter.endswith("weight"))
    _, features = feature_maps.JacobianMap.of(recorder)(x)
    assert_close(features.to_dense(), oracle(model, x))


def test_samples_that_are_looped_over_are_served_alone():
    model = Net(lambda net, x: torch.stack([net.a(torch.tanh(sample)) for sample in x]), a=nn.Linear(3, 2))
    for x in (torch.randn(4, 3).double(), torch.randn(1, 3).double(), torch.randn(2, 3).double()):
        recorder = Recorder(model, ParameterSpace.of(model))
        _, features = feature_maps.JacobianMap.of(recorder)(x)
        assert_close(features.to_dense(), oracle(model, x))
    with pytest.raises(CouplingError, match=r"at parameter 'a.weight'"):
        Recorder(model, ParameterSpace.of(model), fallback=False)(torch.randn(4, 3).double())


def test_samples_may_differ_in_what_they_use():
    """Experts: one sample uses the recurrent one, another one the table that all share, and none of the two both."""

    def forward(net, x):
        kinds = x[:, 0, 0].abs() > 1
        rows = [
            net.cell(sample[None])[0][:, -1]
            if kind
            else net.a(sample[None] + net.table(torch.arange(len(sample)))).mean(1)
            for sample, kind in zip(x, kinds, strict=True)
        ]
        return torch.cat(rows)

    model = Net(forward, cell=nn.GRU(3, 2, batch_first=True), a=nn.Linear(3, 2), table=nn.Embedding(3, 3))
    x = torch.randn(4, 3, 3).double()
    x[:, 0, 0] = torch.tensor([2.0, 0.5, 3.0, 0.1]).double()
    recorder = Recorder(model, ParameterSpace.of(model))
    features = feature_maps.JacobianMap.of(recorder)
    for batch in (x, x[1:2], x[:1], x[::2], x[1::2]):
        assert_close(features(batch)[1].to_dense(), oracle(model, batch))


def test_an_expert_may_have_no_sample_where_no_other_layer_is_served_by_a_rule():
    def forward(net, x):
        rows, out = (x[:, 0] > 0).nonzero().squeeze(1), net.mix[0] * x[:, :2].sin()
        return out.index_add(0, rows, net.expert(x[rows]))

    model = Net(forward, mix=nn.ParameterList([weight(2)]), expert=nn.Linear(3, 2))
    x = torch.randn(5, 3).double()
    x[:, 0] = torch.tensor([-1.0, 2.0, 1.0, -3.0, -2.0]).double()
    recorder = Recorder(model, ParameterSpace.of(model))
    for batch in (x, x[:1], x[3:]):
        _, features = feature_maps.JacobianMap.of(recorder)(batch)
        assert_close(features.to_dense(), oracle(model, batch))


def test_a_sample_may_use_nothing_of_what_is_served_alone():
    def forward(net, x):
        chosen = [
            net.cell(row[None])[0][:, -1] if float(row[0, 0]) > 0 else row[None, 0, :2].sin() for row in x
        ]
        return net.head(torch.cat(chosen))

    model = Net(forward, cell=nn.GRU(3, 2, batch_first=True), head=nn.Linear(2, 2))
    x = torch.randn(3, 4, 3).double()
    x[:, 0, 0] = torch.tensor([2.0, -1.0, 3.0]).double()
    recorder = Recorder(model, ParameterSpace.of(model))
    _, features = feature_maps.JacobianMap.of(recorder)(x)
    assert recorder.served["head.weight"] == RULE
    assert_close(features.to_dense(), oracle(model, x))


def test_a_parameter_stays_served_as_it_was():
    """A later batch that would do with the rule is served by autodiff too: structures see one kind of block."""
    model = Net(
        lambda net, x: (
            net.a(x) if bool((x > 0).all()) else net.a(x) + torch.einsum("ni,oi->no", x, net.a.weight)
        ),
        a=nn.Linear(3, 2),
    )
    recorder = Recorder(model, ParameterSpace.of(model))
    x = torch.rand(3, 3).double()
    unit = torch.eye(2).double()[:, None].expand(2, 3, 2)
    for batch, how in ((x, RULE), (-x, AUTODIFF), (x, AUTODIFF)):
        rows = [block.flat_rows() for block in recorder(batch).captures(unit).blocks]
        assert recorder.served["a.weight"] == how
        assert recorder.served["a.bias"] == RULE
        assert_close(torch.cat(rows, dim=2), oracle(model, batch))


def test_a_structure_of_factors_says_which_parameter_has_none_any_more():
    model = Net(
        lambda net, x: (
            net.a(x) if bool((x[0] > 0).all()) else net.a(x) + torch.einsum("ni,oi->no", x, net.a.weight)
        ),
        a=nn.Linear(3, 2),
    )
    x, y = torch.rand(3, 3).double(), torch.randn(6, 2).double()
    data = [(x, y[:3]), (-x, y[3:])]
    for name in ("kron", "ekfac", "kfoc"):
        with pytest.raises(
            UnsupportedError, match=r"parameter 'a.weight' has rows of another form .* 'diag' by name"
        ):
            curvature(model, "regression", data, name)
    G = ggn(model, torch.cat([x, -x]), y, half_squared_error)
    found = {
        name: curvature(model, "regression", data, name).to_dense() for name in ("full", "diag", "block")
    }
    assert_close(found["full"], G)
    assert_close(found["diag"].diagonal(), G.diagonal())
    assert_close(found["block"], torch.block_diag(G[:6, :6], G[6:, 6:]))


@pytest.mark.parametrize("n", [1, 3])
def test_backward_passes_that_cannot_be_batched_are_made_one_by_one(n):
    constant = torch.randn(4, 2).double()
    model = Net(lambda net, x: Product.apply(net.a(x), constant), a=nn.Linear(3, 4))
    x = torch.randn(n, 3).double()
    _, features = feature_maps.JacobianMap(model)(x)
    assert_close(features.to_dense(), oracle(model, x))


def test_coupling_is_found_where_autodiff_serves():
    def through_time(net, x):
        return net.cell(x)[0]  # (N, 3) is one sequence of N steps to it

    model = Net(through_time, cell=nn.GRU(3, 2))
    x = torch.randn(4, 3).double()
    before = state(model)
    with pytest.raises(CouplingError, match="changes when other samples of the batch do"):
        feature_maps.JacobianMap(model)(x)
    assert_same(before, state(model))
    norm = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, track_running_stats=False), nn.Linear(3, 2))
    with pytest.raises(CouplingError, match="statistics of the batch"):
        feature_maps.JacobianMap(norm)(torch.randn(4, 3))
    latent = Net(lambda net, x: net.z * x, z=weight(4, 3))  # a row for each place in the batch
    with pytest.raises(
        CouplingError, match=r"the outputs for sample 0 of the input are others .* parameter 'z'"
    ):
        feature_maps.JacobianMap(latent)(x)


def test_coupling_is_found_when_it_comes_with_a_later_batch():
    """The course of the forward pass is the same: samples run alone show it."""
    model = Net(
        lambda net, x: net.r(net.a(x)) + (x.sum() if bool((x > 0).all()) else 0),
        a=nn.Linear(3, 2),
        r=nn.PReLU(),
    )
    features = feature_maps.JacobianMap(model)
    x = torch.rand(3, 3).double()
    features(-x)
    with pytest.raises(
        CouplingError, match=r"sample 0 of the input are others .* \(for parameter 'r.weight'"
    ):
        features(x)


def test_a_gradient_that_is_not_finite_is_refused_by_name():
    model = Net(
        lambda net, x: net.a(x).sum(1, keepdim=True) + torch.pow(net.p - net.p.detach(), 0.5),
        a=nn.Linear(3, 2),
        p=weight(1),
    )
    with pytest.raises(
        OutputError, match=r"the gradient of parameter 'p' on sample 0 of the input must be finite"
    ):
        feature_maps.JacobianMap(model)(torch.randn(2, 3).double())


def test_inputs_changed_in_place_are_found_beside_autodiff():
    def forward(net, x):
        h = net.r(x)
        out = net.a(h)
        h += 1
        return out + h

    model = Net(forward, a=nn.Linear(2, 2), r=nn.PReLU())
    with pytest.raises(ModifiedInputError, match=r"parameter 'a.weight' was changed"):
        feature_maps.JacobianMap(model)(torch.randn(3, 2).double())


def test_the_model_is_as_it_was_after_a_failure_in_one_sample():
    class Fragile(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.r, self.norm = nn.Linear(3, 2), nn.PReLU(), nn.BatchNorm1d(2)

        def forward(self, x: Tensor) -> Tensor:
            if len(x) == 1 and float(x.sum()) > 0:
                raise RuntimeError("boom")
            return self.norm(self.r(self.a(x)))

    model, x = Fragile().train(), torch.tensor([[-1.0, 0, 0], [1, 0, 0]])
    model.a.requires_grad_(False)
    before = state(model)
    recording = Recorder(model, ParameterSpace.of(model, ["a", "r"]))(x)
    assert_same(before, state(model))
    with pytest.raises(RuntimeError, match="boom"):
        recording.captures(torch.ones(1, 2, 2))
    assert_same(before, state(model))


class Pair(NamedTuple):
    left: Tensor
    right: Tensor


class BatchEncoding(UserDict):
    """What tokenizers of Hugging Face give: a mapping with attributes."""

    def __getattr__(self, key: str) -> Tensor:
        if key == "data":
            raise AttributeError(key)
        return self.data[key]


@dataclass
class Output:
    logits: Tensor
    hidden: Tensor


class Encoder(nn.Module):
    """Tokens and a mask by name; positions, attention, padding left out; the result is an object."""

    def __init__(self, kind: str = "object") -> None:
        super().__init__()
        self.kind = kind
        self.tokens, self.positions = nn.Embedding(6, 4), nn.Embedding(5, 4)
        self.layer = nn.TransformerEncoderLayer(4, 2, 3, batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, input_ids, attention_mask=None, scale=1.0):
        h = self.tokens(input_ids) + self.positions(torch.arange(input_ids.shape[1]))
        h = self.layer(h, src_key_padding_mask=None if attention_mask is None else attention_mask == 0)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        logits = scale * self.head((h * mask[..., None]).sum(1))
        return {
            "object": Output(logits, h),
            "mapping": {"logits": logits, "hidden": h},
            "namespace": SimpleNamespace(logits=logits),
            "tensor": logits,
        }[self.kind]


def encoded(n: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(n, 5, dtype=torch.long)
    mask[1:, 3:] = 0
    return {"input_ids": torch.randint(6, (n, 5), generator=generator), "attention_mask": mask}


@pytest.mark.parametrize("kind", ["object", "mapping", "namespace", "tensor"])
@pytest.mark.parametrize(
    "pack", [dict, BatchEncoding, lambda d: tuple(d.values()), lambda d: list(d.values())]
)
def test_batches_of_several_tensors_and_outputs_in_objects(kind, pack):
    torch.manual_seed(0)
    model, batch = Encoder(kind).double().eval(), encoded()
    x = pack(batch)
    recorder = Recorder(model, ParameterSpace.of(model))
    before = state(model)
    _, features = feature_maps.JacobianMap.of(recorder)(x)
    assert_same(before, state(model))
    assert {name for name, how in recorder.served.items() if how != RULE} == {"positions.weight"}
    samples = [{name: t[i : i + 1] for name, t in batch.items()} for i in range(3)]
    read = {"mapping": lambda r: r["logits"], "tensor": lambda r: r}.get(kind, lambda r: r.logits)
    assert_close(features.to_dense(), jacobian_row_by_row(model, samples, read=read))


@pytest.mark.parametrize(
    "pack", [BatchEncoding, dict, lambda d: Pair(*d.values()), lambda d: list(d.values())]
)
def test_a_model_of_one_argument_gets_the_batch_as_it_is(pack):
    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = Encoder("tensor")

        def forward(self, batch):
            assert type(batch) is type(x)
            if isinstance(batch, BatchEncoding):
                return self.encoder(batch.input_ids, batch.attention_mask)
            if isinstance(batch, Pair):
                return self.encoder(batch.left, batch.right)
            return self.encoder(**batch) if isinstance(batch, dict) else self.encoder(*batch)

    torch.manual_seed(0)
    model, batch = One().double().eval(), encoded()
    x = pack(batch)
    _, features = feature_maps.JacobianMap(model)(x)
    samples = [{name: t[i : i + 1] for name, t in batch.items()} for i in range(3)]
    assert_close(features.to_dense(), jacobian_row_by_row(model.encoder, samples))
    assert all(torch.equal(t, batch[name]) for name, t in batch.items())


@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (2, 1, 3)], ids=str)
def test_outputs_of_any_shape(shape):
    numel = torch.Size(shape).numel()
    model = Net(lambda net, x: net.r(net.a(x)).reshape(len(x), *shape), a=nn.Linear(3, numel), r=nn.PReLU())
    for n in (1, 4):
        x = torch.randn(n, 3).double()
        recording = Recorder(model, ParameterSpace.of(model))(x)
        assert recording.outputs.shape == (n, *shape)
        columns = torch.randn(5, n, *shape).double()
        rows = torch.cat([block.flat_rows() for block in recording.captures(columns).blocks], dim=2)
        assert_close(rows, torch.einsum("vnc,ncp->nvp", columns.reshape(5, n, -1), oracle(model, x)))


def test_a_shared_tensor_among_the_inputs_is_left_whole():
    """A graph for all samples: only what is as long as the batch is cut."""
    model = Net(lambda net, x: net.r(net.a(x[0])) @ x[1], a=nn.Linear(3, 4), r=nn.PReLU())
    x, shared = torch.randn(3, 3).double(), torch.randn(4, 2).double()
    _, features = feature_maps.JacobianMap(model)((x, shared))
    assert_close(features.to_dense(), jacobian_row_by_row(model, [((row[None], shared),) for row in x]))


def test_samples_along_another_axis_of_the_input_are_served_from_the_whole_batch():
    model = Net(lambda net, x: net.cell(x)[0][-1], cell=nn.GRU(3, 2))
    x = torch.randn(5, 4, 3).double()  # time-major
    _, features = feature_maps.JacobianMap(model)(x)
    assert_close(features.to_dense(), jacobian_row_by_row(model, [(x[:, i : i + 1],) for i in range(4)]))


def test_what_samples_share_is_served_when_a_later_input_cannot_be_cut():
    """The second input has its samples along axis 1: rows come from the whole batch."""

    def forward(net, x):
        h = x if x.shape[2] == 3 else x.permute(1, 2, 0)
        return (h + net.p(torch.arange(2))).sin().sum(1)

    model, x = Net(forward, p=nn.Embedding(2, 3)), torch.randn(4, 2, 3).double()
    features = feature_maps.JacobianMap(model)
    expected = oracle(model, x)
    assert_close(features(x)[1].to_dense(), expected)
    assert_close(features(x.permute(2, 0, 1).contiguous())[1].to_dense(), expected)


def test_recurrent_layers_run_without_cudnn_inside_only():
    seen = []

    def forward(net, x):
        seen.append(torch.backends.cudnn.enabled)
        return net.head(last(net.cell(x)))

    recurrent = Net(forward, cell=nn.GRU(3, 4, batch_first=True), head=nn.Linear(4, 2))
    enabled = torch.backends.cudnn.enabled
    feature_maps.JacobianMap(recurrent)(torch.randn(2, 4, 3).double())
    assert not any(seen)
    assert torch.backends.cudnn.enabled == enabled


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_models_of_half_precision(dtype):
    """To the precision of their dtype, by rules and by autodiff."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv1d(2, 4, 3, padding=1),
        nn.GroupNorm(2, 4),
        nn.PReLU(),
        nn.Flatten(),
        nn.Linear(20, 3),
        nn.LayerNorm(3),
    )
    x = torch.randn(4, 2, 5).to(dtype)
    model.to(dtype)
    f, features = feature_maps.JacobianMap(model)(x)
    assert f.dtype == dtype
    found = features.to_dense().double()
    exact = oracle(model.double(), x.double())
    assert float((found - exact).norm() / exact.norm()) < 8 * torch.finfo(dtype).eps


def test_parameters_on_several_devices_are_refused():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2, device="meta"))
    with pytest.raises(UnsupportedError, match=r"all on one device, found cpu, meta"):
        Recorder(model, ParameterSpace.of(model, ["0"]))(torch.randn(4, 3))


def test_the_oracles_agree():
    model, shape, _ = model_of("einsum")
    x = torch.randn(3, *shape).double()
    J = oracle(model, x).flatten(0, 1)
    assert_close(J.mT @ J, ggn(model, x, torch.zeros(3, 2).double(), half_squared_error))


def oracle(model: nn.Module, x: Tensor, names: list[str] | None = None) -> Tensor:
    """By what happens when a parameter is replaced, of the model's own tensors if that is where the graph leads."""
    rows = jacobian_row_by_row(model, [(sample[None],) for sample in x], names)
    own = [p for name, p in model.named_parameters() if names is None or name in names]
    past = []
    for sample in x:
        parameters = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
        outputs = torch.func.functional_call(model, parameters, (sample[None],)).flatten()
        gradients = [torch.autograd.grad(f, own, retain_graph=True, materialize_grads=True) for f in outputs]
        past.append(torch.stack([torch.cat([g.flatten() for g in row]) for row in gradients]))
    return rows + torch.stack(past)


def test_a_parameter_that_is_viewed_as_complex_numbers_is_served_by_autodiff():
    """A spectral filter, ``irfft(w rfft(x))``."""
    torch.manual_seed(5)
    model = Net(
        lambda net, x: torch.fft.irfft(torch.fft.rfft(x) * torch.view_as_complex(net.w), n=3), w=weight(2, 2)
    )
    x = torch.randn(4, 3).double()
    found = curvature(model, "regression", [(x, torch.randn(4, 3).double())], "full").to_dense()
    J = jacobian_row_by_row(model, [(sample,) for sample in x.split(1)]).flatten(0, 1)
    torch.testing.assert_close(found, J.mT @ J, rtol=1e-10, atol=1e-14)
