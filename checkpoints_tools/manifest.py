"""manifest.json: what a committed checkpoint holds, with the size and checksum of every file.

It is the last file written into a step folder, and carries a checksum of itself: a manifest that
was edited, or that belongs to another step, is found out.
"""

import json
import stat
from pathlib import Path
from typing import Annotated, Any, NotRequired, Required

import xxhash
from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from checkpoints_tools.errors import CheckpointError
from parallel import bounds
from parallel.config import ModelConfig
from untrusted.errors import UnsafeFileError, UnsafeNameError
from untrusted.files import open_regular, read_regular
from untrusted.names import check_file_name
from untrusted.numbers import counted
from untrusted.records import Count, Finite
from untrusted.text import printable

MANIFEST = "manifest.json"
FORMAT_VERSION = 3
READABLE_VERSIONS = (2, 3)  # 2: DCP's files, see old_format.py
# 1,000 ranks' files take 0.1 MiB; the rest is for 100,000 skipped shards and windows. JSON of
# empty objects takes forty times its size in memory
MAX_MANIFEST_BYTES = 1 << 24
BLOCK = 1 << 22
DIGEST = "xxh64"
SHOWN = 4  # files that a message names


def file_entry(path: Path) -> dict[str, Any]:
    """Size and checksum of a file, as a manifest lists it.

    Raises OSError, and UnsafeFileError for a link or a device.
    """
    digest, size = xxhash.xxh64(), 0
    with open_regular(path) as stream:
        while block := stream.read(BLOCK):
            digest.update(block)
            size += len(block)
    return {"bytes": size, DIGEST: digest.hexdigest()}


def manifest_text(manifest: dict[str, Any]) -> str:
    """The file's content: `manifest` and its own checksum."""
    return json.dumps(manifest | {DIGEST: _own_digest(manifest)}, indent=1) + "\n"


def _own_digest(manifest: dict[str, Any]) -> str:
    return xxhash.xxh64_hexdigest(json.dumps(manifest, sort_keys=True).encode())


class _File(TypedDict):
    bytes: Count
    xxh64: str


class _SpikeState(TypedDict):
    losses: list[float]
    log_norms: list[float]
    bad: list[Annotated[list[Any], Field(min_length=3, max_length=3)]]


Ranks = Annotated[int, Field(ge=1, le=bounds.RANKS)]


class _Layout(TypedDict, total=False):
    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]

    tensor: Ranks
    pipeline: Ranks
    context: Ranks


class _Config(TypedDict):
    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]

    model: dict[str, Any]
    data: NotRequired[dict[str, Any]]
    parallel: NotRequired[dict[str, Any]]


def _shard(skipped: list[Any]) -> list[Any]:
    if not isinstance(skipped[0], str) or not isinstance(skipped[1], int):
        raise ValueError("it is no pair of a source and a shard")
    return skipped


def _of_a_step(metrics: dict[str, Any]) -> dict[str, Any]:
    step = metrics.get("step")
    if not isinstance(step, int) or step < 0:
        raise ValueError("it has no step")
    if missing := [name for name in SHOWN_METRICS if name not in metrics]:
        raise ValueError(f"it has no {missing[0]}")
    if empty := [name for name in SHOWN_METRICS[2:] if metrics[name] is None]:
        raise ValueError(f"its {empty[0]} is no number")
    return metrics


SHOWN_METRICS = ("loss", "grad_norm", "lr", "tokens_per_second", "memory_bytes")
_Metrics = Annotated[dict[str, int | float | None], AfterValidator(_of_a_step)]
_SkippedShard = Annotated[
    list[str | Count], Field(min_length=2, max_length=2), AfterValidator(_shard)
]


class _Phase(TypedDict):
    first_step: Count
    first_sample: Count
    first_token: Count
    seq_len: Count
    global_batch_size: Count
    micro_batch_size: Count
    weights: list[float]


class _Evaluation(TypedDict):
    step: Count
    validation_loss: Finite


