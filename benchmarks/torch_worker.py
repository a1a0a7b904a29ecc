"""A contender on torch in a fresh process of its own, so that its memory is its own: ``python -m benchmarks.torch_worker``.

``prepare`` takes ``workload``, ``n``, ``dtype``, ``device``, ``contender``; the rest is ``peers/protocol.py``.
"""

from collections.abc import Callable
from typing import Any

from benchmarks.peers import protocol


def load() -> None:
    """torch with as many threads as this process has cores, like the workers in other environments."""
    import os

    import torch

    if hasattr(os, "sched_getaffinity"):
        torch.set_num_threads(len(os.sched_getaffinity(0)))


def prepare(_: None, request: dict[str, Any]) -> Callable[[], object]:
    """What computes the kernel and waits for it; run once, so that plans, caches and checks are made."""
    import torch

    from benchmarks.rivals import RIVALS
    from benchmarks.workloads import WORKLOADS

    workload, device = WORKLOADS[request["workload"]], request["device"]
    model = workload.model(request["dtype"], device)
    x, _ = workload.batch(request["n"], request["dtype"], device)
    kernel = RIVALS[request["contender"]](model, x)

    def run() -> object:
        found = kernel()
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize(device)
        return found

    run()
    return run


def peak(run: Callable[[], object]) -> int:
    """Peak additional bytes of one call: on CUDA by torch's own account, else resident memory."""
    import torch

    if not torch.cuda.is_initialized():
        return protocol.peak_bytes(run)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_allocated() - before


def save(kernel: Any, path: str) -> str:
    import numpy as np

    np.save(path, kernel.detach().cpu().numpy())
    return path


if __name__ == "__main__":
    protocol.serve(load, prepare, save, peak)
