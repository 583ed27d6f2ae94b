"""One thread for each statistic's products, where as many statistics as there are processors are updated at a time.

numpy's BLAS computes a product on threads of its own. It takes one product at a time for all of them, so that products
which are asked for side by side wait for each other, and threads that wait spin: several small ones take longer, and
much more processor time, than each on the thread that asks for it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from threadpoolctl import ThreadpoolController


@cache
def _libraries() -> ThreadpoolController:
    """Of numpy, which is loaded once; looking through what is loaded takes a millisecond."""
    return ThreadpoolController()


@contextmanager
def side_by_side(products: int) -> Iterator[None]:
    """Within it so many statistics are updated that multiply matrices.

    Products then have a thread each, if there are as many as processors; fewer have all threads, one after another. The
    setting is the process's, and belongs to the Python thread that set it first (threadpoolctl 3.8): elsewhere nothing
    is changed.
    """
    if products < (os.cpu_count() or 1):
        yield
        return
    with _libraries().limit(limits=1, user_api="blas"):
        yield
