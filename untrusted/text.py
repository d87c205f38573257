"""Text from outside, made safe to show on a terminal."""

import unicodedata

# controls, formats (bidirectional overrides among them), surrogates, line and paragraph separators
_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})


def printable(text: str) -> str:
    """Return `text` on one line, with terminal escapes and other controls spelled out (`\\x1b`)."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(_spelled(c) if unicodedata.category(c) in _HIDDEN else c for c in text)


def printable_lines(text: str) -> str:
    """Return `text` with its line ends and tabs kept, and other controls spelled out."""
    return "\n".join("\t".join(map(printable, line.split("\t"))) for line in text.split("\n"))


def _spelled(letter: str) -> str:
    return letter.encode("unicode_escape").decode("ascii")
