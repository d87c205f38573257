"""Units of `prepare` at a URL, where nothing can be renamed.

A unit's shards go to URL/SPLIT under names that no other unit has, of whatever text and options.
Then its description goes to URL/.prepare-units/KEY.npz, which says that it is done: whoever goes
on, or merges, reads those.
"""

import json
import tempfile
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter
from typing_extensions import TypedDict

from data_pipeline.arrays import read_labels, read_note
from data_pipeline.errors import DataError
from data_pipeline.mds import INDEX
from data_pipeline.meta import META
from data_pipeline.remote import download, list_names, upload
from data_pipeline.shard_index import ShardEntry
from data_pipeline.shard_names import check_ours, rename_shard, stored_files
from data_pipeline.unit import Counts, load_counts, load_index, load_labels
from untrusted.errors import UntrustedError
from untrusted.files import open_regular
from untrusted.records import MAX_BYTES, parse_json

ATTEMPTS = 4
TIMEOUT = 60.0  # seconds
LAST_SPLIT = "train"


@dataclass(frozen=True)
class UnitPart:
    """What a unit adds to the whole: counts by split, label counts [splits, vocabulary], shards by
    split as index.json lists them."""

    counts: Counts
    labels: NDArray[np.int64]
    shards: dict[str, list[ShardEntry]]


class Note(TypedDict):
    """What KEY.npz says besides labels."""

    counts: Counts
    shards: dict[str, list[ShardEntry]]


NOTE = TypeAdapter(Note)


@dataclass(frozen=True)
class RemoteUnits:
    """Units below `url`. Methods raise DataError."""

    url: str

    @property
    def _notes(self) -> str:
        return f"{self.url.rstrip('/')}/.prepare-units"

    def refuse_finished(self) -> None:
        """Raises DataError if there is a dataset; nothing there is touched then."""
        if META in list_names(f"{self.url}/{LAST_SPLIT}", attempts=ATTEMPTS):
            raise DataError(
                f"{self.url} holds a dataset ({LAST_SPLIT}/{META}); remove it or name another."
            )

    def done(self, keys: Collection[str]) -> set[str]:
        """Those of the units that are there."""
        names = list_names(self._notes, attempts=ATTEMPTS)
        return {key for key in keys if f"{key}.npz" in names}

    def put(self, key: str, folder: Path, splits: list[str], vocab_size: int) -> None:
        """Upload a unit that `write_unit` has made."""
        shards: dict[str, list[ShardEntry]] = {split: [] for split in splits}
        for split in splits:
            for entry in load_index(folder / split):
                stem = f"shard.{key}-{len(shards[split]):03d}"
                for old, new in rename_shard(entry, stem).items():
                    if (folder / split / old).exists():
                        (folder / split / old).rename(folder / split / new)
                shards[split].append(entry)
            if not shards[split]:  # no document of this unit fell into this split
                continue
            names = [file["basename"] for entry in shards[split] for file in stored_files(entry)]
            upload(folder / split, names, f"{self.url}/{split}", attempts=ATTEMPTS)
        note = {"counts": load_counts(folder, splits), "shards": shards}
        name = f"{key}.npz"
        labels = load_labels(folder, (len(splits), vocab_size))
        np.savez_compressed(folder / name, note=json.dumps(note), labels=labels)
        upload(folder, [name], self._notes, attempts=ATTEMPTS)

    def parts(self, keys: Iterable[str], splits: list[str], vocab_size: int) -> Iterator[UnitPart]:
        """What each unit adds. Raises DataError if shards of one are no longer there."""
        there = {split: list_names(f"{self.url}/{split}", attempts=ATTEMPTS) for split in splits}
        with tempfile.TemporaryDirectory(prefix="transxssm-prepare.") as name:
            file = Path(name) / "unit.npz"
            for key in keys:
                url = f"{self._notes}/{key}.npz"
                download(url, file, max_bytes=MAX_BYTES, timeout=TIMEOUT, attempts=ATTEMPTS)
                part = _read_note(file, url, splits, vocab_size)
                for split, shards in part.shards.items():
                    wanted = {file["basename"] for shard in shards for file in stored_files(shard)}
                    if lost := wanted - there[split]:
                        raise DataError(
                            f"{self.url}/{split}/{min(lost)}: is missing, though {url} says that "
                            f"it is done; remove {self._notes} and run again."
                        )
                yield part

    def finish(self, folder: Path, splits: list[str]) -> None:
        """Upload the description of the whole, from folders as `prepare` leaves them; what makes
        it a dataset is the last file [see refuse_finished]."""
        upload(folder, ["tokenizer.json"], self.url, attempts=ATTEMPTS)
        for split in sorted(splits, key=LAST_SPLIT.__eq__):
            upload(folder / split, [INDEX, META], f"{self.url}/{split}", attempts=ATTEMPTS)


def _read_note(file: Path, url: str, splits: list[str], vocab_size: int) -> UnitPart:
    remedy = "remove it and run the same command again"
    with open_regular(file) as content:
        text = read_note(content, url, MAX_BYTES)
        labels = read_labels(content, url, (len(splits), vocab_size))
    try:
        note = parse_json(text, NOTE, url, remedy)
    except UntrustedError as error:
        raise DataError(str(error)) from error
    if set(note["counts"]) != set(splits) or set(note["shards"]) != set(splits):
        raise DataError(f"{url} has the splits {sorted(note['counts'])!r:.300}; {remedy}.")
    for shards in note["shards"].values():
        check_ours(shards, url)
    return UnitPart(note["counts"], labels, note["shards"])
