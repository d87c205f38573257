"""Files of pieces are safetensors; their index is checked; old metadata is read without code."""

import io
import os
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
import xxhash
from safetensors.torch import load_file

from checkpoints_tools import pieces_file as module
from checkpoints_tools.errors import CheckpointError
from checkpoints_tools.manifest import file_entry
from checkpoints_tools.old_format import read_old_index, values_in_archive
from checkpoints_tools.pieces_file import (
    PlannedPiece,
    header_of,
    pieces_file,
    stored_tensors,
    write_block,
    write_pieces,
)
from checkpoints_tools.tensor_index import INDEX, index_text, read_index

WHOLE = torch.arange(20.0).view(4, 5)


def write(folder: Path) -> None:
    """Two ranks, a box of the tensor each."""
    planned = []
    for rank, rows in enumerate((slice(0, 3), slice(3, 4))):
        part = WHOLE[rows].contiguous()
        piece = PlannedPiece("weight.a", (4, 5), part.dtype, (rows.start, 0), tuple(part.shape))
        file = pieces_file(rank)
        entry = write_pieces(folder / file, header_of([piece]), [part])
        assert entry == file_entry(folder / file)
        planned.append((file, [piece]))
    (folder / INDEX).write_text(index_text(stored_tensors(planned)))


def test_library_reads_the_pieces_and_the_index_finds_them(tmp_path: Path) -> None:
    write(tmp_path)
    assert torch.equal(
        load_file(tmp_path / "rank-00001.safetensors")["weight.a[3:4,0:5]"], WHOLE[3:]
    )
    tensor = read_index(tmp_path)["weight.a"]
    assert (tensor.shape, tensor.dtype) == ((4, 5), torch.float32)
    for piece in tensor.pieces:
        content = (tmp_path / piece.file).read_bytes()[piece.at :]
        rows = WHOLE[piece.offsets[0] :][: piece.sizes[0]]
        assert content == rows.contiguous().numpy().tobytes()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("rank-00001", "../rank-00001", "names a folder|has the part"),
        ("[4,5]", "[5,5]", "a part is missing"),
        ('"F32"', '"BF16"', "is damaged"),
        ("[4,5]", '[4,"5"]', "is damaged"),
    ],
)
def test_a_crafted_index_is_refused(old: str, new: str, message: str, tmp_path: Path) -> None:
    write(tmp_path)
    text = (tmp_path / INDEX).read_text()
    assert old in text
    (tmp_path / INDEX).write_text(text.replace(old, new))
    with pytest.raises(CheckpointError, match=message):
        read_index(tmp_path)


def test_old_checkpoints_are_found_in_their_archives(tmp_path: Path) -> None:
    dcp.save({"t": WHOLE, "r": torch.arange(9, dtype=torch.uint8)}, checkpoint_id=tmp_path,
             no_dist=True)  # fmt: skip
    tensors = read_old_index(tmp_path)
    assert tensors.keys() == {"t", "r"}
    (piece,) = tensors["t"].pieces
    with (tmp_path / piece.file).open("rb") as file:
        file.seek(values_in_archive(file, piece, WHOLE.nbytes))
        assert file.read(WHOLE.nbytes) == WHOLE.numpy().tobytes()
        with pytest.raises(ValueError, match="not 84"):
            values_in_archive(file, piece, WHOLE.nbytes + 4)


class Attack:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def test_code_in_old_metadata_does_not_run(tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Attack(tmp_path / "ran")))
    with pytest.raises(CheckpointError, match="which no checkpoint holds"):
        read_old_index(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_bytes_in_place_of_a_tensor_are_refused(tmp_path: Path) -> None:
    dcp.save({"t": WHOLE, "b": {"not": "a tensor"}}, checkpoint_id=tmp_path, no_dist=True)
    with pytest.raises(CheckpointError, match="is no tensor"):
        read_old_index(tmp_path)


def test_a_file_is_on_disk_when_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole, and a block at a time."""
    synced: dict[int, int] = {}

    def fsync(descriptor: int) -> None:
        found = os.fstat(descriptor)
        synced[found.st_ino] = found.st_size

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(module, "BLOCK", 7)
    piece = PlannedPiece("weight.a", (4, 5), WHOLE.dtype, (0, 0), (4, 5))
    path = tmp_path / pieces_file(0)
    entry = write_pieces(path, header_of([piece]), [WHOLE])
    assert synced == {path.stat().st_ino: entry["bytes"]}
    assert torch.equal(load_file(path)["weight.a[0:4,0:5]"], WHOLE)


def test_a_write_that_takes_a_part_is_gone_on_with() -> None:
    class Hesitant(io.BytesIO):
        def write(self, content: object) -> int:
            return super().write(bytes(content)[:3])  # type: ignore[call-overload]

    file, digest, content = Hesitant(), xxhash.xxh64(), bytes(range(100))
    assert write_block(file, content, digest) == 100
    assert file.getvalue() == content
    assert digest.hexdigest() == xxhash.xxh64_hexdigest(content)
