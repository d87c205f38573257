"""A stand-in for CUDA graphs on a CPU: record operations below autograd, and run them again.

As in a graph, Python does not run in a replay: every operation has the tensors of its recording,
and new values enter through their memory alone. This exposes code that no graph can hold. A value
that the host reads through PyTorch ends the recording; a decision that the host made from an
earlier value makes the losses differ from those of eager execution. A replay is slower than eager
execution, and every intermediate result keeps its memory.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from parallel.dispatched import READS, is_free, named_arguments, tensors_in, written_names

Result = TypeVar("Result")


class CaptureError(Exception):
    """An operation that no graph can hold."""


@dataclass(frozen=True)
class _Operation:
    """A recorded operation, with the tensors of its recording."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    results: list[Tensor]
    """Those that have memory of their own, which an argument has not."""

    def again(self) -> None:
        """Compute the results from what the arguments hold now."""
        returned = _ended(self.func(*self.args, **self.kwargs))
        own = _own(returned, self.args, self.kwargs)
        for result, new in zip(self.results, own, strict=True):
            result.copy_(new)


class Replay:
    """A recorded call.

    external: the tensors that existed before it, by the address of their memory.
    """

    def __init__(self) -> None:
        self.external: dict[int, Tensor] = {}
        self._operations: list[_Operation] = []

    def record(self, function: Callable[[], Result]) -> Result:
        """Record a call, and restore the memory that existed before it.

        Returns the call's result, whose value is undefined before a replay. Raises CaptureError for
        a value that the host reads.
        """
        recorder = _Recorder(self._operations)
        try:
            with recorder:
                result = function()
        finally:
            recorder.undo()
        self.external = recorder.external
        return result

    @torch.no_grad()
    def replay(self) -> None:
        """Run all operations again."""
        for operation in self._operations:
            operation.again()


class _Recorder(TorchDispatchMode):
    def __init__(self, operations: list[_Operation]) -> None:
        super().__init__()
        self.external: dict[int, Tensor] = {}
        self._operations = operations
        # by the address of their memory, which stays theirs; empty tensors have the address 0
        self._made: dict[int, Tensor] = {0: torch.empty(0)}
        self._before: dict[int, tuple[Tensor, Tensor]] = {}  # memory, and a copy of its contents

    def undo(self) -> None:
        """Restore the contents of memory that existed before the recording."""
        for memory, content in self._before.values():
            memory.copy_(content)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name in READS:
            raise CaptureError(f"{name} reads a value of the device")
        if name == "lift_fresh":  # a constant, which Python has just made
            self._made[_address(args[0])] = args[0]
        for tensor in tensors_in((args, kwargs)):
            if _address(tensor) not in self._made:
                self.external.setdefault(_address(tensor), tensor)
        self._save_before_write(func, args, kwargs)
        returned = _ended(func(*args, **kwargs))
        own = _own(returned, args, kwargs)
        self._made.update((_address(tensor), tensor) for tensor in own)
        if not is_free(func):
            self._operations.append(_Operation(func, args, kwargs, own))
        return returned

    def _save_before_write(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Copy external memory that an operation is about to write."""
        arguments = named_arguments(func, args, kwargs)
        # collectives do not say what they write
        names = arguments.keys() if func.namespace == "c10d" else written_names(func)
        for tensor in tensors_in([arguments.get(name) for name in names]):
            address = _address(tensor)
            if address in self.external and address not in self._before:
                memory = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
                self._before[address] = memory, memory.clone()


def _ended(returned: Any) -> Any:
    """Wait for a collective, and return what an operation returned.

    The recorder does not see operations of a wait that happens here. Gloo's reduce-scatter copies
    its result during the wait.
    """
    return tree_map_only(torch.ScriptObject, _ended_work, returned)


def _ended_work(work: torch.ScriptObject) -> torch.ScriptObject:
    c10d = torch._C._distributed_c10d
    c10d.Work.unbox(work).wait()
    nothing: torch.futures.Future[None] = torch.futures.Future()
    nothing.set_result(None)
    ended: torch.ScriptObject = c10d._create_work_from_future(nothing).boxed()
    return ended


def _own(returned: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """Return the tensors of `returned` that lie in other memory than the arguments."""
    given = {_address(tensor) for tensor in tensors_in((args, kwargs))}
    return [tensor for tensor in tensors_in(returned) if _address(tensor) not in given]


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
