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
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import DataError
from data_pipeline.mds import INDEX
from data_pipeline.meta import META
from data_pipeline.remote import download, list_names, upload
from data_pipeline.shard_names import rename_shard, stored_files
from data_pipeline.unit import COUNTS, load_labels

ATTEMPTS = 4
TIMEOUT = 60.0  # seconds
LAST_SPLIT = "train"


@dataclass(frozen=True)
class UnitPart:
    """What a unit adds to the whole: counts by split, label counts [splits, vocabulary], shards by
    split as index.json lists them."""

    counts: dict[str, dict[str, int]]
    labels: NDArray[np.int64]
    shards: dict[str, list[dict[str, Any]]]


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

    def put(self, key: str, folder: Path, splits: list[str]) -> None:
        """Upload a unit that `write_unit` has made."""
        shards: dict[str, list[dict[str, Any]]] = {split: [] for split in splits}
        for split in splits:
            index = folder / split / INDEX
            if not index.exists():  # no document of this unit fell into this split
                continue
            for entry in json.loads(index.read_bytes())["shards"]:
                stem = f"shard.{key}-{len(shards[split]):03d}"
                for old, new in rename_shard(entry, stem).items():
                    if (folder / split / old).exists():
                        (folder / split / old).rename(folder / split / new)
                shards[split].append(entry)
            names = [file["basename"] for entry in shards[split] for file in stored_files(entry)]
            upload(folder / split, names, f"{self.url}/{split}", attempts=ATTEMPTS)
        note = {"counts": json.loads((folder / COUNTS).read_text()), "shards": shards}
        name = f"{key}.npz"
        np.savez_compressed(folder / name, note=json.dumps(note), labels=load_labels(folder))
        upload(folder, [name], self._notes, attempts=ATTEMPTS)

    def parts(self, keys: Iterable[str], splits: list[str]) -> Iterator[UnitPart]:
        """What each unit adds. Raises DataError if shards of one are no longer there."""
        there = {split: list_names(f"{self.url}/{split}", attempts=ATTEMPTS) for split in splits}
        with tempfile.TemporaryDirectory(prefix="transxssm-prepare.") as name:
            file = Path(name) / "unit.npz"
            for key in keys:
                url = f"{self._notes}/{key}.npz"
                download(url, file, timeout=TIMEOUT, attempts=ATTEMPTS)
                with np.load(file) as content:
                    note = json.loads(str(content["note"]))
                    part = UnitPart(note["counts"], content["labels"], note["shards"])
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
