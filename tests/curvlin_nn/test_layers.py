"""Every layer that has a rule: the captured Jacobian is that of per-sample autodiff, at every option and sharing."""

import functools
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from network_oracle import ggn, half_squared_error, jacobian_row_by_row
from networks import assert_close, assert_same, state
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from curvlin_nn import ParameterSpace, curvature, feature_maps
from curvlin_nn.capture import Recorder
from curvlin_nn.errors import UnsupportedError, UnsupportedUseError

Forward = Callable[[nn.Module, Tensor], Tensor]


class Net(nn.Module):
    """Layers by name, and a function of them."""

    def __init__(self, forward: Forward, **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.function = forward
        generator = torch.Generator().manual_seed(3)
        for p in self.parameters():  # also those that start as zeros and ones
            p.data = torch.randn(p.shape, generator=generator).double() / math.sqrt(
                max(1, p.shape[-1] if p.ndim else 1)
            )
        for b in self.buffers():
            b.data = torch.rand(b.shape, generator=generator).double() + 0.5 if b.is_floating_point() else b
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def pooled(layer: nn.Module, outputs: int = 2) -> Net:
    """The layer, and a head on a few weighted sums of what it gives."""

    def forward(net: nn.Module, x: Tensor) -> Tensor:
        h = torch.tanh(net.layer(x)).flatten(1)
        weights = torch.cos(torch.arange(outputs * h.shape[1], dtype=h.dtype)).reshape(h.shape[1], outputs)
        return torch.tanh(h @ weights / h.shape[1] ** 0.5)

    return Net(forward, layer=layer)


def assert_served(model: nn.Module, x: Tensor, names: list[str] | None = None) -> None:
    """The Jacobian of a batch is that of its samples, one by one; and the model is as it was."""
    space = ParameterSpace.of(model, "all" if names is None else names)
    recorder = Recorder(model, space)
    before = state(model)
    outputs, features = feature_maps.JacobianMap.of(recorder)(x)
    assert_same(before, state(model))
    assert set(recorder.served) == set(space.names)
    assert set(recorder.served.values()) == {"rule"}
    alone = torch.stack([model(sample[None])[0].detach().flatten() for sample in x])
    torch.testing.assert_close(outputs, alone, rtol=1e-10, atol=1e-12)
    assert_close(features.to_dense(), jacobian(model, x, list(space.names)))


def jacobian(model: nn.Module, x: Tensor, names: list[str] | None = None) -> Tensor:
    return jacobian_row_by_row(model, [(sample[None],) for sample in x], names)


CONVOLUTIONS = [
    {},
    {"stride": 2},
    {"stride": 3, "padding": 2},
    {"padding": "same"},
    {"padding": "same", "dilation": 2},
    {"padding": "valid", "dilation": 2},
    {"groups": 2},
    {"groups": 4, "bias": False},
    *({"padding": 1, "padding_mode": mode} for mode in ("zeros", "reflect", "replicate", "circular")),
    {"padding": "same", "padding_mode": "circular", "groups": 2, "dilation": 2},
]
SIZES = {1: (9,), 2: (6, 7), 3: (5, 6, 5)}


@pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel:UserWarning")
@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize(("ndim", "kernel"), [(1, 3), (1, 2), (2, 3), (2, (2, 3)), (3, 3), (3, (1, 2, 3))])
def test_convolutions(ndim, kernel, options):
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[ndim - 1](4, 4, kernel, **options)
    assert_served(pooled(conv), torch.randn(3, 4, *SIZES[ndim]).double())


@pytest.mark.parametrize(("ndim", "layout"), [(2, torch.channels_last), (3, torch.channels_last_3d)])
@pytest.mark.parametrize("transposed", [False, True])
def test_convolutions_do_not_mind_how_memory_is_laid_out(ndim, layout, transposed):
    """The flat order of a weight is that of its indices, not of its memory."""
    makes = (nn.ConvTranspose2d, nn.ConvTranspose3d) if transposed else (nn.Conv2d, nn.Conv3d)
    model = pooled(makes[ndim - 2](4, 6, 3, stride=2, padding=1, groups=2))
    x = torch.randn(3, 4, *SIZES[ndim]).double()
    expected = jacobian(model, x)
    model.to(memory_format=layout)
    _, features = feature_maps.JacobianMap(model)(x.to(memory_format=layout))
    assert_close(features.to_dense(), expected)


TRANSPOSED = [
    {},
    {"stride": 2},
    {"stride": 3, "padding": 1, "output_padding": 2},
    {"stride": 2, "dilation": 2, "padding": 2, "output_padding": 1},
    {"groups": 2},
    {"groups": 4, "bias": False, "stride": 2},
    {"padding": 2},
]


@pytest.mark.parametrize("options", TRANSPOSED, ids=str)
@pytest.mark.parametrize(("ndim", "kernel"), [(1, 3), (2, 3), (2, (4, 3)), (3, 3)])
def test_transposed_convolutions(ndim, kernel, options):
    conv = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[ndim - 1](4, 8, kernel, **options)
    assert_served(pooled(conv), torch.randn(3, 4, *(4, 3, 3)[:ndim]).double())


@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize("padding_idx", [None, 0, 3, -1])
def test_embeddings(n, padding_idx):
    tokens = torch.randint(6, (n, 4), generator=torch.Generator().manual_seed(n))
    tokens[0] = torch.tensor([0, 3, 5, 3])
    assert_served(pooled(nn.Embedding(6, 3, padding_idx=padding_idx)), tokens)


@pytest.mark.parametrize("padding_idx", [None, 1, -2])
def test_embeddings_by_function(padding_idx):
    """A negative index counts from the end here too."""
    tokens = torch.tensor([[0, 3, 2], [2, 1, 3]])
    model = Net(lambda net, x: F.embedding(x, net.w, padding_idx).sin().sum(1), w=parameter(4, 3))
    assert_served(model, tokens)


NORMS = {
    "layer norm": (nn.LayerNorm(5), (4, 5)),
    "layer norm over two axes": (nn.LayerNorm((4, 5), eps=1e-2), (3, 4, 5)),
    "layer norm without bias": (nn.LayerNorm(5, bias=False), (5,)),
    "rms norm": (nn.RMSNorm(5), (4, 5)),
    "rms norm over two axes": (nn.RMSNorm((4, 5), eps=1e-2), (4, 5)),
    "group norm": (nn.GroupNorm(2, 4), (4, 3, 3)),
    "group norm without pixels": (nn.GroupNorm(2, 4), (4,)),
    "instance norm 1d": (nn.InstanceNorm1d(3, affine=True), (3, 6)),
    "instance norm 2d": (nn.InstanceNorm2d(3, affine=True, eps=1e-2), (3, 4, 3)),
    "instance norm 3d with running statistics": (
        nn.InstanceNorm3d(3, affine=True, track_running_stats=True),
        (3, 2, 3, 2),
    ),
    "batch norm 1d": (nn.BatchNorm1d(4), (4,)),
    "batch norm 1d over time": (nn.BatchNorm1d(4), (4, 5)),
    "batch norm 2d": (nn.BatchNorm2d(4, eps=1e-2), (4, 3, 2)),
    "batch norm 3d": (nn.BatchNorm3d(2), (2, 3, 2, 2)),
}


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize(("layer", "shape"), NORMS.values(), ids=NORMS)
def test_normalisations(layer, shape, zero):
    model, x = pooled(layer), torch.randn(3, *shape).double()
    if zero:  # x_hat is not to be had from the output
        model.layer.weight.data.zero_()
    assert_served(model, x)


class Attention(nn.Module):
    """Queries, keys and values from one input or three, along either axis; weights of attention in the output."""

    def __init__(self, pattern: str, **options: object) -> None:
        super().__init__()
        self.pattern = pattern
        self.attention = nn.MultiheadAttention(4, 2, **options)

    def forward(self, x: Tensor) -> Tensor:  # (N, T, 4)
        h = x if self.attention.batch_first else x.transpose(0, 1)
        other = torch.sin(2 * h)
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        k, v = {
            "self": (h, h),
            "causal": (h, h),
            "cross": (other, other),
            "all different": (other, h + 1),
            "other widths": (other[..., :3], h[..., :2]),
        }[self.pattern]
        out, weights = self.attention(h, k, v, attn_mask=mask if self.pattern == "causal" else None)
        out = out if self.attention.batch_first else out.transpose(0, 1)
        return torch.cat([out, weights], dim=2)


PATTERNS = ["self", "causal", "cross", "all different"]
WIDTHS = {"kdim": 3, "vdim": 2}


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("pattern", "widths"), [*((p, {}) for p in PATTERNS), ("other widths", WIDTHS)])
@pytest.mark.parametrize(("n", "steps"), [(3, 2), (3, 3), (1, 3)])
def test_attention(pattern, widths, bias, batch_first, n, steps):
    layer = Attention(pattern, bias=bias, batch_first=batch_first, **widths)
    assert_served(pooled(layer), torch.randn(n, steps, 4).double())


