"""Units of `prepare` at a URL, where nothing can be renamed.

A unit's shards go to URL/SPLIT under names that no other unit has. Then its description goes to
URL/.prepare-WORK/UNIT.npz, which says that it is done: whoever goes on, or merges, reads those.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.mds import INDEX
from data_pipeline.meta import META
from data_pipeline.remote import download, list_names, upload
from data_pipeline.shard_names import rename_shard, stored_files
from data_pipeline.unit import COUNTS, LABELS

ATTEMPTS = 4
TIMEOUT = 60.0  # seconds


@dataclass(frozen=True)
class UnitPart:
    """What a unit adds to the whole: counts by split, label counts [splits, vocabulary], shards by
    split as index.json lists them."""

    counts: dict[str, dict[str, int]]
    labels: NDArray[np.int64]
    shards: dict[str, list[dict[str, Any]]]


@dataclass(frozen=True)
class RemoteUnits:
    """Units of the same `work` (an identity) below `url`. Methods raise DataError."""

    url: str
    work: str

    @property
    def _notes(self) -> str:
        return f"{self.url.rstrip('/')}/.prepare-{self.work[:16]}"

    def done(self) -> set[int]:
        """Numbers of the units that are there."""
        names = list_names(self._notes, attempts=ATTEMPTS)
        return {int(name.removesuffix(".npz")) for name in names if name.endswith(".npz")}

    def put(self, number: int, folder: Path, splits: list[str]) -> None:
        """Upload a unit that `write_unit` has made."""
        shards: dict[str, list[dict[str, Any]]] = {split: [] for split in splits}
        for split in splits:
            index = folder / split / INDEX
            if not index.exists():  # no document of this unit fell into this split
                continue
            for entry in json.loads(index.read_bytes())["shards"]:
                stem = f"shard.{number:06d}-{len(shards[split]):03d}"
                for old, new in rename_shard(entry, stem).items():
                    if (folder / split / old).exists():
                        (folder / split / old).rename(folder / split / new)
                shards[split].append(entry)
            names = [file["basename"] for entry in shards[split] for file in stored_files(entry)]
            upload(folder / split, names, f"{self.url}/{split}", attempts=ATTEMPTS)
        note = {"counts": json.loads((folder / COUNTS).read_text()), "shards": shards}
        name = f"{number:06d}.npz"
        np.savez_compressed(folder / name, note=json.dumps(note), labels=np.load(folder / LABELS))
        upload(folder, [name], self._notes, attempts=ATTEMPTS)

    def collect(self, num_units: int, folder: Path) -> list[UnitPart]:
        """What all units add, in order; `folder` is for the downloads."""
        parts = []
        for number in range(num_units):
            name = f"{number:06d}.npz"
            download(f"{self._notes}/{name}", folder / name, timeout=TIMEOUT, attempts=ATTEMPTS)
            with np.load(folder / name) as content:
                note = json.loads(str(content["note"]))
                parts.append(UnitPart(note["counts"], content["labels"], note["shards"]))
        return parts

    def finish(self, folder: Path, splits: list[str]) -> None:
        """Upload the description of the whole, from folders as `prepare` leaves them."""
        upload(folder, ["tokenizer.json"], self.url, attempts=ATTEMPTS)
        for split in splits:
            upload(folder / split, [INDEX, META], f"{self.url}/{split}", attempts=ATTEMPTS)
