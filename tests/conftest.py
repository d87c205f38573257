"""One thread a process, before torch is imported, and small prepared data for the whole session."""

import logging
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from xdist.scheduler import LoadScopeScheduling

from data_pipeline.prepare import prepare
from data_pipeline.tokenizer import train_tokenizer
from kernels.target import interpreting
from tests.tiny import write_text

# `make gpu-check`: what the tests of kernels allocate is on the GPU, which runs compiled kernels.
ON_GPU = os.environ.get("TRANSXSSM_TEST_DEVICE", "cpu") == "cuda"
if ON_GPU:
    torch.set_default_device("cuda")

# A process interprets Triton kernels or compiles them: interpreted/ is run by itself.
collect_ignore = [
    str(path)
    for path in Path(__file__).parent.iterdir()
    if (path.name == "interpreted") != interpreting() and not ON_GPU
]


def missing(reason: str) -> NoReturn:
    """Skip a test for want of something outside the project, which `.ci/run` has to provide."""
    if os.environ.get("TRANSXSSM_CI"):
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(autouse=True)
def _logger_passes_on() -> Iterator[None]:
    """A run in this process takes the logger from the root's handlers; give it back.

    pytest listens at a logger that passes nothing on, too: with both, it would hear all twice.
    """
    log = logging.getLogger("transxssm")
    passes_on = log.propagate
    yield
    log.propagate = passes_on


class ByFile(LoadScopeScheduling):
    """Under `pytest -n`, a worker takes whole files, and one takes all that share the cluster."""

    def _split_scope(self, nodeid: str) -> str:
        return "slurm" if nodeid.startswith("tests/slurm/") else nodeid.partition("::")[0]


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByFile:
    return ByFile(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of Slurm come first: they wait more than they compute, and others fill that time."""
    items.sort(key=lambda item: "slurm" not in item.path.parts)


SEQ_LEN = 64
VOCAB_SIZE = 300


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train/ and validation/ shards of sequences of SEQ_LEN tokens."""
    folder = tmp_path_factory.mktemp("tiny")
    sources = write_text(folder / "text", 400_000)
    train_tokenizer(sources, folder / "tokenizer", VOCAB_SIZE)
    prepare(sources, folder / "tokenizer", folder / "out", SEQ_LEN, validation_fraction=0.2)
    return folder / "out"
