"""Classes, and blocks of samples, are independent: measure several at once, one CPU thread each."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any, TypeVar

import torch
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

MOST_WORKERS = 8

T = TypeVar("T")
Kind = tuple[Callable[[int], Any], int]


def map_parallel(function: Callable[[int], T], number: int, device: torch.device) -> list[T]:
    """Return [function(0), ..., function(number - 1)], computed by threads that share torch's CPU threads.

    >>> map_parallel(lambda i: i * i, 4, torch.device("cpu"))
    [0, 1, 4, 9]
    """
    found = {i: result for _, i, result in map_mixed([(function, number)], device)}
    return [found[i] for i in range(number)]


def map_mixed(kinds: Sequence[Kind], device: torch.device) -> Iterator[tuple[int, int, Any]]:
    """Yield (kind, i, function(i)) for every i below each kind's number, in the order in which they are done.

    Every worker has a kind that it prefers. Jobs of many short calls hold Python's lock, jobs of few long ones do not:
    side by side they keep two cores busy, two of the first kind cannot. On an accelerator one thread issues all work.
    """
    threads = torch.get_num_threads()
    workers = min(threads, sum(number for _, number in kinds), MOST_WORKERS) if device.type == "cpu" else 1
    if workers <= 1:
        for kind, (function, number) in enumerate(kinds):
            for i in range(number):
                yield kind, i, function(i)
        return
    own = threads // workers
    waiting = [deque(range(number)) for _, number in kinds]
    done: SimpleQueue[tuple[int, int, Any] | BaseException] = SimpleQueue()
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(own,))
    try:
        with threadpool_limits(own, user_api="blas"):  # of NumPy and SciPy; torch is told by the initializer
            for worker in range(workers):
                pool.submit(_work, kinds, waiting, worker, done)
            for _ in range(sum(number for _, number in kinds)):
                item = done.get()
                if isinstance(item, BaseException):
                    raise item
                yield item
    finally:
        for jobs in waiting:
            jobs.clear()
        pool.shutdown()
        torch.set_num_threads(threads)  # else threads that start later would inherit the workers' number


def _work(kinds: Sequence[Kind], waiting: Sequence[deque[int]], worker: int, done: "SimpleQueue[Any]") -> None:
    """Do jobs of the preferred kind, then of the others, until none is left."""
    try:
        for offset in range(len(kinds)):
            kind = (worker + offset) % len(kinds)
            while waiting[kind]:
                try:
                    i = waiting[kind].popleft()
                except IndexError:  # another worker was faster
                    break
                done.put((kind, i, kinds[kind][0](i)))
    except BaseException as error:  # raised again where the results are read
        done.put(error)
