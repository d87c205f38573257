"""Files of a shard of `prepare`, as an entry of index.json lists them."""

import re

from data_pipeline.errors import DataError
from data_pipeline.shard_index import FileEntry, ShardEntry

OURS = re.compile(r"shard\.[A-Za-z0-9_-]+\.(?P<suffixes>[a-z][a-z.]*)")


def stored_files(shard: ShardEntry) -> list[FileEntry]:
    """Those that are there: a compressed shard's raw file is not."""
    return [
        file for file in (shard.get("zip_data") or shard["raw_data"], shard.get("offsets")) if file
    ]


def check_ours(shards: list[ShardEntry], source: str) -> None:
    """Raises DataError, naming `source`, where a name is not one that `prepare` gives."""
    for shard in shards:
        for file in (shard["raw_data"], shard.get("zip_data"), shard.get("offsets")):
            if file and not OURS.fullmatch(file["basename"]):
                raise DataError(
                    f"{source}: {file['basename']!r:.300} is not a name that `prepare` gives a "
                    "shard; remove the unit and run the same command again."
                )


def rename_shard(shard: ShardEntry, stem: str) -> dict[str, str]:
    """Name a shard's files [see check_ours] `stem` and what comes after its number; return old
    names to new ones."""
    renamed = {}
    for file in filter(None, (shard["raw_data"], shard.get("zip_data"), shard.get("offsets"))):
        old = file["basename"]
        match = OURS.fullmatch(old)
        assert match is not None
        file["basename"] = renamed[old] = f"{stem}.{match['suffixes']}"
    return renamed
