import functools
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from network_oracle import jacobian
from networks import Sequences, assert_same, cnn, mlp, state
from torch import Tensor, nn

from curvlin_nn import ParameterSpace, feature_maps
from curvlin_nn.capture import Recorder, last_layer
from curvlin_nn.capture.checks import separating_sets
from curvlin_nn.errors import (
    CouplingError,
    DataError,
    ModifiedInputError,
    OutputError,
    StochasticModelError,
    UnsupportedError,
    UnsupportedUseError,
)


def conv(*args, **kwargs) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(*args, **kwargs), nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.LazyLinear(2)
    ).double()


CONVOLUTIONS = [
    {},
    {"stride": 2},
    {"stride": (1, 2), "padding": (2, 0)},
    {"padding": "same"},
    {"padding": "same", "dilation": (2, 1)},
    {"padding": "valid", "dilation": 2},
    {"groups": 2},
    {"groups": 4, "bias": False},
    *({"padding": (1, 2), "padding_mode": mode} for mode in ("zeros", "reflect", "replicate", "circular")),
    {"padding": "same", "padding_mode": "circular", "groups": 2, "dilation": 2},
]


@pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel:UserWarning")
@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize("kernel", [3, (2, 3), 1])
def test_convolution_jacobian_equals_autodiff(options, kernel):
    x = torch.randn(3, 4, 7, 6, dtype=torch.float64)
    model = conv(4, 4, kernel, **options)
    model(x)
    assert_jacobian(model, x)


@pytest.mark.parametrize("n", [1, 2, 3, 5])
@pytest.mark.parametrize("make", [mlp, cnn])
def test_network_jacobian_equals_autodiff(make, n):
    shape = (4,) if make is mlp else (2, 6, 4)
    assert_jacobian(make(), torch.randn(n, *shape, dtype=torch.float64))


@pytest.mark.parametrize(("n", "steps"), [(3, 2), (3, 3), (2, 4), (1, 3), (3, 1)])
def test_reused_layers_and_every_batch_layout(n, steps):
    assert_jacobian(Sequences().double(), torch.randn(n, steps, 4, dtype=torch.float64))


