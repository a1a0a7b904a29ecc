"""The empirical NTK of a whole network, [N, C, N, C]: layer factors against every public tool that can run it."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from pathlib import Path
from time import perf_counter

from torch import Tensor, nn

from benchmarks.environments import NEURAL_TANGENTS, neural_tangents
from benchmarks.flops import yardstick
from benchmarks.rivals import OURS, REFERENCE, RIVALS
from benchmarks.timing import Contender, Entry, Settings, compare, table
from benchmarks.worker import WorkerError
from benchmarks.workloads import WORKLOADS

TITLE = "Gram matrix"
ABOUT = (
    "Full empirical NTK (np × np), from the model and its inputs. `error`: relative Frobenius distance from torch.func "
    "in the same precision. Our one-time check of a new model against autograd falls into the warm-up, not the times; so "
    "does XLA's compilation. neural-tangents runs in its own environment (JAX 0.4.30, jit, `x @ w`, NHWC), by its own watch, "
    "in turn with the others. `of GEMM rate`: the operations of the structured algorithm's Gram products (benchmarks/"
    "flops.py; the full matrix, no passes through the network) per second, over the rate of plain torch products "
    "[np, o]·[o, np] in the same run. Above 1 it goes by symmetry (half of the products) and, in float32, by the products of "
    "oneDNN, which torch's own do not reach on some machines (nt_kernel/products/dense.py)."
)
RATIO = "× layer factors"
CASES = [
    ("W1", 64, "float32"),
    ("W1", 128, "float32"),
    ("W1", 64, "float64"),
    ("W2", 64, "float32"),
    ("W2", 32, "float64"),
    ("W3", 32, "float32"),
    ("W4", 256, "float32"),
    ("W4", 1024, "float32"),
    ("W4", 256, "float64"),
    ("R", 32, "float32"),
    ("T", 32, "float32"),
]
QUICK = [("W1", 16, "float32"), ("W1", 16, "float64"), ("W2", 8, "float32"), ("W4", 64, "float32")]
TOLERANCE = {"float32": 1e-4, "float64": 1e-12}
# How many times faster than the best peer each column should be.
DEMANDED = {"mlp": 3.0, "cnn": 5.0, "resnet": 5.0, "transformer": 2.0}
TOO_SLOW = {("R", "curvlinops"): "not timed: 66 s when tried"}


def contender(name: str, model: nn.Module, x: Tensor, reference: Tensor) -> Contender:
    """One of the torch contenders, with its distance from the reference, or with the reason why it cannot."""
    try:
        run = RIVALS[name](deepcopy(model), x)  # a copy of its own: hooks left behind would be timed with the others
        start = perf_counter()
        found = run()
        seconds = perf_counter() - start
    except ImportError:
        return Contender(None)
    except Exception as error:
        if name in (OURS, REFERENCE):
            raise
        return Contender(None, note=reason(error))
    return Contender(run, ((found - reference).norm() / reference.norm()).item(), seconds=seconds)


def reason(error: Exception) -> str:
    """An error in a table's cell.

    >>> reason(ValueError("no | such layer"))
    'fails: ValueError: no / such layer'
    """
    text = (str(error).strip().splitlines() or [""])[0].replace("|", "/")
    name = "" if isinstance(error, WorkerError) else f"{type(error).__name__}: "
    return f"fails: {name}{text[:100]}"


@contextmanager
def contenders(workload: str, n: int, dtype: str, settings: Settings) -> Iterator[dict[str, Contender]]:
    """All of them on one network and batch; workers in other environments end on leaving."""
    model = WORKLOADS[workload].model(dtype, settings.device)
    x, _ = WORKLOADS[workload].batch(n, dtype, settings.device)
    reference = RIVALS[REFERENCE](deepcopy(model), x)()
    with ExitStack() as stack:
        found = {}
        for name in RIVALS:
            if (workload, name) in TOO_SLOW:
                found[name] = Contender(None, note=TOO_SLOW[workload, name])
            else:
                found[name] = contender(name, model, x, reference)
        if settings.workers:
            for name, implementation in NEURAL_TANGENTS.items():
                found[name] = remote(stack, workload, n, dtype, implementation, reference)
        yield found


def remote(stack: ExitStack, workload: str, n: int, dtype: str, implementation: str, reference: Tensor) -> Contender:
    """A neural-tangents worker, or the reason why there is none."""
    try:
        kernel = stack.enter_context(neural_tangents(WORKLOADS[workload], n, dtype, implementation))
        gap = kernel.result().to(reference.device) - reference
    except WorkerError as error:
        return Contender(None, note=str(error) if "not installed" in str(error) else reason(error))
    return Contender(kernel, (gap.norm() / reference.norm()).item())


def entries(settings: Settings, cases: Sequence[tuple[str, int, str]] = CASES) -> list[Entry]:
    """The rows of the table."""
    rows = []
    for workload, n, dtype in cases:
        with contenders(workload, n, dtype, settings) as found:
            model = WORKLOADS[workload].model(dtype, settings.device)
            gemm = yardstick(WORKLOADS[workload], model, WORKLOADS[workload].batch(n, dtype, settings.device)[0])
            label = f"{workload}, n = {n}, {dtype}"
            rows += compare(label, found, OURS, TOLERANCE[dtype], settings, gemm)
    return rows


def verdicts(rows: Sequence[Entry]) -> str:
    """By case: the best peer, how many times slower it is than ours, and what was demanded.

    >>> ours, peer = Entry("W1, n = 2", OURS, 0, 0.1, (1, 1, 1)), Entry("W1, n = 2", "a", 0, 0.2, (2, 2, 2))
    >>> print(verdicts([ours, peer]))
    | case | ours, ms | of GEMM rate | best peer | its ms | × ours | demanded | |
    |---|--:|--:|---|--:|--:|--:|---|
    | W1, n = 2 | 100.00 | – | a | 200.00 | 2.00 | 3 | missed by 1.50× |
    """
    lines = [
        "| case | ours, ms | of GEMM rate | best peer | its ms | × ours | demanded | |",
        "|---|--:|--:|---|--:|--:|--:|---|",
    ]
    for case in dict.fromkeys(row.case for row in rows):
        timed: Mapping[str, Entry] = {row.name: row for row in rows if row.case == case and row.ratio}
        peers = [row for name, row in timed.items() if name != OURS]
        if OURS not in timed or not peers:
            continue
        ours, best = timed[OURS], min(peers, key=lambda row: row.ratio[0])
        demanded = DEMANDED[WORKLOADS[case.partition(",")[0]].network]
        verdict = "met" if best.ratio[0] >= demanded else f"missed by {demanded / best.ratio[0]:.2f}×"
        fraction = "–" if ours.gemm is None else f"{ours.gemm:.2g}"
        lines.append(
            f"| {case} | {ours.median * 1e3:.2f} | {fraction} | {best.name} | {best.median * 1e3:.2f} | {best.ratio[0]:.2f} | "
            f"{demanded:g} | {verdict} |"
        )
    return "\n".join(lines)


def report(settings: Settings, cases: Sequence[tuple[str, int, str]], stem: Path) -> Iterator[str]:
    """The body of the page after each case: verdicts, then every row."""
    rows: list[Entry] = []
    for case in cases:
        rows += entries(settings, [case])
        yield f"{verdicts(rows)}\n\n{table(rows, RATIO)}"
