"""Wrong backends: the reference one with one rule changed. The kit must notice each (`test_kit_mutants`).

They wrap what the protocol's methods take and hand out, so that they don't depend on how the reference backend works
inside.
"""

from kit_mutants import edits, files, graphs, rounding, scales, sessions, sites
from kit_mutants.base import CASES, MUTANTS, Kit, Mutant

__all__ = ["CASES", "MUTANTS", "Kit", "Mutant", "edits", "files", "graphs", "rounding", "scales", "sessions", "sites"]