class Functional(nn.Module):
    """Parameters used by function, one weight tied between two layers, one bias between two."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 4).double())
        self.b = nn.Parameter(torch.randn(4).double())
        self.head = nn.Linear(4, 2).double()

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(F.linear(x, self.w, bias=self.b))
        h = torch.tanh(F.linear(weight=self.w, input=h))
        return self.head(torch.tanh(F.linear(h, self.w, self.b)))


def test_functional_and_tied_uses():
    assert_jacobian(Functional(), torch.randn(5, 4, dtype=torch.float64))


def test_an_unused_parameter_has_a_zero_jacobian():
    model = mlp()
    model.register_module("spare", nn.Linear(3, 2).double())
    model.register_parameter("scale", nn.Parameter(torch.ones((), dtype=torch.float64)))
    model.forward = lambda x: nn.Sequential(*list(model)[:5])(x)
    assert_jacobian(model, torch.randn(4, 4, dtype=torch.float64))


def test_in_place_activations_after_a_layer_are_harmless():
    model = nn.Sequential(
        nn.Linear(3, 8), nn.ReLU(inplace=True), nn.Linear(8, 4), nn.Hardtanh(inplace=True), nn.Linear(4, 2)
    ).double()
    assert_jacobian(model, 3 * torch.randn(6, 3, dtype=torch.float64))


def test_a_subset_gives_the_columns_of_the_subset():
    model, x = mlp(), torch.randn(4, 4, dtype=torch.float64)
    _, features = feature_maps.JacobianMap(model, ["0.bias", "4.weight"])(x)
    torch.testing.assert_close(features.to_dense(), jacobian(model, x, ["0.bias", "4.weight"]))


def test_last_layer_map_finds_the_layer_that_runs_last_not_the_one_registered_last():
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(5, 3)
            self.body = nn.Linear(4, 5)
            self.norm = nn.BatchNorm1d(5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.norm(self.body(x))))

    model, x = Backwards().double(), torch.randn(4, 4, dtype=torch.float64)
    f, features = feature_maps.LastLayerMap(model)(x)
    model.eval()
    torch.testing.assert_close(f, model(x).detach())
    torch.testing.assert_close(features.to_dense(), jacobian(model, x, ["head.weight", "head.bias"]))


class Einsum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.w = nn.Parameter(torch.randn(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("ni,oi->no", torch.tanh(self.first(x)), self.w)


def test_a_use_without_a_rule_is_refused_by_name():
    with pytest.raises(UnsupportedUseError, match=r"parameter 'w' is used by einsum") as caught:
        record(Einsum(), torch.randn(4, 3))
    assert caught.value.parameter == "w"
    record(Einsum(), torch.randn(4, 3), ["first"])  # the parameter left out, the rest is served


def test_a_parameter_that_is_a_layers_input_is_refused_by_name():
    class Latent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.latent = nn.Parameter(torch.randn(4, 3))
            self.layer = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.latent) + x.sum()

    with pytest.raises(UnsupportedUseError, match="parameter 'latent' is an input of linear"):
        record(Latent(), torch.randn(4, 1))
    with pytest.raises(UnsupportedUseError, match=r"parameter 'layer.weight' is an input of linear"):
        model = nn.Sequential()
        model.layer = nn.Linear(3, 3)
        model.forward = lambda x: x @ torch.ones(1, 3) + model.layer(model.layer.weight).sum(0)
        record(model, torch.randn(4, 1))


def test_a_use_that_nobody_can_intercept_is_found_by_the_completeness_check():
    """An LSTM's weights are used inside one kernel; a hand-written autograd.Function is another place."""

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, w):
            ctx.save_for_backward(x, w)
            return x @ w

        @staticmethod
        def backward(ctx, g):
            x, w = ctx.saved_tensors
            return g @ w.T, x.T @ g

    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)
            self.layer.weight.requires_grad_()

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(Product.apply(x, self.layer.weight))

    with pytest.raises(UnsupportedUseError, match=r"parameter 'layer.weight' influences the outputs"):
        record(Hidden(), torch.randn(4, 3))
    lstm = nn.LSTM(3, 2, batch_first=True)
    model = nn.Sequential(nn.Linear(3, 3), lstm)
    model.forward = lambda x: lstm(model[0](x))[0][:, -1]
    with pytest.raises(UnsupportedUseError, match=r"parameter '1.weight_ih_l0'"):
        record(model, torch.randn(4, 5, 3))


class Kept(nn.Module):
    """Uses one weight through its module, or past it."""

    def __init__(self, past: str) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 2)
        self.listed = [self.a.weight]
        weight = self.a.weight
        view = self.a.weight[:, :]
        self.product = {
            "list": lambda x: F.linear(x, self.listed[0]),
            "closure": lambda x: x @ weight.mT,
            "partial": functools.partial(F.linear, weight=self.a.weight),
            "view": lambda x: F.linear(x, view),
            "both": lambda x: self.a(x) + F.linear(x, weight),
            "shape only": lambda x: self.a(x).reshape(-1, self.listed[0].shape[0]).to(weight.dtype),
        }[past]

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.product(x)))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("past", ["list", "closure", "partial", "view", "both"])
def test_a_parameter_used_past_its_module_is_refused_by_name(past, frozen):
    """A reference taken at construction is the model's own tensor, not the leaf that stands in for it."""
    model, x = Kept(past), torch.randn(4, 3)
    model.a.weight.requires_grad_(not frozen)
    before = state(model)
    with pytest.raises(
        UnsupportedUseError, match=r"parameter 'a.weight' reaches the outputs past its module"
    ):
        record(model, x, ["a.weight", "b"])
    assert_same(before, state(model))
    record(model, x, ["b"])


def test_a_reference_of_which_only_the_shape_is_used_is_harmless():
    assert_jacobian(Kept("shape only").double(), torch.randn(4, 3, dtype=torch.float64))


def test_coupling_between_samples_is_refused():
    model = nn.Sequential(
        nn.Linear(3, 4), nn.BatchNorm1d(4, affine=False, track_running_stats=False), nn.Linear(4, 2)
    )
    with pytest.raises(CouplingError, match=r"depends on other samples at parameter '0.weight'"):
        record(model, torch.randn(6, 3))


