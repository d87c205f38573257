"""Files' bytes, decompressed: .gz and .zst, each of any number of members or frames.

A Zstandard frame may ask for a window of up to 2 GiB (`zstd --long=31`), which then is what reading
it takes of memory.
"""

import gzip
import io
import os
from pathlib import Path
from typing import IO, Any, cast

import zstandard

from untrusted.files import open_regular

GZIP_SUFFIXES = frozenset({".gz", ".gzip"})
COMPRESSED_SUFFIXES = GZIP_SUFFIXES | {".zst", ".zstd"}
MAX_WINDOW = 1 << 31  # bytes; the largest that `zstd` itself writes and reads
HEADER_BYTES = 18  # of a frame, at most
INPUT_BYTES = 1 << 12  # decompressed at once; may become 128 MiB, usually some 10 KiB
BUFFER_BYTES = 1 << 17


def is_compressed(path: Path) -> bool:
    """Whether the file's name says so."""
    return path.suffix.lower() in COMPRESSED_SUFFIXES


def open_bytes(path: Path) -> IO[bytes]:
    """The file's content, decompressed; memory is bounded.

    Raises OSError when it cannot be opened, UnsafeFileError when it is no file and EOFError when it
    is compressed and empty. Reading raises EOFError at the end of a file that is cut off, and
    OSError, zlib.error or zstandard.ZstdError for a damaged one.
    """
    if not is_compressed(path):
        return open_regular(path, follow_link=True)
    file = open_regular(path, follow_link=True)
    if os.fstat(file.fileno()).st_size == 0:
        file.close()
        raise EOFError("it is empty, which no compressed file is: copied or written only in part?")
    if path.suffix.lower() in GZIP_SUFFIXES:
        unpacked = gzip.GzipFile(fileobj=file)
        unpacked.myfileobj = cast(Any, file)  # closed with it, as one that it had opened
        return cast(IO[bytes], unpacked)
    return io.BufferedReader(_ZstdReader(file), BUFFER_BYTES)


class _ZstdReader(io.RawIOBase):
    """Frames one after another, each of which has to be whole (the library's own reader takes a
    frame that is cut off for the end)."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW)
        self._frame: Any = None  # the one that has begun
        self._rest = b""  # input that belongs to the next frame
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            data = self._rest or self._file.read(INPUT_BYTES)
            self._rest = b""
            if not data and self._frame is not None:
                raise EOFError("it ends within a frame: copied or written only in part?")
            if not data:
                return 0
            if self._frame is None:
                data = self._checked(data)
                self._frame = self._decompressor.decompressobj()
            self._ready = memoryview(self._frame.decompress(data))
            if self._frame.eof:
                self._rest, self._frame = self._frame.unused_data, None
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def _checked(self, data: bytes) -> bytes:
        """`data`, with which a frame begins, and more where that is less than the frame's header.

        Raises ZstdError for a frame whose window is too large.
        """
        while len(data) < HEADER_BYTES and (more := self._file.read(HEADER_BYTES - len(data))):
            data += more
        if (window := _window_size(data)) > MAX_WINDOW:
            raise zstandard.ZstdError(
                f"it needs a window of {window:,} bytes, and at most {MAX_WINDOW:,} are read; "
                "compress the text again with `... | zstd --long=31 > FILE.zst`, or split it"
            )
        return data

    def close(self) -> None:
        self._file.close()
        super().close()


def _window_size(frame: bytes) -> int:
    """Bytes of earlier text that decompressing a frame needs, by its header (RFC 8878, 3.1.1.1);
    0 for what is no frame or is cut off."""
    if frame[:4] != b"\x28\xb5\x2f\xfd" or len(frame) < HEADER_BYTES:
        return 0
    descriptor = frame[4]
    if not descriptor & 0x20:
        exponent, mantissa = divmod(frame[5], 8)
        return (1 << (10 + exponent)) * (8 + mantissa) // 8
    at = 5 + (0, 1, 2, 4)[descriptor & 3]  # a single segment: the window is all of the content
    length = (1, 2, 4, 8)[descriptor >> 6]
    return int.from_bytes(frame[at : at + length], "little")
