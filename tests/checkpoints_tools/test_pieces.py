"""Files of pieces are safetensors; their index is checked; old metadata is read without code."""

import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

from checkpoints_tools.errors import CheckpointError
from checkpoints_tools.manifest import file_entry
from checkpoints_tools.old_format import read_old_index, values_in_archive
from checkpoints_tools.pieces_file import (
    PlannedPiece,
    header_of,
    pieces_file,
    stored_tensors,
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