class GraphNetwork(nn.Module):
    """Nodes as samples, each seeing itself; with one edge, one node sees another one too."""

    def __init__(self, n: int, edge: tuple[int, int] | None) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)
        self.register_buffer("adjacency", torch.eye(n))
        if edge is not None:
            self.adjacency[edge] = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.adjacency[: len(x), : len(x)] @ self.a(x)))


@pytest.mark.parametrize("n", [2, 5, 6])
def test_coupling_of_any_two_samples_is_found_behind_the_parameters_and_before_them(n):
    x = torch.randn(n, 3)
    for edge in itertools.permutations(range(n), 2):
        model = GraphNetwork(n, edge)
        with pytest.raises(CouplingError, match=r"depends on other samples at parameter 'a\.weight'"):
            record(model, x)
        with pytest.raises(CouplingError, match="changes when other samples of the batch do"):
            record(model, x, ["b"])
        with pytest.raises(CouplingError, match="changes when other samples of the batch do"):
            feature_maps.LastLayerMap(model)(x)
    record(GraphNetwork(n, None), x)


@pytest.mark.parametrize("n", [2, 7, 40])
def test_a_course_that_a_sum_over_the_batch_decides_is_found_by_samples_alone(n):
    """No mixture of several samples falls below the threshold; each sample alone does."""

    class Deciding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return (self.a if bool(x.sum() > 4 * 3) else self.b)(x)

    x, model = 2 + torch.rand(n, 3), Deciding()
    before = state(model)
    for select in ("all", ["a"]):
        with pytest.raises(CouplingError, match="changes when it is the only one of a batch"):
            record(model, x, select)
    assert_same(before, state(model))


@pytest.mark.parametrize("axes", ["squeezed", "of the batch"])
def test_a_model_that_cannot_be_run_on_one_sample_is_taken_at_its_word(axes):
    class Rigid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x.squeeze() if axes == "squeezed" else x.view(5, 3))

    model, x = Rigid().double(), torch.randn(5, 1, 3).double()
    _, features = feature_maps.JacobianMap(model)(x)
    expected = jacobian(model.a, x.squeeze(1), ["weight", "bias"])
    torch.testing.assert_close(features.to_dense(), expected, rtol=1e-12, atol=1e-12)


def test_coupling_is_looked_for_when_the_first_batch_holds_one_sample():
    recorder = Recorder(model := GraphNetwork(4, (2, 3)), ParameterSpace.of(model, ["b"]))
    recorder(torch.randn(1, 3))
    recorder(torch.randn(3, 3))  # does not reach the edge
    model = GraphNetwork(4, (0, 1))
    recorder = Recorder(model, ParameterSpace.of(model, ["b"]))
    recorder(torch.randn(1, 3))
    with pytest.raises(CouplingError):
        recorder(torch.randn(4, 3))


def test_statistics_of_the_batch_before_the_chosen_parameters_are_refused():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 2))
    with pytest.raises(CouplingError, match="is a normalisation using statistics of the batch"):
        feature_maps.LastLayerMap(model)(torch.randn(6, 3))


@pytest.mark.parametrize("n", [1, 2, 3, 4, 6, 7, 20, 21, 300])
def test_separating_sets_separate_any_two_samples_both_ways(n):
    sets = separating_sets(n).long()
    assert sets.shape == (len(sets), n)
    alone = sets.mT @ (1 - sets)  # [i, j]: how many sets hold i without j
    assert bool((alone + torch.eye(n, dtype=torch.long) > 0).all())
    assert len(sets) <= math.log2(n) + math.log2(math.log2(n) + 1) / 2 + 2


def test_batch_norm_in_training_mode_is_evaluated_with_its_running_statistics():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)).double()
    model.train()
    model[1].running_mean.uniform_()
    x = torch.randn(5, 3, dtype=torch.float64)
    _, features = feature_maps.JacobianMap(model, ["0", "3"])(x)
    assert model[1].training
    model.eval()
    torch.testing.assert_close(
        features.to_dense(), jacobian(model, x, ["0.weight", "0.bias", "3.weight", "3.bias"])
    )


