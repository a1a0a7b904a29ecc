"""The predicted peak is kept: measured by torch's own record of every allocation, of the prediction's making or not."""

import contextlib
import copy
import gc
import itertools
import os

import pytest
import torch
from torch import nn

from nt_kernel import PeakMemory, empirical_ntk, generalized_ntk, predict_peak
from nt_kernel.capture.sensitivities import ONE_BY_ONE
from nt_kernel.kernels.live_bytes import LiveBytes
from nt_kernel.kernels.memory import format_bytes, parse_bytes
from tests.nt_kernel.cases import CASES, F64, Custom, mlp
from tests.thinned import thinned


def perceptron():
    return mlp(24, 96, 96, 6), lambda n: torch.randn(n, 24)


def convolutional():
    model = nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, stride=2, padding=1, groups=2),
        nn.GroupNorm(3, 12),
        nn.ReLU(),
        nn.Conv2d(12, 12, 3, padding=1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 5),
    )
    return model, lambda n: torch.randn(n, 2, 10, 10)


def transformer():
    layer = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True)
    model = Custom(
        lambda s, x: s.out(s.blocks(s.table(x) + s.place).mean(1)),
        table=nn.Embedding(20, 16),
        place=nn.Parameter(torch.randn(9, 16)),
        blocks=nn.TransformerEncoder(layer, 1, enable_nested_tensor=False),
        out=nn.Linear(16, 5),
    )
    return model.eval(), lambda n: torch.randint(0, 20, (n, 9))


