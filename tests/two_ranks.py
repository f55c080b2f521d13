"""A function run on two ranks of a gloo group, in forked processes."""

import multiprocessing
import os
import socket

from torch import distributed as dist


def _run(function, rank, port, results):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    results.put(function(rank))
    dist.destroy_process_group()


def on_two_ranks(function, timeout):
    """The results of ``function(rank)`` on both ranks, in any order; ``timeout`` is the seconds to wait for each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    arguments = [(function, rank, port, results) for rank in range(2)]
    processes = [context.Process(target=_run, args=each, daemon=True) for each in arguments]
    for process in processes:
        process.start()
    return [results.get(timeout=timeout) for _ in processes]
