"""tokenizer.json of a model or checkpoint, which others may have written."""

from pathlib import Path

from tokenizers import Tokenizer  # type: ignore[import-untyped]

from checkpoints_tools.single_gpu import ModelError
from untrusted.errors import UntrustedError, check_refusal
from untrusted.files import read_regular
from untrusted.text import printable
from untrusted.tokenizer_json import differing_parts

TOKENIZER = "tokenizer.json"
MAX_BYTES = 1 << 28  # those of 256,000 tokens have some 35 MB


def read_tokenizer(path: Path) -> bytes:
    """Return the content of a tokenizer.json, of which nothing is known yet.

    Raises ModelError when there is none, or another thing than a file in its place.
    """
    try:
        return read_regular(path, MAX_BYTES)
    except FileNotFoundError as error:
        raise ModelError(
            f"{path.parent} has no {path.name}: copy the one the training data was prepared with."
        ) from error
    except OSError as error:
        raise ModelError(f"{path} cannot be read ({error.strerror}); copy it again.") from error
    except UntrustedError as error:
        raise ModelError(str(error)) from error


def differing_tokenizers(one: bytes, other: bytes, paths: tuple[Path, Path]) -> list[str]:
    """Names of what differs between two tokenizer.json of what decides ids; none if they are the
    same tokenizer. Raises ModelError, naming the file, for what is none."""
    if one == other:
        return []
    return differing_parts(parse_tokenizer(one, paths[0]), parse_tokenizer(other, paths[1]))


def parse_tokenizer(content: bytes, path: Path) -> Tokenizer:
    """Return the tokenizer that the content of a tokenizer.json describes. Raises ModelError."""
    try:
        return Tokenizer.from_buffer(content)
    except BaseException as error:  # the library raises bare Exception, and panics
        check_refusal(error)
        reason = printable(str(error))[:300]
        raise ModelError(f"{path} is not a Hugging Face tokenizer: {reason}.") from error
