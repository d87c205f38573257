"""OUT.tmp: several starts, other options, changed input and failures never damage what is done."""

import errno
import fcntl
import logging
import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest

from data_pipeline import claim as claiming
from data_pipeline import prepare as preparing
from data_pipeline.claim import claim
from data_pipeline.errors import DataError
from data_pipeline.prepare import prepare
from tests.conftest import missing
from tests.data_pipeline.conftest import SEQ_LEN
from tests.data_pipeline.test_prepare import contents
from untrusted.errors import UntrustedError

OPTIONS: dict[str, Any] = {"unit_bytes": 1000, "validation_fraction": 0, "workers": 1}


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Four files, a unit each."""
    (tmp_path / "in").mkdir()
    for name in "abcd":
        (tmp_path / "in" / f"{name}.txt").write_text(f"{name} state of a scan " * 60)
    return tmp_path / "in"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "place").mkdir()
    return tmp_path / "place" / "o"


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """First files of the units that are made."""
    names: list[str] = []
    write = preparing.write_unit

    def counted(folder: Path, unit: Any, *rest: Any) -> None:
        write(folder, unit, *rest)
        names.append(unit[0].path.name)

    monkeypatch.setattr(preparing, "write_unit", counted)
    return names


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claiming, "WAIT_SECONDS", 0.2)
    monkeypatch.setattr(claiming, "WAIT_SECONDS_ALONE", 0.2)


def fresh(texts: Path, tokenizer_file: Path, out: Path) -> dict[str, bytes]:
    other = out.parent.parent / "fresh"
    prepare([texts], tokenizer_file, other, SEQ_LEN, **OPTIONS)
    return contents(other)


@pytest.mark.parametrize("share", [(1, 1), (1, 2)])
@pytest.mark.parametrize("seq_len", [SEQ_LEN, 64])
def test_a_start_where_another_is_at_work_changes_nothing(
    share: Any, seq_len: int, texts: Path, tokenizer_file: Path, out: Path
) -> None:
    prepare([texts], tokenizer_file, out, SEQ_LEN, share=(1, 2), merge=False, **OPTIONS)
    temporary = out.with_name("o.tmp")
    work, before = (temporary / claiming.STATE).read_text(), contents(temporary)
    merge = share == (1, 1)
    with (
        claim(out, work, set(), alone=True),
        pytest.raises(DataError, match=r"o\.tmp: another `prepare` is at work there"),
    ):
        prepare([texts], tokenizer_file, out, seq_len, share=share, merge=merge, **OPTIONS)
    assert contents(temporary) == before


def test_shares_of_one_work_go_together_and_no_other(
    texts: Path, tokenizer_file: Path, out: Path
) -> None:
    def run(number: int, seq_len: int = SEQ_LEN, merge: bool = False) -> None:
        prepare([texts], tokenizer_file, out, seq_len, share=(number, 2), merge=merge, **OPTIONS)

    run(1)
    work = (out.with_name("o.tmp") / claiming.STATE).read_text()
    with claim(out, work, set(), alone=False):
        run(2)
        for number, seq_len, merge in ((2, 64, False), (2, SEQ_LEN, True), (2, 64, True)):
            with pytest.raises(DataError, match="at work"):
                run(number, seq_len, merge)
    run(2, merge=True)
    assert contents(out) == fresh(texts, tokenizer_file, out)


def _start(arguments: tuple[Any, ...], results: Any) -> None:
    try:
        prepare(*arguments, **OPTIONS)
        results.put("done")
    except BaseException as error:
        results.put(f"{type(error).__name__}: {error}")


def test_starts_at_once_give_one_whole_result(texts: Path, tokenizer_file: Path, out: Path) -> None:
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    arguments = ([texts], tokenizer_file, out, SEQ_LEN)
    processes = [context.Process(target=_start, args=(arguments, results)) for _ in range(4)]
    for process in processes:
        process.start()
    found = sorted(results.get(timeout=60) for _ in processes)
    for process in processes:
        process.join()
    assert found[-1] == "done"
    for text in found[:-1]:
        assert text == "done" or "at work there" in text or "exists and is not an empty" in text
    assert contents(out) == fresh(texts, tokenizer_file, out)
    assert [path.name for path in out.parent.iterdir()] == ["o"]


def test_a_file_system_without_locks_is_told(
    texts: Path, tokenizer_file: Path, out: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    def none(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    expected = fresh(texts, tokenizer_file, out)
    monkeypatch.setattr(fcntl, "flock", none)
    logging.getLogger("transxssm").propagate = True
    with caplog.at_level(logging.WARNING, "transxssm"):
        for number, merge in ((1, False), (2, True)):
            prepare(
                [texts], tokenizer_file, out, SEQ_LEN, share=(number, 2), merge=merge, **OPTIONS
            )
    assert "no locks" in caplog.text
    assert contents(out) == expected


def spoil(texts: Path) -> bytes:
    """Make the last file bad; what it was."""
    good = (texts / "d.txt").read_bytes()
    (texts / "d.txt").write_bytes(b"\xe9" + good)
    return good


def test_bad_input_at_the_end_costs_its_unit_alone(
    texts: Path, tokenizer_file: Path, out: Path, made: list[str]
) -> None:
    good = spoil(texts)
    with pytest.raises(DataError, match=r"d\.txt: not UTF-8.* What is done stays in .*o\.tmp;"):
        prepare([texts], tokenizer_file, out, SEQ_LEN, **OPTIONS)
    (texts / "d.txt").write_bytes(good)
    prepare([texts], tokenizer_file, out, SEQ_LEN, **OPTIONS)
    assert made == ["a.txt", "b.txt", "c.txt", "d.txt"]
    assert contents(out) == fresh(texts, tokenizer_file, out)
    assert [path.name for path in out.parent.iterdir()] == ["o"]


def test_text_changed_between_runs_is_read_anew(
    texts: Path, tokenizer_file: Path, out: Path, made: list[str]
) -> None:
    good = spoil(texts)
    with pytest.raises(DataError):
        prepare([texts], tokenizer_file, out, SEQ_LEN, **OPTIONS)
    (texts / "d.txt").write_bytes(good)
    (texts / "b.txt").write_text("B" + (texts / "b.txt").read_text()[1:])
    made.clear()
    prepare([texts], tokenizer_file, out, SEQ_LEN, **OPTIONS)
    assert made == ["b.txt", "d.txt"]
    assert contents(out) == fresh(texts, tokenizer_file, out)


def test_other_work_does_not_take_units_that_a_merge_has_emptied(
    texts: Path, tokenizer_file: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(preparing, "describe_split", full)
        with pytest.raises(DataError, match=r"No space left.* What is done stays in"):
            prepare([texts], tokenizer_file, out, SEQ_LEN, **OPTIONS)
    (texts / "d.txt").write_text("other text")
    prepare([texts], tokenizer_file, out, SEQ_LEN, **OPTIONS)
    assert contents(out) == fresh(texts, tokenizer_file, out)


def test_out_may_be_a_link_but_not_the_working_folder(
    texts: Path, tokenizer_file: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(out.parent)
    with pytest.raises(DataError, match="is the working folder; name a new folder in it"):
        prepare([texts], tokenizer_file, Path("."), SEQ_LEN, **OPTIONS)
    with pytest.raises(DataError, match="exists and is not an empty folder"):
        prepare([texts], tokenizer_file, Path("/"), SEQ_LEN, **OPTIONS)
    (out.parent / "target").mkdir()
    (out.parent / "link").symlink_to("target")
    prepare([texts], tokenizer_file, out.parent / "link", SEQ_LEN, **OPTIONS)
    assert contents(out.parent / "target") == fresh(texts, tokenizer_file, out)
    assert sorted(path.name for path in out.parent.iterdir()) == ["link", "target"]


def test_a_dataset_at_a_url_is_refused_and_untouched(
    texts: Path, tokenizer_file: Path, out: Path
) -> None:
    url = f"file://{out}"
    prepare([texts], tokenizer_file, url, SEQ_LEN, **OPTIONS)
    before = contents(out)
    for seq_len in (SEQ_LEN, 64):
        with pytest.raises(DataError, match=r"o holds a dataset \(train/meta\.json\)"):
            prepare([texts], tokenizer_file, url, seq_len, **OPTIONS)
    assert contents(out) == before
    (out / "train" / "meta.json").unlink()
    next((out / "train").glob("shard.*")).unlink()
    with pytest.raises(DataError, match=r"is missing, though.*remove .*\.prepare-units"):
        prepare([texts], tokenizer_file, url, SEQ_LEN, **OPTIONS)


def test_state_that_is_damaged_is_of_other_work(
    texts: Path, tokenizer_file: Path, out: Path
) -> None:
    prepare([texts], tokenizer_file, out, SEQ_LEN, share=(1, 2), merge=False, **OPTIONS)
    state = out.with_name("o.tmp") / claiming.STATE
    state.write_bytes(b"\xb0\xff")
    prepare([texts], tokenizer_file, out, SEQ_LEN, **OPTIONS)
    assert contents(out) == fresh(texts, tokenizer_file, out)


def test_state_that_is_no_file_is_refused(texts: Path, tokenizer_file: Path, out: Path) -> None:
    out.with_name("o.tmp").mkdir()
    os.mkfifo(out.with_name("o.tmp") / claiming.STATE)
    with pytest.raises(UntrustedError, match="a pipe, not a file"):
        prepare([texts], tokenizer_file, out, SEQ_LEN, **OPTIONS)


# -- what others put in the way ------------------------------------------------------------------


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """A folder of the user's, which is nobody's to remove."""
    (tmp_path / "victim" / "sub").mkdir(parents=True)
    for name in ("thesis.txt", "sub/x", "sub/index.json"):
        (tmp_path / "victim" / name).write_text("keep")
    return tmp_path / "victim"


IN_USE = [
    "o.tmp", "o.tmp/units", "o.tmp/units/KEY", "o.tmp/units/KEY/train", "o.tmp/train",
    "o.tmp/.transxssm-prepare.lock", "o.tmp/units.old",
]  # fmt: skip
TO_REMOVE = ["o.tmp/units/0", "o.tmp/units/0.old", "o.tmp/validation", "o.tmp/other"]


@pytest.mark.parametrize(
    ("state", "planted"),
    [("same", name) for name in IN_USE]
    + [("other", name) for name in IN_USE + TO_REMOVE if not name.endswith("KEY/train")],
)
def test_links_in_the_way_are_refused_and_not_followed(
    state: str, planted: str, victim: Path, texts: Path, tokenizer_file: Path, out: Path
) -> None:
    prepare([texts], tokenizer_file, out, SEQ_LEN, share=(1, 2), merge=False, **OPTIONS)
    temporary = out.with_name("o.tmp")
    if state == "other":
        (temporary / claiming.STATE).write_text("other")
    key = min(path.name for path in (temporary / "units").iterdir())
    path = out.parent / planted.replace("KEY", key)
    if path.exists():
        path.rename(out.parent / "before")
    path.symlink_to(victim / "thesis.txt" if planted.endswith("lock") else victim)
    before = contents(victim)

    def both_shares() -> None:
        prepare([texts], tokenizer_file, out, SEQ_LEN, share=(2, 2), merge=False, **OPTIONS)
        prepare([texts], tokenizer_file, out, SEQ_LEN, **OPTIONS)

    with pytest.raises((DataError, UntrustedError), match=f"{path} is a link, not a f"):
        both_shares()
    assert contents(victim) == before


@pytest.mark.parametrize("planted", ["o.tmp", "o.tmp/units", "o.tmp/units/KEY"])
@pytest.mark.parametrize("fault", ["foreign", "open"])
def test_folders_of_others_are_refused(
    planted: str, fault: str, texts: Path, tokenizer_file: Path, out: Path
) -> None:
    prepare([texts], tokenizer_file, out, SEQ_LEN, share=(1, 2), merge=False, **OPTIONS)
    temporary = out.with_name("o.tmp")
    key = min(path.name for path in (temporary / "units").iterdir())
    path = out.parent / planted.replace("KEY", key)
    if fault == "foreign":
        if os.geteuid():
            missing("only root can create files of other users or device files")
        os.chown(path, 4242, 4242)
    else:
        path.chmod(0o777)
    before = contents(temporary)
    message = "belongs to the user 4242" if fault == "foreign" else "written by every user"
    with pytest.raises(UntrustedError, match=rf"{path.name} .*{message}"):
        prepare([texts], tokenizer_file, out, SEQ_LEN, **OPTIONS)
    assert contents(temporary) == before


def test_a_project_may_share_folders_but_not_with_everybody(
    texts: Path, tokenizer_file: Path, out: Path
) -> None:
    umask = os.umask(0)
    try:
        for number in (1, 2):
            prepare(
                [texts], tokenizer_file, out, SEQ_LEN, share=(number, 2), merge=False, **OPTIONS
            )
        folders = (out.with_name("o.tmp"), out.with_name("o.tmp") / "units")
        assert {path.stat().st_mode & 0o777 for path in folders} == {0o775}
    finally:
        os.umask(umask)
    prepare([texts], tokenizer_file, out, SEQ_LEN, **OPTIONS)


def test_files_in_the_way_are_replaced_and_not_written_through(
    victim: Path, texts: Path, tokenizer_file: Path, out: Path
) -> None:
    prepare([texts], tokenizer_file, out, SEQ_LEN, share=(1, 2), merge=False, **OPTIONS)
    before = contents(victim)
    temporary = out.with_name("o.tmp")
    (temporary / "train").mkdir()
    for name in ("tokenizer.json", "train/index.json", "train/meta.json"):
        (temporary / name).symlink_to(victim / "thesis.txt")
    (temporary / f"{claiming.STATE}.{os.getpid()}").symlink_to(victim / "thesis.txt")
    prepare([texts], tokenizer_file, out, SEQ_LEN, share=(2, 2), **OPTIONS)
    assert contents(victim) == before
    assert contents(out) == fresh(texts, tokenizer_file, out)
