"""Saving while training goes on.

    save(step)    the first time, ranks agree who writes what                       foreground
    ├─ copy       this rank's share to host memory                    ┐ a thread of each rank,
    ├─ write      its file, on disk (fsync), checksum                 ┘ beside the next steps
    ├─ gather     what every rank wrote, or the first error           in a later step's `poll`
    └─ commit     manifest, rename, `latest`; then old ones go        a thread of rank 0

The state changes in updates alone, so the copy, too, is made beside the forward and backward of the
next step; `before_update` waits for its end. One save is in flight at a time. Until the rename the
folder is called step-N.tmp, and whatever dies before it leaves the earlier checkpoints as they are.
"""

import contextlib
import logging
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from checkpoints_tools import folder as folders
from checkpoints_tools.errors import CheckpointError
from checkpoints_tools.global_tensors import GlobalTensor, Part
from checkpoints_tools.pieces_file import (
    PlannedPiece,
    header_of,
    pieces_file,
    stored_tensors,
    write_pieces,
)
from checkpoints_tools.sharded import tensors_to_save
from checkpoints_tools.tensor_index import INDEX, check_covers, index_text
from parallel.groups import from_rank_0, host_group
from parallel.zero import ZeroOptimizer
from untrusted.files import write_durably
from untrusted.numbers import counted

log = logging.getLogger("transxssm")

Tensors = dict[str, Any]  # GlobalTensor, or Tensor for what only one rank has
Entries = dict[str, dict[str, Any]]  # of a manifest's files
T = TypeVar("T")


@dataclass(frozen=True)
class _Plan:
    """What every save of a run has in common."""

    file: str  # that this rank writes
    header: bytes  # of it; empty where this rank writes none
    index: bytes  # tensors.json; on rank 0


@dataclass
class _Flight:
    """A save that is under way."""

    temporary: Path
    step: int
    state: dict[str, Any]
    begun: float
    keep_up_to: int | None = None
    work: "Future[Any]" = field(default_factory=Future)  # this rank's thread
    copied: threading.Event = field(default_factory=threading.Event)
    committing: bool = False
    stalled: float = 0.0


