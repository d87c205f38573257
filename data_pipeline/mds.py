"""mosaicml-streaming's shard format, without importing the rest of the library.

`import streaming` takes seconds: its package file loads transformers and torchvision for datasets
not used here. The format's own modules need neither, so they are imported below bare stand-ins
for the two parent packages, which are taken away again: a later `import streaming` gets the real
one. This is the only file that knows.
"""

import importlib.util
import sys
from types import ModuleType
from typing import Any

INDEX = "index.json"
HASH = "xxh64"
COLUMNS = frozenset({"tokens", "doc_lens", "num_pad"})


def _format_classes() -> tuple[Any, Any]:
    """(MDSReader, MDSWriter)."""
    if "streaming" not in sys.modules:
        spec = importlib.util.find_spec("streaming")
        if spec is None or not spec.submodule_search_locations:
            raise ImportError("mosaicml-streaming is not installed; run `make setup`")
        (root,) = spec.submodule_search_locations
        for name, folder in (("streaming", root), ("streaming.base", f"{root}/base")):
            parent = ModuleType(name)
            parent.__path__ = [folder]
            sys.modules[name] = parent
        try:
            return _import()
        finally:
            # The modules below stay, since the library looks itself up in sys.modules.
            for name in ("streaming", "streaming.base"):
                del sys.modules[name]
    return _import()


def _import() -> tuple[Any, Any]:
    from streaming.base.format.mds import MDSReader, MDSWriter

    return MDSReader, MDSWriter


MDSReader, MDSWriter = _format_classes()


def open_writer(folder: str, token_dtype: str, seq_len: int, shard_bytes: int) -> Any:
    """A writer of uncompressed shards; `tokens` [seq_len + 1] are checked on every write."""
    columns = {
        "tokens": f"ndarray:{token_dtype}:{seq_len + 1}",
        "doc_lens": "ndarray:int32",
        "num_pad": "int",
    }
    return MDSWriter(columns=columns, out=folder, hashes=[HASH], size_limit=shard_bytes)
