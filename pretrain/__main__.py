"""`python -m pretrain` is the `transxssm` command."""

from pretrain.cli import main

main()
