"""Optional packages, imported where they are first needed."""

from __future__ import annotations

import importlib
from types import ModuleType


def import_extra(module: str, extra: str, needed_by: str) -> ModuleType:
    """A module of an optional package.

    Args:
        module: its name.
        extra: the extra of curvlin that installs it.
        needed_by: what needs it, for the message.

    Raises:
        ImportError: if it is not installed; the message names the extra.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{needed_by} needs the extra {extra!r}: {error.name} is missing; pip install 'curvlin[{extra}]'",
            name=error.name,
        ) from error