def test_the_learned_key_and_value_of_attention():
    """They are appended to what is not seen: by autodiff; the projections by their rules."""
    model, x = pooled(Attention("cross", add_bias_kv=True)), torch.randn(3, 4, 4).double()
    recorder = Recorder(model, ParameterSpace.of(model))
    _, features = feature_maps.JacobianMap.of(recorder)(x)
    assert_close(features.to_dense(), jacobian(model, x))
    by_autodiff = {name for name, how in recorder.served.items() if how != "rule"}
    assert by_autodiff == {"layer.attention.bias_k", "layer.attention.bias_v"}


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("names", [None, ["layer.linear2"], ["layer.self_attn"], ["layer.norm1"]])
def test_transformer_layers_are_captured_past_their_fused_kernel(norm_first, batch_first, names):
    layer = nn.TransformerEncoderLayer(4, 2, 5, batch_first=batch_first, norm_first=norm_first)

    def forward(net: nn.Module, x: Tensor) -> Tensor:
        h = net.layer(x) if batch_first else net.layer(x.transpose(0, 1)).transpose(0, 1)
        return h.mean(1)

    model, x = Net(forward, layer=layer), torch.randn(3, 5, 4).double()
    with torch.no_grad():
        fused = model(x)
    assert torch.backends.mha.get_fastpath_enabled()
    assert_served(model, x, names=names)
    assert torch.backends.mha.get_fastpath_enabled()
    outputs, _ = feature_maps.JacobianMap(model, ["layer.linear2"])(x)
    assert_close(outputs, fused)


