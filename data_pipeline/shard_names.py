"""Files of a shard, as an entry of index.json lists them."""

from typing import Any


def stored_files(shard: dict[str, Any]) -> list[dict[str, Any]]:
    """Those that are there: a compressed shard's raw file is not."""
    return [
        file for file in (shard.get("zip_data") or shard["raw_data"], shard.get("offsets")) if file
    ]


def rename_shard(shard: dict[str, Any], stem: str) -> dict[str, str]:
    """Name a shard's files `stem` and what comes after its number; old names to new ones."""
    renamed = {}
    for file in filter(None, (shard["raw_data"], shard.get("zip_data"), shard.get("offsets"))):
        old = file["basename"]
        suffixes = old.split(".", 2)[2]  # of shard.NUMBER.SUFFIXES
        file["basename"] = renamed[old] = f"{stem}.{suffixes}"
    return renamed
