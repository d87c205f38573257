"""The JSON header of a safetensors file: dtype, shape and place of every tensor in it."""

import os
from pathlib import Path
from typing import IO, Annotated, Any

from pydantic import BeforeValidator, Field, TypeAdapter
from typing_extensions import TypedDict

from checkpoints_tools.errors import CheckpointError
from untrusted.records import Count, parse_json

MAX_HEADER = 100_000_000  # as the library has it


class Entry(TypedDict):
    """A tensor of the file; its values are bytes [begin, end) behind the header."""

    dtype: str
    shape: Annotated[list[Annotated[int, Field(ge=1, lt=2**53)]], Field(min_length=1, max_length=8)]
    data_offsets: Annotated[list[Count], Field(min_length=2, max_length=2)]


def _without_metadata(header: Any) -> Any:
    """The header's entries of tensors; `__metadata__` holds free text, which nothing here reads."""
    if not isinstance(header, dict):
        return header
    return {name: entry for name, entry in header.items() if name != "__metadata__"}


_HEADER = TypeAdapter(Annotated[dict[str, Entry], BeforeValidator(_without_metadata)])


def read_header(file: IO[bytes], path: Path, remedy: str) -> tuple[dict[str, Entry], int]:
    """Return the tensors of an open file, by name, and where their values begin.

    path and remedy: what is read, and what to do if it cannot be. Raises CheckpointError where
    there is no header, RecordError where it is damaged, OSError.
    """
    size = os.fstat(file.fileno()).st_size
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(MAX_HEADER, size - 8):
        raise CheckpointError(f"{path} has no safetensors header; {remedy}")
    return parse_json(file.read(length), _HEADER, f"the header of {path}", remedy), 8 + length
