"""Paths in a configuration: `~`, `$NAME` and `${NAME}` mean what they mean in a shell."""

import os
import re
from typing import Annotated, TypeVar

from pydantic import AfterValidator
from pydantic_core import PydanticCustomError

_VARIABLE = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([A-Za-z_]\w*)\})", re.ASCII)


def expand_path(path: str) -> str:
    """Return a path with the home folder and variables of the environment put in.

    A file or folder that has such a name literally is meant itself, and so is a URL with
    credentials, whose secrets may contain `$`. Raises ValueError for a variable that is not set.
    """
    is_url = "://" in path
    if ("~" not in path[:1] and "$" not in path) or (is_url and "@" in path):
        return path
    if not is_url and os.path.lexists(path):
        return path

    def value(found: re.Match[str]) -> str:
        name = found[1] or found[2]
        if not os.environ.get(name):
            raise ValueError(f"the variable {name} is not set; set it, or write the path itself")
        return os.environ[name]

    return os.path.expanduser(_VARIABLE.sub(value, path))


Paths = TypeVar("Paths", str, str | dict[str, str])


def _expand_field(paths: Paths) -> Paths:
    try:
        if isinstance(paths, dict):
            return {name: expand_path(path) for name, path in paths.items()}
        return expand_path(paths)
    except ValueError as error:
        raise PydanticCustomError("path", "{reason}", {"reason": str(error)}) from error


ConfiguredPath = Annotated[str, AfterValidator(_expand_field)]
"""A field of the configuration that is a path or URL; expanded when the configuration is read."""
NamedPaths = Annotated[str | dict[str, str], AfterValidator(_expand_field)]
"""The same for one path, or several by name."""
