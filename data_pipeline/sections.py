"""One text file as many documents: sections between separators, read as a stream.

A separator is a string, such as `<|endoftext|>`; one of line ends alone stands for the end of a
line and blank lines after it, which may hold spaces and tabs and end with CR LF. Line breaks after
a separator are no part of the section that follows it, so that a section is what a file of its own
would be.
"""

import re
from collections.abc import Iterator
from typing import IO

from data_pipeline.errors import DataError

MAX_BYTES = 1 << 12  # of a separator
MAX_BLANKS = 1 << 10  # spaces and tabs of a blank line
BLOCK_BYTES = 1 << 17
ESCAPES = {"n": "\n", "r": "\r", "t": "\t", "\\": "\\"}


class Separator:
    """What to look for, and how many bytes it may have."""

    def __init__(self, text: str) -> None:
        r"""text: of the separator, in which \n, \r, \t and \\ are escapes. Raises DataError."""
        plain = re.sub(r"\\([nrt\\])", lambda found: ESCAPES[found[1]], text)
        try:
            content = plain.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"--document-separator {text!r} is not Unicode text.") from error
        if not 1 <= len(content) <= MAX_BYTES or not plain.strip(" \t\r"):
            raise DataError(
                f"--document-separator {text!r:.80}: give a string of 1 to {MAX_BYTES:,} bytes "
                r"that is not only spaces, such as '<|endoftext|>', or '\n\n' for blank lines."
            )
        line_ends = plain.replace("\r\n", "\n")
        if set(line_ends) == {"\n"}:
            blanks = len(line_ends) - 1
            line = rb"[ \t\r]{0,%d}\n" % MAX_BLANKS
            self.pattern = re.compile(rb"\r?\n(?:%s){%d}" % (line, blanks))
            self.max_bytes = 2 + blanks * (MAX_BLANKS + 1)
        else:
            self.pattern = re.compile(re.escape(content))
            self.max_bytes = len(content)


class Section:
    """A section, read like a file from where it begins at `offset`."""

    def __init__(self, stream: "_Stream", offset: int) -> None:
        self._stream, self.offset = stream, offset

    def read(self, size: int) -> bytes:
        """Exactly `size` bytes, fewer at the section's end, none after it."""
        parts = []
        while size and (part := self._stream.read(size)):
            parts.append(part)
            size -= len(part)
        return b"".join(parts)


def sections(file: IO[bytes], separator: Separator) -> Iterator[Section]:
    """The sections of a file, in order; each is to be read before the next is asked for.

    Some may be empty. Memory is bounded, whatever the file holds.
    """
    stream = _Stream(file, separator)
    while stream.begin():
        section = Section(stream, stream.offset)
        yield section
        while section.read(BLOCK_BYTES):
            pass  # what the caller has left


class _Stream:
    """A file up to the next separator, and so on."""

    def __init__(self, file: IO[bytes], separator: Separator) -> None:
        self._file, self._separator = file, separator
        self._buffer = b""
        self._at = 0  # of the buffer, what is read
        self._end_of_file = False
        self._until: int | None = None  # of the buffer, where the section ends, once that is known
        self._after = 0  # where the separator behind it ends
        self.offset = 0  # of the file, what is read

    def _fill(self) -> None:
        """Read on, so that there are at least two separators' bytes before the end of the file."""
        wanted = max(BLOCK_BYTES, 2 * self._separator.max_bytes)
        self._buffer, self._at = self._buffer[self._at :], 0
        while len(self._buffer) < wanted and not self._end_of_file:
            block = self._file.read(wanted - len(self._buffer))
            self._buffer += block
            self._end_of_file = not block

    def begin(self) -> bool:
        """Begin the next section, after the separator and line breaks; whether there is one."""
        if self._until is not None:
            self._move(self._after - self._at)
            self._until = None
        after_separator = self.offset > 0
        while True:
            if self._at == len(self._buffer):
                self._fill()
            if self._at == len(self._buffer):
                return False
            if not after_separator or self._buffer[self._at] not in b"\r\n":
                return True
            self._move(1)

    def _move(self, count: int) -> None:
        self._at += count
        self.offset += count

    def read(self, size: int) -> bytes:
        """Some bytes of the section, at most `size`; none at its end."""
        if self._until is None:
            if len(self._buffer) - self._at < 2 * self._separator.max_bytes:
                self._fill()
            found = self._separator.pattern.search(self._buffer, self._at)
            # one that begins later may only be found because the buffer ends
            sure = len(self._buffer) - self._separator.max_bytes
            if self._end_of_file:
                sure = len(self._buffer)
            if found and found.start() <= sure:
                self._until, self._after = found.start(), found.end()
            elif self._end_of_file:
                self._until = self._after = len(self._buffer)
            else:
                return self._take(min(size, sure - self._at))
        return self._take(min(size, self._until - self._at))

    def _take(self, count: int) -> bytes:
        part = self._buffer[self._at : self._at + count]
        self._move(count)
        return part
