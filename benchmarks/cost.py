"""What the benchmarks of cost (cost_*.py) share: options, timing in turns, the streaming pass of a calibration."""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time

BATCHES = 8
"""Of a calibration pass: what is made once for a pass is shared out among them, as in use."""
STEADY = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**32)}
"""glibc keeps what is freed, as jemalloc and the like do. By default it hands large tensors back to the system after
each use or not, as the heap happens to lie; the page faults then double the time of any of the tasks, in any order."""
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def steady_memory():
    """Start this process again with `STEADY` allocation, unless it has it."""
    if os.environ.get("MALLOC_TRIM_THRESHOLD_") is None:
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | STEADY)


def parser(description):
    """Options that all of them have."""
    found = argparse.ArgumentParser(description=description)
    found.add_argument("--repeats", type=int, default=5)
    found.add_argument("--size", type=int, default=224)
    found.add_argument("--batch", type=int, default=8)
    found.add_argument("--threads", type=int, default=2)
    found.add_argument("--clock", choices=tuple(CLOCKS), default="wall", help="cpu: on a machine with other work")
    return found


def interleaved(tasks, repeats, clock, before=lambda: None):
    """Median seconds of each task; they take turns, so that all see the same machine.

    `before` runs before each and isn't timed: a pass that takes back the memory that the last task has given away.
    """
    for task in tasks.values():
        task()
    times = {name: [] for name in tasks}
    for _ in range(repeats):
        for name, task in tasks.items():
            before()
            begin = CLOCKS[clock]()
            task()
            times[name].append((CLOCKS[clock]() - begin) / getattr(task, "batches", 1))
    return {name: statistics.median(t) for name, t in times.items()}


def calibration(sim, given):
    """The streaming pass of a calibration: the float network with every site's statistic; timed for a batch."""
    from bitwright.calibration import activation_requests, collect
    from bitwright.progress import Silent

    data = sim.open((given if isinstance(given, list) else [given]) * BATCHES)
    session = None

    def open_session(source, taps):
        nonlocal session
        session = session or sim.backend.session(sim.native, taps)
        return session

    def run():
        requests = activation_requests(sim.graph, sim.plan, sim.plan.activations)
        collect(requests, open_session, data, progress=Silent())

    run.batches = BATCHES
    return run


def show(found, base_of):
    """A line for each figure: seconds, and the ratio to the float figure that `base_of` names for it."""
    for name, seconds in found.items():
        print(f"{name:32} {seconds:8.3f} s {seconds / found[base_of(name)]:6.2f} ×")
