"""Names from files stay in their folder or are refused."""

from pathlib import Path

import pytest

from untrusted.errors import UnsafeNameError
from untrusted.names import check_file_name, check_local, check_name, name_in


@pytest.mark.parametrize(
    "name",
    ["/etc/passwd", "..", "../x", "a/../x", "a//b", "./a", "a/.", "", "a\nb", "a\0b", "x" * 256,
     "é" * 128, "a\x1b[31m", 7, None, ["a"], "a/" + "x" * 256, "\ud800"],
)  # fmt: skip
def test_names_that_are_paths_are_refused(name: object) -> None:
    with pytest.raises(UnsafeNameError, match=r"index\.json: the file name .*Do not use"):
        check_name(name, "index.json")


@pytest.mark.parametrize(
    "name", ["shard.00000.mds", "0/shard.mds", "..x", "x..", "日本", "x" * 255]
)
def test_plain_names_lie_in_the_folder(name: str, tmp_path: Path) -> None:
    assert name_in(tmp_path, name, "index.json") == tmp_path / name


def test_a_name_does_not_lead_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "0").symlink_to(tmp_path / "outside")
    with pytest.raises(UnsafeNameError, match=r"leads through .*which is a link"):
        name_in(tmp_path / "data", "0/shard.mds", "index.json")


def test_a_file_name_has_no_folder() -> None:
    with pytest.raises(UnsafeNameError, match="names a folder"):
        check_file_name("a/b", "index.json")


@pytest.mark.parametrize(
    "url",
    ["s3://user:S3cr3t@bucket/x", Path("s3://user:S3cr3t@bucket/x"), "file:///S3cr3t", " gs://S3cr3t",
     "runs/s3://user:S3cr3t@bucket"],
)  # fmt: skip
def test_url_where_only_a_path_will_do_is_refused_without_its_secret(url: str | Path) -> None:
    with pytest.raises(UnsafeNameError, match=r"^checkpoint\.dir is a URL") as caught:
        check_local(url, "checkpoint.dir")
    assert "S3cr3t" not in str(caught.value)


@pytest.mark.parametrize("path", ["", "runs/a", "/data/run", "../a:b/c", "12:30/x", "a b", "@x/y"])
def test_path_of_this_machine_is_taken(path: str) -> None:
    check_local(path, "checkpoint.dir")