class CheckpointSaver:
    """Saves of one run into one folder. Every method that says so is a collective of all ranks."""

    def __init__(
        self,
        folder: Path,
        zero: ZeroOptimizer,
        *,
        tokenizer: Path,
        keep_last: int,
        keep_every: int,
        asynchronous: bool = True,
        committed: Callable[[int], None] | None = None,
    ) -> None:
        """tokenizer: a file that travels along; committed: called on rank 0, in another thread,
        with the step of every checkpoint. A collective."""
        self.folder, self.zero, self.tokenizer = folder, zero, tokenizer
        self.keep_last, self.keep_every = keep_last, keep_every
        self.asynchronous, self.committed = asynchronous, committed
        self._group = host_group()
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._plan: _Plan | None = None
        self._host: HostCopy | None = None
        self._flight: _Flight | None = None
        self._stalled = 0.0

    def save(self, step: int, state: dict[str, Any], keep_up_to: int | None = None) -> None:
        """Begin to save; `state`: what else a resumed run needs (JSON). A collective.

        keep_up_to: the newest checkpoint up to this step stays, whatever keep_last is.

        Returns when the checkpoint is committed, or soon with `asynchronous`. Raises
        CheckpointError, the same on every rank; earlier checkpoints are intact then.
        """
        begin = time.perf_counter()
        if self._flight is not None:
            log.info("waiting for the checkpoint of step %d to be written", self._flight.step)
            self.drain()
        temporary = folders.step_folder(self.folder, step).with_suffix(".tmp")

        def make_folder() -> None:
            folders.begin(self.folder, step)
            write_durably(temporary / "tokenizer.json", self.tokenizer.read_bytes())

        self._on_rank_0(make_folder, f"cannot begin {temporary}")
        tensors = tensors_to_save(self.zero)
        plan = self._planned(tensors)
        state = state | {"adam_step": self.zero.adam_step(), "world_size": dist.get_world_size()}
        self._host = self._host or HostCopy(tensors)
        copy = self._host.begin(tensors)
        flight = self._flight = _Flight(temporary, step, state, begin, keep_up_to)
        flight.work = self._pool.submit(_copy_and_write, copy, flight, plan)
        if not self.asynchronous:
            self.drain()
        self._count_stall(flight, begin)

    def before_update(self) -> None:
        """Wait until the state is copied; to be called before it changes."""
        flight = self._flight
        if flight is not None and not flight.copied.is_set():
            begin = time.perf_counter()
            flight.copied.wait()
            self._count_stall(flight, begin)

    def poll(self) -> None:
        """Go on with the save in flight, if it is time to. A collective; free when there is none.

        Raises CheckpointError, the same on every rank, when a part of the save failed.
        """
        flight = self._flight
        if flight is None or not self._everywhere(flight.work.done()):
            return
        if not flight.committing:
            self._begin_commit(flight)
        else:
            self._end(flight)

    def drain(self) -> None:
        """Wait for the save in flight. A collective; raises as `poll` does."""
        while self._flight is not None:
            wait([self._flight.work])
            self.poll()

    def take_stall(self) -> float:
        """Seconds that training has waited for saves since this was last asked."""
        stalled, self._stalled = self._stalled, 0.0
        return stalled

    # -- in a flight --------------------------------------------------------------------------

    def _count_stall(self, flight: _Flight, begin: float) -> None:
        waited = time.perf_counter() - begin
        flight.stalled += waited
        self._stalled += waited

    def _planned(self, tensors: Tensors) -> _Plan:
        """Who writes what, agreed once: it is the same in every save of a run. Collective."""
        if self._plan is None:
            file, pieces = pieces_file(dist.get_rank()), planned_pieces(tensors)
            index = b""

            def described() -> None:
                nonlocal index
                found = stored_tensors(everyones)
                check_covers(found)
                index = index_text(found).encode()

            everyones = self._gathered((file, pieces))
            from_rank_0(described)
            self._plan = _Plan(file, header_of(pieces) if pieces else b"", index)
        return self._plan

    def _begin_commit(self, flight: _Flight) -> None:
        """All ranks have written, or failed."""
        self._check(flight, None if flight.work.exception() is None else self._cause(flight.work))
        gathered = self._gathered(flight.work.result())
        flight.committing = True
        if gathered:
            flight.work = self._pool.submit(self._commit, flight, gathered)

    def _commit(self, flight: _Flight, gathered: list[Entries]) -> None:
        """Of rank 0. `gathered`: what every rank wrote."""
        assert self._plan is not None
        write_durably(flight.temporary / INDEX, self._plan.index)
        entries = {name: entry for files in gathered for name, entry in files.items()}
        _check_all_files_here(flight.temporary, entries)
        folders.commit(self.folder, flight.step, flight.state, entries)
        if self.committed is not None:
            self.committed(flight.step)
        folders.remove_old(
            self.folder, flight.step, self.keep_last, self.keep_every, flight.keep_up_to
        )

    def _end(self, flight: _Flight) -> None:
        """Rank 0 has committed, or failed."""
        failed = dist.get_rank() == 0 and flight.work.exception() is not None
        self._check(flight, self._cause(flight.work) if failed else None)
        self._flight = None
        log.info(
            "saved %s in %.2f s; training waited %.3f s",
            folders.step_folder(self.folder, flight.step),
            time.perf_counter() - flight.begun,
            flight.stalled or time.perf_counter() - flight.begun,
        )

    def _check(self, flight: _Flight, cause: str | None) -> None:
        """Raise on every rank if any has a cause to."""
        causes: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(causes, cause, group=self._group)
        failed = [(rank, cause) for rank, cause in enumerate(causes) if cause is not None]
        if not failed:
            return
        self._flight = None
        if dist.get_rank() == 0:
            with contextlib.suppress(OSError):  # else the next start does
                folders.remove_temporary(self.folder)
        rank, cause = failed[0]
        raise CheckpointError(
            f"saving {flight.temporary} failed: rank {rank}: {cause} "
            f"({counted(len(failed), 'rank')} failed); earlier checkpoints are intact"
        )

    def _cause(self, work: "Future[Any]") -> str:
        error = work.exception()
        known = isinstance(error, (OSError, CheckpointError))
        said = str(error) if known else f"{type(error).__name__}: {error}"
        return said + free_space(self.folder)

    def _everywhere(self, here: bool) -> bool:
        flag = torch.tensor(int(here))
        dist.all_reduce(flag, op=dist.ReduceOp.MIN, group=self._group)
        return bool(flag)

    def _gathered(self, mine: T) -> list[T]:
        """Every rank's, on rank 0; elsewhere nothing."""
        first = dist.get_rank() == 0
        everyones: list[Any] | None = [None] * dist.get_world_size() if first else None
        dist.gather_object(mine, everyones, dst=0, group=self._group)
        return everyones or []

    def _on_rank_0(self, action: Callable[[], None], what: str) -> None:
        """Run `action` on rank 0; its OSError becomes a CheckpointError on every rank."""

        def explained() -> None:
            try:
                action()
            except OSError as error:
                message = f"{what}: {error}{free_space(self.folder)}"
                with contextlib.suppress(OSError):
                    folders.remove_temporary(self.folder)
                raise CheckpointError(message) from error

        from_rank_0(explained)


