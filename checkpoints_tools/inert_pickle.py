"""Reading a pickle as data: numbers, strings, containers, and records of the classes it names.

Only the opcodes that Python writes for such data are known, and every step takes constant time and
memory: keys of dicts are strings or records, whose hashes are not computed from their content, and
a tuple may lie in another, but no deeper. Of nothing in it an attribute is looked up or called.
"""

import pickletools
from collections.abc import Callable, Mapping
from typing import Any

# A real `.metadata` has 8 bytes for every container and record in it
BYTES_PER_OBJECT = 6
FREE_OBJECTS = 1_000
PLAIN = ("BININT", "BININT1", "BININT2", "LONG1", "SHORT_BINUNICODE", "BINUNICODE")
IGNORED = ("PROTO", "FRAME", "STOP")


class Record:
    """Stands for an object of a pickle: what would be its state, and nothing that runs."""

    __slots__ = ("arguments", "state")

    def __init__(self, *arguments: object) -> None:
        self.arguments = arguments
        self.state: Any = None

    def __getitem__(self, field: str) -> Any:
        return self.state[field]


def load(content: bytes, known: Mapping[tuple[str, str], Any]) -> Any:
    """Return what a pickle holds.

    known: what stands for the objects that it names by (module, name): subclasses of Record, other
    functions of plain values, and constants. Raises ValueError, IndexError, KeyError and TypeError
    for what is no such pickle.
    """
    machine = _Machine(known, FREE_OBJECTS + len(content) // BYTES_PER_OBJECT)
    for code, argument, _ in pickletools.genops(content):
        if (action := machine.actions.get(code.name)) is None:
            raise ValueError(f"it has a {code.name}, which no checkpoint needs")
        action(argument)
    (value,) = machine.stack
    return value


class _Machine:
    """The stack and memo of pickle."""

    def __init__(self, known: Mapping[tuple[str, str], Any], objects: int) -> None:
        self.known, self.objects_left = known, objects
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: list[Any] = []
        stack, memo, push = self.stack, self.memo, self.stack.append
        self.actions: dict[str, Callable[[Any], None]] = {
            **dict.fromkeys(IGNORED, lambda _: None),
            **dict.fromkeys(PLAIN, push),
            "NONE": lambda _: push(None),
            "NEWTRUE": lambda _: push(True),
            "NEWFALSE": lambda _: push(False),
            "MEMOIZE": lambda _: memo.append(stack[-1]),
            "BINGET": lambda number: push(memo[number]),
            "LONG_BINGET": lambda number: push(memo[number]),
            "MARK": lambda _: self.marks.append(len(stack)),
            "EMPTY_TUPLE": lambda _: push(()),
            "EMPTY_LIST": lambda _: self._made([]),
            "EMPTY_DICT": lambda _: self._made({}),
            "TUPLE": lambda _: self._tuple(self._above_mark()),
            "TUPLE1": lambda _: self._tuple(self._last(1)),
            "TUPLE2": lambda _: self._tuple(self._last(2)),
            "TUPLE3": lambda _: self._tuple(self._last(3)),
            "APPEND": lambda _: self._append(self._last(1)),
            "APPENDS": lambda _: self._append(self._above_mark()),
            "SETITEM": lambda _: self._set(self._last(2)),
            "SETITEMS": lambda _: self._set(self._above_mark()),
            "STACK_GLOBAL": lambda _: self._name(*self._last(2)),
            "REDUCE": lambda _: self._call(*self._last(2)),
            "NEWOBJ": lambda _: self._call(*self._last(2)),
            "BUILD": lambda _: self._build(self.stack.pop()),
        }

    def _made(self, value: Any) -> None:
        self.objects_left -= 1
        if self.objects_left < 0:
            raise ValueError("it makes more objects than a description of tensors of its size")
        self.stack.append(value)

    def _last(self, count: int) -> list[Any]:
        found = self.stack[-count:]
        del self.stack[-count:]
        return found

    def _above_mark(self) -> list[Any]:
        begin = self.marks.pop()
        found = self.stack[begin:]
        del self.stack[begin:]
        return found

    def _tuple(self, values: list[Any]) -> None:
        inner = (value for value in values if type(value) is tuple)
        if any(type(value) is tuple for one in inner for value in one):
            raise ValueError("it has tuples nested more deeply than any checkpoint's")
        self._made(tuple(values))

    def _append(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not list:
            raise TypeError(f"it appends to a {type(target).__name__}")
        target += values

    def _set(self, values: list[Any]) -> None:
        target, keys = self.stack[-1], values[::2]
        if type(target) is not dict:
            raise TypeError(f"it has items of a {type(target).__name__}")
        for key in keys:
            if type(key) is not str and not isinstance(key, Record):
                raise TypeError(f"it has a {type(key).__name__} as a key")
        target.update(zip(keys, values[1::2], strict=True))

    def _name(self, module: Any, name: Any) -> None:
        if type(module) is not str or type(name) is not str or (module, name) not in self.known:
            named = f"{module}.{name}" if type(module) is type(name) is str else "no name"
            raise ValueError(f"it names {named:.100}, which no checkpoint holds")
        self.stack.append(self.known[module, name])

    def _call(self, what: Any, arguments: Any) -> None:
        if not callable(what) or type(arguments) is not tuple:
            raise TypeError("it calls what is no class")
        self._made(what(*arguments))

    def _build(self, state: Any) -> None:
        if not isinstance(self.stack[-1], Record):
            raise TypeError("it gives a state to what has none")
        self.stack[-1].state = state
