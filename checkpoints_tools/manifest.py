"""manifest.json: what a committed checkpoint holds, with the size and checksum of every file.

It is the last file written into a step folder, and carries a checksum of itself: a manifest that
was edited, or that belongs to another step, is found out.
"""

import json
from pathlib import Path
from typing import Any

import xxhash

from checkpoints_tools.errors import CheckpointError

MANIFEST = "manifest.json"
FORMAT_VERSION = 2
BLOCK = 1 << 22
DIGEST = "xxh64"
SHOWN = 4  # files that a message names


def file_entry(path: Path) -> dict[str, Any]:
    """Size and checksum of a file, as a manifest lists it. Raises OSError."""
    digest, size = xxhash.xxh64(), 0
    with path.open("rb") as stream:
        while block := stream.read(BLOCK):
            digest.update(block)
            size += len(block)
    return {"bytes": size, DIGEST: digest.hexdigest()}


def manifest_text(manifest: dict[str, Any]) -> str:
    """The file's content: `manifest` and its own checksum."""
    return json.dumps(manifest | {DIGEST: _own_digest(manifest)}, indent=1) + "\n"


def _own_digest(manifest: dict[str, Any]) -> str:
    return xxhash.xxh64_hexdigest(json.dumps(manifest, sort_keys=True).encode())


def read_manifest(step_dir: Path) -> dict[str, Any]:
    """manifest.json of a committed checkpoint: `step`, `files` {name: {bytes, xxh64}}, and what the
    run saved with it.

    Raises CheckpointError where there is none, or it is damaged, of another version, of another
    step than its folder, or lists files that are missing or of another size.
    """
    path = step_dir / MANIFEST
    try:
        manifest = json.loads(path.read_text("utf-8"))
        if not isinstance(manifest, dict):
            raise ValueError("it holds no JSON object")
    except OSError as error:
        raise CheckpointError(
            f"{step_dir} is not a checkpoint: cannot read {MANIFEST} ({error.strerror}); name a "
            "step-* folder"
        ) from error
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}; use another checkpoint") from error
    if manifest.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{step_dir} has format version {manifest.get('format_version')}, this program reads "
            f"{FORMAT_VERSION}; use the version that wrote it"
        )
    said = manifest.pop(DIGEST, None)
    if said != _own_digest(manifest):
        raise CheckpointError(
            f"{path} was changed after it was written (checksum {_own_digest(manifest)}, it says "
            f"{said}); use another checkpoint than {step_dir.name}"
        )
    if step_dir.name != (named := f"step-{manifest['step']:08d}"):
        raise CheckpointError(
            f"{path} is of {named}, but lies in {step_dir.name}: the folder was renamed, or its "
            "manifest comes from another; use another checkpoint"
        )
    faults = []
    for name, entry in manifest["files"].items():
        file = step_dir / name
        try:
            size = file.stat().st_size
        except OSError as error:
            missing = isinstance(error, FileNotFoundError)
            what = "is missing" if missing else f"cannot be read ({error.strerror})"
            faults.append(f"{file} {what}")
            continue
        if size != entry["bytes"]:
            faults.append(f"{file} has {size} bytes, not {entry['bytes']}")
    if faults:
        raise CheckpointError(f"{listed(faults)}; use another checkpoint than {step_dir.name}")
    return manifest


def listed(faults: list[str]) -> str:
    """Some faults in one sentence, and how many there are more."""
    more = f"; and {len(faults) - SHOWN} files more" if len(faults) > SHOWN else ""
    return "; ".join(faults[:SHOWN]) + more


def damaged_files(
    step_dir: Path, manifest: dict[str, Any], names: list[str] | None = None
) -> dict[str, str]:
    """What is wrong with each file whose content is not what the manifest says; reads all of
    `names` [every file]."""
    found = {}
    for name in manifest["files"] if names is None else names:
        expected = manifest["files"][name]
        try:
            entry = file_entry(step_dir / name)
        except OSError as error:
            found[name] = f"cannot be read ({error.strerror})"
            continue
        if entry["bytes"] != expected["bytes"]:
            found[name] = f"has {entry['bytes']} bytes, not {expected['bytes']}"
        elif entry != expected:
            found[name] = f"has checksum {entry[DIGEST]}, not {expected[DIGEST]}"
            others = [n for n, e in manifest["files"].items() if e == entry and n != name]
            if others:
                found[name] += f": it is {others[0]}"
    return found
