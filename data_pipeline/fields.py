"""The text of a row: a field by its name, or by a path through nested objects."""

from enum import Enum
from typing import Any


class NoText(Enum):
    """Why a row has no text."""

    MISSING = "missing"
    NULL = "null"


def find_field(row: dict[str, Any], path: str) -> Any:
    """The value at `path` of a row: a field of this name, else what dots lead to.

    Returns NoText.NULL for null there or on the way, and NoText.MISSING where there is no such
    field.
    """
    if path in row:
        return NoText.NULL if row[path] is None else row[path]
    parts = path.split(".")
    found: Any = NoText.MISSING
    for cut in range(1, len(parts)):
        name, rest = ".".join(parts[:cut]), ".".join(parts[cut:])
        if name not in row:
            continue
        inner = row[name]
        if isinstance(inner, dict):
            inner = find_field(inner, rest)
            if not isinstance(inner, NoText):
                return inner
            found = inner if found is NoText.MISSING else found
        elif inner is None:
            found = NoText.NULL
    return found


def field_names(row: dict[str, Any], limit: int = 20) -> str:
    """The paths of a row's fields, for a message."""
    names: list[str] = []
    for name, value in row.items():
        inner = value if isinstance(value, dict) else {}
        names += [f"{name}.{field}" for field in inner] or [name]
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more or "none"
