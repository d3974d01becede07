"""Threads beside the main one, which leave the processor to it."""

from concurrent.futures import ThreadPoolExecutor

import torch


def helper_threads(count: int, name: str = "") -> ThreadPoolExecutor:
    """Threads that do work beside the main one, each on one core.

    As soon as a second thread has computed with a team of OpenMP's threads of its own, OpenMP counts more threads than
    cores, and those of the main thread sleep between two products instead of waiting for the next one: decoding, which
    has many small products, took 1.3 times as long.
    """
    return ThreadPoolExecutor(count, name, initializer=torch.set_num_threads, initargs=(1,))
