"""Entry point of the `transxssm` command, also as `python -m pretrain`.

Handles signals before anything else is imported, which takes seconds. What the interpreter does
before its first line of ours stays with the system's defaults.
"""

import contextlib
import os
import signal
import sys

REQUEUE = 85  # of pretrain.stop, which is imported later
LISTENING = ("pretrain", "preflight", "evaluate")  # as ranks of jobs


def main() -> None:
    """Run the command; a signal that ends it is one line and an exit code of `pretrain.stop`."""
    _open_closed_streams()
    signal.signal(signal.SIGINT, _interrupted)
    listens = sys.argv[1:2] and sys.argv[1] in LISTENING
    try:
        if listens:
            signal.signal(signal.SIGTERM, _interrupted)
            signal.signal(signal.SIGUSR1, _interrupted)
            from pretrain import stop

            stop.listen()
        from pretrain.cli import main as command
    except (MemoryError, RuntimeError, OSError) as error:  # of memory, threads, files
        limits = "raise the limits of memory, files and processes (ulimit -v, -n, -u)"
        os.write(2, f"error: cannot start ({error or 'out of memory'}); {limits}\n".encode())
        os._exit(1)
    try:
        if not listens:  # from here on, commands may clean up first
            signal.signal(signal.SIGINT, _interrupt)
        command()
    except KeyboardInterrupt:
        _interrupted(signal.SIGINT, None)
    except SystemExit:
        signal.signal(
            signal.SIGINT, signal.SIG_IGN
        )  # while the interpreter ends, handlers are gone
        raise


def _open_closed_streams() -> None:
    """Give a process that was started without standard streams, as by `>&-`, ones that take all.

    Else the first files that are opened would get their numbers.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free
            setattr(sys, name, os.fdopen(number, "w" if number else "r"))


def _interrupt(_number: int, _frame: object) -> None:
    """Let the command clean up; the next signal ends it at once."""
    signal.signal(signal.SIGINT, _interrupted)
    raise KeyboardInterrupt


def _interrupted(number: int, _: object) -> None:
    """End at once."""
    with contextlib.suppress(OSError):
        os.write(2, f"stopped by {signal.Signals(number).name}\n".encode())
    os._exit(REQUEUE if number == signal.SIGUSR1 else 128 + number)


if __name__ == "__main__":
    main()