def test_decoder_layers():
    layer = nn.TransformerDecoderLayer(4, 2, 5, batch_first=True)
    model = Net(
        lambda net, x: net.layer(x[:, :3], net.encoder(x)).mean(1), layer=layer, encoder=nn.Linear(4, 4)
    )
    assert_served(model, torch.randn(3, 5, 4).double())


def test_fused_attention_is_off_inside_only():
    seen = []

    def forward(net: nn.Module, x: Tensor) -> Tensor:
        seen.append(torch.backends.mha.get_fastpath_enabled())
        return net.layer(x)

    feature_maps.JacobianMap(Net(forward, layer=nn.Linear(3, 2)))(torch.randn(2, 3).double())
    assert seen
    assert not any(seen)
    assert torch.backends.mha.get_fastpath_enabled()


class Conv1D(nn.Module):
    """The linear layer of GPT-2."""

    def __init__(self, out: int, inputs: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(inputs, out)), nn.Parameter(torch.empty(out))

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight)
        return rows.reshape(*x.shape[:-1], -1)


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape))


MATRICES: dict[str, tuple[Forward, dict[str, nn.Module | nn.Parameter]]] = {
    "x @ W": (lambda net, x: x @ net.w, {"w": parameter(3, 2)}),
    "x @ W.T": (lambda net, x: x @ net.w.T, {"w": parameter(2, 3)}),
    "x @ W.mT + b": (lambda net, x: x @ net.w.mT + net.b, {"w": parameter(2, 3), "b": parameter(2)}),
    "matmul": (lambda net, x: torch.matmul(x, net.w.transpose(0, 1)), {"w": parameter(2, 3)}),
    "mm": (
        lambda net, x: torch.mm(x.reshape(-1, 3), net.w).reshape(*x.shape[:-1], 2),
        {"w": parameter(3, 2)},
    ),
    "linear of W.T": (lambda net, x: F.linear(x, net.w.T), {"w": parameter(3, 2)}),
    "as it is and transposed": (
        lambda net, x: F.linear(torch.tanh(x @ net.w), net.w),
        {"w": parameter(3, 2)},
    ),
    "square, as it is and transposed": (
        lambda net, x: F.linear(torch.tanh(x @ net.w), net.w, net.b),
        {"w": parameter(3, 3), "b": parameter(3)},
    ),
    "addmm": (lambda net, x: net.c(x), {"c": Conv1D(2, 3)}),
    "rows apart": (
        lambda net, x: torch.tanh(F.linear(x, net.w[:2], net.b[:2])) * F.linear(x, net.w[2:], net.b[2:]),
        {"w": parameter(4, 3), "b": parameter(4)},
    ),
    "chunks": (
        lambda net, x: torch.stack([torch.tanh(F.linear(x, w)) for w in net.w.chunk(3)]).prod(0),
        {"w": parameter(6, 3)},
    ),
    "split by unbind": (
        lambda net, x: torch.stack([torch.tanh(x @ w) for w in net.w.unbind(0)]).prod(0),
        {"w": parameter(2, 3, 2)},
    ),
    "reshaped": (lambda net, x: F.linear(x, net.w.view(2, 3)), {"w": parameter(6)}),
    "scaled and shifted": (lambda net, x: x * net.g + net.b, {"g": parameter(3), "b": parameter(1, 3)}),
    "scaled by one number": (lambda net, x: net.g * x, {"g": parameter()}),
    "shifted in place": (lambda net, x: (x * 1).add_(net.b).sin(), {"b": parameter(3)}),
}


