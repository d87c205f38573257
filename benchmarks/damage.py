"""Files damaged by seeded choice: other kinds of files, other bytes, other values.

Every function takes its choices from a `random.Random`, also one of Hypothesis, and returns words
that say what it did.
"""

import json
import math
import os
import random
import shutil
import socket
import struct
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tomli_w

ESCAPED = "escaped"
"""Part of every name that leads out of a folder: no program may make a file of such a name."""
CONTROLS = "\x1b[2J\x1b]0;owned\x07\x9b31m\r\x08\x00\u202e\u2028"
DEPTH = 20_000  # of nested lists
LONG = 200_000  # letters
NUMBERS: tuple[Any, ...] = (
    0, -1, 1, 2**31, 2**32, 2**53, 2**63, 10**9, 10**18, 10**21, 10**400, -(10**18),
    0.5, -0.0, 1e-308, 1e308, -1e308, math.nan, math.inf, -math.inf,
)  # fmt: skip


def hostile_name(choice: random.Random, outside: Path) -> str:
    """A name that leads out of a folder, or that no file should have. outside: where to."""
    return choice.choice(
        [
            "../" * choice.randint(1, 6) + ESCAPED,
            f"x/../../{ESCAPED}",
            str(outside / ESCAPED),
            str(outside / "precious"),
            f"{CONTROLS}{ESCAPED}",
            str(outside / "zero"), "", ".", "..", "/", "a" * 300, "x\ny", "$(touch escaped)",
        ]
    )  # fmt: skip


def hostile_value(choice: random.Random, outside: Path) -> Any:
    """A plain value that a reader may not expect."""
    number = choice.choice(NUMBERS)
    text = choice.choice(["", "x", "3", "nan", CONTROLS, "\ud800", "ü" * 50, "x" * LONG])
    return choice.choice(
        [
            number, number, number, str(number) if abs(number) < 10**300 else "1",
            None, True, False, text, text, hostile_name(choice, outside),
            [], {}, [number], [[]], {"x": number}, {CONTROLS: CONTROLS}, [text] * 3,
        ]
    )  # fmt: skip


def some_place(value: Any, choice: random.Random) -> tuple[Any, Any] | None:
    """(container, key) of a value within a plain value, near its root as often as deep in it."""
    place = None
    while isinstance(value, (dict, list)) and value and (place is None or choice.random() < 0.7):
        keys = list(value) if isinstance(value, dict) else range(len(value))
        place = value, choice.choice(keys)
        value = value[place[1]]
    return place


def damage_value(value: Any, choice: random.Random, outside: Path) -> tuple[Any, str]:
    """Change one place of a plain value, which is taken over; (the value, what was done)."""
    place = some_place(value, choice)
    if place is None or choice.random() < 0.05:
        return hostile_value(choice, outside), "the whole value replaced"
    container, key = place
    how = choice.choice(["replace", "replace", "replace", "remove", "add", "rename", "number"])
    if how == "number":
        container[key] = choice.choice(NUMBERS)
    elif how == "remove":
        del container[key]
    elif how == "add" or isinstance(container, list):
        new = hostile_value(choice, outside)
        if isinstance(container, dict):
            container[choice.choice(["x", "", CONTROLS, hostile_name(choice, outside)])] = new
        else:
            container.insert(key, new)
    elif how == "rename":
        container[choice.choice([f"{key}x", hostile_name(choice, outside)])] = container.pop(key)
    else:
        container[key] = hostile_value(choice, outside)
    return value, f"{how} at {str(key)[:40]!r}"


def damage_file(path: Path, choice: random.Random, outside: Path) -> str:
    """Damage a regular file in its place: in half of the cases its values, where it has any."""
    content = path.read_bytes()
    if choice.random() < 0.5:
        changed = _other_values(path, content, choice, outside)
        if changed is not None:
            path.write_bytes(changed[0])
            return changed[1]
    how = choice.choice([*BYTES, *BYTES, *KINDS])
    if how in BYTES:
        path.write_bytes(BYTES[how](content, choice))
    else:
        path.unlink()
        KINDS[how](path)
    return how


# -- other values ----------------------------------------------------------------------------------


