"""Whether calls are recorded, to be issued again with other values, or compiled.

Then the host may read no value of a tensor, and what it does by such a value has to be inside an
operator of its own.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_recording = False


def is_recorded() -> bool:
    """Whether what runs now will run again without Python."""
    return _recording or torch.compiler.is_compiling()


@contextmanager
def recording() -> Iterator[None]:
    """Calls within are recorded."""
    global _recording
    before, _recording = _recording, True
    try:
        yield
    finally:
        _recording = before
