"""A worker that is killed over its first share of a collection, once."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from bitwright.bank import _shares

COLLECT = _shares.share_of


def share_of(backend: str, network: str, wanted: Any, share: Any) -> Any:
    """As `bank._shares.share_of`, but for the second share's first try."""
    told = Path(network).parents[2] / "killed"
    if share.first and not told.exists():
        told.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return COLLECT(backend, network, wanted, share)
