"""The `transxssm` command with a fault: `FAULT=nan|spike python -m tests.slurm.faulty WORDS`."""

import math
import os

from pretrain.cli import main
from tests.pretrain.test_bad_steps import poison

if __name__ == "__main__":
    if os.environ["FAULT"] == "nan":
        poison([3], math.nan, 1)
    elif os.environ["FAULT"] == "spike":
        poison([11], 1e4, 1)
    main()
