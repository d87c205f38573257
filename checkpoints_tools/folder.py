"""The checkpoint folder: step-* folders, `latest`, what is committed and what is removed.

A step folder is written as step-N.tmp and renamed when everything in it is on disk, so a folder
named step-N is whole. `latest` is moved after the rename, old steps are removed after that.
"""

import contextlib
import logging
import re
import shutil
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from typing_extensions import TypedDict

from checkpoints_tools.errors import CheckpointError
from checkpoints_tools.manifest import FORMAT_VERSION, MANIFEST, file_entry, manifest_text
from untrusted.errors import UntrustedError
from untrusted.files import read_regular, sync_folder, write_durably
from untrusted.records import Count, read_state

log = logging.getLogger("transxssm")

LATEST = "latest"
MAX_LATEST_BYTES = 4096
SAVES_FILE = "checkpoints.json"  # of a run directory


class Saves(TypedDict):
    """checkpoints.json: where the run's checkpoints are, and the step of the newest; 0: none."""

    folder: str
    step: Count


SAVES = TypeAdapter(Saves)


def step_folder(folder: Path, step: int) -> Path:
    """Where the committed checkpoint of a step lies."""
    return folder / f"step-{step:08d}"


def committed_steps(folder: Path) -> list[int]:
    """Steps with a committed checkpoint, ascending."""
    if not folder.is_dir():
        return []
    names = (re.fullmatch(r"step-(\d+)", path.name) for path in folder.iterdir() if path.is_dir())
    return sorted(int(match[1]) for match in names if match)


def resolve(path: Path) -> Path:
    """The step folder that `path` means: itself, or what `latest` names in a folder of step-*
    folders, else the newest of them. A run directory means the folder of its checkpoints.

    Raises CheckpointError when there is none.
    """
    if (path / MANIFEST).exists():
        return path
    places = [path, path / "checkpoints", *_recorded_folder(path)]
    folder = next((place for place in places if committed_steps(place)), None)
    if folder is None:
        raise CheckpointError(
            f"{path} is not a checkpoint: neither {MANIFEST} nor step-* folders in it; name a "
            "step-* folder, a checkpoints folder or a run directory"
        )
    steps = committed_steps(folder)
    with contextlib.suppress(OSError, ValueError):  # after a fallback newer ones may be damaged
        named = read_regular(folder / LATEST, MAX_LATEST_BYTES, follow_link=True).decode().strip()
        if named in {step_folder(folder, step).name for step in steps}:
            return folder / named
    return step_folder(folder, steps[-1])


def _recorded_folder(run_dir: Path) -> list[Path]:
    """The folder of a run's checkpoints by its own record, if it has one: checkpoint.dir may lie
    anywhere."""
    if not run_dir.is_dir():
        return []
    try:
        saves = read_state(run_dir / SAVES_FILE, SAVES, "name the folder of checkpoints itself")
    except UntrustedError as error:
        log.warning("%s", error)
        return []
    return [Path(saves["folder"])] if saves else []


def begin(folder: Path, step: int) -> Path:
    """An empty temporary folder for a step; leftovers of interrupted saves are removed."""
    folder.mkdir(parents=True, exist_ok=True)
    remove_temporary(folder)
    temporary = step_folder(folder, step).with_suffix(".tmp")
    temporary.mkdir()
    return temporary


def remove_temporary(folder: Path) -> None:
    """Remove what interrupted or failed saves left; a step they had set aside comes back."""
    for leftover in folder.glob("step-*.tmp"):
        _remove(leftover)
    for old in folder.glob("step-*.old"):
        if old.with_suffix("").exists():
            _remove(old)
        else:
            old.rename(old.with_suffix(""))


def commit(
    folder: Path,
    step: int,
    state: dict[str, Any],
    entries: dict[str, dict[str, Any]] | None = None,
) -> Path:
    """Make step-N.tmp the checkpoint of the step, point `latest` at it; all durable on return.

    state: of the manifest, beside its files; entries: size and checksum of those files of
    which they are known already.
    """
    target = step_folder(folder, step)
    temporary = target.with_suffix(".tmp")
    known = entries or {}
    names = sorted(path.name for path in temporary.iterdir() if path.name != MANIFEST)
    files = {name: known.get(name) or file_entry(temporary / name) for name in names}
    manifest = {"format_version": FORMAT_VERSION, "step": step} | state | {"files": files}
    write_durably(temporary / MANIFEST, manifest_text(manifest).encode())
    sync_folder(temporary)
    if target.exists():  # the same step, saved again after a resume from an older checkpoint
        target.rename(target.with_suffix(".old"))
    temporary.rename(target)
    sync_folder(folder)
    shutil.rmtree(target.with_suffix(".old"), ignore_errors=True)
    write_durably(folder / LATEST, f"{target.name}\n".encode())
    return target


def remove_old(
    folder: Path, newest: int, keep_last: int, keep_every: int, keep_up_to: int | None = None
) -> None:
    """Of the steps up to `newest`, keep the last `keep_last`, the multiples of `keep_every`, and
    the newest one up to `keep_up_to`."""
    steps = [step for step in committed_steps(folder) if step <= newest]
    kept = max((step for step in steps if keep_up_to is not None and step <= keep_up_to), default=0)
    for step in steps[:-keep_last]:
        if step != kept and (not keep_every or step % keep_every):
            path = step_folder(folder, step)
            try:
                path.rename(path.with_suffix(".tmp"))  # what is half removed has no step's name
            except OSError as error:
                log.warning("%s cannot be removed: %s", path, error)
                continue
            _remove(path.with_suffix(".tmp"))


def go_back_to(folder: Path, start: Path, last_step: int) -> None:
    """Make `start`, a step folder, what a run goes on from: the steps after `last_step` go.

    They lose their names first, the newest first, so that whatever is left when this is cut off is
    whole. Raises OSError.
    """
    later = [step for step in committed_steps(folder) if step > last_step]
    if not later:
        return
    write_durably(folder / LATEST, f"{start.name}\n".encode())
    for step in reversed(later):
        path = step_folder(folder, step)
        log.warning("removing %s: its steps are made again", path)
        if (left := path.with_suffix(".tmp")).exists():
            _remove(left)
        path.rename(left)
    sync_folder(folder)
    for step in later:
        _remove(step_folder(folder, step).with_suffix(".tmp"))


def _remove(path: Path) -> None:
    """What cannot be removed stays, with a warning: it is in nobody's way."""
    try:
        if path.is_symlink() or not path.is_dir():
            path.unlink()
        else:
            shutil.rmtree(path)
    except OSError as error:
        log.warning("%s cannot be removed: %s", path, error)
