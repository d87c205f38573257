"""Commands whose output may be of any size and content, such as the scripts sites put around
Slurm's."""

import subprocess
import threading
from collections.abc import Mapping, Sequence
from typing import IO

MAX_OUTPUT_BYTES = 64 << 20  # squeue's lines of 100,000 jobs have some 20 MB


def run_bounded(
    words: Sequence[str], *, timeout: float, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command and return its exit code and what it printed, with what is not UTF-8 replaced.

    timeout: seconds. Raises OSError where it cannot be run, subprocess.TimeoutExpired where it did
    not end, and subprocess.SubprocessError where it printed more than MAX_OUTPUT_BYTES; it is
    killed then.
    """
    process = subprocess.Popen(
        words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=environment,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stderr is not None
    streams = (process.stdout, process.stderr)
    found: dict[IO[bytes], bytes] = {}

    def read(stream: IO[bytes]) -> None:
        found[stream] = stream.read(MAX_OUTPUT_BYTES + 1)
        if len(found[stream]) > MAX_OUTPUT_BYTES:
            process.kill()
            stream.close()  # what it started, and still prints, ends too

    # what it started may hold the streams for ever: nothing waits for these
    readers = [threading.Thread(target=read, args=(stream,), daemon=True) for stream in streams]
    for reader in readers:
        reader.start()
    try:
        process.wait(timeout)
        for reader in readers:
            reader.join(timeout)
            if reader.is_alive():
                raise subprocess.TimeoutExpired(words, timeout)
    finally:
        process.kill()
        process.wait()
    if any(len(content) > MAX_OUTPUT_BYTES for content in found.values()):
        raise subprocess.SubprocessError(
            f"{words[0]} printed more than {MAX_OUTPUT_BYTES >> 20} MiB, and was ended"
        )
    said = [found[stream].decode(errors="replace") for stream in streams]
    for stream in streams:
        stream.close()
    return subprocess.CompletedProcess(words, process.returncode, *said)
