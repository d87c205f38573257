"""What stands in for a CUDA graph on a CPU: operations recorded below autograd, and issued again.

As in a graph, Python does not run in a replay: every operation has the tensors of its recording,
and new values come in through their memory alone. So whatever the host would have decided anew is
found out here: a value that it reads ends the recording, and one that it has kept gives other
losses than eager execution. Slower than that, and in need of memory for every intermediate result.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from parallel.ledger import FREE, READS

Result = TypeVar("Result")


class CaptureError(Exception):
    """An operation that no graph can hold."""


@dataclass(frozen=True)
class _Operation:
    """One that has run, on these very arguments, into these results."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    results: list[Tensor]
    """Of those, what is in memory of its own."""

    def again(self) -> None:
        """Compute from what the arguments hold now."""
        returned = _ended(self.func(*self.args, **self.kwargs))
        if self.results:
            own = _own(_tensors(returned), self.args, self.kwargs)
            for result, new in zip(self.results, own, strict=True):
                result.copy_(new)


class Replay:
    """A recorded call. external: tensors that were there before it, by the address of their
    memory."""

    def __init__(self) -> None:
        self.external: dict[int, Tensor] = {}
        self._operations: list[_Operation] = []

    def record(self, function: Callable[[], Result]) -> Result:
        """Record a call and undo what it writes into memory that was there before.

        Returns its result, which holds nothing of use before a replay. Raises CaptureError.
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
        """Issue all operations again."""
        for operation in self._operations:
            operation.again()


class _Recorder(TorchDispatchMode):
    def __init__(self, operations: list[_Operation]) -> None:
        super().__init__()
        self.external: dict[int, Tensor] = {}
        self._operations = operations
        self._made: dict[int, Tensor] = {0: torch.empty(0)}  # by address, and kept there
        self._before: list[tuple[Tensor, Tensor]] = []  # memory, and what it held
        self._kept: set[int] = set()

    def undo(self) -> None:
        """Give memory that was there before its contents back."""
        for memory, content in self._before:
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
            self._made[args[0].untyped_storage().data_ptr()] = args[0]
        for tensor in _tensors((args, kwargs)):
            address = tensor.untyped_storage().data_ptr()
            if address not in self._made:
                self.external.setdefault(address, tensor)
        self._keep(func, args, kwargs)
        returned = _ended(func(*args, **kwargs))
        own = _own(_tensors(returned), args, kwargs)
        self._made.update((t.untyped_storage().data_ptr(), t) for t in own)
        if not func.is_view:
            results = [] if name in FREE else own
            self._operations.append(_Operation(func, args, kwargs, results))
        return returned

    def _keep(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Copy what is about to be overwritten, unless the recording made it."""
        arguments = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
        changed = [a.name for a in func._schema.arguments if a.alias_info and a.alias_info.is_write]
        # collectives do not say what they write
        written = arguments if func.namespace == "c10d" else {n: arguments.get(n) for n in changed}
        for tensor in _tensors(list(written.values())):
            storage = tensor.untyped_storage()
            if storage.data_ptr() in self._made or storage.data_ptr() in self._kept:
                continue
            self._kept.add(storage.data_ptr())
            whole = torch.empty(0, dtype=torch.uint8).set_(storage)
            self._before.append((whole, whole.clone()))


def _ended(returned: Any) -> Any:
    """What an operation returns; of a collective, once it has ended.

    It is waited for here, where the recorder does not see what waiting does: gloo's reduce-scatter
    copies its result then.
    """
    return tree_map_only(torch.ScriptObject, _ended_work, returned)


def _ended_work(work: torch.ScriptObject) -> torch.ScriptObject:
    c10d = torch._C._distributed_c10d
    c10d.Work.unbox(work).wait()
    nothing: torch.futures.Future[None] = torch.futures.Future()
    nothing.set_result(None)
    ended: torch.ScriptObject = c10d._create_work_from_future(nothing).boxed()
    return ended


def _own(results: list[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """Results that lie in other memory than the arguments."""
    given = {t.untyped_storage().data_ptr() for t in _tensors((args, kwargs))}
    return [t for t in results if t.untyped_storage().data_ptr() not in given]


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
