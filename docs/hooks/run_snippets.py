"""Run the ```python blocks of the given Markdown files, so that what the documentation shows works.

The blocks of one file are one module and run in order. A block opened with ```py is shown, not run. A line
``--8<-- "FILE:SECTION"`` stands for a part of a file, as it does in the built pages.
"""

import re
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

_BLOCK = re.compile(r"^```python\n(.*?)^```", re.S | re.M)
_INCLUDE = re.compile(r'^--8<-- "(?P<file>[^":]+):(?P<section>\w+)"$', re.M)


def _included(match: re.Match[str]) -> str:
    text, name = Path(match["file"]).read_text(), re.escape(match["section"])
    section = re.search(rf"^# --8<-- \[start:{name}\]\n(.*?)^# --8<-- \[end:{name}\]", text, re.S | re.M)
    if section is None:
        raise ValueError(f"{match['file']} has no section {match['section']!r}")
    return section[1]


def run(path: Path) -> int:
    """Run one file's blocks; returns how many there were."""
    text, module = path.read_text(), ModuleType("snippet")
    sys.modules["snippet"] = module  # where dataclasses and pickle look for what the page defines
    blocks: list[re.Match[str]] = list(_BLOCK.finditer(text))
    for block in blocks:
        line = text[: block.start(1)].count("\n")
        source = "\n" * line + _INCLUDE.sub(_included, block[1])  # so that tracebacks name the line
        code: Any = compile(source, str(path), "exec", dont_inherit=True)
        exec(code, module.__dict__)
    return len(blocks)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        begin = time.perf_counter()
        if count := run(Path(name)):
            print(f"{name}: {count} blocks in {time.perf_counter() - begin:.1f} s")
