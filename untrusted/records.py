"""JSON files read into known types, or one sentence that says why not.

A reader describes what it expects as a pydantic TypeAdapter, usually of a TypedDict (that of
typing_extensions; keys it does not name are dropped):

    class Start(TypedDict):
        time: str
        world_size: Count

    STARTS = TypeAdapter(list[Start])
    starts = read_json(run_dir / "environment.json", STARTS, "remove the file to go on without it")
"""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Generic, TypeVar

from pydantic import Field, TypeAdapter, ValidationError
from pydantic_core import from_json

from untrusted.errors import RecordError, UntrustedError
from untrusted.files import open_regular, read_regular
from untrusted.text import printable

log = logging.getLogger("transxssm")

T = TypeVar("T")

MAX_BYTES = 1 << 28
MAX_LINE_BYTES = 1 << 20
# A text larger than SMALL_BYTES has a list or object for so many bytes at most: an empty one takes
# 64 bytes of memory, and two of the text
SMALL_BYTES = 1 << 24
BYTES_PER_CONTAINER = 6
Count = Annotated[int, Field(ge=0, lt=2**53)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


def parse_json(content: bytes | str, kind: TypeAdapter[T], source: str, remedy: str) -> T:
    """Return the value of a JSON text, whose types must be exactly those of `kind`.

    source and remedy: what is read, and what to do if it cannot be. Raises RecordError.
    """
    try:
        _check_containers(content)
        value = from_json(content, allow_inf_nan=False)
    except (ValueError, RecursionError) as error:
        raise _damaged(source, f"not JSON: {error}", remedy) from error
    return check_value(value, kind, source, remedy)


def _check_containers(content: bytes | str) -> None:
    if len(content) <= SMALL_BYTES:
        return
    if isinstance(content, bytes):
        found = content.count(b"[") + content.count(b"{")
    else:
        found = content.count("[") + content.count("{")
    if found * BYTES_PER_CONTAINER > len(content):
        raise ValueError("it has more lists and objects than any file of its size")


def check_value(value: object, kind: TypeAdapter[T], source: str, remedy: str) -> T:
    """Return plain values, whose types must be exactly those of `kind`. Raises RecordError."""
    try:
        return kind.validate_python(value, strict=True)
    except ValidationError as error:
        fault = error.errors(include_url=False, include_context=False)[0]
        place = ".".join(map(str, fault["loc"]))
        reason = f"{place or 'the value'}: {fault['msg']}, found {_short(fault['input'])}"
    except (ValueError, RecursionError) as error:
        reason = str(error)
    raise _damaged(source, reason, remedy)


def _damaged(source: str, reason: str, remedy: str) -> RecordError:
    return RecordError(f"{printable(source)} is damaged ({printable(reason)}); {remedy}.")


def _short(value: object) -> str:
    try:
        return f"{value!r:.80}"
    except ValueError:  # a number of thousands of digits
        return "a number of thousands of digits"


def read_json(path: Path, kind: TypeAdapter[T], remedy: str, *, max_bytes: int = MAX_BYTES) -> T:
    """Return the value of a JSON file.

    Raises RecordError for damaged content, UnsafeFileError for what is no regular file, and
    FileNotFoundError; other faults of the operating system are RecordErrors.
    """
    try:
        content = read_regular(path, max_bytes, follow_link=True)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise RecordError(f"{path} cannot be read ({error.strerror}); {remedy}.") from error
    return parse_json(content, kind, str(path), remedy)


def read_state(
    path: Path, kind: TypeAdapter[T], remedy: str, *, max_bytes: int = MAX_BYTES
) -> T | None:
    """Return the value of a JSON file of a run, or None where there is none.

    An empty file, or one of zeros, is what a power loss makes of a file that was just written: it
    counts as missing, with a warning. Raises RecordError and UnsafeFileError as `read_json` does.
    """
    try:
        return read_json(path, kind, remedy, max_bytes=max_bytes)
    except FileNotFoundError:
        return None
    except RecordError:
        if not _is_blank(path):
            raise
        log.warning("%s is empty, as after a power loss: it counts as missing", path)
        return None


def _is_blank(path: Path) -> bool:
    """Whether a file can be read and holds nothing but zeros and spaces."""
    try:
        with open_regular(path, follow_link=True) as file:
            while block := file.read(1 << 20):
                if block.strip(b"\0 \r\n\t"):
                    return False
    except OSError:
        return False
    return True


@dataclass
class Lines(Generic[T]):
    """Entries of a JSON-lines file; `faults` has a sentence for each line that is none."""

    entries: list[T] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def read_json_lines(path: Path, kind: TypeAdapter[T]) -> Lines[T]:
    """Return the sound lines of a JSON-lines file; a missing file has none.

    Blank, cut and damaged lines are left out and reported in `faults`, and so is a file that cannot
    be read at all.
    """
    found: Lines[T] = Lines()
    try:
        with open_regular(path, follow_link=True) as file:
            number = 0
            while line := file.readline(MAX_LINE_BYTES):
                number += 1
                line = line.lstrip(b"\0")  # of a page that a crash left empty
                try:
                    if not line.endswith(b"\n"):
                        raise RecordError(f"{path}, line {number} is cut off or too long; left out")
                    source = f"{path}, line {number}"
                    found.entries.append(parse_json(line, kind, source, "the line is left out"))
                except RecordError as error:
                    found.faults.append(str(error))
    except FileNotFoundError:
        pass
    except (OSError, UntrustedError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        found.faults.append(f"{path} cannot be read ({reason}); its entries are left out.")
    return found
