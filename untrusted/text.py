"""Text from outside, made safe to show on a terminal."""

import unicodedata

# controls, formats (bidirectional overrides among them), surrogates, line and paragraph separators
_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})

_TURNING = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def printable(text: str) -> str:
    """Return `text` on one line, with terminal escapes and other controls spelled out (`\\x1b`)."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(_spelled(c) if unicodedata.category(c) in _HIDDEN else c for c in text)


def printable_lines(text: str) -> str:
    """Return `text` with its line ends and tabs kept, and other controls spelled out."""
    return "\n".join("\t".join(map(printable, line.split("\t"))) for line in text.split("\n"))


def without_controls(text: str) -> str:
    """Return text in any language with terminal escapes and other controls spelled out.

    Line ends, tabs, and formats that scripts need are kept; those that turn text around are not.
    """
    return "".join(_spelled(c) if _steers_terminal(c) else c for c in text)


def _steers_terminal(letter: str) -> bool:
    return letter in _TURNING or (letter not in "\n\t" and unicodedata.category(letter) == "Cc")


def _spelled(letter: str) -> str:
    return letter.encode("unicode_escape").decode("ascii")