# -- the copy --------------------------------------------------------------------------------------


class HostCopy:
    """Host memory for this rank's share, allocated once: twelve bytes a parameter it owns.

    Of GPUs it is page-locked, if that is allowed, and filled on a stream of its own. It holds the
    values of this rank's file in their order, but for what only one rank has, which follows.
    """

    def __init__(self, tensors: Tensors) -> None:
        """tensors: as later given to `begin`, in the same order and shapes."""
        flats = [part.data for part in _parts(tensors)]
        self._buffer = torch.empty(sum(t.numel() for t in flats), dtype=torch.float32)
        self._stream: torch.cuda.Stream | None = None
        if any(t.is_cuda for t in flats):
            self._stream = torch.cuda.Stream()
            place, size = self._buffer.data_ptr(), self._buffer.nbytes
            try:
                torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(place, size, 0))
            except torch.cuda.CudaError as error:
                log.warning("host memory is not page-locked (%s): copies will be slower", error)

    def begin(self, tensors: Tensors) -> Callable[[], list[Tensor]]:
        """What copies the state as it is now, to be called in another thread; the file's values."""
        now = None
        if self._stream is not None:
            now = torch.cuda.current_stream().record_event()

        def copy() -> list[Tensor]:
            at = 0
            with torch.cuda.stream(self._stream):
                if self._stream is not None and now is not None:
                    self._stream.wait_event(now)
                for part in _parts(tensors):
                    size = part.data.numel()
                    host = self._buffer[at : at + size].view(part.data.shape)
                    host.copy_(part.data, non_blocking=True)
                    at += size
            if self._stream is not None:
                self._stream.synchronize()
            return [self._buffer, *(t for t in tensors.values() if isinstance(t, Tensor))]

        return copy


def _parts(tensors: Tensors) -> list[Part]:
    return [p for t in tensors.values() if isinstance(t, GlobalTensor) for p in t.parts]


# -- files -----------------------------------------------------------------------------------------


def planned_pieces(tensors: Tensors) -> list[PlannedPiece]:
    """Return the pieces of this rank's file in the order in which HostCopy holds their values."""
    pieces = [
        PlannedPiece(name, tuple(t.shape), part.data.dtype, part.offsets, tuple(part.data.shape))
        for name, t in tensors.items()
        if isinstance(t, GlobalTensor)
        for part in t.parts
    ]
    whole = [(name, t) for name, t in tensors.items() if isinstance(t, Tensor)]
    return pieces + [
        PlannedPiece(name, tuple(t.shape), t.dtype, (0,) * t.dim(), tuple(t.shape))
        for name, t in whole
    ]


def _copy_and_write(copy: Callable[[], list[Tensor]], flight: _Flight, plan: _Plan) -> Entries:
    try:
        values = copy()
    finally:
        flight.copied.set()
    return _write(values, flight.temporary, plan)


def _write(values: list[Tensor], folder: Path, plan: _Plan) -> Entries:
    """This rank's file; its size and checksum."""
    if not plan.header:
        return {}
    return {plan.file: write_pieces(folder / plan.file, plan.header, values)}


def _check_all_files_here(step_dir: Path, entries: Entries) -> None:
    """Every rank's file must be where rank 0 commits: the folder must be shared by all nodes."""
    missing = sorted(name for name in entries if not (step_dir / name).exists())
    if missing:
        raise CheckpointError(
            f"{step_dir} lacks {len(missing)} files that other ranks wrote ({missing[0]}, ...): "
            "checkpoint.dir (or logging.run_dir) must lie on a file system that all nodes share"
        )


def free_space(folder: Path) -> str:
    """How full the disk is, for messages."""
    try:
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        free = shutil.disk_usage(existing).free
    except OSError:  # what is to be explained is explained without it
        return ""
    full = "No space left on device: " if free < 2**20 else ""
    return f" ({full}{free / 2**20:,.1f} MiB free on the file system of {existing})"
