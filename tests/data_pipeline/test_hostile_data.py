"""Prepared data that somebody made to do harm: index, shards and descriptions, checksums too."""

import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
import zstandard

from data_pipeline import remote
from data_pipeline.dataset import PackedDataset
from data_pipeline.errors import BadShardError, DataError
from data_pipeline.inspection import verify_dataset
from data_pipeline.mds import described
from data_pipeline.meta import fingerprint
from data_pipeline.prepare import prepare
from data_pipeline.storage import Cache
from tests.conftest import missing
from tests.data_pipeline.conftest import SEQ_LEN
from tests.data_pipeline.test_storage import cache as cache
from tests.data_pipeline.test_storage import samples
from tests.data_pipeline.test_storage import short_waits as short_waits

Edit = Callable[[Any], None]


def changed(split: Path, index: Edit = lambda _: None, meta: Edit = lambda _: None) -> Path:
    """Change both files as who wants them to be believed."""
    shards = json.loads((split / "index.json").read_text())
    index(shards)
    (split / "index.json").write_text(json.dumps(shards))
    about = json.loads((split / "meta.json").read_text())
    about["fingerprint"] = fingerprint((split / "index.json").read_bytes(), about["tokenizer_hash"])
    meta(about)
    (split / "meta.json").write_text(json.dumps(about))
    return split


def renamed(name: Any, kind: str = "raw_data", shard: int = 0) -> Edit:
    return lambda index: index["shards"][shard][kind].update(basename=name)


def read_all(location: str, cache: Cache) -> None:
    samples(PackedDataset(location, cache=cache))


@pytest.fixture(params=["mds", "tar", "zstd", "tar-zstd"])
def split(
    request: pytest.FixtureRequest, corpus: Path, tokenizer_file: Path, tmp_path: Path
) -> Path:
    """OUT/train of each format, to be changed."""
    made = corpus.parent / f"hostile-{request.param}"
    if not made.exists():
        prepare(
            [corpus], tokenizer_file, made, SEQ_LEN, shard_bytes=1 << 13, workers=1,
            format="webdataset" if "tar" in request.param else "mds",
            compression="zstd" if "zstd" in request.param else "none",
        )  # fmt: skip
    return Path(shutil.copytree(made, tmp_path / "bucket")) / "train"


def kinds(split: Path) -> list[str]:
    shard = json.loads((split / "index.json").read_text())["shards"][0]
    return [kind for kind in ("raw_data", "zip_data", "offsets") if shard.get(kind)]


# -- names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["/ABSOLUTE", "../target"])
@pytest.mark.parametrize("scheme", ["", "file://"])
def test_names_that_lead_elsewhere_are_refused(
    scheme: str, name: Any, split: Path, tmp_path: Path, cache: Cache
) -> None:
    target = tmp_path / "bucket/target"
    target.write_text("precious")
    name = str(target) if name == "/ABSOLUTE" else name
    original = (split / "index.json").read_bytes()
    for kind in kinds(split):
        (split / "index.json").write_bytes(original)
        changed(split, renamed(name, kind))
        with pytest.raises(DataError, match=r"index\.json.*(basename|file name)"):
            read_all(f"{scheme}{split}", cache)
        assert target.read_text() == "precious"
    assert not list(tmp_path.glob("cache/*/*/*"))


NO_NAMES = [
    "a/../../x",
    "./x",
    "a//b",
    "",
    ".",
    "..",
    "x\n",
    "x\0y",
    "n" * 300,
    7,
    None,
    ["x"],
    "\ud800",
]


@pytest.mark.parametrize("name", NO_NAMES, ids=ascii)
def test_names_that_are_none_are_refused(
    name: Any, prepared: Path, tmp_path: Path, cache: Cache
) -> None:
    split = changed(Path(shutil.copytree(prepared, tmp_path / "copy")) / "train", renamed(name))
    with pytest.raises(DataError, match=r"index\.json.*(basename|file name|not JSON)"):
        read_all(str(split), cache)


