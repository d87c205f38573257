"""JSON of any shape is read whole or refused with one sentence."""

import resource
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter
from typing_extensions import TypedDict

from untrusted.errors import RecordError, UntrustedError
from untrusted.records import Count, Finite, parse_json, read_json, read_json_lines, read_state


class Start(TypedDict):
    host: str
    world_size: Count
    seconds: Finite


STARTS = TypeAdapter(list[Start])
GOOD = '[{"host": "a", "world_size": 2, "seconds": 1}]'


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("\0\1\2", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("{}", "valid list"),
        (GOOD.replace("2", '"2"'), "0.world_size"),
        (GOOD.replace("2", "-2"), "0.world_size"),
        (GOOD.replace("2", "1" + "0" * 400), "0.world_size"),
        (GOOD.replace("2", "true"), "0.world_size"),
        (GOOD.replace("1}", "NaN}"), "not JSON"),
        (GOOD.replace("1}", "1e999}"), "0.seconds"),
        (GOOD.replace('"host": "a", ', ""), "0.host"),
        (GOOD.replace('"a"', "null"), "0.host"),
    ],
)
def test_damaged_json_is_one_sentence(text: str, reason: str) -> None:
    with pytest.raises(RecordError) as caught:
        parse_json(text, STARTS, "environment.json", "remove it")
    message = str(caught.value)
    assert message.startswith("environment.json is damaged (")
    assert message.endswith("; remove it.")
    assert reason in message
    assert message.isprintable()
    assert len(message) < 400


@pytest.mark.parametrize("empty", ["{}", "[]"])
def test_more_lists_and_objects_than_a_file_has_are_not_made(empty: str) -> None:
    text = f'{{"x":[{",".join([empty] * 6_000_000)}]}}'
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for content in (text, text.encode()):
        with pytest.raises(RecordError, match="more lists and objects"):
            parse_json(content, STARTS, "x", "y")
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory  # KiB
    assert grown < 200 << 10


def test_sound_json_is_read() -> None:
    assert parse_json(GOOD, STARTS, "x", "y")[0]["world_size"] == 2
    assert parse_json(GOOD.encode(), STARTS, "x", "y")[0]["seconds"] == 1.0


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
                    lambda v: st.lists(v) | st.dictionaries(st.text(), v)))  # fmt: skip
def test_no_value_gets_past_its_type(value: Any) -> None:
    import json

    try:
        starts = parse_json(json.dumps(value), STARTS, "x", "y")
    except RecordError:
        return
    assert starts == value


def test_files_of_other_kinds_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UntrustedError, match="a folder"):
        read_json(tmp_path, STARTS, "remove it")
    with pytest.raises(UntrustedError, match="a device"):
        read_json(Path("/dev/zero"), STARTS, "remove it")
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "none", STARTS, "remove it")


def test_bad_lines_are_left_out_and_named(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    assert read_json_lines(path, STARTS).entries == []
    path.write_bytes(f"{GOOD}\n\n\xff\n{GOOD}\n[1]\n{GOOD}".encode("latin-1"))
    found = read_json_lines(path, STARTS)
    assert len(found.entries) == 2
    assert [f"line {n} " in fault for n, fault in zip((2, 3, 5, 6), found.faults, strict=True)] == [
        True, True, True, True,
    ]  # fmt: skip
    assert "a folder" in read_json_lines(tmp_path, STARTS).faults[0]


def test_a_page_that_a_crash_left_empty_does_not_spoil_the_line_after_it(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b"\0" * 4096 + f"{GOOD}\n".encode())
    found = read_json_lines(path, STARTS)
    assert len(found.entries) == 1
    assert not found.faults


def test_state_that_cannot_be_read_is_one_sentence(tmp_path: Path) -> None:
    """Where it is not even a file of which one could see whether it is empty."""
    (tmp_path / "run").write_text("")
    with pytest.raises(RecordError, match=r"starts\.json cannot be read .*; remove it"):
        read_state(tmp_path / "run/starts.json", STARTS, "remove it")
