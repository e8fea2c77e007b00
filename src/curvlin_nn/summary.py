"""What `Laplace.describe` says: a posterior layer by layer, as data that render as a table."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from curvlin import BlockDiag
from curvlin.precision.base import PrecisionOperator
from curvlin_nn.curvature import Accumulated
from curvlin_nn.evidence import Evidence
from curvlin_nn.prior import GroupedPrior, Prior, group_of_coordinate

WIDTH = 120
"""Columns of text that ``str(summary)`` takes at most."""


@dataclass(frozen=True)
class LayerSummary:
    """One module with parameters of its own.

    Attributes:
        name: of the module; empty for the model itself.
        kind: its class.
        shapes: of its parameters, by name.
        n_params: how many numbers these are.
        structures: the operators that its curvature is made of, each once.
        served: how its parameters are captured, each way once, as far as is known; see `Recorder.served`.
        prior_precision: the least and the largest over its coordinates; None for a prior given as an operator.
        effective_parameters: ``gamma = sum_i (1 - delta_i (P^-1)_ii)``, between 0 and `n_params`: how many of them the
            data determine rather than the prior (MacKay, 1992). None for a prior given as an operator.
        memory: bytes of its curvature; None where a block is shared with other layers.
    """

    name: str
    kind: str
    shapes: dict[str, torch.Size]
    n_params: int
    structures: tuple[str, ...]
    served: tuple[str, ...]
    prior_precision: tuple[float, float] | None
    effective_parameters: float | None
    memory: int | None


@dataclass(frozen=True)
class Summary:
    """A fitted posterior; ``str`` and `rich` show it as a table.

    Attributes:
        likelihood: its name.
        layers: the modules it is about.
        n_params: P, the number of parameters.
        n_data: the number of samples seen.
        n_outputs: C, the number of outputs per sample.
        fit_seconds: how long the last call of `fit` took.
        memory: bytes of the curvature.
        sigma_noise: the standard deviation of observations, or one for each output.
        temperature: T.
        effective_parameters: ``gamma = P - tr(P^-1 P0)`` of all layers together.
        log_marginal_likelihood: in nats.
    """

    likelihood: str
    layers: tuple[LayerSummary, ...]
    n_params: int
    n_data: int
    n_outputs: int
    fit_seconds: float
    memory: int
    sigma_noise: float | tuple[float, ...]
    temperature: float
    effective_parameters: float
    log_marginal_likelihood: float

    def __rich__(self) -> RenderableType:
        title = f"Laplace approximation, {self.likelihood}"
        layers = Table(
            title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False
        )
        layers.add_column("layer")
        layers.add_column("parameters")
        layers.add_column("number", justify="right")
        layers.add_column("curvature")
        layers.add_column("served by")
        layers.add_column("prior precision", justify="right")
        layers.add_column("effective", justify="right")
        layers.add_column("memory", justify="right")
        for layer in self.layers:
            layers.add_row(*map(Text, _cells(layer)))
        facts = Table.grid(padding=(0, 2))
        for name, value in self._facts().items():
            facts.add_row(name, Text(value))
        return Group(layers, facts)

    def __str__(self) -> str:
        console = Console(
            file=io.StringIO(), width=WIDTH, color_system=None, force_terminal=False, force_jupyter=False
        )
        with console.capture() as capture:
            console.print(self)
        return "\n".join(line.rstrip() for line in capture.get().splitlines())

    def _facts(self) -> dict[str, str]:
        facts = {
            "data": f"{self.n_data} samples of {self.n_outputs} output{'s' * (self.n_outputs != 1)}",
            "parameters": f"{self.n_params}, effectively {self.effective_parameters:.1f}",
            "curvature": f"{_bytes(self.memory)}, fitted in {self.fit_seconds:.2f} s",
            "log marginal likelihood": f"{self.log_marginal_likelihood:.2f} nats",
        }
        if self.sigma_noise != 1:
            scales = self.sigma_noise if isinstance(self.sigma_noise, tuple) else (self.sigma_noise,)
            facts["noise"] = ", ".join(f"{sigma:.3g}" for sigma in scales)
        if self.temperature != 1:
            facts["temperature"] = f"{self.temperature:.3g}"
        return facts


def summarise(
    model: nn.Module,
    accumulated: Accumulated,
    evidence: Evidence,
    prior: Prior,
    sigma_noise: Float[Tensor, "*C"],
    fit_seconds: float,
) -> Summary:
    """Describe a fitted posterior.

    Args:
        model: whose parameters it is about.
        accumulated: what the pass over the data left.
        evidence: of the curvature.
        prior: at the current precision.
        sigma_noise: the standard deviation of observations.
        fit_seconds: how long the fit took.

    Raises:
        LostPriorError: if the prior is lost in the rounding of the curvature.
    """
    space, H = accumulated.space, evidence.curvature.total
    log_z = float(evidence.log_marginal_likelihood(prior, sigma_noise))
    layer_of = group_of_coordinate(space, "modulewise").to(H.device)
    modules = list(space.modules.items())
    served = accumulated.recorder.served
    shapes = dict(zip(space.names, space.shapes, strict=True))
    structures, memory = _by_layer(H, layer_of, len(modules))
    gamma, total = _effective_parameters(evidence, prior, sigma_noise, layer_of, len(modules))
    layers = []
    for k, (name, parameters) in enumerate(modules):
        here = layer_of == k
        delta = prior.precision[prior.groups[here]] if isinstance(prior, GroupedPrior) else None
        layers.append(
            LayerSummary(
                name=name,
                kind=type(model.get_submodule(name)).__name__,
                shapes={parameter.rpartition(".")[2]: shapes[parameter] for parameter in parameters},
                n_params=int(here.sum()),
                structures=structures[k],
                served=tuple(
                    dict.fromkeys(served[parameter] for parameter in parameters if parameter in served)
                ),
                prior_precision=None if delta is None else (float(delta.min()), float(delta.max())),
                effective_parameters=None if gamma is None else float(gamma[k]),
                memory=memory[k],
            )
        )
    return Summary(
        likelihood=evidence.likelihood.name,
        layers=tuple(layers),
        n_params=space.size,
        n_data=accumulated.n_data,
        n_outputs=accumulated.n_outputs,
        fit_seconds=fit_seconds,
        memory=_memory([H]),
        sigma_noise=float(sigma_noise) if sigma_noise.ndim == 0 else tuple(sigma_noise.tolist()),
        temperature=float(evidence.temperature),
        effective_parameters=total,
        log_marginal_likelihood=log_z,
    )


def _effective_parameters(
    evidence: Evidence, prior: Prior, sigma_noise: Tensor, layer_of: Int[Tensor, " P"], n_layers: int
) -> tuple[Float[Tensor, " L"] | None, float]:
    """gamma by layer and in all."""
    curvature = evidence.curvature
    if not isinstance(prior, GroupedPrior):
        P0 = prior.operator(curvature.total.to(torch.float64))
        P = curvature.posterior(prior, sigma_noise, evidence.temperature)
        return None, P.size - float(P.trace_solve(P0))
    spectrum, delta = evidence.relevant_spectrum(prior), prior.precision[prior.groups]
    if sigma_noise.ndim == 0 and spectrum is not None and spectrum.resolves(layer_of):
        ratios = spectrum.ratios(evidence.scale(sigma_noise), delta)
        share = ratios / (1 + ratios)  # no difference of almost equal numbers
        share = spectrum.power * share.reshape(-1, len(delta)).sum(0)
    else:
        P = curvature.posterior(prior, sigma_noise, evidence.temperature)
        share = 1 - delta * P.inverse_diagonal()
    gamma = share.new_zeros(n_layers).index_add(0, layer_of, share)
    return gamma, float(gamma.sum())


def _by_layer(
    H: PrecisionOperator, layer_of: Int[Tensor, " P"], n_layers: int
) -> tuple[list[tuple[str, ...]], list[int | None]]:
    """The operators that each layer's curvature is made of, and their bytes."""
    operators: list[list[PrecisionOperator]] = [[] for _ in range(n_layers)]
    shared = set()
    for block, coordinates in _blocks(H, torch.arange(H.size, device=layer_of.device)):
        layers = layer_of[coordinates].unique().tolist()
        for layer in layers:
            operators[layer].append(block)
        if len(layers) > 1:
            shared.update(layers)
    return (
        [tuple(dict.fromkeys(type(block).__name__ for block in blocks)) for blocks in operators],
        [None if k in shared else _memory(blocks) for k, blocks in enumerate(operators)],
    )


