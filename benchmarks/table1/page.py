"""The page of the documentation that shows the results, written anew from the files of the rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from table1 import figures
from table1.problem import FULL, PROTOCOLS, QUICK
from table1.record import results
from table1.report import (
    COSTS,
    MAIN,
    Result,
    as_csv,
    as_published,
    by_row,
    claim_table,
    columns_table,
    comparison_table,
    score,
    tolerance_table,
)
from table1.rows import ROWS

INTRODUCTION = """\
# A results table, row by row

Every method of the first table of the ScaLLA paper ([arXiv 2601.21835](https://arxiv.org/abs/2601.21835)) on its
network and its data, Fashion-MNIST, by

{commands}

This page, the CSV files and the pictures are written by that command from one file for each row and seed.

- **ACC, NLL, ECE, Brier** are of the mean softmax over 2,048 draws of the logits (MFVI: over its drawn networks) on the
  10,000 test images; ECE has 15 bins. **NLL - MAP** is the difference, image by image, to the network alone.
- **AUC** is that of telling other data from the test images by the entropy of that mean. The paper's script takes
  another softmax of it first, where logits are Gaussian or certain. Its column is compared with by that rule, and only
  there.
- **Gaussian AUC** is by the log-determinant of the covariance of the logits. It stays the same when that covariance is
  multiplied by a number, so it says nothing without the other columns.
- Numbers are means over seeds (of network and method), ± the standard error of that mean where there are several.
"""

OURS = """\
## Hyperparameters from held-out images

The network is trained on 55,000 images. Prior precisions, and what else is chosen, have the largest likelihood of the
other 5,000 training images; so has the state that is kept of what is trained, that before any step among them. No image
of another data set is seen before the test: what context a surrogate has is made of training images.
"""

PUBLISHED = """\
## The published protocol

The network is trained on all 60,000 images, with seed 1. The prior precision of LLA and LLLA has the largest marginal
likelihood, that of ELLA and ScaLLA is one, and surrogates see training images of MNIST as context. The paper's
surrogates have a million steps, its VaLLA 15,000 and its FMGP 50,000. Here they have what the time below allows, and
where that is much less, rows say how far it takes a method and not where it ends: VaLLA's prior precision is learned
from one on. MFVI has the published optimiser, which hardly leaves where it starts.

The published script draws Gaussian logits as `f + z L`, whose covariance is `L^T L` and not `L L^T`. Beside the
paper's numbers{drawn} are drawn so; in all other tables they have their own covariance. That explains the row LLLA,
whose likelihood and calibration only the script's draws make worse than the network's: so drawn, it comes out as
printed. The committed hyperparameters of that row say KFAC over all weights, which is the row LLA here. Its optimum is
a prior precision of 24.7 (laplace-torch, asked as the script asks it, ends at 24.4 on this network), and of 25 to 800,
with either covariance, none comes near.
"""

CLAIM = """\
### The joint claim

One covariance must detect, and cost neither likelihood nor calibration. Differences to MAP are taken seed by seed.
"""


def written(folder: Path, quick: bool) -> str:
    """Write all that is shown of a folder of results.

    Returns:
        The tables as text.
    """
    found = {protocol: results(folder / "rows", protocol, quick) for protocol in PROTOCOLS}
    sections = []
    for protocol, of in found.items():
        rows = by_row(of, [row.name for row in ROWS])
        if rows:
            sections.append(_section(protocol, rows, folder))
    commands = "\n".join(_command(protocol, of, quick) for protocol, of in found.items() if of)
    page = "\n".join([INTRODUCTION.format(commands=commands), *sections])
    folder.with_name(folder.name + ".md").write_text(page)
    return "\n".join(sections)


def _section(protocol: str, rows: dict[str, list[Result]], folder: Path) -> str:
    (folder / f"{protocol}.csv").write_text(as_csv(rows))
    pictures = figures.draw(rows, folder, protocol)
    introduction = OURS if protocol == "ours" else PUBLISHED.format(drawn=_drawn(rows))
    parts = [introduction.rstrip(), _seeds(rows), columns_table(rows, MAIN)]
    if protocol == "ours":
        parts += [CLAIM.rstrip(), claim_table(rows)]
    parts += ["### Beside the paper's numbers", comparison_table(rows)]
    if protocol == "published":
        parts += ["Off by, and what is tolerated of a network trained anew:", tolerance_table(rows)]
    parts += ["### Cost, on one thread", _budgets(rows), columns_table(rows, COSTS)]
    parts += ["### Pictures", *(f"![{p.stem}]({folder.name}/{p.name})" for p in pictures)]
    return "\n\n".join(parts) + "\n"


def _drawn(rows: dict[str, list[Result]]) -> str:
    """The rows of which the draws of the published script are known, and change something."""
    drawn, own = as_published("NLL"), score("NLL")
    known = [name for name, of in rows.items() if any(drawn(r) != own(r) for r in of)]
    return f" the rows {', '.join(known)}" if known else " rows"


def _seeds(rows: dict[str, list[Result]]) -> str:
    counts = {name: len(of) for name, of in rows.items()}
    if len(set(counts.values())) == 1:
        return f"Seeds: {next(iter(counts.values()))}."
    return "Seeds: " + ", ".join(f"{name} {count}" for name, count in counts.items()) + "."


def _budgets(rows: dict[str, list[Result]]) -> str:
    trained = (
        "\n\nMethods that are trained were allowed the seconds in the table (`--seconds`). The best step is that of "
        "the best likelihood of held-out images, whose state is kept; 0 is before any. The kernel error is that of a "
        "surrogate on inputs held out, relative, in the Frobenius norm."
        if any("seconds" in r["options"] for of in rows.values() for r in of)
        else ""
    )
    return (
        "Seconds are of the processor; those of prediction include the draws, those of fit not the network."
        + trained
    )


def _command(protocol: str, of: list[dict[str, Any]], quick: bool) -> str:
    flags = f"--protocol {protocol} --seeds {len({r['seed'] for r in of})}" + (" --quick" if quick else "")
    allowed = {r["options"]["seconds"] for r in of if "seconds" in r["options"]}
    if len(allowed) == 1 and allowed != {(QUICK if quick else FULL).seconds}:
        flags += f" --seconds {allowed.pop():g}"
    return f"    make table1 DATA=DIR ARGS='{flags}'"
