"""Files of results, one for each row and seed: what is there is not computed again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

WORKER = Path(__file__).parent / "worker.py"


@dataclass(frozen=True)
class Task:
    """A row for a seed; the row ``"network"`` trains what the others need."""

    row: str
    protocol: str
    seed: int
    quick: bool
    seconds: float
    data_dir: str
    cache: str

    @property
    def stem(self) -> str:
        """What its file is called; `seconds` is no part of it."""
        parts = [self.protocol, *(["quick"] if self.quick else []), f"seed{self.seed}", self.row.lower()]
        return "-".join(parts).replace(" ", "-")

    def __str__(self) -> str:
        return f"{self.row}, seed {self.seed}"


def read(path: Path) -> dict[str, Any] | None:
    """A finished result; None if there is none, or it is damaged."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and "seconds" in found else None


def results(folder: Path, protocol: str, quick: bool) -> list[dict[str, Any]]:
    """All finished rows of a protocol in a folder, by seed."""
    found = [read(path) for path in sorted(folder.glob("*.json"))]
    chosen = [r for r in found if r and r.get("protocol") == protocol and r.get("quick") == quick]
    return sorted(chosen, key=lambda r: r["seed"])


Execute = Callable[[Task, Path], None]
"""Does a task and writes its file."""


def in_subprocess(task: Task, path: Path) -> None:
    """With one thread.

    Raises:
        RuntimeError: if it fails, with the end of what it said.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", str(WORKER), json.dumps(asdict(task)), str(path)]
    done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True, errors="replace")
    if done.returncode:
        raise RuntimeError(f"exit code {done.returncode}\n{done.stderr[-4000:]}")


def complete(
    tasks: Sequence[Task],
    folder: Path,
    jobs: int,
    execute: Execute = in_subprocess,
    say: Callable[[str], None] = print,
) -> list[Task]:
    """Do what is missing, some at once; what fails leaves ``.error.txt`` and is tried again the next time.

    Returns:
        The tasks that failed.
    """
    folder.mkdir(parents=True, exist_ok=True)

    def done(task: Task) -> bool:
        path = folder / f"{task.stem}.json"
        complaint = folder / f"{task.stem}.error.txt"
        try:
            execute(task, path)
            if read(path) is None:
                raise RuntimeError("it left no result")
        except Exception as error:
            complaint.write_text(f"{error}\n")
            say(f"{task}: failed, see {complaint}: {(str(error).strip() or repr(error)).splitlines()[-1]}")
            return False
        complaint.unlink(missing_ok=True)
        say(f"{task}: done")
        return True

    missing = [task for task in tasks if read(folder / f"{task.stem}.json") is None]
    with ThreadPoolExecutor(jobs) as pool:
        succeeded = list(pool.map(done, missing))
    return [task for task, good in zip(missing, succeeded, strict=True) if not good]