def _other_values(
    path: Path, content: bytes, choice: random.Random, outside: Path
) -> tuple[bytes, str] | None:
    """The content with a value changed, and how; None for a file without values."""
    try:
        if path.suffix == ".jsonl":
            lines = content.split(b"\n")
            at = choice.randrange(max(1, len(lines) - 1))
            value, what = damage_value(json.loads(lines[at]), choice, outside)
            lines[at] = _json(value)
            return b"\n".join(lines), f"line {at + 1}: {what}"
        if path.suffix == ".toml":
            value, what = damage_value(tomllib.loads(content.decode()), choice, outside)
            return toml(value), what
        if path.suffix == ".safetensors":
            (length,) = struct.unpack("<Q", content[:8])
            value, what = damage_value(json.loads(content[8 : 8 + length]), choice, outside)
            header = _json(value)
            size = choice.choice([len(header)] * 9 + [2**63])
            return struct.pack("<Q", size) + header + content[8 + length :], f"header: {what}"
        value, what = damage_value(json.loads(content), choice, outside)
        return _json(value), what
    except (ValueError, TypeError, AttributeError, IndexError, struct.error, RecursionError):
        return None


def _json(value: Any) -> bytes:
    """As Python writes it: NaN and lone surrogates included."""
    return json.dumps(value).encode("utf-8", "surrogatepass")


def toml(value: Any) -> bytes:
    """A TOML file of a plain value, without what TOML cannot say. Raises TypeError."""

    def sayable(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: sayable(item) for key, item in value.items() if item is not None}
        if isinstance(value, list):
            return [sayable(item) for item in value if item is not None]
        return value

    return tomli_w.dumps(sayable(value)).encode("utf-8", "surrogatepass")


# -- other bytes -----------------------------------------------------------------------------------


def _flipped(content: bytes, choice: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(min(len(content), choice.choice([1, 1, 3, 20]))):
        changed[choice.randrange(len(changed))] ^= 1 << choice.randrange(8)
    return bytes(changed)


def _inserted(content: bytes, choice: random.Random, new: bytes) -> bytes:
    at = choice.randrange(len(content) + 1)
    return content[:at] + new + content[at:]


BYTES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "empty": lambda content, choice: b"",
    "cut": lambda content, choice: content[: choice.randrange(len(content) + 1)],
    "flipped bits": _flipped,
    "blank line": lambda content, choice: content.replace(b"\n", b"\n\n", 1) or b"\n",
    "cut last line": lambda content, choice: content[: -choice.randint(2, 9)],
    "zeros": lambda content, choice: bytes(max(1, len(content))),
    "zeros after it": lambda content, choice: content + bytes(4096),
    "noise": lambda content, choice: choice.randbytes(choice.choice([1, 100, 5000])),
    "noise within": lambda content, choice: _inserted(content, choice, choice.randbytes(20)),
    "no UTF-8": lambda content, choice: _inserted(content, choice, b"\xff\xfe\xc3("),
    "controls": lambda content, choice: _inserted(content, choice, CONTROLS.encode()),
    "twice": lambda content, choice: content + content,
    "deep": lambda content, choice: b"[" * DEPTH + choice.choice([b"", b"]" * DEPTH]),
    "deep objects": lambda content, choice: b'{"a":' * DEPTH,
    "long text": lambda content, choice: b'"' + b"x" * LONG + b'"',
    "long number": lambda content, choice: b"9" * LONG,
    "null": lambda content, choice: b"null\n",
    "another value": lambda content, choice: choice.choice([b"[]", b"{}", b"3", b'"x"', b"[[]]"]),
}


# -- other kinds of files --------------------------------------------------------------------------


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(os.path.relpath(path))  # of at most 107 bytes


def _loop(path: Path) -> None:
    path.symlink_to(path.name)


def _full_folder(path: Path) -> None:
    path.mkdir()
    (path / path.name).write_text("x")


KINDS: dict[str, Callable[[Path], None]] = {
    "missing": lambda path: None,
    "folder": lambda path: path.mkdir(),
    "folder with a file": _full_folder,
    "pipe": lambda path: os.mkfifo(path),
    "socket": _socket,
    "dangling link": lambda path: path.symlink_to("nowhere"),
    "link to itself": _loop,
    "link to /dev/zero": lambda path: path.symlink_to("/dev/zero"),
    "link to a folder": lambda path: path.symlink_to("/usr"),
}


def remove(path: Path) -> None:
    """Remove whatever is at `path`."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
