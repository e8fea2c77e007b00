"""What each layer and each likelihood is served with, found by asking: rows of the tables of `tables.py`."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from curvlin_nn import ParameterSpace, likelihoods
from curvlin_nn.capture import Recorder
from curvlin_nn.columns import EXACT
from curvlin_nn.errors import UnsupportedError

Make = Callable[[], nn.Module]


class Head(nn.Module):
    """The layer's outputs, flattened, after a nonlinearity; of recurrent and attention layers the first output."""

    def __init__(self, layer: nn.Module, *, several: int = 1) -> None:
        super().__init__()
        self.layer, self.several = layer, several

    def forward(self, x: Tensor) -> Tensor:
        """The outputs."""
        out = self.layer(*(x,) * self.several)
        return torch.tanh(out[0] if isinstance(out, tuple) else out).flatten(1)


class Raw(nn.Module):
    """A parameter in an operation of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        """The outputs."""
        return torch.einsum("ni,oi->no", x, self.w.sin())


class Tied(nn.Module):
    """An embedding and the output layer share their weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.output = nn.Embedding(5, 4), nn.Linear(4, 5)
        self.output.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """The logits."""
        return self.output(torch.tanh(self.embedding(tokens)))


def vectors() -> Tensor:
    """Three vectors."""
    return torch.randn(3, 4)


def sequences() -> Tensor:
    """Three sequences of five."""
    return torch.randn(3, 5, 4)


def images(n_dims: int) -> Callable[[], Tensor]:
    """Three images of four channels."""
    return lambda: torch.randn(3, 4, *(5,) * n_dims)


def tokens() -> Tensor:
    """Three sequences of six."""
    return torch.randint(5, (3, 6))


LAYERS: dict[str, tuple[Make, Callable[[], Tensor]]] = {
    "`Linear`": (lambda: Head(nn.Linear(4, 2)), sequences),
    "`Bilinear`": (lambda: Head(nn.Bilinear(4, 4, 2), several=2), vectors),
    "`Conv1d`": (lambda: Head(nn.Conv1d(4, 2, 2)), images(1)),
    "`Conv2d`, groups": (lambda: Head(nn.Conv2d(4, 2, 2, groups=2)), images(2)),
    "`Conv3d`": (lambda: Head(nn.Conv3d(4, 2, 2)), images(3)),
    "`ConvTranspose1d`": (lambda: Head(nn.ConvTranspose1d(4, 2, 2)), images(1)),
    "`ConvTranspose2d`": (lambda: Head(nn.ConvTranspose2d(4, 2, 2)), images(2)),
    "`ConvTranspose3d`": (lambda: Head(nn.ConvTranspose3d(4, 2, 2)), images(3)),
    "`Embedding`": (lambda: Head(nn.Embedding(5, 4)), tokens),
    "`Embedding(sparse=True)`": (lambda: Head(nn.Embedding(5, 4, sparse=True)), tokens),
    "`Embedding(max_norm=1)`": (lambda: Head(nn.Embedding(5, 4, max_norm=1.0)), tokens),
    "`EmbeddingBag`": (lambda: Head(nn.EmbeddingBag(5, 4)), tokens),
    "`LayerNorm`": (lambda: Head(nn.LayerNorm(4)), sequences),
    "`RMSNorm`": (lambda: Head(nn.RMSNorm(4)), sequences),
    "`GroupNorm`": (lambda: Head(nn.GroupNorm(2, 4)), images(2)),
    "`InstanceNorm2d`": (lambda: Head(nn.InstanceNorm2d(4, affine=True)), images(2)),
    "`BatchNorm2d`": (lambda: Head(nn.BatchNorm2d(4)), images(2)),
    "`MultiheadAttention`": (
        lambda: Head(nn.MultiheadAttention(4, 2, batch_first=True), several=3),
        sequences,
    ),
    "`TransformerEncoderLayer`": (
        lambda: Head(nn.TransformerEncoderLayer(4, 2, 4, batch_first=True)),
        sequences,
    ),
    "`LSTM`": (lambda: Head(nn.LSTM(4, 2, batch_first=True)), sequences),
    "`GRU`": (lambda: Head(nn.GRU(4, 2, batch_first=True)), sequences),
    "`PReLU`": (lambda: Head(nn.Sequential(nn.Linear(4, 2), nn.PReLU())), vectors),
    "`weight_norm`": (lambda: Head(parametrizations.weight_norm(nn.Linear(4, 2))), vectors),
    "a raw `Parameter`": (Raw, vectors),
    "an embedding tied to the output layer": (Tied, tokens),
}
"""A model around each layer, and an input."""


def layers() -> Iterator[list[str]]:
    """Each layer with how its parameters are served; refusals by their first words."""
    for name, (make, draw) in LAYERS.items():
        torch.manual_seed(0)
        model, x = make().double(), draw()
        recorder = Recorder(model, ParameterSpace.of(model))
        try:
            recorder(x if x.dtype == torch.long else x.double())
        except UnsupportedError:
            yield [name, "refused by name"]
            continue
        ways: dict[str, list[str]] = {}
        for parameter, way in recorder.served.items():
            ways.setdefault(way, []).append(f"`{parameter.removeprefix('layer.')}`")
        yield [
            name,
            "; ".join(way if len(ways) == 1 else f"{way}: {', '.join(p)}" for way, p in ways.items()),
        ]


TARGETS: dict[str, tuple[tuple[int, ...], Callable[[], Tensor]]] = {
    "binary": ((4,), lambda: torch.randint(2, (3, 4)).double()),
    "classification": ((4,), lambda: torch.randint(4, (3,))),
    "heteroscedastic": ((4,), lambda: torch.randn(3, 2).double()),
    "poisson": ((4,), lambda: torch.randint(5, (3, 4)).double()),
    "regression": ((4,), lambda: torch.randn(3, 4).double()),
    "reward_modeling": ((2,), lambda: torch.randint(2, (3,))),
}
"""The shape of one sample's outputs, and targets, for each likelihood."""


def families() -> Iterator[list[str]]:
    """Each registered likelihood, with what it is and how many exact columns it has for how many outputs."""
    for name in likelihoods.available():
        family = likelihoods.resolve(name)
        shape, draw = TARGETS[name]
        torch.manual_seed(0)
        outputs = torch.randn(3, *shape).double()
        targets = family.check(outputs, draw(), "the table")
        n_terms = family.terms(outputs).shape[1]
        n_columns = sum(len(columns) for columns in EXACT(family, outputs, targets))
        says = (type(family).__doc__ or "").strip().splitlines()[0]
        yield [f'`"{name}"`', says, f"{shape[0]}", f"{n_terms}", f"{n_columns}"]
