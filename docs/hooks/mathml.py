"""MkDocs hook: turn the formulas that arithmatex marks into MathML while the site is built.

Browsers show MathML by themselves, so a page needs neither a script nor a font from elsewhere, and a formula
that does not parse fails the build instead of the reader.
"""

import html
import re
from typing import Any

from latex2mathml.converter import convert

_MARKED = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\s*\\(?P<open>[(\[])(?P<tex>.*?)\\[)\]]\s*</(?P=tag)>', re.S
)

_NAMED = re.compile(r"<mo>([A-Za-z]{2,})</mo>")  # \operatorname{tr}: a name, without the spacing of a "+"


def _to_mathml(match: re.Match[str], page: str) -> str:
    tex = html.unescape(match["tex"]).strip()
    try:
        mathml = convert(tex, display="inline" if match["open"] == "(" else "block")
    except Exception as error:
        raise ValueError(f"{page}: cannot read the formula {tex!r}: {error!r}") from error
    return _NAMED.sub(r"<mi>\1</mi>", mathml)


def on_page_content(content: str, page: Any, **_: Any) -> str:
    """Replace every marked formula of a page."""
    return _MARKED.sub(lambda match: _to_mathml(match, page.file.src_path), content)
