"""Device operations of the code that trains, by the part of the step that issues them.

A Ledger is a mode that sees every operation below autograd, of tensors with memory or without:

    ledger = Ledger(torch.device("meta"))
    watch(ledger, zero)                        # names the parts of the stage
    with ledger, ledger.part("schedule"):
        forward_backward(zero, batches, tokens)

Forward, an operation belongs to the innermost part that runs. Backward it belongs to the part in
which its node of the autograd graph was made: nodes are numbered in the order of their making, and
the ledger keeps the numbers at which parts began and ended.
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from kernels.audit.recording import Recorded, distinct_bytes
from parallel.dispatched import READS, is_free, named_arguments, tensors_in, written_names
from parallel.layers import ReplicatedScale
from parallel.model import DecoderLayer
from parallel.zero import ZeroOptimizer

Direction = Literal["forward", "backward"]
HOOKS, HEAD = "gradient hooks", "head and loss"
_OVERWRITES = {"copy_", "fill_", "zero_"}  # what stood in the first argument is not read
_GATHERS = {"index", "index_select", "gather", "embedding"}  # read of it as much as they return
_ACCUMULATES = 1 << 63  # nodes that accumulate gradients have the highest of all numbers


@dataclass(frozen=True)
class Place:
    """Where an operation comes from. layer: "ssd", "attention", or "" outside of layers."""

    layer: str
    part: str
    direction: Direction


@dataclass
class Tally:
    """Sums over operations; `kinds` and `kind_bytes` by the operation's name."""

    operations: int = 0
    bytes: int = 0
    waits: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    kind_bytes: Counter[str] = field(default_factory=Counter)

    def add(self, other: "Tally", times: int = 1) -> None:
        """Add `other` so many times; -1 takes it away."""
        self.operations += times * other.operations
        self.bytes += times * other.bytes
        self.waits += times * other.waits
        for mine, more in ((self.kinds, other.kinds), (self.kind_bytes, other.kind_bytes)):
            for kind, amount in more.items():
                mine[kind] += times * amount
                if not mine[kind]:
                    del mine[kind]

    @classmethod
    def sum(cls, tallies: Iterable["Tally"]) -> "Tally":
        """All of them together, as a tally of its own."""
        total = cls()
        for tally in tallies:
            total.add(tally)
        return total


@dataclass(frozen=True)
class _Open:
    """A part that runs, and the autograd node during which it began."""

    layer: str
    part: str
    node: int | None


class Ledger(TorchDispatchMode):
    """Counts operations on tensors of one type of device while the mode is on.

    On the meta device nothing can be read: what the host asks for is answered by `read`, which is
    given the tensor and the name of the operation that made it.
    """

    def __init__(
        self, device: torch.device, read: Callable[[Tensor, str], Any] = lambda tensor, made_by: 1
    ) -> None:
        super().__init__()
        self.tallies: dict[Place, Tally] = {}
        self._device, self._read = device.type, read
        self._makers: WeakIdKeyDictionary = WeakIdKeyDictionary()  # of flags
        self._open: list[_Open] = [_Open("", "other", None)]
        self._began: list[int] = [0]  # numbers of autograd nodes
        self._parts: list[_Open] = [self._open[0]]  # that run from these numbers on

    @contextmanager
    def part(self, part: str, layer: str | None = None) -> Iterator[None]:
        """What runs within belongs to `part`, of the layer around it unless one is given."""
        node = torch._C._current_autograd_node()
        inherited = self.place().layer if layer is None else layer
        self._open.append(_Open(inherited, part, None if node is None else node._sequence_nr()))
        self._mark()
        try:
            yield
        finally:
            self._open.pop()
            self._mark()

    def _mark(self) -> None:
        self._began.append(torch.autograd._get_sequence_nr())
        self._parts.append(self._open[-1])

    def named(self, function: Callable[..., Any], part: str, layer: str | None = None) -> Any:
        """`function`, every call of which belongs to `part`."""

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with self.part(part, layer):
                return function(*args, **kwargs)

        return call

    def place(self) -> Place:
        """Return the place of an operation that is issued now."""
        node = torch._C._current_autograd_node()
        innermost = self._open[-1]
        if node is None:
            return Place(innermost.layer, innermost.part, "forward")
        number = node._sequence_nr()
        if number >= _ACCUMULATES:
            return Place("", HOOKS, "backward")
        if innermost.node != number:  # else it began here: a recomputed module
            innermost = self._parts[bisect_right(self._began, number) - 1]
        return Place(innermost.layer, innermost.part, "backward")

    def count(self, kind: str, moved: int, waits: int = 0) -> None:
        """Enter an operation."""
        tally = self.tallies.setdefault(self.place(), Tally())
        tally.add(Tally(1, moved, waits, Counter({kind: 1}), Counter({kind: moved})))

    def launched(self, launch: Recorded) -> None:
        """Enter a launch of a Triton kernel."""
        self.count(launch.name, launch.bytes)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if is_free(func):
            return func(*args, **kwargs)
        name = func.overloadpacket.__name__
        given = tensors_in((args, kwargs))
        here = any(t.device.type == self._device for t in given)
        to_host = here and _goes_to_host(name, args, kwargs, self._device)
        unwaited = kwargs.get("non_blocking") or (name == "copy_" and True in args[2:])
        reads = here and (name in READS or (to_host and not unwaited))
        result = self._answer(func, name, args, kwargs, to_host)
        if isinstance(result, Tensor) and result.dtype == torch.bool:
            self._makers[result] = name
        made = tensors_in(result)
        here = here or any(t.device.type == self._device for t in made)
        if here and not (func.namespace == "c10d" and _alone(args)):
            self.count(name, _bytes(func, name, args, kwargs, given, made), int(reads))
        return result

    def _answer(
        self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], to_host: bool
    ) -> Any:
        if self._device == "meta":
            if name == "_local_scalar_dense" and args[0].is_meta:
                return self._answer_of(args[0])
            if name == "_to_copy" and to_host:
                dtype = kwargs.get("dtype") or args[0].dtype
                return torch.full(
                    args[0].shape, self._answer_of(args[0]), dtype=dtype, device="cpu"
                )
            if name == "copy_" and to_host:
                return args[0].fill_(self._answer_of(args[1]))
        return func(*args, **kwargs)

    def _answer_of(self, tensor: Tensor) -> Any:
        return self._read(tensor, self._makers.get(tensor, ""))


