"""Classes, and blocks of samples, are independent: measure several at once, one CPU thread each."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

MOST_WORKERS = 8

T = TypeVar("T")


def map_parallel(function: Callable[[int], T], number: int, device: torch.device) -> Iterator[T]:
    """Yield function(0), function(1), ... in order, computed ahead by threads that share torch's CPU threads.

    One class is too small to keep several threads busy. On an accelerator one thread issues all work.
    """
    threads = torch.get_num_threads()
    workers = min(threads, number, MOST_WORKERS) if device.type == "cpu" else 1
    if workers == 1:
        yield from map(function, range(number))
        return
    own = threads // workers
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(own,))
    try:
        with threadpool_limits(own, user_api="blas"):  # of NumPy and SciPy; torch is told by the initializer
            yield from pool.map(function, range(number))
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # else threads that start later would inherit the workers' number