def test_a_name_of_a_folder_of_its_own_is_fine(
    prepared: Path, tmp_path: Path, cache: Cache
) -> None:
    split = Path(shutil.copytree(prepared, tmp_path / "copy")) / "train"
    expected = samples(PackedDataset(split, cache=cache))
    (split / "0").mkdir()
    (split / "shard.000000.mds").rename(split / "0/shard.000000.mds")
    changed(split, renamed("0/shard.000000.mds"))
    for scheme in ("", "file://"):
        assert samples(PackedDataset(f"{scheme}{split}", cache=cache)) == expected
    (split / "0").rename(tmp_path / "elsewhere")
    (split / "0").symlink_to(tmp_path / "elsewhere")
    for scheme in ("", "file://"):
        with pytest.raises(DataError, match="which is a link"):
            read_all(f"{scheme}{split}", Cache(tmp_path / "new"))


# -- files ---------------------------------------------------------------------------------------


def to_secret(path: Path) -> None:
    (path.parent.parent / "secret").write_bytes(path.read_bytes())
    path.unlink()
    path.symlink_to("../secret")


def to_zero(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def device(path: Path) -> None:
    if os.geteuid():
        missing("only root can create files of other users or device files")
    path.unlink()
    os.mknod(path, 0o020666, os.makedev(1, 5))


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("scheme", ["", "file://"])
@pytest.mark.parametrize("place", [to_secret, to_zero, device, pipe, folder])
def test_a_shard_that_is_no_file_is_bad(
    place: Callable[[Path], None], scheme: str, split: Path, cache: Cache
) -> None:
    place(next(path for path in sorted(split.iterdir()) if path.name.startswith("shard.")))
    begin = time.monotonic()
    with pytest.raises(BadShardError, match=r"shard\.000000\..* (is|cannot be)"):
        read_all(f"{scheme}{split}", cache)
    assert time.monotonic() - begin < 4


@pytest.mark.parametrize("scheme", ["", "file://"])
@pytest.mark.parametrize("place", [to_zero, device, pipe, folder])
@pytest.mark.parametrize("name", ["meta.json", "index.json"])
def test_a_description_that_is_no_file_is_refused(
    name: str, place: Callable[[Path], None], scheme: str, prepared: Path, tmp_path: Path,
    cache: Cache,
) -> None:  # fmt: skip
    split = Path(shutil.copytree(prepared, tmp_path / "copy")) / "train"
    place(split / name)
    begin = time.monotonic()
    with pytest.raises(DataError, match=name.replace(".", r"\.")):
        read_all(f"{scheme}{split}", cache)
    assert time.monotonic() - begin < 4


# -- sizes ---------------------------------------------------------------------------------------


def test_a_remote_file_larger_than_its_index_says_is_not_fetched(
    prepared: Path, tmp_path: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = Path(shutil.copytree(prepared, tmp_path / "copy")) / "train"
    os.truncate(split / "shard.000000.mds", 1 << 33)
    begin = time.monotonic()
    with pytest.raises(BadShardError, match=r"shard\.000000\.mds: .* larger than \d+ bytes"):
        read_all(f"file://{split}", cache)
    monkeypatch.setattr(remote, "_check_local", lambda *_: None)  # as of a bucket, which is asked
    with pytest.raises(BadShardError, match=r"shard\.000000\.mds: .* larger than \d+ bytes"):
        read_all(f"file://{split}", cache)
    assert time.monotonic() - begin < 10
    assert not list((cache.folder / "parts").iterdir())


@pytest.mark.parametrize("scheme", ["", "file://"])
@pytest.mark.parametrize("frames", [1, 7])
def test_decompression_ends_at_the_size_that_the_index_says(
    frames: int, scheme: str, corpus: Path, tokenizer_file: Path, tmp_path: Path, cache: Cache,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    written = 0
    real = Path.open

    def counted(path: Path, *arguments: Any, **options: Any) -> Any:
        file = real(path, *arguments, **options)
        if "parts" in path.parts and "b" in str(arguments):
            write = file.write

            class Counted:
                def __enter__(self) -> "Counted":
                    return self

                def __exit__(self, *_: object) -> None:
                    file.close()

                def write(self, block: bytes) -> None:
                    nonlocal written
                    written += len(block)
                    assert written < 1 << 26, "the disk is full"
                    write(block)

            return Counted()
        return file

    out = tmp_path / "o"
    prepare([corpus], tokenizer_file, out, SEQ_LEN, compression="zstd", workers=1)
    file = out / "train/shard.000000.mds.zstd"
    part = zstandard.ZstdCompressor().compress(bytes(1 << 27))
    file.write_bytes(part * frames)
    changed(out / "train", lambda index: index["shards"][0].update(zip_data=described(file)))
    monkeypatch.setattr(Path, "open", counted)
    with pytest.raises(
        BadShardError, match=r"shard\.000000\.mds\.zstd: decompressed, it is larger"
    ):
        read_all(f"{scheme}{out}/train", cache)
    assert not list((cache.folder / "parts").iterdir())


# -- numbers -------------------------------------------------------------------------------------


def numbers(path: str, value: Any) -> Edit:
    """Set a field, such as shards.0.samples."""

    def edit(content: Any) -> None:
        *folders, last = path.split(".")
        for part in folders:
            content = content[int(part) if part.isdecimal() else part]
        content[last] = value

    return edit


@pytest.mark.parametrize(
    ("path", "value"),
    [
        *(("shards.0.samples", value) for value in (10**18, 10**40, -5, 0, 2.0, "3", True, None)),
        *(("shards.0.raw_data.bytes", value) for value in (10**18, -1, 0, 1e9, "9", [])),
        *(
            ("shards.0.raw_data.hashes", value)
            for value in ({}, {"xxh64": "../x"}, {"xxh64": 5}, [])
        ),
        *(("shards", value) for value in ([], {}, 3, [None], [{}], [[]], None)),
        ("shards.0.raw_data", None),
        ("shards.0.offsets", {"basename": "x", "bytes": 1, "hashes": {"xxh64": "0" * 16}}),
        ("shards.0.column_names", 5),
        ("shards.0.column_encodings", ["int", "int", "int"]),
    ],
    ids=repr,
)
def test_numbers_of_an_index_that_cannot_be_are_refused(
    path: str, value: Any, prepared: Path, tmp_path: Path, cache: Cache
) -> None:
    split = Path(shutil.copytree(prepared, tmp_path / "copy")) / "train"
    samples_of_all = json.loads((split / "meta.json").read_text())["samples"]
    before = json.loads((split / "index.json").read_text())["shards"][0]["samples"]
    plausible = samples_of_all - before + value if type(value) is int else samples_of_all
    meta = numbers("samples", plausible) if path.endswith("samples") else (lambda _: None)
    changed(split, numbers(path, value), meta)
    with pytest.raises(DataError, match=r"(index|meta)\.json|shard\.000000\.mds") as found:
        read_all(str(split), cache)
    assert len(str(found.value)) < 900
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        *(("vocab_size", value) for value in (2 * 10**9, 10**18, 0, -1, 300.0, "300", None)),
        *(("seq_len", value) for value in (0, -1, 10**9, 10**18, "32", None)),
        *(("samples", value) for value in (0, -1, 10**18, 10**30)),
        *(("tokens", value) for value in (0, -1, 10**18, float("nan"))),
        *(("pad_id", value) for value in (-1, 10**6, 10**18)),
        *(("eod_id", value) for value in (-1, 10**6)),
        *(("unigram_entropy", value) for value in (float("nan"), float("inf"), "x")),
        *(("format", value) for value in ("zip", 3)),
        ("unknown", 1),
    ],
    ids=repr,
)
def test_numbers_of_a_description_that_cannot_be_are_refused(
    path: str, value: Any, prepared: Path, tmp_path: Path, cache: Cache
) -> None:
    split = Path(shutil.copytree(prepared, tmp_path / "copy")) / "train"
    changed(split, meta=numbers(path, value))
    with pytest.raises(DataError, match=r"(index|meta)\.json") as found:
        read_all(str(split), cache)
    assert "\n" not in str(found.value)


NO_JSON = [b"", b"\xff\xfe", b"[" * 100_000, b"null", b"{}", b'{"shards": [', bytes(1000)]


@pytest.mark.parametrize("content", NO_JSON, ids=range(len(NO_JSON)))
@pytest.mark.parametrize("name", ["meta.json", "index.json"])
def test_a_description_that_is_no_json_is_refused(
    name: str, content: bytes, prepared: Path, tmp_path: Path, cache: Cache
) -> None:
    split = Path(shutil.copytree(prepared, tmp_path / "copy")) / "train"
    (split / name).write_bytes(content)
    about = json.loads((prepared / "train/meta.json").read_text())
    if name == "index.json":
        about["fingerprint"] = fingerprint(content, about["tokenizer_hash"])
        (split / "meta.json").write_text(json.dumps(about))
    with pytest.raises(DataError, match=name.replace(".", r"\.")):
        read_all(str(split), cache)


# -- content -------------------------------------------------------------------------------------


def spoiled(split: Path, name: str, kind: str, spoil: Callable[[bytearray], None]) -> None:
    """Change a file, and its checksum."""
    content = bytearray((split / name).read_bytes())
    spoil(content)
    (split / name).write_bytes(content)
    digest = {"xxh64": xxhash.xxh64_hexdigest(content)}
    changed(split, lambda i: i["shards"][0][kind].update(bytes=len(content), hashes=digest))


@pytest.mark.parametrize(("format", "token"), [("mds", 300), ("webdataset", 65_000)])
def test_a_token_beyond_the_vocabulary_is_named(
    format: str, token: int, prepared: Path, prepared_tars: Path, tmp_path: Path, cache: Cache
) -> None:
    made = prepared if format == "mds" else prepared_tars
    split = Path(shutil.copytree(made, tmp_path / "copy")) / "train"
    suffix = "mds" if format == "mds" else "tar"
    wanted = np.array(PackedDataset(split, cache=cache)[2].tokens)

    def spoil(content: bytearray) -> None:
        at = content.index(wanted.tobytes())
        content[at + 6 : at + 8] = np.uint16(token).tobytes()

    spoiled(split, f"shard.000000.{suffix}", "raw_data", spoil)
    dataset = PackedDataset(split, cache=cache)
    assert dataset[1].tokens.size == SEQ_LEN + 1
    message = rf"shard\.000000\.{suffix}: sample 2 .*token {token} of a vocabulary of 300"
    with pytest.raises(BadShardError, match=message):
        _ = dataset[2]
    with pytest.raises(DataError, match=message):
        verify_dataset(split)


@pytest.mark.parametrize("spoil", [
    lambda o: o.__setitem__(slice(None), np.full_like(o, -1)),
    lambda o: o.__setitem__((0, 0), 2**62),
    lambda o: o.__setitem__((0, 1), 2**62),
    lambda o: o.__setitem__((0, 3), 2**40),
    lambda o: o.__setitem__((0, 2), 0),
])  # fmt: skip
def test_offsets_that_cannot_be_are_refused(
    spoil: Callable[[Any], None], prepared_tars: Path, tmp_path: Path, cache: Cache
) -> None:
    split = Path(shutil.copytree(prepared_tars, tmp_path / "copy")) / "train"
    file = split / "shard.000000.offsets.npy"
    offsets = np.load(file)
    spoil(offsets)
    np.save(file, offsets)
    spoiled(split, file.name, "offsets", lambda _: None)
    with pytest.raises(BadShardError, match=r"shard\.000000\.tar: .*cannot be decoded"):
        read_all(str(split), cache)


@pytest.mark.parametrize("array", [
    np.zeros((0, 4), np.int64), np.zeros((10**6, 4), np.int64), np.zeros(4, np.int64),
    np.zeros((3, 4)), np.array([{"an": "object"}], object),
], ids=lambda a: f"{a.shape}-{a.dtype}")  # fmt: skip
def test_offsets_of_another_kind_are_refused(
    array: Any, prepared_tars: Path, tmp_path: Path, cache: Cache
) -> None:
    split = Path(shutil.copytree(prepared_tars, tmp_path / "copy")) / "train"
    np.save(split / "shard.000000.offsets.npy", array)
    spoiled(split, "shard.000000.offsets.npy", "offsets", lambda _: None)
    with pytest.raises(BadShardError, match=r"shard\.000000\.tar: .*cannot be decoded"):
        read_all(str(split), cache)


@pytest.mark.parametrize("at", [0, 4, 8, 40, -60, -9])
def test_bytes_of_a_shard_that_cannot_be_are_an_error_or_are_read(
    at: int, prepared: Path, tmp_path: Path, cache: Cache
) -> None:
    """Offsets, lengths of documents, padding: a shard's checksum is right, its content is not."""
    split = Path(shutil.copytree(prepared, tmp_path / "copy")) / "train"

    def spoil(content: bytearray) -> None:
        content[at : at + 4] = b"\xff\xff\xff\x7f"

    spoiled(split, "shard.000000.mds", "raw_data", spoil)
    with contextlib.suppress(BadShardError):
        read_all(str(split), cache)