def test_a_layer_input_changed_in_place_is_refused():
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = x + 1
            out = self.a(h)
            h += 1
            return self.b(out + h)

    with pytest.raises(
        ModifiedInputError, match=r"the input of the layer with parameter 'a.weight' was changed"
    ):
        record(Residual(), torch.randn(4, 3))


def test_active_dropout_is_refused():
    class Dropping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(self.a(x), 0.5, training=True)

    model, x = Dropping(), torch.randn(4, 3)
    before = torch.get_rng_state()
    with pytest.raises(StochasticModelError, match="drew random numbers"):
        record(model, x)
    assert torch.equal(before, torch.get_rng_state())


def test_random_numbers_from_a_generator_of_the_models_own_are_found():
    class Dropping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.own = nn.Linear(3, 2), torch.Generator().manual_seed(0)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) * torch.bernoulli(torch.full((len(x), 2), 0.5), generator=self.own)

    with pytest.raises(StochasticModelError, match="outputs differ between two passes over one input"):
        record(Dropping(), torch.randn(8, 3))


def test_an_input_that_the_model_changes_in_place_is_left_alone():
    class Centring(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            x -= 1
            return self.a(x)

    model, x = Centring().double(), torch.randn(4, 3, dtype=torch.float64)
    before = x.clone()
    _, features = feature_maps.JacobianMap(model)(x)
    assert torch.equal(x, before)
    torch.testing.assert_close(features.to_dense(), jacobian(model.a, before - 1))


class Bytes(nn.Module):
    """Takes integers, and converts them itself."""

    def __init__(self, convert: bool = True) -> None:
        super().__init__()
        self.a, self.convert = nn.Linear(3, 2), convert

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x.to(self.a.weight.dtype) / 255 if self.convert else x)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.float32, torch.float16])
@pytest.mark.parametrize("head", [feature_maps.JacobianMap, feature_maps.LastLayerMap])
def test_inputs_of_a_dtype_that_the_model_does_not_take_are_refused(dtype, head):
    x = torch.ones(4, 3, dtype=dtype)
    message = rf"the input has dtype {dtype} and the model torch.float64, expected one that the model takes; it says: "
    with pytest.raises(DataError, match=message) as caught:
        head(Bytes(convert=False).double())(x)
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match=f"batch 3 has dtype {dtype}"):
        Recorder(model := Bytes(convert=False).double(), ParameterSpace.of(model))(x, "batch 3")
    model = Bytes().double()
    _, features = head(model)(x)
    torch.testing.assert_close(features.to_dense(), jacobian(model, x))


def test_token_indices_are_inputs_like_others():
    model = nn.Sequential(nn.Embedding(10, 4), nn.Flatten(), nn.Tanh(), nn.Linear(12, 2)).double()
    x = torch.randint(10, (5, 3))
    _, features = feature_maps.LastLayerMap(model)(x)
    torch.testing.assert_close(features.to_dense(), jacobian(model, x, ["3.weight", "3.bias"]))


def test_an_empty_input_is_refused_as_such():
    for features in (feature_maps.JacobianMap(mlp()), feature_maps.LastLayerMap(mlp())):
        with pytest.raises(DataError, match=r"the input must hold at least one sample, found shape \(0, 4\)"):
            features(torch.zeros(0, 4).double())


def test_autocast_is_refused_outside_of_the_model_and_inside():
    class Casting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu"):
                return self.a(x).float()

    x = torch.randn(4, 3)
    refused = pytest.raises(UnsupportedError, match=r"torch.autocast is on for cpu, expected it off")
    with refused, torch.autocast("cpu"):
        record(Bytes(), x)
    with pytest.raises(
        UnsupportedUseError, match=r"'a.weight' is used by linear in torch.bfloat16 \(is torch.autocast on"
    ):
        record(Casting(), x)
    with pytest.raises(
        UnsupportedUseError, match=r"'a.weight' is used by linear in torch.bfloat16 \(is torch.autocast on"
    ):
        feature_maps.LastLayerMap(Casting())(x)


