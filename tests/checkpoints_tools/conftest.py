"""One trained run for the tests of what is done with checkpoints."""

import shutil
from pathlib import Path

import pytest

from benchmarks.ranks import run_ranks
from pretrain.config import Config, dump_config
from tests.tiny import tiny_config


def train(config: Config) -> None:
    from parallel.launch import launch_from_environment
    from pretrain.job import train as run

    run(config, launch_from_environment())


@pytest.fixture(scope="session")
def trained(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of config.toml and run/, trained on two ranks: checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("trained")
    config = tiny_config(
        tiny_data,
        folder / "run",
        model={"vocab_size": 301, "ssd_skip": True, "ssd_conv_width": 3},
        parallel={"tensor": 2},
        training={"steps": 4},
        checkpoint={"every": 2},
    )
    (folder / "config.toml").write_text(dump_config(config))
    run_ranks(2, train, config)
    return folder


@pytest.fixture
def steps(trained: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoints, to damage."""
    shutil.copytree(trained / "run/checkpoints", tmp_path / "checkpoints")
    return tmp_path / "checkpoints"
