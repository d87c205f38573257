"""Credentials in the URLs of a configuration: left out of records, handed to jobs in a variable.

A record of the configuration (config.toml of a run, manifests, trackers) has `***` in their place.
A job reads that config.toml, so `submit` puts the URLs themselves into TRANSXSSM_CREDENTIALS of its
environment, from where they are put back by field.
"""

import json
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import tomli_w
from pydantic import TypeAdapter

from untrusted.errors import RecordError, UntrustedError
from untrusted.records import parse_json
from untrusted.secrets import HIDDEN, redact_value, redact_values, remember

if TYPE_CHECKING:
    from pretrain.config import Config

VARIABLE = "TRANSXSSM_CREDENTIALS"
BY_FIELD = TypeAdapter(dict[str, str])
Change = Callable[[str, str], str]
"""Takes a field's dotted name and its text, and returns the text to put in its place."""


def recorded(config: "Config") -> dict[str, Any]:
    """The whole tree as plain values, for a record."""
    plain: dict[str, Any] = redact_values(config.model_dump(mode="json"))
    return plain


def dump_recorded(config: "Config") -> str:
    """The whole tree as TOML, for a record."""
    return tomli_w.dumps(recorded(config))


def environment_of_job(config: "Config") -> dict[str, str]:
    """What a job that reads the record of this configuration needs besides."""
    found: dict[str, str] = {}

    def note(name: str, text: str) -> str:
        if redact_value(text) != text:
            found[name] = text
        return text

    _changed(config.model_dump(mode="json"), note)
    return {VARIABLE: json.dumps(found)} if found else {}


def restored(tree: dict[str, Any]) -> dict[str, Any]:
    """A tree with the credentials of TRANSXSSM_CREDENTIALS put back where it has `***`.

    From here on messages do not show its credentials. Raises RecordError where the variable is
    damaged.
    """
    urls: dict[str, str] = {}
    if text := os.environ.get(VARIABLE):
        try:
            urls = parse_json(text, BY_FIELD, VARIABLE, "submit the run again")
        except RecordError:  # whose message has a part of the value
            raise RecordError(f"{VARIABLE} is damaged; submit the run again.") from None

    def put_back(name: str, text: str) -> str:
        url = urls.get(name, text)
        text = url if HIDDEN in text and redact_value(url) == text else text
        remember(text, is_value=True)
        return text

    return _changed(tree, put_back)


def check_credentials(config: "Config") -> None:
    """Raises UntrustedError for URLs from a record, where nothing has put credentials back."""
    found = []

    def note(name: str, text: str) -> str:
        if "://" in text and HIDDEN in text:
            found.append(name)
        return text

    _changed(config.model_dump(mode="json"), note)
    if found:
        raise UntrustedError(
            f"{', '.join(found)}: the URL has {HIDDEN} in the place of credentials, which records "
            "of a run leave out; use the configuration that the run was started with, or set "
            f"{VARIABLE} as its job had it"
        )


def _changed(tree: Any, change: Change, name: str = "") -> Any:
    """A copy of plain values with every text changed."""
    if isinstance(tree, str):
        return change(name, tree)
    prefix = f"{name}." if name else ""
    if isinstance(tree, dict):
        return {key: _changed(value, change, f"{prefix}{key}") for key, value in tree.items()}
    if isinstance(tree, list):
        return [_changed(value, change, f"{prefix}{n}") for n, value in enumerate(tree)]
    return tree
