"""Violations that are accepted, each with its reason."""

from kernels.audit.rules import Allowance

ALLOWED: tuple[Allowance, ...] = ()
