"""One thread for each statistic's products, where as many statistics as there are processors are updated at a time.

numpy's BLAS computes a product on threads of its own. It takes one product at a time for all of them, so that products
which are asked for side by side wait for each other, and threads that wait spin: several small ones take longer, and
much more processor time, than each on the thread that asks for it.
"""

from __future__ import annotations

import os
import threading
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
    setting is the process's: only the main thread makes it, so that what one pass sets no other that ends later keeps.
    """
    if products < (os.cpu_count() or 1) or threading.current_thread() is not threading.main_thread():
        yield
        return
    with _libraries().limit(limits=1, user_api="blas"):
        yield
