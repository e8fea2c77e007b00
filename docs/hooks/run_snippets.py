"""Run the ```python blocks of the given Markdown files, so that what the documentation shows works.

    python docs/hooks/run_snippets.py [--pictures DIR] FILE...

The blocks of one file are one module and run in order; each file begins with torch's default dtype. A block opened
with ```py is shown, not run. A line ``--8<-- "FILE:SECTION"`` stands for a part of a file, as in the built pages.
With --pictures, the figures that a page leaves open are written to DIR, as PAGE-1.png, PAGE-2.png and so on.
"""

import argparse
import re
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import torch

_BLOCK = re.compile(r"^```python\n(.*?)^```", re.S | re.M)
_INCLUDE = re.compile(r'^--8<-- "(?P<file>[^":]+):(?P<section>\w+)"$', re.M)
_STYLE = {
    "figure.dpi": 110,
    "figure.constrained_layout.use": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}


def _included(match: re.Match[str]) -> str:
    text, name = Path(match["file"]).read_text(), re.escape(match["section"])
    section = re.search(rf"^# --8<-- \[start:{name}\]\n(.*?)^# --8<-- \[end:{name}\]", text, re.S | re.M)
    if section is None:
        raise ValueError(f"{match['file']} has no section {match['section']!r}")
    return section[1]


def run(path: Path) -> int:
    """Run one file's blocks; returns how many there were."""
    text, module = path.read_text(), ModuleType("snippet")
    torch.set_default_dtype(torch.float32)  # whatever the page before has chosen
    sys.modules["snippet"] = module  # where dataclasses and pickle look for what the page defines
    blocks: list[re.Match[str]] = list(_BLOCK.finditer(text))
    for block in blocks:
        line = text[: block.start(1)].count("\n")
        source = "\n" * line + _INCLUDE.sub(_included, block[1])  # so that tracebacks name the line
        code: Any = compile(source, str(path), "exec", dont_inherit=True)
        exec(code, module.__dict__)
    return len(blocks)


def save_figures(page: str, folder: Path) -> None:
    """Write the figures that are open."""
    folder.mkdir(parents=True, exist_ok=True)
    for count, number in enumerate(plt.get_fignums(), start=1):
        plt.figure(number).savefig(folder / f"{page}-{count}.png", metadata={"Software": None})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--pictures", type=Path, help="folder to write the pages' figures to")
    options = parser.parse_args()
    mpl.rcParams.update(_STYLE)
    for file in options.files:
        begin = time.perf_counter()
        if count := run(file):
            print(f"{file}: {count} blocks in {time.perf_counter() - begin:.1f} s")
        if options.pictures:
            save_figures(file.stem, options.pictures)
        plt.close("all")
