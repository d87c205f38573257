"""Tensors read from checkpoints and written to them a block of rows at a time."""

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.checkpoint_layouts import stored_tensors
from checkpoints_tools import stored, tensor_index
from checkpoints_tools.errors import CheckpointError
from checkpoints_tools.stored import StoredTensors
from checkpoints_tools.stored_writer import write_untrained_state
from checkpoints_tools.tensor_index import Piece, StoredTensor, check_cover, check_covers


@pytest.mark.parametrize("block_bytes", [150, 4096, 1 << 25])
def test_blocks_are_what_the_library_loads(
    block_bytes: int, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored, "BLOCK_BYTES", block_bytes)
    step_dir = trained / "run/checkpoints/step-00000004"
    tensors, expected = StoredTensors(step_dir, os.listdir(step_dir)), stored_tensors(step_dir)
    names = [name for name in tensors.tensors if not name.startswith("rng.")]
    assert set(names) == set(expected)
    for name in names:
        blocks = list(tensors.blocks(name))
        assert [row for rows, _ in blocks for row in rows] == list(range(len(expected[name])))
        assert torch.equal(torch.cat([block for _, block in blocks]), expected[name]), name


def test_library_loads_what_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "BLOCK_BYTES", 100)
    weights = {"a": torch.randn(23, 5), "b": torch.randn(40), "c": torch.randn(6, 1, 3)}

    def read(name: str) -> Any:
        row_bytes = weights[name][0].nbytes
        for rows in stored.row_blocks(len(weights[name]), row_bytes):
            yield rows, weights[name][rows.start : rows.stop]

    write_untrained_state(tmp_path, {n: tuple(w.shape) for n, w in weights.items()}, read)
    loaded = stored_tensors(tmp_path)
    assert len(loaded) == 9
    for name, weight in weights.items():
        assert torch.equal(loaded[f"weight.{name}"], weight)
        assert not loaded[f"exp_avg.{name}"].any()
        assert not loaded[f"exp_avg_sq.{name}"].any()
    assert torch.equal(
        StoredTensors(tmp_path, os.listdir(tmp_path)).rows("weight.a", range(3, 20)),
        weights["a"][3:20],
    )


def test_a_cover_is_checked_in_time_with_its_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    columns = tuple(piece((0, n), (4400, 1)) for n in range(4400))  # ten million pairs
    begin = time.process_time()
    assert check_cover("t", (4400, 4400), columns) == 4400
    assert time.process_time() - begin < 5
    tensor = StoredTensor("t", (4400, 4400), torch.float32, columns)
    monkeypatch.setattr(tensor_index, "MAX_CELLS", 3 * 4400)
    check_covers([tensor] * 3)
    with pytest.raises(CheckpointError, match="cut as no run cuts them"):
        check_covers([tensor] * 4)


def test_a_tensor_without_values_has_none_to_cover() -> None:
    assert check_cover("t", (0, 3), (piece((0, 0), (0, 3)),)) == 0


def piece(offsets: tuple[int, ...], sizes: tuple[int, ...]) -> Piece:
    return Piece(offsets, sizes, "f", 0)


@pytest.mark.parametrize(
    ("pieces", "found"),
    [
        ([((0, 0), (2, 3)), ((2, 0), (2, 3))], None),
        ([((0, 0), (4, 1)), ((0, 1), (1, 2)), ((1, 1), (3, 2))], None),
        ([((0, 0), (2, 3)), ((3, 0), (1, 3))], "a part is missing"),
        ([((0, 0), (3, 3)), ((2, 0), (2, 3))], "overlap"),
        ([((0, 0), (4, 2)), ((1, 1), (3, 2)), ((0, 2), (1, 1))], "overlap"),
        ([((0, 0), (4, 3)), ((4, 0), (1, 3))], "outside"),
        ([((0, 0), (4, 3)), ((1, 0), (1, 0))], "without values"),
        ([((0, 0), (4, 3)), ((0, 0), (4, 3))], "overlap"),
        ([((0, 0), (2, 3)), ((0, 0), (2, 3))], "overlap"),
    ],
)
def test_pieces_cover_a_tensor_once(pieces: list[Any], found: str | None) -> None:
    def check() -> None:
        check_cover("t", (4, 3), tuple(piece(*p) for p in pieces))

    if found is None:
        check()
        return
    with pytest.raises(CheckpointError, match=found):
        check()
