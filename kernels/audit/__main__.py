"""`python -m kernels.audit [TARGET ...]`, for a host without the rest of the project."""

import sys

from kernels.audit.command import audit

if __name__ == "__main__":
    sys.exit(audit(sys.argv[1:], update=False, json_file=None))
