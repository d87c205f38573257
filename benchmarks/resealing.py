"""Checksums made right again after damage, as by whoever wants it to be believed."""

import contextlib
import json
from pathlib import Path
from typing import Any

import xxhash

from checkpoints_tools.manifest import DIGEST, MANIFEST, manifest_text
from data_pipeline.mds import HASH
from data_pipeline.meta import META, fingerprint

INDEX = "index.json"
BEYOND_READING = (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError)


def reseal(file: Path) -> None:
    """Let the manifest, or the index and its description, beside a changed file agree with it.

    Does nothing where these are damaged themselves beyond reading.
    """
    with contextlib.suppress(*BEYOND_READING):
        if _regular(file, file.with_name(MANIFEST)):
            _reseal_checkpoint(file)
        elif _regular(file, file.with_name(META), file.with_name(INDEX)):
            _reseal_data(file)


def _regular(*files: Path) -> bool:
    """Whether reading them ends."""
    return all(file.is_file() for file in files)


def _reseal_checkpoint(file: Path) -> None:
    path = file.with_name(MANIFEST)
    manifest = json.loads(path.read_bytes())
    manifest.pop(DIGEST, None)
    if file.name in manifest["files"]:
        manifest["files"][file.name] = _entry(file, DIGEST)
    path.write_text(manifest_text(manifest))


def _reseal_data(file: Path) -> None:
    index, about = file.with_name(INDEX), file.with_name(META)
    shards = json.loads(index.read_bytes())
    for shard in shards["shards"]:
        for kind in ("raw_data", "zip_data", "offsets"):
            if (shard.get(kind) or {}).get("basename") == file.name:
                entry = _entry(file, HASH)
                shard[kind] |= {"bytes": entry["bytes"], "hashes": {HASH: entry[HASH]}}
    if file != index:
        index.write_text(json.dumps(shards))
    meta = json.loads(about.read_bytes())
    meta["fingerprint"] = fingerprint(index.read_bytes(), meta["tokenizer_hash"])
    if file != about:
        about.write_text(json.dumps(meta))


def _entry(file: Path, digest: str) -> dict[str, Any]:
    content = file.read_bytes()
    return {"bytes": len(content), digest: xxhash.xxh64_hexdigest(content)}
