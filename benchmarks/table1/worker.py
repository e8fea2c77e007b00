"""One row for one seed, in a process of its own: so that its memory and its processor time are its own.

python benchmarks/table1/worker.py '{"row": "MAP", ...}' FILE
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from curvlin_nn.feature_maps import surrogate_training
from curvlin_nn.variational import training
from table1 import problem as problems
from table1.outputs import Logits, in_batches
from table1.problem import Problem
from table1.rows import ROWS, network
from table1.scores import Predicted, difference, histograms, scores, scores_as_published


def problem_of(task: dict[str, Any]) -> Problem:
    return Problem(
        Path(task["data_dir"]),
        task["protocol"],
        task["seed"],
        problems.QUICK if task["quick"] else problems.FULL,
        task["seconds"],
        Path(task["cache"]),
    )


def evaluated(task: dict[str, Any]) -> dict[str, Any]:
    """What the file of a row holds; of the row ``"network"``, nothing but that it is trained."""
    problem = problem_of(task)
    begin = time.process_time()
    reference = network(problem).predict  # trains the network, or reads it
    if task["row"] == "network":
        return {"seconds": time.process_time() - begin}
    row = next(row for row in ROWS if row.name == task["row"])
    begin = time.process_time()
    fit = row.fit(problem)
    fitted = time.process_time()
    predicted: dict[str, Predicted] = {}
    drawn: dict[str, Predicted] = {}  # the same by the draws of the published script
    predicting = 0.0
    for name, x in problem.test_sets():
        started = time.process_time()
        parts = in_batches(fit.predict, x)
        predicted[name] = _predicted(parts)
        predicting += time.process_time() - started
        if problem.published:
            log_p = _joined([part.log_probabilities_as_published() for part in parts])
            drawn[name] = replace(predicted[name], log_probabilities=log_p)
        del parts  # before there are those of the next images
    n_images = sum(len(of.log_probabilities) for of in predicted.values())
    seconds = {"fit": fitted - begin + fit.seconds_before, "predict 10,000": 1e4 * predicting / n_images}
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    test, y = predicted["test"], problem.data.test[1]
    outside = {name: predicted[name] for name in problem.data.outside}
    alone = _predicted(in_batches(reference, problem.data.test[0]))
    columns = scores(test, y, outside, row.n_softmax_as_published)
    if drawn:
        columns |= scores_as_published(drawn.pop("test"), y, drawn, row.n_softmax_as_published)
    return {
        "row": row.name,
        "protocol": problem.protocol,
        "quick": task["quick"],
        "seed": problem.seed,
        "scores": columns,
        "NLL minus MAP": difference(test.surprises(y), alone.surprises(y)),
        "seconds": seconds,
        "peak memory, MiB": memory,
        "options": fit.options,
        "versions": _versions(),
        "histograms": histograms(predicted),
    }


def _predicted(parts: Sequence[Logits]) -> Predicted:
    determinants = [part.log_determinants() for part in parts]
    return Predicted(
        _joined([part.log_probabilities() for part in parts]),
        torch.cat(known) if len(known := [d for d in determinants if d is not None]) == len(parts) else None,
    )


def _joined(log_probabilities: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(log_probabilities)).double().log_softmax(-1)


def _versions() -> dict[str, str]:
    names = ("curvlin", "torch", "gpytorch", "numpy")
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in names}


def main() -> None:
    task, path = json.loads(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    surrogate_training.clock = training.clock = time.process_time
    found = evaluated(task)
    unfinished = path.with_suffix(f".{os.getpid()}.unfinished")
    unfinished.write_text(json.dumps(found, indent=1) + "\n")
    os.replace(unfinished, path)


if __name__ == "__main__":
    main()
