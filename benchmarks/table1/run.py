"""The results table of the ScaLLA paper (arXiv 2601.21835), every row of it, on Fashion-MNIST.

    python benchmarks/table1/run.py --data-dir DIR [--seeds K] [--protocol ours|published] [--quick] [--jobs J]

DIR holds ``fashion-mnist/``, ``mnist/`` and ``kmnist/`` in the IDX format. Each row and seed has a file in the folder
of results; what is there is not computed again, so that the same command goes on after an interruption. To have a row
computed anew, delete its file.

Protocol ``published``: the network of seed 1 after all 60,000 training images, prior precisions by evidence (LLA) or
one (the others), context from MNIST. Protocol ``ours``: the first 55,000 images, hyperparameters by the likelihood of
the other 5,000, no context but what is made of training images.

A seed costs about 7 minutes of one core for its network, 8 for LLA, and half an hour for all rows that are not trained;
each row that is (VaLLA, FMGP, MFVI, SNGP, ScaLLA, ScaLLA biased) takes --seconds, and up to ten minutes to predict.
With the default of half an hour, that is between four and five hours of one core for a seed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from table1 import page
from table1.problem import FULL, PROTOCOLS, QUICK
from table1.record import Execute, Task, complete, in_subprocess
from table1.rows import ROWS

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "benchmarks" / "out" / "table1"


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", type=Path, help="where the data sets are")
    parser.add_argument("--seeds", type=int, default=1, help="how many (default 1)")
    parser.add_argument("--protocol", choices=PROTOCOLS, default="ours")
    parser.add_argument("--quick", action="store_true", help="10,000 images and little training: 10 minutes")
    parser.add_argument("--rows", nargs="+", metavar="NAME", choices=[row.name for row in ROWS])
    parser.add_argument(
        "--seconds",
        type=float,
        help=f"of processor time for each method that is trained (default {FULL.seconds:g}, quick {QUICK.seconds:g})",
    )
    parser.add_argument("--jobs", type=int, default=2, help="rows at once, one thread each (default 2)")
    parser.add_argument("--results", type=Path, help="folder of results (default docs/results/table1)")
    parser.add_argument("--report", action="store_true", help="compute nothing, show what is there")
    asked = parser.parse_args(arguments)
    if asked.data_dir is None and not asked.report:
        parser.error("--data-dir is needed, but for --report")
    if asked.seeds < 1 or asked.jobs < 1:
        parser.error(f"--seeds and --jobs must be at least 1, found {asked.seeds} and {asked.jobs}")
    if asked.seconds is not None and not asked.seconds > 0:
        parser.error(f"--seconds must be positive, found {asked.seconds:g}")
    return asked


def main(arguments: list[str] | None = None, execute: Execute = in_subprocess) -> int:
    asked = parsed(arguments)
    folder = asked.results or (OUT / "quick" if asked.quick else ROOT / "docs" / "results" / "table1")
    cache = OUT / "quick" if asked.quick else OUT
    seconds = asked.seconds or (QUICK if asked.quick else FULL).seconds
    first = 1 if asked.protocol == "published" else 0  # the paper's network has seed 1

    def task(row: str, seed: int) -> Task:
        return Task(row, asked.protocol, seed, asked.quick, seconds, str(asked.data_dir), str(cache))

    failed: list[Task] = []
    if not asked.report:
        seeds = range(first, first + asked.seeds)
        names = [
            row.name
            for row in ROWS
            if (asked.rows is None or row.name in asked.rows)
            and (row.in_published or asked.protocol == "ours")
        ]
        failed = complete([task("network", seed) for seed in seeds], cache, asked.jobs, execute)
        broken = {t.seed for t in failed}
        tasks = [task(name, seed) for seed in seeds if seed not in broken for name in names]
        failed += complete(tasks, folder / "rows", asked.jobs, execute)
    print(page.written(folder, asked.quick))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
