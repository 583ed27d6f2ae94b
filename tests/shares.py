"""What is to be tried on every backend or case: whole by `make suite`; the tests take a share with each of it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import pytest

WHOLE = bool(os.environ.get("BITWRIGHT_WHOLE"))
EVERY = 1 if WHOLE else 3
"""Of slow frameworks, see `PlanContract.every`."""


def spread(names: str, cases: Sequence[Any], ports: Sequence[Any], elsewhere: Sequence[Any]) -> pytest.MarkDecorator:
    """All cases on the first port; on the others `elsewhere`, or all if the whole was asked for."""
    first, *others = ports
    chosen = [(first, c) for c in cases] + [(port, c) for port in others for c in (cases if WHOLE else elsewhere)]
    values = [(port, *(c if isinstance(c, tuple) else (c,))) for port, c in chosen]
    return pytest.mark.parametrize(("port", *names.split(",")), values, ids=["-".join(map(str, v)) for v in values])
