"""Pickles are read as data, in time and memory in proportion to their bytes."""

import pickle
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from checkpoints_tools.errors import CheckpointError
from checkpoints_tools.inert_pickle import Record, load
from checkpoints_tools.old_format import read_old_index

PROTOCOL = b"\x80\x04"
DOUBLED = PROTOCOL + b")\x94" + b"".join(b"h%ch%c\x86\x94" % (n, n) for n in range(60))


def test_plain_data_is_as_pickle_reads_it() -> None:
    data = {"a": [1, -2, 300, 70_000, 2**40, None, True, False, ("b", (3, 4, 5, 6))], "é": {}}
    data["again"] = data["a"]
    found = load(pickle.dumps(data), {})
    assert found == data
    assert found["again"] is found["a"]


def test_objects_are_records_of_their_state() -> None:
    index = dcp.metadata.MetadataIndex("t", torch.Size([2, 3]), 4)
    known = {
        ("torch.distributed.checkpoint.metadata", "MetadataIndex"): Record,
        ("torch", "Size"): lambda dimensions: dimensions,
    }
    found = load(pickle.dumps(index), known)
    assert found.state == {"fqn": "t", "offset": (2, 3), "index": 4}


@pytest.mark.parametrize(
    "content",
    [
        DOUBLED + b"}h<K\x01s.",
        PROTOCOL + b"}" + b")" + b"\x85" * 2_000_000 + b"K\x01s.",
        PROTOCOL + b"\x8f" * 4_000_000 + b".",
        PROTOCOL + b"]" + b"]\x94" * 2_000_000 + b".",
        PROTOCOL + b"}" + b"}\x8c\x01a" * 100 + b"u.",
        PROTOCOL + b"}K\x01K\x01s.",
        PROTOCOL + b"r\xff\xff\xff\xff.",
        PROTOCOL + b"\x8c\x02os\x8c\x06system\x93.",
        PROTOCOL + b"h\x07.",
        PROTOCOL + b"a.",
        PROTOCOL + b"K\x01",
        b"",
    ],
    ids=["doubled tuple as a key", "deep tuple", "sets", "lists", "items", "number as a key",
         "memo", "function", "nothing in the memo", "nothing on the stack", "no end", "nothing"],
)  # fmt: skip
def test_what_no_checkpoint_holds_is_refused_at_once(content: bytes, tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(content)
    begin = time.process_time()
    with pytest.raises(CheckpointError, match=r"\.metadata") as caught:
        read_old_index(tmp_path)
    assert time.process_time() - begin < 20
    assert len(str(caught.value)) < 500


def nested(depth: int) -> list[object]:
    """Lists that hold another twice: 2^depth to print."""
    found: list[object] = []
    for _ in range(depth):
        found = [found, found]
    return found


def as_size(metadata: dcp.metadata.Metadata) -> None:
    entry = metadata.state_dict_metadata["t"]
    assert isinstance(entry, TensorStorageMetadata)
    entry.size = nested(60)  # type: ignore[assignment]


def as_file(metadata: dcp.metadata.Metadata) -> None:
    for place in metadata.storage_data.values():
        place.relative_path = nested(60)


def as_name(metadata: dcp.metadata.Metadata) -> None:
    index, place = metadata.storage_data.popitem()
    object.__setattr__(index, "fqn", "t")
    metadata.storage_data[index] = place
    object.__setattr__(index, "fqn", nested(60))


@pytest.mark.parametrize("change", [as_size, as_file, as_name])
def test_what_is_nested_without_end_is_never_printed(
    change: Callable[[dcp.metadata.Metadata], None], tmp_path: Path
) -> None:
    dcp.save({"t": torch.arange(4.0)}, checkpoint_id=tmp_path, no_dist=True)
    assert read_old_index(tmp_path).keys() == {"t"}
    metadata = dcp.FileSystemReader(tmp_path).read_metadata()
    change(metadata)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=r"of type list|a list is in place") as caught:
        read_old_index(tmp_path)
    assert len(str(caught.value)) < 500