@pytest.mark.parametrize("shape", [(3,), (4, 3), (5, 3)], ids=str)
@pytest.mark.parametrize(("forward", "parts"), MATRICES.values(), ids=MATRICES)
def test_linear_maps_in_every_form(forward, parts, shape):
    model = Net(lambda net, x: torch.tanh(forward(net, x)).flatten(1), **parts)
    assert_served(model, torch.randn(5, *shape).double())


def test_a_position_embedding_that_is_added():
    positions = parameter(1, 4, 3)
    model = Net(lambda net, x: torch.tanh(x + net.p).mean(1), p=positions)
    for n in (1, 2, 3):
        assert_served(model, torch.randn(n, 4, 3).double())


class Tied(nn.Module):
    """A small language model whose output layer is its embedding."""

    def __init__(self, vocabulary: int = 7, width: int = 3, padding_idx: int | None = None) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width, padding_idx=padding_idx)
        self.mix = nn.Linear(width, width)
        self.head = nn.Linear(width, vocabulary)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        h = torch.tanh(self.mix(self.embed(tokens)).cumsum(1))
        return self.head(h).flatten(1)


@pytest.mark.parametrize(("vocabulary", "padding_idx"), [(7, None), (3, None), (3, 1)])
def test_a_weight_tied_between_embedding_and_output(vocabulary, padding_idx):
    model, tokens = Tied(vocabulary, 3, padding_idx).double(), torch.randint(vocabulary, (4, 2))
    tokens[0, 0] = 1
    assert_served(model, tokens)
    y = torch.zeros(4, 2 * vocabulary).double()
    H = ggn(model, tokens, y, half_squared_error)
    loader = [(tokens[:3], y[:3]), (tokens[3:], y[3:])]
    assert_close(curvature(model, "regression", loader, "full").to_dense(), H)
    assert_close(curvature(model, "regression", loader, "diag").to_dense().diagonal(), H.diagonal())


def test_both_kinds_of_use_of_a_tied_weight_are_kept():
    """Their rows add up to those of the block, each in its own order."""
    model, tokens = Tied().double(), torch.randint(7, (4, 2))
    recording = Recorder(model, ParameterSpace.of(model, ["embed"]))(tokens)
    (block,) = recording.captures(torch.randn(3, 4, 14).double()).blocks
    natural, transposed = block.uses
    assert (natural.shape, transposed.shape) == ((7, 3), (3, 7))
    assert not block.transposed
    total = natural.rows() + transposed.rows().unflatten(2, (3, 7)).mT.flatten(2)
    assert_close(block.rows(), total)


