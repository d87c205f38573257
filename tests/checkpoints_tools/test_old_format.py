"""A checkpoint that revision 497b26a wrote (two ranks, tensor parallel) is read as it was saved."""

import os
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from benchmarks.checkpoint_layouts import stored_tensors
from benchmarks.ranks import run_ranks
from checkpoints_tools.manifest import read_manifest
from checkpoints_tools.stored import StoredTensors
from checkpoints_tools.verify import verify_checkpoint
from pretrain.config import Config
from tests.tiny import tiny_config

ARCHIVE = Path(__file__).with_name("format2.tar.gz")


@pytest.fixture
def old(tmp_path: Path) -> Path:
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path / "checkpoints", filter="data")
    return tmp_path / "checkpoints/step-00000003"


def library_tensors(step_dir: Path) -> dict[str, torch.Tensor]:
    """All tensors, as torch.distributed.checkpoint reads them."""
    entries: dict[str, Any] = dcp.FileSystemReader(step_dir).read_metadata().state_dict_metadata
    tensors = {n: torch.empty(e.size, dtype=e.properties.dtype) for n, e in entries.items()}
    dcp.load(tensors, storage_reader=dcp.FileSystemReader(step_dir), no_dist=True)
    return tensors


def test_it_is_sound_and_its_tensors_are_the_library_s(old: Path) -> None:
    assert verify_checkpoint(old, deep=True) == (old, [])
    stored, expected = StoredTensors(old, os.listdir(old)), library_tensors(old)
    assert stored.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(stored.rows(name, range(len(tensor))), tensor), name


def load_and_save(config: Config, step_dir: Path) -> None:
    from benchmarks.trainers import open_trainer
    from checkpoints_tools.sharded import load_checkpoint

    trainer = open_trainer(config)
    trainer.step = load_checkpoint(step_dir, trainer.zero)["step"]
    trainer.save()
    trainer.saver.drain()


def test_another_layout_loads_it_and_saves_the_same_values(
    old: Path, tiny_data: Path, tmp_path: Path
) -> None:
    model = read_manifest(old)["config"]["model"]
    config = tiny_config(tiny_data, tmp_path / "run", model=model, parallel={"zero_stage": 3})
    run_ranks(2, load_and_save, config, old)
    saved = tmp_path / "run/checkpoints/step-00000003"
    assert not [p.name for p in saved.iterdir() if p.name == ".metadata" or p.suffix == ".distcp"]
    found, expected = stored_tensors(saved), library_tensors(old)
    assert found.keys() == {name for name in expected if not name.startswith("rng.")}
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