class _Manifest(TypedDict, total=False):
    """What the program reads of a manifest; it may hold more."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]

    step: Required[Count]
    files: Required[dict[str, _File]]
    config: Required[_Config]
    tokens: Required[Count]
    samples: Required[Count]
    adam_step: Required[Count]
    world_size: Required[Count]
    data_fingerprint: Required[str]
    tokenizer_hash: Required[str]
    eod_id: Required[Count]
    pad_id: Required[Count]
    layout: _Layout
    versions: dict[str, str]
    saved_at: str
    git_revision: str
    imported: dict[str, Any]
    averaged: list[dict[str, Any]]
    judge: _SpikeState
    evaluation: _Evaluation | None
    longest_sequence: Annotated[int, Field(ge=1, le=bounds.LENGTH)] | None
    unwritten_metrics: _Metrics | None
    skipped_updates: Count
    phases: list[_Phase]
    sources: dict[str, str]
    skipped_shards: list[_SkippedShard]
    skipped_windows: list[Annotated[list[Count], Field(min_length=2, max_length=2)]]


_MANIFEST = TypeAdapter(_Manifest)


def read_manifest(step_dir: Path) -> dict[str, Any]:
    """manifest.json of a committed checkpoint: `step`, `files` {name: {bytes, xxh64}}, and what the
    run saved with it.

    Raises CheckpointError where there is none, or it is damaged, of another version, of another
    step than its folder, or lists files that are missing or of another size.
    """
    manifest = _read(step_dir)
    path = step_dir / MANIFEST
    if manifest.get("format_version") not in READABLE_VERSIONS:
        raise CheckpointError(
            f"{step_dir} has format version {manifest.get('format_version')!r:.40}, this program "
            f"reads {' and '.join(map(str, READABLE_VERSIONS))}; use the version that wrote it"
        )
    said = manifest.pop(DIGEST, None)
    if said != _own_digest(manifest):
        raise CheckpointError(
            f"{path} was changed after it was written (checksum {_own_digest(manifest)}, it says "
            f"{said!r:.40}); use another checkpoint than {step_dir.name}"
        )
    try:
        _MANIFEST.validate_python(manifest, strict=True)
        model = model_of(manifest)
        for name in manifest["files"]:
            check_file_name(name, str(path))
    except ValidationError as error:
        fault = error.errors(include_url=False, include_context=False)[0]
        section = "config.model." if error.title == ModelConfig.__name__ else ""
        place = section + ".".join(map(str, fault["loc"]))
        raise CheckpointError(
            f"{path} describes no checkpoint: {printable(place.rstrip('.'))}: {fault['msg']}; use "
            f"another checkpoint than {step_dir.name}"
        ) from error
    except UnsafeNameError as error:
        raise CheckpointError(str(error)) from error
    for name in ("eod_id", "pad_id"):
        if manifest[name] >= model.vocab_size:
            raise CheckpointError(
                f"{path} describes no checkpoint: {name}: {manifest[name]} is no token of a "
                f"vocabulary of {model.vocab_size}; use another checkpoint than {step_dir.name}"
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
            found = file.lstat()
        except OSError as error:
            missing = isinstance(error, FileNotFoundError)
            what = "is missing" if missing else f"cannot be read ({error.strerror})"
            faults.append(f"{file} {what}")
            continue
        if not stat.S_ISREG(found.st_mode):
            faults.append(f"{file} is a link, folder or device, not a file")
        elif found.st_size != entry["bytes"]:
            faults.append(f"{file} has {found.st_size} bytes, not {entry['bytes']}")
    if faults:
        raise CheckpointError(f"{listed(faults)}; use another checkpoint than {step_dir.name}")
    return manifest


def model_of(manifest: dict[str, Any]) -> ModelConfig:
    """Return the [model] section of a manifest, as far as this version knows its fields.

    Raises pydantic's ValidationError, but not for the manifest that `read_manifest` returns.
    """
    section = manifest["config"]["model"]
    return ModelConfig(
        **{name: section[name] for name in ModelConfig.model_fields if name in section}
    )


def _read(step_dir: Path) -> dict[str, Any]:
    path = step_dir / MANIFEST
    try:
        manifest = json.loads(read_regular(path, MAX_MANIFEST_BYTES))
        if not isinstance(manifest, dict):
            raise ValueError("it holds no JSON object")
        json.dumps(manifest, ensure_ascii=False).encode()  # no halves of characters
    except UnsafeFileError as error:
        raise CheckpointError(f"{step_dir} is not a checkpoint: {error}") from error
    except OSError as error:
        raise CheckpointError(
            f"{step_dir} is not a checkpoint: cannot read {MANIFEST} ({error.strerror}); name a "
            "step-* folder"
        ) from error
    except (ValueError, RecursionError) as error:
        reason = printable(str(error))
        raise CheckpointError(f"{path} is damaged: {reason}; use another checkpoint") from error
    return manifest


def listed(faults: list[str]) -> str:
    """Some faults in one sentence, and how many there are more."""
    more = f"; and {counted(len(faults) - SHOWN, 'file')} more" if len(faults) > SHOWN else ""
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
        except UnsafeFileError as error:
            found[name] = str(error)
            continue
        if entry["bytes"] != expected["bytes"]:
            found[name] = f"has {entry['bytes']} bytes, not {expected['bytes']}"
        elif entry != expected:
            found[name] = f"has checksum {entry[DIGEST]}, not {expected[DIGEST]}"
            others = [n for n, e in manifest["files"].items() if e == entry and n != name]
            if others:
                found[name] += f": it is {others[0]}"
    return found
