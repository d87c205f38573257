"""Updates of refused steps are left out, whatever DeepSpeed asks before it makes one.

DeepSpeed decides by itself whether a step updates, in functions that differ between its optimizers
and releases. None of them is relied on: they all end in step() of the optimizer that they were
given, and that one declines. `close` proves after each step that it was called.
"""

from typing import Any

import deepspeed
import torch

from untrusted.errors import UserError


class EngineError(UserError):
    """The installed DeepSpeed does not do what training relies on; the message says what."""


class UpdateGuard:
    """In the place of step() of one optimizer, which DeepSpeed may call part by part.

    Between `open` and `close` lies one step of the engine.
    """

    def __init__(self, adam: torch.optim.Optimizer, engine_optimizer: Any) -> None:
        """engine_optimizer: DeepSpeed's, which updates by `adam`.

        Raises EngineError where it updates by another one.
        """
        if getattr(engine_optimizer, "optimizer", None) is not adam:
            raise EngineError(
                f"DeepSpeed {deepspeed.__version__} does not update by the optimizer it was given "
                f"({type(engine_optimizer).__name__} has another): {CONSEQUENCE}"
            )
        self._engine_optimizer, self._update = engine_optimizer, adam.step
        self._refused = self._called = False
        adam.step = self._step

    def open(self, refused: bool) -> None:
        """Begin a step; refused: without an update."""
        self._refused, self._called = refused, False

    def _step(self, *words: Any, **more: Any) -> Any:
        self._called = True
        return None if self._refused else self._update(*words, **more)

    def close(self) -> bool:
        """Return whether the step made an update.

        Raises EngineError where DeepSpeed says that it did, and cannot have done it here.
        """
        if not self._called and not self._engine_optimizer.overflow:
            raise EngineError(
                f"DeepSpeed {deepspeed.__version__} ended a step without the optimizer it was "
                f"given: {CONSEQUENCE}"
            )
        return self._called and not self._refused


CONSEQUENCE = (
    "updates of bad steps could not be left out. Install a release that pyproject.toml allows"
)
