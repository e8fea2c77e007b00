"""Run the ```python blocks of the given Markdown files, so that what the documentation shows works.

The blocks of one file share a namespace and run in order. A block opened with ```py is shown, not run.
"""

import re
import sys
import time
from pathlib import Path
from typing import Any

_BLOCK = re.compile(r"^```python\n(.*?)^```", re.S | re.M)


def run(path: Path) -> int:
    """Run one file's blocks; returns how many there were."""
    text, namespace = path.read_text(), {"__name__": "snippet"}
    blocks: list[re.Match[str]] = list(_BLOCK.finditer(text))
    for block in blocks:
        line = text[: block.start(1)].count("\n")
        code: Any = compile("\n" * line + block[1], str(path), "exec")  # so that tracebacks name the line
        exec(code, namespace)
    return len(blocks)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        begin = time.perf_counter()
        if count := run(Path(name)):
            print(f"{name}: {count} blocks in {time.perf_counter() - begin:.1f} s")
