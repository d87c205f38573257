"""The watchdog: a job that makes no progress, or has lost a rank, ends and says where.

A thread of every rank tells the job's store that the rank lives, and what it is at. After
hang_timeout seconds without progress, or when collectives break for no known reason, the first rank
to notice looks at all the others: one that is silent is stopped, or dead, or its node is; the rest
are where they say. In a hang every rank then writes the stacks of its threads to its log and exits
with HUNG.
"""

import contextlib
import faulthandler
import json
import logging
import os
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from parallel.launch import Launch, host_name
from parallel.rendezvous import connect
from pretrain import failure, stop
from pretrain.console import shown
from pretrain.starts import record_ended
from untrusted.errors import UserError

log = logging.getLogger("transxssm")

T = TypeVar("T")
HUNG = 185
"""Exit code of a job that made no progress: run the same command again. Larger than that of any
signal, since srun returns the largest of its tasks', one of which may have had to be killed."""
SECONDS_TO_DUMP = 5.0  # for every rank to write its stacks
SECONDS_TO_STOP = 5.0  # without progress after a request to stop, before the others are looked at
SECONDS_TO_ANSWER = 10.0  # after which the store's host is taken for gone
SOURCE = str(Path(__file__).resolve().parents[1]) + os.sep


class RankLost(UserError):
    """Ranks ended, or stopped, without a word; the message names them and their hosts."""


