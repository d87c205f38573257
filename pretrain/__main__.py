"""Entry point of the `transxssm` command, also as `python -m pretrain`.

Handles signals before anything else is imported, which takes seconds. What the interpreter does
before its first line of ours stays with the system's defaults.
"""

import os
import sys

from pretrain import stop

LISTENING = ("pretrain", "preflight", "evaluate")  # as ranks of jobs


def main() -> None:
    """Run the command; Ctrl-C is one line and exit code 130."""
    if sys.argv[1:2] and sys.argv[1] in LISTENING:
        stop.listen()
    try:
        from pretrain.cli import main as command

        command()
    except KeyboardInterrupt:
        os.write(2, b"interrupted\n")
        os._exit(130)


if __name__ == "__main__":
    main()