class LoRA(nn.Module):
    """A frozen layer and a low-rank adapter."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a = nn.Linear(base.in_features, rank, bias=False)
        self.b = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 0.5 * self.b(self.a(x))


def test_adapters_of_frozen_layers():
    model = nn.Sequential(LoRA(nn.Linear(4, 5)), nn.Tanh(), LoRA(nn.Linear(5, 3))).double()
    x = torch.randn(4, 6, 4).double()
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert names == ["0.a.weight", "0.b.weight", "2.a.weight", "2.b.weight"]
    pooling = Net(lambda net, x: net.lora(x).sum(1), lora=model)
    assert_served(pooling, x)
    assert_served(pooling, x, names=["lora.0.base"])  # frozen ones can be chosen too


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_checkpoints(reentrant, training):
    body = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.Tanh())

    def forward(net: nn.Module, x: Tensor) -> Tensor:
        return net.head(checkpoint(net.body, x, use_reentrant=reentrant))

    model = Net(forward, body=body, head=nn.Linear(4, 2))
    x = torch.randn(4, 3).double()
    expected = jacobian(Net(lambda net, x: net.head(net.body(x)), body=body, head=model.head), x)
    model.train(training)
    before = state(model)
    _, features = feature_maps.JacobianMap(model)(x)
    assert_same(before, state(model))
    names = [name for name, _ in model.named_parameters()]
    order = [name for part in ("body", "head") for name in names if name.startswith(part)]
    assert order == names
    assert_close(features.to_dense(), expected)


def test_torch_is_as_it_was_after_a_failure_inside_attention_and_checkpoints():
    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("boom")

    def forward(net: nn.Module, x: Tensor) -> Tensor:
        return checkpoint(net.layer, x, use_reentrant=False).mean(1)

    model, x = Net(forward, layer=Attention("self")), torch.randn(3, 2, 4).double()
    module = torch.utils.checkpoint
    kept = F.linear, module.CheckpointFunction, module._checkpoint_without_reentrant_generator
    softmax = F.softmax
    before = state(model)
    for enabled in (True, False):
        torch.backends.mha.set_fastpath_enabled(enabled)
        F.softmax = fail  # called by attention, between its linear maps
        try:
            with pytest.raises(RuntimeError, match="boom"):
                feature_maps.JacobianMap(model)(x)
            assert torch.backends.mha.get_fastpath_enabled() is enabled
        finally:
            F.softmax = softmax
            torch.backends.mha.set_fastpath_enabled(True)
        assert kept == (F.linear, module.CheckpointFunction, module._checkpoint_without_reentrant_generator)
        assert_same(before, state(model))
    assert_served(model, x)


@pytest.mark.parametrize("option", ["sparse", "scale_grad_by_freq"])
def test_embeddings_whose_gradient_is_no_dense_derivative_are_refused_by_name(option):
    model = pooled(nn.Embedding(5, 3, **{option: True}))
    for fallback in (False, True):
        recorder = Recorder(model, ParameterSpace.of(model), fallback=fallback)
        with pytest.raises(
            UnsupportedUseError, match=rf"'layer.weight' is used by embedding with {option}=True"
        ):
            recorder(torch.randint(5, (3, 2)))


@pytest.mark.parametrize("chosen", [True, False])
@pytest.mark.parametrize("make", [nn.Embedding, nn.EmbeddingBag])
def test_an_embedding_that_renormalises_its_weight_is_refused_before_it_does(make, chosen):
    head = nn.Linear(6 if make is nn.Embedding else 3, 2)
    layer = make(5, 3, max_norm=0.1)
    model = Net(lambda net, x: net.head(net.layer(x).flatten(1)), layer=layer, head=head)
    tokens = torch.randint(5, (3, 2))
    before = state(model)
    found = "embedding.* of parameter 'layer.weight' with max_norm" if chosen else "embedding.* with max_norm"
    with pytest.raises(UnsupportedError, match=found):
        feature_maps.JacobianMap(model, "all" if chosen else ["head"])(tokens)
    with pytest.raises(UnsupportedError, match="with max_norm changes its weight in place"):
        feature_maps.LastLayerMap(model)(tokens)
    assert_same(before, state(model))


def blocks(channels: int, steps: int) -> dict[str, tuple[Callable[[], nn.Module], int]]:
    """Layers on ``(N, channels, steps)``, and the channels they give."""
    eps = (
        0.1  # a normalisation of a normalisation hardly depends on its input otherwise: all would be rounding
    )
    time_last = {
        "conv": (lambda: nn.Conv1d(channels, 4, 3, padding=1), 4),
        "grouped": (
            lambda: nn.Conv1d(channels, channels, 2, padding="same", groups=channels, bias=False),
            channels,
        ),
        "transposed": (lambda: nn.ConvTranspose1d(channels, 3, 3, padding=1), 3),
        "batch norm": (lambda: nn.BatchNorm1d(channels, eps=eps), channels),
        "group norm": (lambda: nn.GroupNorm(1, channels, eps=eps), channels),
        "instance norm": (lambda: nn.InstanceNorm1d(channels, affine=True, eps=eps), channels),
        "tanh": (nn.Tanh, channels),
        "relu": (nn.ReLU, channels),
    }
    channels_last = {
        "linear": (lambda: nn.Linear(channels, 3), 3),
        "gpt": (lambda: Conv1D(4, channels), 4),
        "layer norm": (lambda: nn.LayerNorm(channels, eps=eps), channels),
        "rms norm": (lambda: nn.RMSNorm((steps, channels), eps=eps), channels),
        "attention": (
            lambda: nn.TransformerEncoderLayer(channels, 1, 3, batch_first=True, layer_norm_eps=eps),
            channels,
        ),
        "lstm": (lambda: First(nn.LSTM(channels, 2, batch_first=True)), 2),
        "time-major": (lambda: Transposed(nn.Linear(channels, 4), 0, 1), 4),
    }
    swapped = {
        name: (functools.partial(lambda make: Transposed(make(), 1, 2), make), out)
        for name, (make, out) in channels_last.items()
    }
    return time_last | swapped


class Transposed(nn.Module):
    """A layer with two axes exchanged before and after."""

    def __init__(self, layer: nn.Module, *axes: int) -> None:
        super().__init__()
        self.layer, self.axes = layer, axes

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.transpose(*self.axes)).transpose(*self.axes)


class First(nn.Module):
    """The first result of a layer that gives several."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


@pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel:UserWarning")
@settings(max_examples=100)
@given(
    data=st.data(), n=st.sampled_from([1, 2, 3, 4]), steps=st.sampled_from([3, 4]), depth=st.integers(1, 4)
)
def test_random_networks(data, n, steps, depth):
    channels, layers = 2, []
    for _ in range(depth):
        choices = blocks(channels, steps)
        make, out = choices[data.draw(st.sampled_from(sorted(choices)))]
        layers.append(make())
        channels = out
    reused = data.draw(st.booleans())
    body = nn.Sequential(*layers, *(layers[-1:] if reused and channels == 2 and depth == 1 else []))

    def forward(net: nn.Module, x: Tensor) -> Tensor:
        return net.head(torch.tanh(net.body(x)).flatten(1))

    model = Net(forward, body=body, head=nn.Linear(channels * steps, 2))
    x = torch.randn(n, 2, steps, generator=torch.Generator().manual_seed(n)).double()
    before = state(model)
    _, features = feature_maps.JacobianMap(model)(x)
    assert_same(before, state(model))
    assert_close(features.to_dense(), jacobian(model, x))


@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 3), (4, 2, 3, 2)])
def test_an_instance_norm_has_one_jacobian_for_one_sample_and_in_a_batch(shape):
    """Torch's backward pass of one sample misreads gradients with channels last; the oracle has a batch of two."""
    kind = {2: nn.InstanceNorm1d, 3: nn.InstanceNorm2d, 4: nn.InstanceNorm3d}[len(shape)]

    def forward(net: nn.Module, x: Tensor) -> Tensor:
        h = net.norm(x * net.scale)
        return net.head(torch.tanh(h.movedim(1, -1))).flatten(1)[:, :3]

    model = Net(
        forward, scale=nn.Parameter(torch.ones(())), norm=kind(4, affine=True, eps=0.1), head=nn.Linear(4, 2)
    )
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0)).double()
    parameters = tuple(model.parameters())
    recorder = Recorder(model, ParameterSpace.of(model))
    for batch in (x, x[:1]):
        _, features = feature_maps.JacobianMap.of(recorder)(batch)
        for sample, rows in zip(batch, features.to_dense(), strict=True):
            outputs = model(torch.stack([sample, sample]))[0]
            expected = [torch.autograd.grad(f, parameters, retain_graph=True) for f in outputs]
            expected = torch.stack([torch.cat([g.flatten() for g in row]) for row in expected])
            torch.testing.assert_close(rows, expected, rtol=1e-10, atol=1e-13)
    assert recorder.served["norm.weight"] == "rule"


VIEWS = {
    "linear": (nn.Linear(4, 3), (5, 4)),
    "instance norm": (nn.InstanceNorm2d(4, affine=True), (4, 2, 3)),
    "conv": (nn.Conv1d(4, 3, 2), (4, 5)),
}


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("n", [1, 3])
def test_an_activation_in_place_leaves_a_layer_its_rule(name, n):
    """Torch returns a view of some results, whose place in the graph the activation takes."""
    layer, shape = VIEWS[name]
    model = Net(lambda net, x: torch.tanh(F.leaky_relu_(net.layer(x), 0.1).flatten(1)[:, :3]), layer=layer)
    assert_served(model, torch.randn(n, *shape, generator=torch.Generator().manual_seed(1)).double())


def test_a_group_norm_of_channels_last_is_served_without_the_layers_before_it():
    """Torch's own backward pass ends the process there; the oracle has the usual order of memory."""
    x = torch.randn(3, 4, 2, 3, generator=torch.Generator().manual_seed(0)).double()
    model = pooled(nn.GroupNorm(2, 4))
    _, features = feature_maps.JacobianMap(model)(x.contiguous(memory_format=torch.channels_last))
    assert_close(features.to_dense(), jacobian(model, x))
