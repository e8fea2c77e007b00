"""Small tables of strings, as plain text, Markdown and LaTeX."""

from __future__ import annotations

from collections.abc import Sequence

Row = Sequence[str]


def plain(head: Row, rows: Sequence[Row]) -> str:
    """Columns two blanks apart, the first to the left, the others to the right."""
    lines = [list(head), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    text = []
    for line in lines:
        cells = [line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]
        text.append("  ".join(cells).rstrip())
    return "\n".join(text)


def markdown(head: Row, rows: Sequence[Row]) -> str:
    """A Markdown table, the first column to the left, the others to the right."""
    ruler = [":---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ruler, *rows])


def latex(head: Row, rows: Sequence[Row]) -> str:
    r"""A ``tabular`` in the style of the package booktabs."""
    body = [r" & ".join(line) + r" \\" for line in rows]
    return "\n".join(
        [
            rf"\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}",
            r"\toprule",
            r" & ".join(head) + r" \\",
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
        ]
    )
