"""Which errors are a user's, and that every exception of the project crosses processes."""

import ast
import importlib
import inspect
import pickle
from pathlib import Path

import pytest

from checkpoints_tools.errors import CheckpointError
from data_pipeline.errors import BadShardError
from pretrain.config import LayoutError
from untrusted.errors import UserError, transferable

ROOT = Path(__file__).parents[2]
PACKAGES = (
    "benchmarks", "checkpoints_tools", "data_pipeline", "kernels", "parallel", "pretrain", "slurm",
    "untrusted",
)  # fmt: skip
ENDINGS = ("Error", "Exception", "Exit", "Fault", "Lost", "Gone")
VALUES = {"str": "words", "int": 3}  # of constructors' arguments, by their annotation


def exception_classes() -> list[type[BaseException]]:
    """Every class that the project derives from an exception."""
    found = []
    for path in sorted(file for name in PACKAGES for file in (ROOT / name).rglob("*.py")):
        for node in ast.parse(path.read_text()).body:
            bases = [ast.unparse(base) for base in getattr(node, "bases", [])]
            if isinstance(node, ast.ClassDef) and any(base.endswith(ENDINGS) for base in bases):
                module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
                found.append(getattr(importlib.import_module(module), node.name))
    return [kind for kind in found if isinstance(kind, type) and issubclass(kind, BaseException)]


CLASSES = exception_classes()


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_an_exception_comes_out_of_a_pickle_as_it_went_in(kind: type[BaseException]) -> None:
    words = ["what happened"]
    if kind.__init__ is not BaseException.__init__ and "__init__" in vars(kind):
        parameters = [*inspect.signature(kind).parameters.values()][1:]
        words += [VALUES[getattr(p.annotation, "__name__", p.annotation)] for p in parameters]
    error = kind(*words)
    copied = pickle.loads(pickle.dumps(error))
    assert type(copied) is kind
    assert (str(copied), vars(copied)) == (str(error), vars(error))


def test_the_classes_are_found() -> None:
    assert {BadShardError, CheckpointError, LayoutError, UserError} <= set(CLASSES)
    assert len(CLASSES) > 20


def test_a_refusal_is_a_users_error() -> None:
    """One that is not is shown with its traceback: state here why."""
    others = {kind.__name__ for kind in CLASSES if not issubclass(kind, UserError)}
    assert others == {
        "ModelError",  # of a file that imports torch alone; the command line knows it
        "ThriftError", "_FooterError", "_StoreGone",  # caught in their modules
        "NoCompilerError", "MemoryFault",  # of the audit, which is for developers
        "CaptureError",  # of what no graph can hold: a warning, and in strict mode for developers
        "CampaignError", "CorpusError",  # of benchmarks, which print them
    }  # fmt: skip


class ForeignError(Exception):
    def __init__(self, code: int, reason: str) -> None:
        super().__init__(f"{reason} ({code})")


class LocalError(Exception):
    def __reduce__(self) -> str:
        raise TypeError("not to be pickled")


@pytest.mark.parametrize("error", [ForeignError(404, "no such thing"), LocalError("local")])
def test_an_error_that_cannot_cross_processes_does_so_as_text(error: Exception) -> None:
    copied = pickle.loads(pickle.dumps(transferable(error)))
    assert type(copied) is RuntimeError
    assert str(copied) == f"{type(error).__name__}: {error}"
    own = BadShardError("it is damaged", "folder", 3)
    assert transferable(own) is own
