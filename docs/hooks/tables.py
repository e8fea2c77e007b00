"""Write the tables of the documentation from the code they describe, or check that they still agree.

    python docs/hooks/tables.py [--check]

A table stands between ``<!-- NAME -->`` and ``<!-- /NAME -->`` in a page.
"""

import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import network_tables
import torch

from curvlin import (
    BlockDiag,
    BlockFeatures,
    Dense,
    DenseFeatures,
    Diagonal,
    Isotropic,
    KhatriRaoFeatures,
    KroneckerSum,
    LowRankPlusDiag,
    NotClosedError,
    PrecisionOperator,
    SpectralKronecker,
    Woodbury,
)
from curvlin.testing import LAWS

DOCS = Path(__file__).resolve().parents[1]
REFUSED = "–"


def spd(n: int) -> torch.Tensor:
    """A well-conditioned matrix."""
    X = torch.randn(n, 3 * n, dtype=torch.float64)
    return X @ X.mT / (3 * n)


def operators() -> dict[str, PrecisionOperator]:
    """One operator of every kind that the tables tell apart, of 6 = 2 x 3 rows."""
    torch.manual_seed(0)
    d, U = torch.rand(6, dtype=torch.float64) + 1, torch.randn(6, 2, dtype=torch.float64)
    G, A = spd(2), spd(3)
    QL, QR = torch.linalg.eigh(G).eigenvectors, torch.linalg.eigh(A).eigenvectors
    shift = torch.tensor(0.5, dtype=torch.float64)
    return {
        "`Isotropic`": Isotropic(shift, 6),
        "`Diagonal`": Diagonal(d),
        "`Dense`": Dense(spd(6)),
        "K, 1 term": KroneckerSum([(G, A)]),
        "K, shifted": KroneckerSum.shifted(G, A, shift),
        "K, direct sum": KroneckerSum.direct(G, A),
        "K, 2 terms": KroneckerSum([(G, A), (spd(2), spd(3))]),
        "`SpectralKronecker`": SpectralKronecker(QL, QR, d.reshape(2, 3)),
        "`BlockDiag`": BlockDiag([KroneckerSum([(spd(2), spd(2))]), Diagonal(d[:2])]),
        "`LowRankPlusDiag`": LowRankPlusDiag(d, U),
        "`Woodbury`": Woodbury(KroneckerSum.shifted(G, A, shift), U),
    }


CODES = {
    Isotropic: "I",
    Diagonal: "D",
    Dense: "M",
    KroneckerSum: "K",
    SpectralKronecker: "S",
    BlockDiag: "B",
    LowRankPlusDiag: "L",
    Woodbury: "W",
}


def outcome(compute: Callable[[], PrecisionOperator]) -> str:
    """A letter for the type of a result, or a dash where there is none."""
    try:
        return CODES[type(compute())]
    except NotClosedError:
        return REFUSED


def sums() -> str:
    """The sum table, by adding."""
    left, right = operators(), operators()  # different objects with equal values, in the same bases
    rows = []
    for name, P in left.items():
        row = [outcome(lambda P=P, Q=Q: P + Q) for Q in right.values()]
        swapped = [outcome(lambda P=P, Q=Q: Q + P) for Q in right.values()]
        if row != swapped:
            raise SystemExit(f"the sum table is not symmetric at {name}: {row} and {swapped}")
        rows.append([f"{name} **{CODES[type(P)]}**" if "`" in name else f"`KroneckerSum` **{name}**", *row])
    return table(["+", *(name if "`" not in name else CODES[type(Q)] for name, Q in right.items())], rows)


def congruences() -> str:
    """The congruence table, by asking."""
    torch.manual_seed(0)
    left, right = torch.randn(4, 2, 1, 2, dtype=torch.float64), torch.randn(4, 1, 3, dtype=torch.float64)
    layer = KhatriRaoFeatures(left, right)
    halves = [
        KhatriRaoFeatures(left, right[..., :2]),
        DenseFeatures(torch.randn(4, 2, 2, dtype=torch.float64)),
    ]
    features = {
        "`KhatriRaoFeatures`": layer,
        "`BlockFeatures`": BlockFeatures(halves),
        "`DenseFeatures`": DenseFeatures(torch.randn(4, 2, 6, dtype=torch.float64)),
    }

    def answer(Phi: Any, P: PrecisionOperator) -> str:
        try:
            P.inv_congruence(Phi)
        except NotClosedError:
            return REFUSED
        return "yes"

    rows = [
        [f"**{name}**", *(answer(Phi, P) for Phi in features.values())] for name, P in operators().items()
    ]
    return table(["P", *features], rows)


def laws() -> str:
    """The laws, from their docstrings."""
    return table(["", "law", "says"], [[str(law.number), f"`{law.name}`", law.doc] for law in LAWS.values()])


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def layers() -> str:
    """How each layer is served, by capturing a model around it."""
    return table(["layer", "served by"], network_tables.layers())


def families() -> str:
    """The registered likelihoods."""
    return table(["likelihood", "is", "outputs", "terms", "exact columns"], network_tables.families())


TABLES: dict[str, Callable[[], str]] = {
    "sums": sums,
    "congruences": congruences,
    "laws": laws,
    "layers": layers,
    "families": families,
}


def main(check: bool) -> None:
    """Rewrite every marked table, or fail where one is out of date."""
    for page in sorted(DOCS.rglob("*.md")):
        text = new = page.read_text()
        for name in re.findall(r"^<!-- (\w+) -->$", text, re.M):
            marked = re.compile(f"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.S)
            content = TABLES[name]()
            new = marked.sub(lambda m, content=content: f"{m[1]}\n{content}\n\n{m[2]}", new)
        if new != text and check:
            raise SystemExit(
                f"{page.relative_to(DOCS.parent)}: a table does not agree with the code; run {__file__}"
            )
        page.write_text(new)


if __name__ == "__main__":
    main(check="--check" in sys.argv[1:])
