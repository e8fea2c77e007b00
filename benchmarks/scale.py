"""Networks of a real size through every structure that fits them: time and memory, on real data.

    CURVLIN_DATA=... python benchmarks/scale.py [--threads 2] [--models resnet20 ...] [--structures kron ...]

    resnet20   269,722 parameters, trained on CIFAR-10; its test images
    llm        260,032 parameters, a trained Llama with token losses; stories that it writes itself
    lora       adapters of rank 4 on the queries and values of the same, 10,240 parameters
    vit        a small vision transformer, not trained; CIFAR-10 images

Curvature needs no labels but the model's, so that test images serve. Each run has a process of its own; memory is the
peak of the resident set above what the model and data take.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import _models
from _networks import in_process, peak_memory
from curvlin import Isotropic
from curvlin_nn import curvature, feature_maps

RUNS: dict[str, dict[str, dict[str, Any]]] = {
    "resnet20": {
        "kron": {},
        "kron, mc": {"hessian_structure": "kron", "columns": "mc"},
        "ekfac": {},
        "diag": {},
        "lowrank": {},
        "full, last layer": {"hessian_structure": "full", "subset_of_weights": "last_layer"},
    },
    "llm": {
        "kron, mc": {"hessian_structure": "kron", "columns": "mc"},
        "ekfac, mc": {"hessian_structure": "ekfac", "columns": "mc"},
        "diag, mc": {"hessian_structure": "diag", "columns": "mc"},
        "lowrank, mc": {"hessian_structure": "lowrank", "columns": "mc"},
    },
    "lora": {
        "kron, mc": {"hessian_structure": "kron", "columns": "mc"},
        "ekfac, mc": {"hessian_structure": "ekfac", "columns": "mc"},
        "diag, mc": {"hessian_structure": "diag", "columns": "mc"},
        "block, mc": {"hessian_structure": "block", "columns": "mc"},
        "full, mc": {"hessian_structure": "full", "columns": "mc"},
        "lowrank, mc": {"hessian_structure": "lowrank", "columns": "mc"},
    },
    "vit": {"kron": {}, "ekfac": {}, "diag": {}, "lowrank": {}},
}
"""Options of `curvature` by model and run; the structure is the name of the run where no other is given."""


def prepare(name: str, folder: Path, samples: int) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    if name in ("llm", "lora"):
        model = _models.stories260k(folder)
        tokens = _models.stories_tokens(model, samples, 128)
        model = _models.with_lora(model) if name == "lora" else model
        return model, tokens[:, :-1], tokens[:, 1:]
    images, labels = _models.cifar10_test(folder)
    model = _models.resnet20(folder) if name == "resnet20" else _models.VisionTransformer().eval()
    return model, images[:samples], labels[:samples]


def run(
    name: str, options: dict[str, Any], folder: Path, samples: int, batch: int, threads: int
) -> list[float]:
    """Seconds to fit and to predict 200 samples (4 of the language model), peak memory in MB, and the trace."""
    torch.set_num_threads(threads)
    model, x, y = prepare(name, folder, samples)
    before, started = peak_memory(reset=True), time.perf_counter()
    H = curvature(model, "classification", DataLoader(TensorDataset(x, y), batch), **options)
    fitted = time.perf_counter() - started
    started = time.perf_counter()
    P = (H + Isotropic(torch.tensor(1.0), H.size)).factor()
    last_layer = options.get("subset_of_weights") == "last_layer"
    # A story has 128 x 512 outputs: some of the last token's stand for them.
    predicted = LastToken(model) if name in ("llm", "lora") else model
    jacobians = feature_maps.LastLayerMap(predicted) if last_layer else feature_maps.JacobianMap(predicted)
    for part in x[: 4 if name in ("llm", "lora") else 200].split(2 if name in ("llm", "lora") else 50):
        P.inv_congruence_diagonal(jacobians(part)[1])
    return [fitted, time.perf_counter() - started, peak_memory() - before, float(H.diagonal().sum())]


class LastToken(nn.Module):
    """The logits of 16 tokens after the last one."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.model(tokens)
        return logits[:, -1, :16]


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--threads", type=int, default=2)
    options.add_argument("--models", nargs="+", choices=RUNS, default=list(RUNS))
    options.add_argument("--structures", nargs="+", help="runs whose name begins with one of these")
    options.add_argument(
        "--samples", type=int, help="default: 10,000 images for kron, 1,000 for the rest, 256 stories"
    )
    chosen = options.parse_args()
    folder = Path(os.environ.get("CURVLIN_DATA", ""))
    if not (folder / "models").is_dir():
        print("CURVLIN_DATA names no folder with models")
        return
    print(f"{'model':10}{'structure':20}{'samples':>9}{'fit s':>9}{'predict s':>10}{'MB':>8}{'trace':>12}")
    for name in chosen.models:
        for label, given in RUNS[name].items():
            if chosen.structures and not label.startswith(tuple(chosen.structures)):
                continue
            arguments = {"hessian_structure": label} | given
            text = name in ("llm", "lora")
            images = 10_000 if label == "kron" and name == "resnet20" else 1000
            samples = chosen.samples or (256 if text else images)
            fit, predict, memory, trace = in_process(
                run, name, arguments, folder, samples, 4 if text else 50, chosen.threads
            )
            print(
                f"{name:10}{label:20}{samples:9d}{fit:9.1f}{predict:10.1f}{memory:8.0f}{trace:12.4g}",
                flush=True,
            )


if __name__ == "__main__":
    main()
