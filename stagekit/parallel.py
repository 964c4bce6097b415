"""Work on many items in several processes: in order, and with few of them in memory."""

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

S, T = TypeVar("S"), TypeVar("T")
SMALL = 2000  # rows below which starting more processes costs more than it saves


def map_in_order(work: Callable[[S], T], items: Iterable[S], num_workers: int) -> Iterator[tuple[S, T]]:
    """Do some work on every item; at most two items a process are under way.

    Args:
        work: any function, since forked processes inherit it; items and what it returns can be pickled.
        items: read one by one, in this process.
        num_workers: processes; with less than two, or where there is no fork, this one works.

    Yields:
        (item, what `work` returned), in order.

    Raises:
        ValueError: a process was killed.
    """
    if num_workers < 2 or "fork" not in multiprocessing.get_all_start_methods():
        yield from ((item, work(item)) for item in items)
        return
    global _work
    _work = work
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(num_workers, mp_context=context, initializer=_quiet) as pool:
        waiting = deque()
        try:
            for item in items:
                waiting.append((item, pool.submit(_do, item)))
                if len(waiting) == 2 * num_workers:
                    item, future = waiting.popleft()
                    yield item, future.result()
            while waiting:
                item, future = waiting.popleft()
                yield item, future.result()
        except BrokenProcessPool:
            raise ValueError(
                "a process that works on the data was killed, as happens when memory runs out; try fewer of them "
                f"({max(1, num_workers // 2)} in place of {num_workers}: --preprocessing_num_workers, --num_workers)"
            ) from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _do(item):
    return _work(item)


def _quiet():
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def choose_workers(num_workers: int | None, num_rows: int) -> int:
    """As many processes as asked for; None: one for each core, if there are rows enough."""
    return num_workers or (num_cores() if num_rows >= SMALL else 1)


def num_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