def test_a_weight_used_whole_and_in_parts_is_refused():
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 4, 1, 1))
            self.v = nn.Parameter(torch.randn(4, 2, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            y = F.conv2d(x, self.v, groups=2) + F.conv2d(x[:, :2], self.v)
            return F.conv2d(y, self.w).mean((2, 3))

    with pytest.raises(UnsupportedUseError, match="parameter 'v' is used in parts of different shapes"):
        record(Mixed(), torch.randn(3, 4, 2, 2))


@pytest.mark.parametrize(
    ("forward", "found"),
    [
        (lambda x: x.sum(), r"at least one output for each sample, found \(\)"),
        (lambda x: x[:0], r"found \(0, 2\)"),
        (lambda x: {"outputs": x}, r"must be a tensor \(N, \.\.\.\), or have one under 'logits', found dict"),
        (lambda x: x / 0, "must be finite"),
        (lambda x: x.detach(), "depend on none of the chosen parameters"),
    ],
)
def test_outputs_of_the_wrong_kind_are_refused(forward, found):
    model = nn.Sequential(nn.Linear(3, 2))
    model.forward = lambda x: forward(model[0](x))
    with pytest.raises(OutputError, match=f"model outputs on batch 2.*{found}"):
        Recorder(model, ParameterSpace.of(model))(torch.randn(4, 3), "batch 2")
    with pytest.raises(OutputError, match=f"model outputs on batch 2.*{found}"):
        last_layer(model, torch.randn(4, 3), "batch 2")


def test_a_weight_without_rows_is_refused():
    class Vector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(3))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.w)[:, None]

    with pytest.raises(UnsupportedUseError, match=r"'w' is used by linear with a weight of shape \(3,\)"):
        record(Vector(), torch.randn(4, 3))


def test_layouts_are_found_where_most_gradients_vanish():
    """Each sample uses one expert; what one probe leaves open is probed again, and dead layers cost nothing."""

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(3, 2) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:  # (N, T, 3) with rows of all samples and steps together
            rows = x.reshape(-1, 3)
            chosen = x[:, 0].argmax(-1)  # of three: the fourth expert is never used
            y = torch.stack([expert(rows).reshape(len(x), -1, 2).sum(1) for expert in self.experts], dim=1)
            return y[torch.arange(len(x)), chosen] + 0 * y[:, 3]

    assert_jacobian(Experts().double(), torch.randn(6, 6, 3, dtype=torch.float64))


def test_a_probe_that_decides_nothing_is_followed_by_one_that_does():
    """Rows are time-major, and only sample 1 reaches the layer: the first probe, of sample 3, sees nothing."""

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            rows = self.layer(x.transpose(0, 1).reshape(-1, 3)).reshape(x.shape[1], len(x), 2)
            return rows[0] * (x[:, 0, :1] > 0)

    x = -torch.rand(6, 6, 3, dtype=torch.float64)
    x[1] *= -1
    assert_jacobian(Gated().double(), x)


@pytest.mark.parametrize("steps", [(1, 3), (3, 1, 3), (2, 3, 4, 1)])
def test_layouts_are_found_again_when_the_number_of_positions_changes(steps):
    """With one step per sample, time-major and sample-major rows are the same; with three they are not."""

    class TimeMajor(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            rows = torch.tanh(self.layer(x.transpose(0, 1).reshape(-1, 3)))
            return self.head(rows.reshape(x.shape[1], len(x), 4).mean(0))

    model = TimeMajor().double()
    features = feature_maps.JacobianMap(model)
    for n_steps in steps:
        x = torch.randn(4, n_steps, 3, dtype=torch.float64)
        torch.testing.assert_close(features(x)[1].to_dense(), jacobian(model, x), rtol=1e-12, atol=1e-13)


def test_unbatched_images_are_refused():
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.Flatten())
    for fallback in (False, True):
        with pytest.raises(
            UnsupportedUseError, match=r"is used by conv2d on an input \(2, 3, 4\) without an axis for"
        ):
            record(model, torch.randn(2, 3, 4), fallback=fallback)


