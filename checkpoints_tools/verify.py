"""Is a checkpoint what its run saved: sizes and metadata, or every byte of it."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoints_tools import folder as folders
from checkpoints_tools.errors import CheckpointError
from checkpoints_tools.manifest import MANIFEST, damaged_files, manifest_text, read_manifest
from checkpoints_tools.source import differing_tensors, parameter_shapes, single_gpu_config
from checkpoints_tools.stored import StoredTensors, index_name

TOKENIZER = "tokenizer.json"
SUFFIXES = (".safetensors", ".distcp")  # of the files that hold tensors


@dataclass(frozen=True)
class Problem:
    """A file of a checkpoint, and what is wrong with it."""

    file: str
    what: str


def verify_checkpoint(path: Path, *, deep: bool) -> tuple[Path, list[Problem]]:
    """The step folder that `path` means, and everything that is wrong with it.

    Always: the manifest, the sizes of all files, the content of the small ones, and that
    tensors.json describes the model and the files there are. With `deep` every file is read and
    compared with its checksum. Raises CheckpointError when there is no checkpoint.
    """
    step_dir = folders.resolve(path)
    try:
        manifest = read_manifest(step_dir)
    except CheckpointError as error:
        return step_dir, [Problem(_file_named(str(error), step_dir), str(error))]
    except (OSError, LookupError, TypeError, AttributeError) as error:
        return step_dir, [Problem(MANIFEST, f"cannot be used ({error!r})")]
    index = index_name(step_dir)
    problems = []
    if (step_dir / MANIFEST).read_bytes() != manifest_text(manifest).encode():
        problems.append(Problem(MANIFEST, "is not written as it was saved"))
    problems += [
        Problem(name, f"is not listed in {MANIFEST}, so nothing says what it should hold")
        for name in (index, TOKENIZER)
        if name not in manifest["files"]
    ]
    small = [name for name in manifest["files"] if not name.endswith(SUFFIXES)]
    damaged = damaged_files(step_dir, manifest, None if deep else small)
    problems += [Problem(name, what) for name, what in damaged.items()]
    if index in manifest["files"] and index not in damaged:
        problems += _index_problems(step_dir, index, manifest)
    return step_dir, problems


def _file_named(message: str, step_dir: Path) -> str:
    """The file of the folder that an error speaks of first."""
    found = re.search(re.escape(str(step_dir)) + r"/(\S+)", message)
    return found[1] if found else MANIFEST


def _index_problems(step_dir: Path, index: str, manifest: dict[str, Any]) -> list[Problem]:
    """Does the index describe the model of the manifest, in the files of the manifest?"""
    try:
        # Accept every file of the folder: files that the manifest does not list are reported below.
        present = {path.name for path in step_dir.iterdir()}
        stored = StoredTensors(step_dir, present)
        shapes = parameter_shapes(single_gpu_config(manifest, "fp32"))
    except CheckpointError as error:
        return [Problem(index, str(error))]
    problems = [Problem(index, what) for what in differing_tensors(stored, shapes)]
    problems += [Problem(name, what) for name, what in stored.check_headers().items()]
    files = manifest["files"]
    used = stored.file_ends
    for name, end in sorted(used.items()):
        if name not in files:
            problems.append(Problem(name, f"is used by {index}, but {MANIFEST} does not list it"))
        elif end > files[name]["bytes"]:
            problems.append(Problem(name, f"has {files[name]['bytes']} bytes, {index} uses {end}"))
    listed = {name for name in files if name.endswith(SUFFIXES)}
    problems += [
        Problem(name, f"is listed in {MANIFEST}, but {index} uses nothing of it")
        for name in sorted(listed - used.keys())
    ]
    present = {path.name for path in step_dir.iterdir() if path.name.endswith(SUFFIXES)}
    problems += [
        Problem(name, f"lies in the folder, but {MANIFEST} does not list it")
        for name in sorted(present - listed - used.keys())
    ]
    return problems