def wide():
    """Past the size at which passes go one output at a time."""
    model = nn.Sequential(nn.Linear(4, ONE_BY_ONE // 6), nn.Softmax(-1), nn.Linear(ONE_BY_ONE // 6, 3))
    return model, lambda n: torch.randn(n, 4)


MODELS = {"mlp": perceptron, "cnn": convolutional, "transformer": transformer, "wide": wide}
N, M = 7, 3


@pytest.fixture(autouse=True)
def collector_at_rest():
    """Circles of references are freed at a moment of the collector's choosing, and peaks would be no numbers."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def made(name):
    torch.manual_seed(0)
    model, draw = MODELS[name]()
    return model, draw(N), draw(M)


def measured(function) -> int:
    """The peak of what torch's allocator gave out while ``function`` ran, freed blocks taken off; the result included."""
    kept = []
    with (
        muted(),
        torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile,
    ):
        kept.append(function())
    live = peak = 0
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    assert peak > 0
    return peak


@contextlib.contextmanager
def muted():
    """The profiler's library writes to the process's standard error."""
    keep, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(keep, 2)
        os.close(keep), os.close(null)


def test_the_measure_measures():
    assert 0 <= measured(lambda: torch.zeros(2**17, dtype=F64) + 1) - 2 * 2**20 <= 1024  # 1 is a tensor, too


SETTINGS = [
    (M, {}),
    (None, {"outputs": "trace", "dtype": torch.float32}),
    (None, {"outputs": "diagonal", "per_layer": True}),
]


SLOW = {"transformer", "wide"}  # what they show beyond the small networks is size


def quick_and_slow(cases: list[tuple]) -> list:
    return [pytest.param(*case, marks=pytest.mark.slow) if case[0] in SLOW else case for case in cases]


@pytest.mark.parametrize(
    ("name", "chunk"), quick_and_slow([("mlp", 1), ("cnn", 1), *itertools.product(MODELS, (3, N))])
)
def test_the_empirical_kernels_peak_is_kept(name, chunk, capsys):
    model, x, other = made(name)
    for second, options in SETTINGS:
        x2 = None if second is None else other
        fresh = copy.deepcopy(model)  # planning and probing are part of the run
        predicted = predict_peak(copy.deepcopy(model), x, x2, chunk_size=chunk, **options)
        peak = measured(lambda: empirical_ntk(fresh, x, x2, chunk_size=chunk, **options))  # noqa: B023
        said = announced(capsys.readouterr().err)
        assert peak <= said * 1.01 <= 2 * peak + 2**17, (options, str(predicted), format_bytes(peak))
        assert predicted.blocks == -(-N // chunk)
        assert abs(predicted.total - said) <= 0.01 * said


@pytest.mark.parametrize(
    ("name", "blocks"),
    quick_and_slow([("mlp", "layer"), ("mlp", "network"), ("cnn", "layer"), ("transformer", "layer")]),
)
def test_the_generalized_kernels_peak_is_kept(name, blocks, capsys):
    model, x, other = made(name)
    for x1, x2, chunk in ((None, None, 4), (None, None, N), (other, None, 4), (other, x[:2], 4)):
        for metric in ("identity", "cross_entropy") if name == "mlp" else ("cross_entropy",):
            fresh = copy.deepcopy(model)
            options = {"chunk_size": chunk, "blocks": blocks, "output_metric": metric}
            peak = measured(lambda: generalized_ntk(fresh, x, x1, x2, **options))  # noqa: B023
            said = announced(capsys.readouterr().err)
            assert peak <= said * 1.01, (options, format_bytes(peak), format_bytes(said))
            assert said <= 3 * peak + 2**16, (options, format_bytes(peak), format_bytes(said))


def announced(line: str) -> int:
    return parse_bytes(line.partition("predicted peak ")[2].partition(" of ")[0].strip())


@pytest.mark.parametrize(
    ("name", "outputs"), thinned([("mlp", "trace"), ("mlp", "full"), ("cnn", "full"), ("wide", "trace")], 4)
)
def test_a_limit_is_kept_and_used(name, outputs):
    torch.manual_seed(0)
    model, draw = MODELS[name]()
    x = draw(16)
    whole, least = (predict_peak(copy.deepcopy(model), x, outputs=outputs, chunk_size=n) for n in (16, 1))
    K, size = empirical_ntk(model, x, outputs=outputs), 16
    for limit in (1.02 * whole.total, 1.02 * (whole.total + least.total) / 2, 1.02 * least.total):
        chosen = predict_peak(copy.deepcopy(model), x, outputs=outputs, memory_limit=limit)
        assert chosen.total <= limit
        assert chosen.chunk_size <= size
        size = chosen.chunk_size
        if chosen.blocks > 1 and name != "wide":  # the next larger blocks do not fit
            larger = -(-16 // (chosen.blocks - 1))
            assert predict_peak(copy.deepcopy(model), x, outputs=outputs, chunk_size=larger).total > limit / 1.05
        found, fresh = [], copy.deepcopy(model)
        run = lambda: found.append(empirical_ntk(fresh, x, outputs=outputs, memory_limit=limit))  # noqa: B023, E731
        assert measured(run) <= limit
        assert (found[0] - K).norm() <= 1e-13 * K.norm()
    assert size < 16 or outputs == "trace"  # of which planning can be the most
    with pytest.raises(ValueError, match=r"memory_limit is .* one sample at a time takes .*Ask for less"):
        empirical_ntk(model, x, outputs=outputs, memory_limit=least.total // 2)


def test_it_is_said_before_the_run(capsys):
    model, x, other = made("mlp")
    empirical_ntk(model, x, other)
    generalized_ntk(model, x)
    assert capsys.readouterr().err == ""
    predict_peak(model, x, chunk_size=5)
    assert capsys.readouterr().err == ""
    peak = predict_peak(model, x, chunk_size=5)  # the plan is made by now, and takes no memory any more
    empirical_ntk(model, x, chunk_size=5)
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"empirical_ntk: 2 blocks of 5 samples, predicted peak {format_bytes(peak.total)}"
    generalized_ntk(model, x, memory_limit="1 GiB")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("generalized_ntk: 1 block of 7 samples, predicted peak ")
    assert line.endswith(" of 1 GiB allowed")


def test_a_chunk_beyond_the_limit():
    model, x, _ = made("mlp")
    with pytest.raises(ValueError, match=r"chunk_size=7 takes .*, memory_limit is 100 KiB; leave chunk_size out"):
        empirical_ntk(model, x, chunk_size=N, memory_limit="100 KiB")
    assert empirical_ntk(model, x, chunk_size=3, memory_limit="1 GiB").shape == (N, 6, N, 6)
    for bad in (0, -1, 2.0, True, "3"):
        with pytest.raises(ValueError, match="chunk_size must be a whole number of samples >= 1"):
            empirical_ntk(model, x, chunk_size=bad)


def test_nothing_large_runs_before_the_limit_is_known():
    """Neither the plan nor the probes see more than a few samples."""
    sizes = []
    model = Custom(lambda s, x: sizes.append(len(x)) or s.a(x), a=nn.Linear(3, 2)).to(F64)
    x = torch.randn(50, 3, dtype=F64)
    predict_peak(model, x, x[:40], chunk_size=10)
    generalized_ntk(model, x, chunk_size=10)
    assert max(sizes) == 10
    sizes.clear()
    with pytest.raises(ValueError, match="memory_limit is 10 B"):
        empirical_ntk(model, x, memory_limit=10)
    assert max(sizes) <= 2


@pytest.mark.parametrize("name", thinned(CASES, 3))
def test_every_case_has_a_prediction(name):
    case = CASES[name]
    model, x, other = case.make()
    for outputs in ("full", "diagonal", "trace"):
        peak = predict_peak(model, x, other, outputs=outputs, per_layer=True, chunk_size=2, output=case.output)
        assert isinstance(peak, PeakMemory)
        assert peak.total > peak.items["result"] > 0
        assert "result" in str(peak)


def test_one_sample():
    model, x, _ = CASES["one sample"].make()
    assert predict_peak(model, x, memory_limit="1 MiB").blocks == 1


def test_live_bytes():
    x = torch.zeros(1000, dtype=F64)
    with LiveBytes() as seen:
        y = x + 1
        y = y * 2
        assert seen.live == 8000
        view = y[5:].view(-1)
        z = torch.zeros(10, dtype=F64)
        del y
        assert seen.live == 8080
        del view
        assert seen.live == 80
        x.add_(1)
    assert seen.peak == 16000
    del z
    assert seen.live == 0


@pytest.mark.parametrize(
    ("text", "size"), [("2 GiB", 2**31), ("2g", 2**31), ("500MB", 5 * 10**8), ("1e3", 1000), (1.5, 1), (".5 KiB", 512)]
)
def test_amounts(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("amount", ["2 GiBs", "GiB", "", "-1", 0, float("inf"), float("nan"), "2 2", None, True])
def test_amounts_that_are_none(amount):
    with pytest.raises((ValueError, TypeError), match="memory_limit"):
        parse_bytes(amount)
    if amount is not None:
        with pytest.raises((ValueError, TypeError), match="memory_limit"):
            predict_peak(nn.Linear(2, 1), torch.ones(1, 2), memory_limit=amount)
