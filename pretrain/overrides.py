"""Values and names of fields as a person types them on the command line."""

import contextlib
import difflib
import json
import tomllib
from collections.abc import Sequence
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

# settings of a command whose further options are overrides
WITH_OVERRIDES = {"allow_extra_args": True, "ignore_unknown_options": True}
BOOLEANS = {
    "true": True, "yes": True, "on": True, "1": True,
    "false": False, "no": False, "off": False, "0": False,
}  # fmt: skip
SAME_SECTION = 0.2  # by which a name of the same section is nearer than another
NEAR = 0.5  # likeness, of 1, from which a name is a suggestion


def read_value(text: str, annotation: Any) -> Any:
    """Return what `text` means for a field of this type; a bare word stays text.

    TOML, and besides: False, yes or off; 1e9 and 1,000 for integers; .5; 0.9,0.95 for lists; JSON.
    Raises ValueError and RecursionError for what no program should read.
    """
    if annotation is str:
        return text
    kinds = list(_kinds(annotation))
    if bool in kinds and text.lower() in BOOLEANS:
        return BOOLEANS[text.lower()]
    if (dict in kinds and text[:1] == "{") or (list in kinds and text[:1] in ("[", "(")):
        with contextlib.suppress(json.JSONDecodeError):
            return json.loads(f"[{text[1:-1]}]" if text[:1] == "(" else text)
    value = _toml(text)
    if list in kinds and not isinstance(value, list):
        values = _toml(f"[{text}]")
        if isinstance(values, list) and not any(isinstance(entry, str) for entry in values):
            return values
    if (int in kinds or float in kinds) and isinstance(value, str | float):
        return _number(text, value, whole=int in kinds and float not in kinds)
    if str in kinds and isinstance(value, str):
        return _choice(value, annotation)
    return value


def _kinds(annotation: Any) -> Sequence[Any]:
    """Return the classes of a type's values: of Literal["auto"] | bool, str and bool."""
    origin, words = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _kinds(words[0])
    if origin is Literal:
        return [*dict.fromkeys(type(word) for word in words)]
    if origin in (Union, UnionType):
        return [kind for word in words for kind in _kinds(word)]
    return [origin or annotation]


def _toml(text: str) -> Any:
    try:
        return tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        return text


def _number(text: str, value: str | float, whole: bool) -> Any:
    """Return the number that Python reads in `text`, commas aside, if it is one; else `value`."""
    try:
        number = float(text.replace(",", "").replace("_", ""))
    except ValueError:
        return value
    if not whole:
        return number
    if not number.is_integer():  # infinite and NaN, too
        return value
    digits = text.replace(",", "").replace("_", "")
    return int(digits) if digits.lstrip("+-").isdigit() else int(number)


def _choice(value: str, annotation: Any) -> str:
    """Return the word of a Literal that `value` is but for capital letters; else `value`."""
    words = [w for w in _words(annotation) if w.lower() == value.lower()]
    return words[0] if words else value


def _words(annotation: Any) -> list[str]:
    if get_origin(annotation) is Literal:
        return [word for word in get_args(annotation) if isinstance(word, str)]
    return [word for inner in get_args(annotation) for word in _words(inner)]


def suggestion(name: str, names: Sequence[str]) -> str:
    """Return which of `names` (section.field) somebody meant by `name`, which is none of them.

    The same field of another section comes first, then those that it abbreviates or that have it in
    full (`learning_rate` is `lr`, `batch_size` is `global_batch_size`), then the most alike, of the
    same section above all.
    """
    section, _, field = name.rpartition(".")
    field = field.replace("-", "_")
    if same := [other for other in names if other.rpartition(".")[2] == field]:
        return " or ".join(same)
    if longer := [other for other in names if _is_short_for(field, other.rpartition(".")[2])]:
        return " or ".join(longer)

    def likeness(other: str) -> float:
        there, _, its_field = other.rpartition(".")
        alike = difflib.SequenceMatcher(None, field, its_field).ratio()
        return alike + (SAME_SECTION if alike >= NEAR and there == section else 0.0)

    best = max(names, key=likeness)
    if likeness(best) >= NEAR:
        return best
    return difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]


def _is_short_for(field: str, other: str) -> bool:
    """Whether a field of several words has all of them in the other's, or the other is their
    initials."""
    words = [word for word in field.split("_") if word]
    initials = "".join(word[0] for word in words)
    return len(words) > 1 and (other == initials or set(words) <= set(other.split("_")))
