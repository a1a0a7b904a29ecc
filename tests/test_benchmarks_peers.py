"""Peers in other processes and environments: one protocol, and whatever fails there is a row, not an end."""

import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from benchmarks import environments, gram, memory
from benchmarks.peers import install
from benchmarks.rivals import OURS, REFERENCE, RIVALS
from benchmarks.timing import Settings, table
from benchmarks.worker import Worker, WorkerError
from benchmarks.workloads import WORKLOADS, export
from tests.test_benchmarks import keep

FAST = Settings(rounds=2, turn=0.0, workers=False)
PEERS = Path(install.HERE)


@pytest.fixture(autouse=True)
def _waiting_policy(monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")  # the command sets it where it is not set


# A worker with nothing of ours but the protocol: its kernel is a number that it was given.
FAKE = """
import sys, json
sys.path.insert(0, {peers!r})
import protocol
def prepare(loaded, request):
    if request["value"] < 0:
        raise ValueError("no such | kernel")
    if request["value"] == 99:
        sys.stderr.write("out of memory\\n"); sys.exit(3)
    print("noise on stdout")
    return lambda: request["value"]
def save(result, path):
    open(path, "w").write(json.dumps(result)); return path
protocol.serve(lambda: None, prepare, save, lambda run: 10 * run())
"""


@pytest.fixture
def fake():
    with Worker([sys.executable, "-c", FAKE.format(peers=str(PEERS))], timeout=60) as worker:
        yield worker


def test_a_worker_is_prepared_timed_and_asked_for_its_result(fake, tmp_path):
    assert fake.ask(do="prepare", value=7) is True
    assert fake.ask(do="run", calls=3) > 0
    assert Path(fake.ask(do="result", path=str(tmp_path / "r"))).read_text() == "7"
    assert fake.ask(do="memory") == 70


def test_a_worker_that_cannot_says_why_and_goes_on(fake):
    with pytest.raises(WorkerError, match=r"ValueError: no such \| kernel"):
        fake.ask(do="prepare", value=-1)
    with pytest.raises(WorkerError, match="unknown request 'dance'; write prepare, run, result or memory"):
        fake.ask(do="dance")
    assert fake.ask(do="prepare", value=1) is True


def test_a_worker_that_dies_is_reported_by_its_last_words(fake):
    with pytest.raises(WorkerError, match="died: out of memory"):
        fake.ask(do="prepare", value=99)
    with pytest.raises(WorkerError):
        fake.ask(do="run", calls=1)


def test_a_worker_that_does_not_answer_is_ended():
    with pytest.raises(WorkerError, match="no answer within 1 s"):
        Worker([sys.executable, "-c", "import time; time.sleep(60)"], timeout=1)


def test_a_worker_that_does_not_start_is_reported():
    with pytest.raises(WorkerError, match=r"died: .*no_such_module"):
        Worker([sys.executable, "-c", "import no_such_module"])


def test_peak_memory_is_that_of_the_call():
    code = (
        "import sys; sys.path.insert(0, sys.argv.pop()); import protocol; "
        "print(protocol.peak_bytes(lambda: len(bytearray(50_000_000))), protocol.peak_bytes(lambda: None))"
    )
    command = [sys.executable, "-c", code, str(PEERS)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    big, none = map(int, done.stdout.split())
    assert 49_000_000 < big < 55_000_000
    assert none < 2_000_000


@pytest.mark.slow
def test_the_memory_of_a_contender_is_measured_in_its_own_process(monkeypatch):
    keep(monkeypatch, OURS, REFERENCE)
    ours, peer = memory.peaks(FAST, [("W4", 32, "float32")])
    assert (ours.note, peer.note) == ("", "")
    # jacrev holds [32, 1, 82 433] float32 = 10.6 MB
    assert 10.5e6 < peer.bytes < 40e6
    assert ours.bytes < peer.bytes


def test_a_process_that_fails_is_a_row():
    @contextmanager
    def broken():
        raise WorkerError("ModuleNotFoundError: No module named 'x'")
        yield

    assert memory.measured("case", "peer", broken(), 1.0).note == "not installed"


def test_peers_in_other_environments_take_part_by_the_same_protocol(monkeypatch, tmp_path):
    """A worker that answers as neural-tangents' would, by our own numbers."""
    script = tmp_path / "worker.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(PEERS)!r})\nimport protocol, numpy as np\n"
        "def prepare(_, request):\n"
        "    stored = np.load(request['npz'])\n"
        "    assert request['network'] == 'mlp' and 'parameters/0.weight' in stored.files\n"
        "    k = np.load(request['npz'] + '.expected.npy') if request['implementation'] == 'AUTO' else np.zeros(1)\n"
        "    return lambda: k\n"
        "protocol.serve(lambda: None, prepare, lambda k, path: np.save(path, k) or path)\n"
    )

    def exporting(workload, n, dtype, path):
        path = export(workload, n, dtype, path)
        model, (x, _) = workload.model(dtype, "cpu"), workload.batch(n, dtype, "cpu")
        np.save(f"{path}.expected.npy", RIVALS[REFERENCE](model, x)().numpy())
        return path

    keep(monkeypatch, OURS, REFERENCE)
    monkeypatch.setattr(environments, "export", exporting)
    monkeypatch.setattr(environments, "neural_tangents_command", lambda: [sys.executable, str(script)])
    monkeypatch.setattr(gram, "NEURAL_TANGENTS", {"right": "AUTO", "wrong": "STRUCTURED_DERIVATIVES"})
    rows = gram.entries(Settings(rounds=2, turn=0.0), [("W4", 2, "float64")])
    assert [row.note for row in rows] == ["", "", "", "disagrees, not timed"]
    assert rows[2].error == 0
    assert rows[2].ratio is not None


def test_a_missing_environment_is_a_row(monkeypatch):
    monkeypatch.setattr(environments, "is_ready", lambda peer: False)
    keep(monkeypatch, OURS, REFERENCE)
    monkeypatch.setattr(gram, "NEURAL_TANGENTS", {"neural-tangents": "AUTO"})
    rows = gram.entries(Settings(rounds=1, turn=0.0), [("W4", 2, "float64")])
    assert rows[2].note == "not installed; write python -m benchmarks.peers.install"
    assert "python -m benchmarks.peers.install | – | – |" in table(rows, "×")


@pytest.mark.skipif(not install.is_ready("neural_tangents"), reason="python -m benchmarks.peers.install")
@pytest.mark.parametrize("workload", ["W2", *(pytest.param(w, marks=pytest.mark.slow) for w in ("W3", "R", "T"))])
def test_the_networks_in_jax_are_the_same_networks(workload):
    model, (x, _) = WORKLOADS[workload].model("float64", "cpu"), WORKLOADS[workload].batch(2, "float64", "cpu")
    expected = RIVALS[REFERENCE](model, x)()
    with environments.neural_tangents(WORKLOADS[workload], 2, "float64", "JACOBIAN_CONTRACTION") as kernel:
        assert (kernel.result() - expected).norm() <= 1e-12 * expected.norm()


def test_the_pinned_lists_leave_torch_alone():
    for path in PEERS.glob("*.txt"):
        names = [line.split("==")[0] for line in path.read_text().splitlines() if line and not line.startswith("#")]
        assert not {"torch", "torchvision", "tensorflow"} & set(names)
        assert all("==" in line for line in path.read_text().splitlines() if line and not line.startswith("#"))


def test_an_environment_is_ready_only_when_whole_and_from_the_list_of_today(monkeypatch, tmp_path):
    monkeypatch.setattr(install, "ENVIRONMENTS", tmp_path)
    assert not install.is_ready("neural_tangents")
    monkeypatch.setattr(install.subprocess, "run", lambda command, check: None)
    install.make_environment("neural_tangents")
    assert not install.is_ready("neural_tangents")  # there is no Python in it
    install.python_of("neural_tangents").parent.mkdir()
    install.python_of("neural_tangents").touch()
    assert install.is_ready("neural_tangents")
    (tmp_path / "neural_tangents" / ".complete").write_text("jax==0.1")
    assert not install.is_ready("neural_tangents")


def test_a_peer_that_cannot_be_had_stops_nothing(monkeypatch, capsys):
    def fails(*_):
        raise subprocess.CalledProcessError(1, "pip")

    monkeypatch.setattr(install, "install", fails)
    monkeypatch.setattr(install, "make_environment", fails)
    assert install.main() == 0
    assert capsys.readouterr().err.count("could not be installed") == 3
