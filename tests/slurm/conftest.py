"""One Slurm cluster for the session."""

from collections.abc import Iterator

import pytest

from benchmarks.slurm_cluster import Cluster, why_not
from tests.conftest import missing


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Four nodes."""
    if (reason := why_not()) is not None:
        missing(reason)
    cluster = Cluster()
    yield cluster
    cluster.stop()
