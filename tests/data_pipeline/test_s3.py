"""Shards in S3: the real client against a server of the same protocol on this machine."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from data_pipeline import remote
from data_pipeline.dataset import PackedDataset
from data_pipeline.errors import DataError
from data_pipeline.inspection import verify_dataset
from data_pipeline.prepare import prepare
from data_pipeline.storage import Cache
from tests.data_pipeline.conftest import SEQ_LEN


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """URL of an empty bucket."""
    from boto3 import client
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("S3_ENDPOINT_URL", f"http://{host}:{port}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setattr(remote, "FIRST_WAIT", 0.01)
        client("s3", endpoint_url=f"http://{host}:{port}").create_bucket(Bucket="corpus")
        yield "s3://corpus"
    server.stop()


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_prepared_there_and_read_from_there(
    compression: str, bucket: str, corpus: Path, tokenizer_file: Path, prepared: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    url, cache = f"{bucket}/{compression}/data", Cache(tmp_path / "cache", attempts=2)
    for share, merge in ((2, False), (1, True)):
        prepare(
            [corpus], tokenizer_file, url, SEQ_LEN, validation_fraction=0.2, shard_bytes=4096,
            workers=1, share=(share, 2), merge=merge, compression=compression,
        )  # fmt: skip
    for split in ("train", "validation"):
        here = PackedDataset(prepared / split)
        there = PackedDataset(f"{url}/{split}", cache=cache)
        assert len(here) == len(there)
        for one, two in zip(*(d.read(np.arange(len(here))) for d in (here, there)), strict=True):
            assert np.array_equal(one.tokens, two.tokens)
            assert np.array_equal(one.doc_lens, two.doc_lens)
    verify_dataset(url)


def test_what_is_not_there_is_named(bucket: str, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", attempts=2)
    with pytest.raises(DataError, match=r"s3://corpus/nothing/meta\.json: cannot be downloaded"):
        PackedDataset(f"{bucket}/nothing", cache=cache)
    with pytest.raises(DataError, match=r"gopher://x/y/meta\.json.*Unsupported remote path"):
        PackedDataset("gopher://x/y", cache=cache)