def _blocks(
    H: PrecisionOperator, coordinates: Int[Tensor, " D"]
) -> Iterator[tuple[PrecisionOperator, Tensor]]:
    """The blocks of H, with the coordinates of each."""
    if not isinstance(H, BlockDiag):
        yield H, coordinates
        return
    for block, index in zip(H.blocks, H.indices.blocks, strict=True):
        yield from _blocks(block, coordinates[index.to(coordinates.device)])


def _memory(operators: list[PrecisionOperator]) -> int:
    """Bytes of what the tensors of some operators are stored in, each storage counted once."""
    storages = [t.untyped_storage() for operator in operators for t, _ in operator._tensors()]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _cells(layer: LayerSummary) -> Iterator[str]:
    yield f"{layer.kind} {layer.name}".rstrip()
    yield ", ".join(f"{name} {'x'.join(map(str, shape)) or 'scalar'}" for name, shape in layer.shapes.items())
    yield str(layer.n_params)
    yield ", ".join(layer.structures)
    yield ", ".join(layer.served) or "-"
    if layer.prior_precision is None:
        yield "operator"
    else:
        least, largest = layer.prior_precision
        yield f"{least:.3g}" if least == largest else f"{least:.3g} to {largest:.3g}"
    yield "-" if layer.effective_parameters is None else f"{layer.effective_parameters:.1f}"
    yield "shared" if layer.memory is None else _bytes(layer.memory)


def _bytes(number: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.1f} GiB"
