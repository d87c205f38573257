"""Credentials removed from what is shown, logged or recorded."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any
from urllib.parse import unquote

HIDDEN = "***"
# up to the last "@" of the host part; after a colon up to the last "@" of all, since keys of object
# stores have slashes: a port with an "@" in the path behind it is taken for one, too
_SCHEME = r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*:/+)"  # also of a URL with a slash too few
_USER = re.compile(_SCHEME + r'(?P<user>[^/\s?#"]*|[^/\s?#":@]*:[^\s"]*)@')
_USER_OF_VALUE = re.compile(  # of a text that is one URL: blanks and quotes do not end it
    _SCHEME + r"(?P<user>[^/?#]*|[^/?#:@]*:.*)@", re.DOTALL
)
_WORDS = (
    r"(?:[A-Za-z0-9]*[-_.])*"
    r"(?:password|passwd|pwd|secret|token|jwt|credentials?|signature|sig|sas|auth|authorization|"
    r"(?:api|access|secret|private|account|signing|encryption|storage)[-_.]?key(?:[-_.]?id)?)"
    r"(?:[-_.]?[0-9]+)?"
)
_SECRET_NAME = re.compile(_WORDS, re.IGNORECASE)
_PARAMETER = re.compile(  # rather too many than too few
    r"(?P<name>[?&;#][^=&;#\s\"]*(?:key|secret|token|pass|pwd|sig|cred|auth|access|jwt|sas|\bcode\b)[^=&;#\s\"]*=)"
    r'(?P<value>[^&\s"#]*)',
    re.IGNORECASE,
)

_LEAST, _LEAST_OF_NAME = 6, 16  # letters of what is hidden outside of URLs; shorter ones are words
_known: set[str] = set()


def is_secret_name(name: str) -> bool:
    """Return whether values of this name (of a variable, option or field) are credentials."""
    is_key_variable = name.isupper() and name.endswith("_KEY")
    return is_key_variable or _SECRET_NAME.fullmatch(name.lstrip("-")) is not None


def redact(text: str) -> str:
    """Return `text` without the user information and secret parameters of the URLs in it."""
    if ":/" not in text:
        return text
    return _PARAMETER.sub(rf"\g<name>{HIDDEN}", _USER.sub(rf"\g<scheme>{HIDDEN}@", text))


def redact_value(value: str) -> str:
    """Return the text of a field, which may be a URL with blanks or quotes, redacted."""
    return redact(_USER_OF_VALUE.sub(rf"\g<scheme>{HIDDEN}@", value, 1))


def remember(text: str, *, is_value: bool = False) -> None:
    """Note the credentials of the URLs in `text`, so that `redact_message` hides them alone, too.

    Libraries report URLs in parts, and decoded. is_value: the text is that of a field, as in
    `redact_value`.
    """
    users = _USER_OF_VALUE if is_value else _USER
    for match in users.finditer(text) if ":/" in text else ():
        user, colon, password = match["user"].partition(":")
        _note(password if colon else user, _LEAST if colon else _LEAST_OF_NAME)
    for match in _PARAMETER.finditer(text):
        _note(match["value"], _LEAST)


def _note(secret: str, least: int) -> None:
    if len(secret) >= least and secret != HIDDEN and len(_known) < 1000:
        _known.update((secret, unquote(secret), ascii(secret)[1:-1]))


def redact_message(text: str) -> str:
    """Return `text` redacted, also of the credentials that `remember` has noted."""
    remember(text)
    text = _PARAMETER.sub(rf"\g<name>{HIDDEN}", redact(text))  # also of a URL's end alone
    for secret in sorted(_known, key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    return text


def redact_arguments(arguments: Iterable[str]) -> list[str]:
    """Return the words of a command line, redacted; values of secret options are hidden, too."""
    words: list[str] = []
    hide = False
    for word in arguments:
        name, equals, value = word.partition("=")
        is_secret = is_secret_name(name.rpartition(".")[2])
        if hide and not word.startswith("-"):
            words.append(HIDDEN)
        elif is_secret and equals:
            words.append(f"{name}={HIDDEN}")
        elif ":/" in name:
            words.append(redact_value(word))
        else:
            words.append(name + equals + redact_value(value))
        hide = is_secret and not equals and word.startswith("-")
    return words


def redact_variables(variables: Mapping[str, str]) -> dict[str, str]:
    """Return environment variables with the values of secret names hidden, the rest redacted."""
    return {n: HIDDEN if is_secret_name(n) else redact_value(v) for n, v in variables.items()}


def redact_values(tree: Any, hide: Callable[[str], str] = redact_value) -> Any:
    """Return a tree of plain values (as JSON has them) with every text in it redacted."""
    if isinstance(tree, str):
        return hide(tree)
    if isinstance(tree, dict):
        return {key: redact_values(value, hide) for key, value in tree.items()}
    if isinstance(tree, list):
        return [redact_values(value, hide) for value in tree]
    return tree
