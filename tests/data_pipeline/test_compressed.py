"""Compressed input: windows of any size that `zstd` makes."""

from pathlib import Path

import pytest
import zstandard

from data_pipeline.errors import DataError
from data_pipeline.reading import documents

LINES = b'{"text": "hello"}\n' * 100


def frame(window_log: int, content: bytes = LINES) -> bytes:
    """A frame as `zstd --long=WINDOW_LOG` writes it; small tables keep the compressor's memory
    small."""
    parameters = zstandard.ZstdCompressionParameters(
        window_log=window_log, hash_log=12, chain_log=12, enable_ldm=True
    )
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    return compressor.compress(content) + compressor.flush()


@pytest.mark.parametrize("window_log", [27, 28, 31])
def test_frames_with_long_windows_are_read(window_log: int, tmp_path: Path) -> None:
    content = frame(window_log)
    assert zstandard.get_frame_parameters(content).window_size == 1 << window_log
    (tmp_path / "a.jsonl.zst").write_bytes(content + zstandard.compress(LINES) + content)
    assert [document.text for document in documents([tmp_path])] == ["hello"] * 300


def single_segment(num_bytes: int) -> bytes:
    """The beginning of a frame whose window is all of its content."""
    return b"\x28\xb5\x2f\xfd\xe0" + num_bytes.to_bytes(8, "little") + b"\x01\x00\x00" + b"x" * 20


@pytest.mark.parametrize(
    ("content", "window"),
    [
        (frame(31)[:5] + bytes([22 << 3]) + frame(31)[6:], "4,294,967,296"),
        (zstandard.compress(LINES) + single_segment(1 << 40), "1,099,511,627,776"),
    ],
    ids=["window", "content"],
)
def test_beyond_two_gib_a_sentence_says_what_to_do(
    content: bytes, window: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_pipeline.compressed.INPUT_BYTES", 5)
    (tmp_path / "a.jsonl.zst").write_bytes(content)
    with pytest.raises(DataError, match=rf"a\.jsonl\.zst: .*window of {window} .*zstd --long=31"):
        list(documents([tmp_path]))
