"""Where independent tasks are computed: here, in processes, or on a cluster."""

from __future__ import annotations

from bitwright.workers._opening import lent, open_workers, processes
from bitwright.workers._workers import Flight, Workers, sendable

__all__ = ["Flight", "Workers", "lent", "open_workers", "processes", "sendable"]