def _goes_to_host(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], device: str) -> bool:
    """Whether a copy leaves the device."""
    if name == "_to_copy":
        wanted = kwargs.get("device")
        return wanted is not None and torch.device(wanted).type == "cpu" != device
    return name == "copy_" and args[0].device.type == "cpu" != device == args[1].device.type


def _alone(args: tuple[Any, ...]) -> bool:
    """Whether a collective's group has one rank: nothing is sent, nothing is launched."""
    groups = [a for a in args if isinstance(a, torch.ScriptObject)]
    return any(dist.ProcessGroup.unbox(g).size() == 1 for g in groups if _is_group(g))


def _is_group(script_object: Any) -> bool:
    return "ProcessGroup" in str(script_object._type())


def _bytes(
    func: Any,
    name: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    given: list[Tensor],
    made: list[Tensor],
) -> int:
    """Every tensor that is read, and every one that is written, once."""
    if name in _GATHERS:
        indices = [t for t in given if not t.is_floating_point()]
        return 2 * _sum_bytes(made) + _sum_bytes(indices)
    if name in ("index_put_", "index_put"):
        return _scattered_bytes(*args[:3])
    arguments, changed = named_arguments(func, args, kwargs), written_names(func)
    unread = {a.name for a in func._schema.arguments if a.is_out}
    unread |= changed if name in _OVERWRITES else set()
    if name.startswith("_fused_") and arguments.get("grad_scale") is None:
        changed -= {"grads"}  # optimizers write them where they scale them alone
    written = tensors_in([arguments.get(n) for n in changed]) or made
    read = tensors_in([given for n, given in arguments.items() if n not in unread])
    return _sum_bytes(read) + _sum_bytes(written)


def _scattered_bytes(target: Tensor, indices: Sequence[Tensor | None], values: Tensor) -> int:
    """Elements written, with what says which and what they become."""
    index = [i for i in indices if i is not None]
    dimensions = sum(i.ndim if i.dtype == torch.bool else 1 for i in index)
    elements = torch.broadcast_shapes(*(i.shape for i in index)).numel()
    elements *= target.shape[dimensions:].numel()
    return elements * target.element_size() + _sum_bytes([*index, values])


def _sum_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(distinct_bytes(t) for t in tensors)


def watch(ledger: Ledger, zero: ZeroOptimizer) -> None:
    """Name the parts of a stage and of its optimizer, for good: they are built for this alone."""
    for chunk in zero.built.chunks:
        # after its layers the last stage has the head and the loss alone
        _rename(ledger, chunk, HEAD if chunk.last else "rest of the stage")
        chunk.hidden = ledger.named(chunk.hidden, "rest of the stage")  # type: ignore[method-assign]
        chunk.positions = ledger.named(chunk.positions, "positions")  # type: ignore[method-assign]
        for name, child in chunk.model.named_children():
            if name == "word_embed":
                _rename(ledger, child, "embedding")
            elif name == "final_layernorm":
                _rename(ledger, child, "norms")
        for layer in chunk.model.layers.values():
            _watch_layer(ledger, layer)
    if zero.main_grads is not None:
        zero.main_grads.add_waiting = ledger.named(  # type: ignore[method-assign]
            zero.main_grads.add_waiting, HOOKS, ""
        )
    zero.reduce_gradients = ledger.named(  # type: ignore[method-assign]
        zero.reduce_gradients, "gradient reduction"
    )
    zero.grad_norm = ledger.named(zero.grad_norm, "update")  # type: ignore[method-assign]
    zero.step = ledger.named(zero.step, "update")  # type: ignore[method-assign]


def _watch_layer(ledger: Ledger, layer: nn.Module) -> None:
    assert isinstance(layer, DecoderLayer)
    kind = "ssd" if layer.attn is None else "attention"
    _rename(ledger, layer, "rest", kind)
    for name, child in layer.named_children():
        if isinstance(child, ReplicatedScale):
            _rename(ledger, child, "norms")
        elif name in ("attn", "ssd"):
            _rename(ledger, child, "mixer")
        elif name == "feed_forward":
            _rename(ledger, child, "feed-forward")


def _rename(ledger: Ledger, module: nn.Module, part: str, layer: str | None = None) -> None:
    module.forward = ledger.named(module.forward, part, layer)
