"""index.json: which shards a folder has, read as what anybody may have written."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, NotRequired

from pydantic import ConfigDict, Field, TypeAdapter
from typing_extensions import TypedDict

from data_pipeline.errors import DataError
from data_pipeline.mds import HASH
from data_pipeline.storage import FileInfo
from untrusted.errors import UntrustedError
from untrusted.names import check_name
from untrusted.records import Count, parse_json

DIGEST = re.compile("[0-9a-f]{16}")


class FileEntry(TypedDict):
    """A file as index.json lists it; keys that are not read are kept."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]

    basename: str
    bytes: Count
    hashes: dict[str, str]


class ShardEntry(TypedDict):
    """A shard as index.json lists it."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]

    samples: Annotated[int, Field(ge=1, lt=2**53)]
    raw_data: FileEntry
    zip_data: NotRequired[FileEntry | None]
    offsets: NotRequired[FileEntry | None]
    compression: NotRequired[str | None]
    column_names: NotRequired[list[str]]
    column_encodings: NotRequired[list[str]]


class Index(TypedDict):
    """The file."""

    shards: list[ShardEntry]


INDEX_FILE = TypeAdapter(Index)
SHARDS = TypeAdapter(dict[str, list[ShardEntry]])  # by split


@dataclass(frozen=True, slots=True)
class ShardInfo:
    """What index.json says of a shard."""

    samples: int
    raw: FileInfo
    packed: FileInfo | None
    """Stored in its place, compressed with Zstandard."""
    offsets: FileInfo | None
    """Of WebDataset: where samples are."""

    @property
    def files(self) -> list[FileInfo]:
        """Those that are stored."""
        return [file for file in (self.packed or self.raw, self.offsets) if file is not None]


def read_index(content: bytes, source: str) -> list[ShardEntry]:
    """Return the shards of an index.json whose names stay in its folder. Raises DataError, naming
    `source`."""
    try:
        shards = parse_json(content, INDEX_FILE, source, "copy it again or prepare the data again")
        check_entries(shards["shards"], source)
    except UntrustedError as error:
        raise DataError(str(error)) from error
    return shards["shards"]


def check_entries(shards: Sequence[ShardEntry], source: str) -> None:
    """Raises UntrustedError where the name of a shard's file leads out of its folder."""
    for shard in shards:
        for file in (shard["raw_data"], shard.get("zip_data"), shard.get("offsets")):
            if file is not None:
                check_name(file["basename"], source)


def shard_infos(
    shards: Sequence[ShardEntry], source: str, columns: dict[str, str] | None, sample_bytes: int
) -> list[ShardInfo]:
    """Return what a reader needs to know of shards.

    columns: of MDS shards; sample_bytes: of the tokens of a sample. Raises DataError for shards
    that cannot be what they are said to be.
    """
    if not shards:
        raise DataError(f"{source}: lists no shards; copy it again or prepare the data again.")
    infos = []
    for shard in shards:
        names, encodings = shard.get("column_names", []), shard.get("column_encodings", [])
        if columns is not None and dict(zip(names, encodings, strict=False)) != columns:
            found = dict(zip(names, encodings, strict=False))
            raise DataError(
                f"{source}: columns {found!r:.300}, expected {columns}. Prepare the shards again."
            )
        packed, offsets = shard.get("zip_data"), shard.get("offsets")
        info = ShardInfo(
            shard["samples"],
            _file_info(shard["raw_data"], source),
            _file_info(packed, source) if packed else None,
            _file_info(offsets, source) if offsets else None,
        )
        if info.packed and not str(shard.get("compression")).startswith("zstd"):
            raise DataError(
                f"{source}: {info.packed.name!r:.300} has the compression "
                f"{shard.get('compression')!r:.80}, and only zstd is read; prepare the data again."
            )
        if (info.offsets is None) != (columns is not None):
            raise DataError(f"{source}: is not of the format in meta.json; prepare the data again.")
        if info.samples * sample_bytes > info.raw.size:
            raise DataError(
                f"{source}: {info.raw.name!r:.300} has {info.raw.size} bytes, too few for its "
                f"{info.samples} samples of {sample_bytes} bytes; the file is damaged. Copy it "
                "again or prepare the data again."
            )
        infos.append(info)
    return infos


def _file_info(file: FileEntry, source: str) -> FileInfo:
    digest = file["hashes"].get(HASH, "")
    if not DIGEST.fullmatch(digest):
        raise DataError(
            f"{source}: {file['basename']!r:.300} has the {HASH} checksum {digest!r:.80}, not 16 "
            "hexadecimal digits; copy the file again or prepare the data again."
        )
    return FileInfo(file["basename"], file["bytes"], digest)