class Watchdog:
    """Of one rank, as a context around its training. The main thread calls `at` as it goes on.

    hang_timeout: seconds; 0: hangs are nobody's business.
    """

    def __init__(self, launch: Launch, hang_timeout: float, logs: Path, started: float) -> None:
        """logs: where this rank's log is; started: Unix time. The job must be joined."""
        self.launch, self.hang_timeout, self.logs, self.started = (
            launch,
            hang_timeout,
            logs,
            started,
        )
        self._interval = max(1.0, launch.world_size / 1000)  # the store hears 1000 beats a second
        self._stacks = (logs / f"rank-{launch.rank}.log").open("a")
        self._main = threading.get_ident()
        self._place, self._since, self._beats = "starting", time.monotonic(), 0
        self._looked: set[str] = set()  # places at which this rank has looked at the others
        self._left, self._hangs, self._fails = threading.Event(), False, False
        self._store: dist.Store | None = None
        # a store whose host is gone may not answer at all
        self._asker = ThreadPoolExecutor(1, "watchdog-store")
        if launch.world_size > 1:
            self._store = _connect()
            self._store.set(f"host/{launch.rank}", host_name())
            self._beat(self._store)
            self._store.wait(["host/0"], timedelta(minutes=5))
            self._host_of_store = self._store.get("host/0").decode()

    def __enter__(self) -> "Watchdog":
        self.at(self._place)
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def at(self, place: str) -> None:
        """There is progress: this rank has come to `place`."""
        self._place, self._since = place, time.monotonic()
        if self.hang_timeout:
            # from C, for a call that hangs with Python's lock keeps the thread from running
            faulthandler.dump_traceback_later(self.hang_timeout + 2, file=self._stacks)

    def __exit__(self, _: Any, error: BaseException | None, __: Any) -> None:
        """Raises RankLost in place of an error that a lost rank caused."""
        if error is not None and self._hangs:  # and ranks that have ended broke the collective
            threading.Event().wait()  # for the thread to end the process
        faulthandler.cancel_dump_traceback_later()
        self._fails = isinstance(error, Exception)
        if self._store is None or not isinstance(error, Exception):
            self._left.set()
        elif not failure.is_echo(error):
            who = f"rank {self.launch.rank} on {host_name()}"
            self._end_all(1, f"{who}: {type(error).__name__}: {error}")
        elif (
            self._is_first("echo")
            and failure.first_failure(self.logs, self.started, 1) is None
            and (lost := self._lost_ranks())
        ):
            raise RankLost(f"{lost}; perhaps killed for want of memory, or its node is down")

    # -- the thread -------------------------------------------------------------------------------

    def _watch(self) -> None:
        while not self._left.wait(self._interval):
            if self._store is not None:
                self._exchange()
            if self._fails:
                continue  # it still lives, for whoever asks
            idle = time.monotonic() - self._since
            if self.hang_timeout and idle > self.hang_timeout:
                self._report_hang(idle)
            elif self._store is not None and stop.requested() and idle > SECONDS_TO_STOP:
                self._look_for_lost_ranks()

    def _exchange(self) -> bool:
        """Say that this rank lives; obey if the job is over. Whether the store answers."""
        try:
            self._ask(self._beat)
            if not self._fails and (over := self._ask(self._over)) is not None:
                self._obey(**over)
        except _StoreGone:
            return False  # of consequence only when this rank gets no further
        return True

    def _report_hang(self, idle: float) -> None:
        self._hangs = True
        place = f"no progress for {idle:.0f} s"
        if self._store is not None and self._is_first("hang"):
            report = f"{place}: {self._diagnosis()}"
            failure.announce(self.logs, report, self.started)
            if self.launch.rank:  # rank 0 does so when it ends
                _say(f"error: {report}")
            self._end_all(HUNG, report)
            self._obey(HUNG, report)
        elif self._store is not None:  # who was first tells
            deadline = time.monotonic() + 4 * self._interval + 2 * SECONDS_TO_ANSWER
            while time.monotonic() < deadline and self._exchange():
                time.sleep(self._interval / 2)
        self._obey(HUNG, f"{place}: this rank is at {self._where()}")

    def _obey(self, code: int, message: str) -> None:
        """The job is over, and why."""
        self._hangs = code == HUNG
        if code != HUNG and self._main_thread_ends():
            return
        self._report(message)
        if code == HUNG:
            faulthandler.cancel_dump_traceback_later()
            faulthandler.dump_traceback(file=self._stacks, all_threads=True)
            self._wait_for_stacks()
        elif self.launch.rank:
            _say(f"error: stopped because another rank failed: {message}")
        record_ended("failed", message)
        logging.shutdown()
        os._exit(code)

    def _report(self, message: str) -> None:
        """Write an error to this rank's log and, on rank 0, once to standard error."""
        for handler in log.handlers:
            if isinstance(handler, logging.FileHandler):
                handler.handle(logging.makeLogRecord({"levelname": "ERROR", "msg": message}))
        if self.launch.rank == 0:
            _say(f"error: {message}")

    def _main_thread_ends(self) -> bool:
        """By itself, having noticed, too."""
        deadline = time.monotonic() + SECONDS_TO_STOP
        while time.monotonic() < deadline and not self._fails and not self._left.is_set():
            time.sleep(0.1)
        return self._fails or self._left.is_set()

    def _wait_for_stacks(self) -> None:
        """Of the other ranks: with the first that ends, the launcher ends them all."""
        if self._store is None:
            return
        deadline, amount = time.monotonic() + SECONDS_TO_DUMP, 1
        try:
            while time.monotonic() < deadline:
                if self._add("stacks", amount) >= self.launch.world_size:
                    return
                amount = 0
                time.sleep(0.2)
        except _StoreGone:
            pass

    def _look_for_lost_ranks(self) -> None:
        """Of a rank that is to stop and does not come on: once a place, by one rank."""
        place = self._place
        if place in self._looked:
            return
        self._looked.add(place)
        if self._is_first(f"stop/{place}") and (lost := self._lost_ranks()):
            failure.announce(self.logs, lost, self.started)
            self._end_all(1, lost)

    # -- looking at the others --------------------------------------------------------------------

    def _diagnosis(self) -> str:
        """Who does not answer, and where the others are; the smallest party first."""
        try:
            silent, beats = self._silent_ranks()
        except _StoreGone:
            return f"{self._store_is_gone()}; this rank is at {self._where()}"
        parties: dict[str, list[int]] = defaultdict(list)
        for rank, beat in enumerate(beats):
            if rank not in silent:
                parties[beat["where"]].append(rank)
        said = [self._names(silent) + " does not answer"] if silent else []
        for where, ranks in sorted(parties.items(), key=lambda party: len(party[1])):
            said.append(f"{self._names(ranks)} at {where}")
        return f"{'; '.join(said)}. The stacks of every rank that lives are in {self.logs}"

    def _lost_ranks(self) -> str | None:
        """The silent ones, in words."""
        try:
            silent, _ = self._silent_ranks()
        except _StoreGone:
            return self._store_is_gone()
        return f"{self._names(silent)} ended without a word" if silent else None

    def _silent_ranks(self) -> tuple[list[int], list[dict[str, Any]]]:
        """And every rank's last sign of life. Takes some beats' time."""
        before = self._ask(self._all_beats)
        time.sleep(3 * self._interval)
        after = self._ask(self._all_beats)
        me = self.launch.rank
        pairs = enumerate(zip(before, after, strict=True))
        return [r for r, (old, new) in pairs if old["n"] == new["n"] and r != me], after

    def _names(self, ranks: list[int]) -> str:
        """A few of them with their hosts."""
        some = ranks[:4]
        hosts = self._ask(lambda store: [store.get(f"host/{r}").decode() for r in some])
        named = ", ".join(f"rank {r} on {h}" for r, h in zip(some, hosts, strict=True))
        more = len(ranks) - len(some)
        return f"{named} and {more} more" if more else named

    def _store_is_gone(self) -> str:
        return f"rank 0 on {self._host_of_store}, which holds the job's store, does not answer"

    def _where(self) -> str:
        return f"{self._place}, {position(self._main)}"

    # -- the store --------------------------------------------------------------------------------

    def _ask(self, action: Callable[[dist.Store], T]) -> T:
        """Raises _StoreGone when there is no answer in time."""
        assert self._store is not None
        try:
            return self._asker.submit(action, self._store).result(SECONDS_TO_ANSWER)
        except (TimeoutError, RuntimeError) as error:
            raise _StoreGone from error

    def _beat(self, store: dist.Store) -> None:
        self._beats += 1
        beat = {"n": self._beats, "where": self._where()}
        store.set(f"beat/{self.launch.rank}", json.dumps(beat))

    def _all_beats(self, store: dist.Store) -> list[dict[str, Any]]:
        names = [f"beat/{rank}" for rank in range(self.launch.world_size)]
        return [json.loads(beat) for beat in store.multi_get(names)]

    def _over(self, store: dist.Store) -> dict[str, Any] | None:
        return json.loads(store.get("over")) if store.check(["over"]) else None

    def _end_all(self, code: int, message: str) -> None:
        try:
            said = json.dumps({"code": code, "message": message})
            self._ask(lambda store: store.compare_set("over", "", said))
        except _StoreGone:
            pass  # the others notice that by themselves

    def _is_first(self, question: str) -> bool:
        """Of the ranks that ask this; each is, where the store is gone."""
        try:
            return self._add(f"asked/{question}", 1) == 1
        except _StoreGone:
            return True

    def _add(self, key: str, amount: int) -> int:
        return self._ask(lambda store: store.add(key, amount))


class _StoreGone(Exception):
    pass


def _connect() -> dist.Store:
    """A connection of our own to the job's store."""
    store = connect(timedelta(seconds=SECONDS_TO_ANSWER))
    return dist.PrefixStore("watchdog", store)


def position(thread: int) -> str:
    """Where a thread of this process is: the collective, or the innermost call, and our line."""
    frame = sys._current_frames().get(thread)
    if frame is None:
        return "ended"
    call, line = frame.f_code.co_name, ""
    while frame is not None and not line:
        file, name = frame.f_code.co_filename, frame.f_code.co_name
        if file.endswith("torch/distributed/distributed_c10d.py") and name != "wrapper":
            call = name
        if file.startswith(SOURCE) and "site-packages" not in file:
            line = f" from {file.removeprefix(SOURCE)}:{frame.f_lineno}"
        frame = frame.f_back
    return call + line


def _say(text: str) -> None:
    """On standard error, unless its terminal or disk is gone."""
    with contextlib.suppress(OSError):
        print(shown(text), file=sys.stderr, flush=True)
