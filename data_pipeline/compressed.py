"""Files' bytes, decompressed: .gz and .zst, each of any number of members or frames."""

import gzip
import io
import os
from pathlib import Path
from typing import IO, Any, cast

import zstandard

from untrusted.files import open_regular

COMPRESSED_SUFFIXES = frozenset({".gz", ".zst"})
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
    if path.suffix.lower() == ".gz":
        unpacked = gzip.GzipFile(fileobj=file)
        unpacked.myfileobj = cast(Any, file)  # closed with it, as one that it had opened
        return cast(IO[bytes], unpacked)
    return io.BufferedReader(_ZstdReader(file), BUFFER_BYTES)


class _ZstdReader(io.RawIOBase):
    """Frames one after another, each of which has to be whole (the library's own reader takes a
    frame that is cut off for the end)."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._decompressor = zstandard.ZstdDecompressor()
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
            self._frame = self._frame or self._decompressor.decompressobj()
            self._ready = memoryview(self._frame.decompress(data))
            if self._frame.eof:
                self._rest, self._frame = self._frame.unused_data, None
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()
