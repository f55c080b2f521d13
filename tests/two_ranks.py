"""Two ranks in forked processes: of a gloo group, of torchrun, or of a run that starts its second rank itself."""

import multiprocessing
import os
import socket
import sys

from commands import ROOT
from hostile_runs import start
from torch import distributed as dist
from torch.distributed.launcher.api import LaunchConfig, elastic_launch


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


def under_torchrun(folder, function, *arguments, limit=120):
    """Exit code, stdout and stderr of two ranks that the agent of torchrun starts; ``function()`` runs in each."""
    config = LaunchConfig(
        1, 1, 2, rdzv_backend="c10d", rdzv_endpoint="localhost:0", start_method="fork", max_restarts=0
    )
    process = start(folder, *arguments, main=elastic_launch(config, function))
    return process.wait(limit), *process.texts()


def as_script():
    """Preparation of a forked process whose further ranks are started as ``python train.py``."""
    sys.argv[0] = str(ROOT / "train.py")
    sys.modules["__main__"].__spec__ = None  # pytest's, which Lightning would start again
