"""Contenders in other environments: started as workers, given the same parameters and inputs, timed in turn with ours."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.peers.install import HERE, is_ready, python_of
from benchmarks.worker import Worker, WorkerError
from benchmarks.workloads import Modern, Workload, export

# Each by the name of neural-tangents' own enumeration.
NEURAL_TANGENTS = {
    "neural-tangents, Jacobian contraction": "JACOBIAN_CONTRACTION",
    "neural-tangents, NTK-vector products": "NTK_VECTOR_PRODUCTS",
    "neural-tangents, structured": "STRUCTURED_DERIVATIVES",
    "neural-tangents, auto": "AUTO",
}
PATIENCE = 180.0  # seconds for one request; compiling counts


@dataclass(frozen=True)
class RemoteKernel:
    """A prepared kernel in a worker: what :mod:`benchmarks.timing` calls a Remote."""

    worker: Worker

    def seconds(self, calls: int) -> float:
        """Seconds per call, by the worker's own watch."""
        return self.worker.ask(do="run", calls=calls)

    def result(self) -> Tensor:
        """The kernel [N, C, N, C]."""
        with tempfile.TemporaryDirectory() as folder:
            return torch.from_numpy(np.load(self.worker.ask(do="result", path=str(Path(folder) / "kernel.npy"))))

    def peak(self) -> int:
        """Peak additional bytes of one call."""
        return self.worker.ask(do="memory")


def neural_tangents_command() -> list[str]:
    """What starts a worker, with as many threads as torch has here. Raises WorkerError where it is not installed."""
    if not is_ready("neural_tangents"):
        raise WorkerError("not installed; write python -m benchmarks.peers.install")
    threads = str(torch.get_num_threads())
    return [str(python_of("neural_tangents")), str(HERE / "neural_tangents_worker.py"), "--threads", threads]


@contextmanager
def neural_tangents(workload: Workload | Modern, n: int, dtype: str, implementation: str) -> Iterator[RemoteKernel]:
    """A worker with the compiled kernel of one implementation, ended on leaving."""
    with (
        tempfile.TemporaryDirectory() as folder,
        Worker(neural_tangents_command(), PATIENCE) as worker,
    ):
        path = export(workload, n, dtype, Path(folder) / "case.npz")
        names = {"network": workload.network, "activation": workload.activation, "implementation": implementation}
        worker.ask(do="prepare", npz=str(path), **names)
        yield RemoteKernel(worker)
