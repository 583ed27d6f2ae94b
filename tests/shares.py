"""What is to be tried on every backend or case: whole by `make suite`; the tests take a share with each of it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from typing import Any

import pytest

WHOLE = bool(os.environ.get("BITWRIGHT_WHOLE"))
EVERY = 1 if WHOLE else 3
"""Of slow frameworks, see `PlanContract.every`."""


def one_of_each_rank(names: Iterable[str]) -> list[str]:
    """Of layers that there are in 1, 2 and 3 dimensions the one in 2, and all others; or all of them where `WHOLE`.

    They run through the same code, but for what `foreign_keras` of `make suite` looks at.
    """
    listed = sorted(names)
    return [n for n in listed if WHOLE or (twin := re.sub("[13]D", "2D", n)) == n or twin not in listed]


def spread(names: str, cases: Sequence[Any], ports: Sequence[Any], elsewhere: Sequence[Any]) -> pytest.MarkDecorator:
    """All cases on the first port; on the others `elsewhere`, or all if the whole was asked for."""
    first, *others = ports
    chosen = [(first, c) for c in cases] + [(port, c) for port in others for c in (cases if WHOLE else elsewhere)]
    values = [(port, *(c if isinstance(c, tuple) else (c,))) for port, c in chosen]
    return pytest.mark.parametrize(("port", *names.split(",")), values, ids=["-".join(map(str, v)) for v in values])
