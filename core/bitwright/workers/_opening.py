"""From what users give (a number, an address, an executor, a Dask client) to workers."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor
from contextlib import AbstractContextManager, ExitStack, nullcontext
from multiprocessing import get_context
from types import ModuleType
from typing import Any, TypeVar

from bitwright.errors import InputError, MissingExtraError, WorkerError
from bitwright.workers._workers import Place, Workers, width_of

T = TypeVar("T")
LOCAL = "local:"
ADDRESSES = ("tcp://", "tls://", "ucx://", "ws://", "wss://")
CONNECT_SECONDS = 10.0
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
"""Variables that say how many threads a sum has."""


def open_workers(given: object) -> Workers | None:
    """Workers of any kind.

    Args:
        given: how many processes of this machine; "local:N" for as many workers of Dask, or the address of a Dask
            scheduler (`tcp://host:8786`); a `distributed.Client`; any `concurrent.futures.Executor`, or a function
            that makes one (after a worker's death it is called again); workers; None, and 1, for none: all is done
            here.

    Raises:
        InputError: it is nothing of these, or no scheduler answers at the address.
        MissingExtraError: Dask isn't installed.
    """
    if given is None or isinstance(given, Workers):
        return given
    if isinstance(given, bool):
        raise InputError(f"executor={given!r}: {_FORMS}")
    if isinstance(given, int):
        if given < 1:
            raise InputError(f"executor={given}: give the number of processes, at least 1")
        return processes(given) if given > 1 else None
    if isinstance(given, str):
        return _cluster(given)
    if isinstance(given, Executor):
        return Workers([Place(width_of(given), executor=given, owned=False)])
    if callable(getattr(given, "get_executor", None)) and callable(getattr(given, "nthreads", None)):
        return _of_client(given)
    if callable(given):
        return _made_by(given)
    raise InputError(f"executor={given!r}: {_FORMS}")


def lent(given: object) -> AbstractContextManager[Workers | None]:
    """`open_workers` for as long as a ``with`` block; workers that were given as such stay open after it."""
    workers = open_workers(given)
    return nullcontext(workers) if workers is given or workers is None else workers


_FORMS = (
    "give a number of processes, 'local:N' or the address of a Dask scheduler, a Dask client, or an executor of "
    "concurrent.futures"
)


def processes(count: int) -> Workers:
    """So many processes of this machine. Each has a pool of its own, so that one that dies takes no other along."""
    # Forking a process whose runtime has threads can deadlock.
    return Workers([Place(1, lambda: ProcessPoolExecutor(1, mp_context=get_context("spawn"))) for _ in range(count)])


def _made_by(make: Callable[[], Any]) -> Workers:
    executor = make()
    if not isinstance(executor, Executor):
        raise InputError(f"the function given as executor makes a {type(executor).__name__}; {_FORMS}")
    return Workers([Place(width_of(executor), make, executor)])


def _cluster(text: str) -> Workers:
    count = text.removeprefix(LOCAL)
    if text.startswith(LOCAL) and count.isdecimal() and int(count) > 0:
        return _local(int(count))
    if not text.startswith(ADDRESSES):
        raise InputError(f"{text!r} is no cluster; give local:N or the address of a Dask scheduler, tcp://host:8786")
    distributed = _distributed()
    try:
        client = distributed.Client(text, timeout=CONNECT_SECONDS, set_as_default=False)
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"no Dask scheduler answers at {text!r}: {error}") from error
    return _of_client(client, client.close)


def _local(count: int) -> Workers:
    """A Dask scheduler here, with processes that have as many threads for their sums as this one."""
    distributed = _distributed()
    environment = {name: value for name in THREADS if (value := os.environ.get(name)) is not None}
    # Where nothing is set, Dask would set 1, and sums come out otherwise in their last bits than here.
    unset = dict.fromkeys(THREADS, str(os.cpu_count() or 1)) if not environment else {}
    cluster = distributed.LocalCluster(
        n_workers=count, threads_per_worker=1, processes=True, dashboard_address=None, env={**unset, **environment},
        memory_limit=0,
    )  # fmt: skip
    with ExitStack() as opened:
        opened.callback(cluster.close)
        client = distributed.Client(cluster, set_as_default=False)
        opened.callback(client.close)
        return _of_client(client, opened.pop_all().close)


def _of_client(client: Any, closing: Callable[[], None] | None = None) -> Workers:
    """A Dask client's workers. Dask runs a lost worker's tasks again (`distributed.scheduler.allowed-failures`)."""
    distributed = _distributed()
    with ExitStack() as opened:
        if closing is not None:
            opened.callback(closing)
        threads: Mapping[str, int] = client.nthreads()
        if not threads:
            raise WorkerError("the Dask cluster has no workers; start some (`dask worker ADDRESS`) and try again")
        opened.pop_all()
    executor = _QuietExecutor(client)
    place = Place(
        sum(threads.values()),
        executor=executor,
        owned=False,
        lost=(BrokenExecutor,),
        blamed=(distributed.KilledWorker,),
    )
    return Workers([place], closing)


class _QuietExecutor(Executor):
    """A Dask client's executor whose tasks hold their arguments, large ones too: those outlive the worker."""

    def __init__(self, client: Any) -> None:
        self._executor = client.get_executor(pure=False)

    def submit(self, fn: Callable[..., T], /, *args: object, **kwargs: object) -> Future[T]:
        """See `Executor.submit`."""
        import warnings

        with warnings.catch_warnings():
            # What a task needs travels with it on purpose: scattered data are gone with the worker that holds them.
            warnings.filterwarnings("ignore", "Sending large graph", UserWarning)
            made: Future[T] = self._executor.submit(fn, *args, **kwargs)
        return made


def _distributed() -> ModuleType:
    try:
        import distributed
    except ImportError as error:
        raise MissingExtraError('a Dask cluster needs distributed: pip install "bitwright[distributed]"') from error
    return distributed