class Headed(nn.Module):
    """A body, and one of several ways to end."""

    def __init__(self, head: str) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(4, 2)
        self.conv, self.norm = nn.Conv1d(4, 2, 1), nn.BatchNorm1d(2)
        self.w = nn.Parameter(torch.randn(4, 2))
        self.kept = [self.b.weight]
        self.head = {
            "einsum": lambda h: torch.einsum("ni,io->no", h, self.w),
            "matmul": lambda h: h @ self.w,
            "conv1d": lambda h: self.conv(h[..., None]).squeeze(-1),
            "past its module": lambda h: F.linear(h, self.kept[0]),
            "two heads": lambda h: torch.cat([self.b(h), self.c(h)], dim=1),
            "norm": lambda h: self.norm(self.b(h)),
            "twice": lambda h: self.b(h) - self.b(h.flip(1)),
            "unused later": lambda h: (self.b(h), self.c(h))[0],
            "frozen": lambda h: self.b(h),
        }[head]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.a(x)))


@pytest.mark.parametrize(
    ("head", "last", "other"),
    [
        ("einsum", "a.weight", "w"),
        ("past its module", "a.weight", "b.weight"),
        ("two heads", "c.weight", r"b\.(weight|bias)"),
        ("norm", "b.weight", r"norm\.(weight|bias)"),
    ],
)
def test_last_layer_refuses_a_model_that_does_not_end_in_one(head, last, other):
    model, x = Headed(head), torch.randn(5, 3)
    before = state(model)
    with pytest.raises(
        UnsupportedError, match=f"found '{last}' used last, but .* parameter '{other}' not only"
    ):
        feature_maps.LastLayerMap(model)(x)
    assert_same(before, state(model))


def test_last_layer_refuses_a_layer_whose_weight_is_computed():
    head = nn.utils.parametrizations.weight_norm(nn.Linear(4, 2))
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), head), torch.randn(5, 3)
    with pytest.raises(UnsupportedError, match=r"'2.bias' used last, but its weight is computed"):
        feature_maps.LastLayerMap(model)(x)


@pytest.mark.parametrize(
    ("head", "last"),
    [
        ("twice", ["b.weight", "b.bias"]),
        ("unused later", ["b.weight", "b.bias"]),
        ("frozen", ["b.weight", "b.bias"]),
        ("matmul", ["w"]),
        ("conv1d", ["conv.weight", "conv.bias"]),
    ],
)
def test_last_layer_is_what_the_outputs_come_from(head, last):
    model, x = Headed(head).double(), torch.randn(5, 3, dtype=torch.float64)
    model.a.requires_grad_(head != "frozen")
    _, features = feature_maps.LastLayerMap(model)(x)
    expected = jacobian(model, x, last)
    torch.testing.assert_close(features.to_dense(), expected, rtol=1e-12, atol=1e-13)


def test_a_last_layer_whose_weight_scales_too():
    model = nn.Module()
    model.a, model.b = nn.Linear(3, 4), nn.Linear(4, 2)
    model.forward = lambda x: model.b(torch.tanh(model.a(x))) * model.b.bias
    model.double()
    x = torch.randn(5, 3).double()
    _, features = feature_maps.LastLayerMap(model)(x)
    torch.testing.assert_close(features.to_dense(), jacobian(model, x, ["b.weight", "b.bias"]))


def test_a_model_without_layers_has_no_last_layer():
    with pytest.raises(UnsupportedError, match="found no linear or convolutional layer"):
        feature_maps.LastLayerMap(nn.BatchNorm1d(3))(torch.randn(4, 3))


def record(model: nn.Module, x: Tensor, select="all", fallback=False):
    return Recorder(model, ParameterSpace.of(model, select), fallback=fallback)(x)


def assert_jacobian(model: nn.Module, x: Tensor) -> None:
    f, features = feature_maps.JacobianMap(model)(x)
    with torch.no_grad():
        torch.testing.assert_close(f, model(x), rtol=0, atol=0)
    torch.testing.assert_close(features.to_dense(), jacobian(model, x), rtol=1e-12, atol=1e-13)
