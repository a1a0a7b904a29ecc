"""What a study is refused for when the user's own code or file fails: one line with key and place, the cause behind it."""

import sys

import numpy as np
import pandas as pd
import pytest

from nt_kernel.errors import NumericalError
from studies.cli import main
from studies.data.datasets import load
from studies.data.subsets import check_data
from studies.definition.config import ConfigError, Study
from studies.definition.training import Data
from studies.running.outcome import failure_of

MODULE = """
import numpy as np, torch
def crash(**_): raise RuntimeError("boom")
def lookup(**_): return {}["x"]
def out_of_memory(**_): raise MemoryError
def asks(foo): return None
def takes(inputs, depth=1): return torch.nn.Linear(inputs, 1)
def three(): return 1, 2, 3
def scalars(): return 1, 2
def cube(): return np.ones((9, 3)), np.ones((9, 2, 2))
def imaginary(): return np.ones((9, 3)), 1j * np.ones(9)
def words(): return np.ones((2, 3)), np.array([["a", "b"], ["c", "d"]])
def empty(): return []
def sparse():
    import scipy.sparse
    return scipy.sparse.eye(9).tocsr(), np.arange(9)
class Rows:
    def __init__(self, row): self.row = row
    def __len__(self): return 3
    def __getitem__(self, i): return self.row(i)
def triples(): return Rows(lambda i: (np.ones(2), 1, 2))
def ragged(): return Rows(lambda i: (np.ones(i + 1), 1))
def broken(): return Rows(lambda i: 1 / i)
number = 3
"""
BROKEN = {"syntax": "def f(:", "unknown": "x = undefined", "leaves": "raise SystemExit(0)"}


@pytest.fixture(autouse=True)
def _my_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    for name, text in {"my_code": MODULE, **BROKEN}.items():
        (tmp_path / f"{name}.py").write_text(text)
    yield
    for name in ("my_code", *BROKEN):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("place", "words", "cause"),
    [
        ("my_code:crash", ": RuntimeError: boom", RuntimeError),
        ("my_code:lookup", ": KeyError: 'x'", KeyError),
        ("my_code:asks", r" takes \(foo\) and was given nothing: missing a required argument: 'foo'", TypeError),
        ("my_code:number", " is of type int; expected a function or a class", None),
        ("syntax:f", " cannot be imported: SyntaxError: ", SyntaxError),
        ("unknown:f", " cannot be imported: NameError: name 'undefined' is not defined", NameError),
        ("leaves:f", " cannot be imported: SystemExit: 0", SystemExit),
        ("absent:f", " cannot be imported: No module named 'absent'", ModuleNotFoundError),
        ("my_code:f", " cannot be imported: module 'my_code' has no attribute 'f'", AttributeError),
    ],
)
@pytest.mark.parametrize("key", ["data.name", "model.architecture"])
def test_code_of_the_users_that_fails_is_named_by_key_and_place(key, place, words, cause):
    with pytest.raises(ValueError, match=f"^{key} = {place}{words}") as failure:
        check_data(Study.from_toml("digits", [f"{key}={place}"]))
    assert type(failure.value.__cause__) is (cause or type(None))


def test_a_wrong_argument_of_a_factory_is_named_with_those_there_are():
    study = Study.from_toml("digits", ["architecture=my_code:takes", "model.arguments.dept=2"])
    with pytest.raises(
        ValueError, match=r"my_code:takes takes \(inputs, depth=1\) and was given inputs, dept: got an un"
    ):
        check_data(study)


def test_a_kind_whose_module_fails_keeps_its_cause(tmp_path):
    (tmp_path / "study.toml").write_text('kind = "syntax:K"')
    with pytest.raises(ConfigError, match="kind = syntax:K cannot be imported: SyntaxError") as failure:
        Study.from_toml("study.toml")
    assert isinstance(failure.value.__cause__.__cause__, SyntaxError)


def test_memory_that_runs_out_in_a_factory_is_no_wrong_input():
    with pytest.raises(ValueError, match="MemoryError") as failure:
        check_data(Study.from_toml("digits", ["architecture=my_code:out_of_memory"]))
    assert failure_of(failure.value, "cpu").kind == "memory"
    assert failure_of(ValueError("other"), "cpu").kind == "input"
    assert failure_of(NumericalError("x", where="y", value=0.0), "cpu").kind == "numerical"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("three", r" returned a tuple of 3 \(int, int, int\); expected \(x, y\) or a torch Dataset"),
        ("scalars", r": inputs \(\) and targets \(\); expected \[rows, …\] and \[rows\] or \[rows, p\]"),
        ("cube", r": inputs \(9, 3\) and targets \(9, 2, 2\); expected \[rows, …\] and \[rows\] or \[rows, p\]"),
        ("imaginary", r": targets \(9,\) are complex128; expected numbers or words"),
        ("words", r": targets \(2, 2\) are <U1; expected numbers, or one column of words"),
        ("empty", r": inputs \(0,\) and targets \(0,\); expected"),
        ("sparse", r": inputs are a sparse matrix \(9, 9\); expected a dense array"),
        ("triples", r": row 0 of its Rows is a tuple of 3 \(ndarray, int, int\); expected a pair \(x, y\)"),
        ("ragged", ": inputs make no array: ValueError: all input arrays must have the same shape"),
        ("broken", ": a row of its Rows: ZeroDivisionError: division by zero"),
    ],
)
def test_data_that_a_function_returns_and_that_make_no_data_set(name, words):
    with pytest.raises(ValueError, match=rf"^data\.name = my_code:{name}{words}"):
        load(Data(name=f"my_code:{name}"))


def _garbage(path):
    path.write_bytes(b"garbage")


def _cut_off(path):
    np.savez(path, x=np.ones((80, 3)), y=np.ones(80))
    path.write_bytes(path.read_bytes()[:300])


def _flipped(path):
    np.savez_compressed(path, x=np.random.default_rng(0).normal(size=(80, 3)), y=np.ones(80))
    held = bytearray(path.read_bytes())
    held[200:260] = bytes(60)
    path.write_bytes(held)


def _objects(path):
    np.savez(path, x=np.array([[1, "a"], [None, 2.0]], dtype=object), y=np.ones(2))


def _one_array(path):
    with path.open("wb") as file:
        np.save(file, np.ones((80, 3)))


@pytest.mark.parametrize("write", [_garbage, _cut_off, _flipped, _objects, _one_array])
def test_a_damaged_archive_is_named_with_what_it_should_be(write, tmp_path, capsys):
    write(tmp_path / "mine.npz")
    expected = r"expected the arrays x \[rows, …\] and y \[rows\] or \[rows, p\], of numbers: np\.savez"
    with pytest.raises(ValueError, match=rf"^data\.name = mine\.npz cannot be read: .*; {expected}") as failure:
        load(Data(name="mine.npz"))
    assert failure.value.__cause__ is not None
    assert main(["run", "digits", "data.name=mine.npz", "--out", "out"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("word", r"data\.name = t\.csv: targets that are missing in 1 rows, the first 2"),
        ("word,real", r"data\.target = 'word,real': columns word of t\.csv are no numbers"),
    ],
)
def test_target_columns_that_cannot_be_targets(target, words):
    pd.DataFrame({"a": [1.0, 2, 3], "real": [1.0, 2, 3], "word": ["x", "y", None]}).to_csv("t.csv", index=False)
    frame = pd.read_csv("t.csv")
    (frame if target != "word" else frame.drop(columns="real")).to_csv("t.csv", index=False)
    with pytest.raises(ValueError, match=words):
        load(Data(name="t.csv", target=target))


@pytest.mark.parametrize(
    "name",
    ["california_housing", "fetch_california_housing", "fetch_20newsgroups", "fetch_lfw_people", "fetch_openml"],
)
def test_no_fetcher_goes_to_the_network_unasked(name, tmp_path, monkeypatch):
    monkeypatch.setenv("SCIKIT_LEARN_DATA", str(tmp_path / "nothing"))

    def refuse(*_, **__):
        raise AssertionError("the network was asked")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    monkeypatch.setattr("urllib.request.urlretrieve", refuse)
    with pytest.raises(ValueError, match=rf"^data\.name = {name} .*: write data\.download=true to allow it"):
        load(Data(name=name))


def test_an_openml_set_is_asked_for_with_what_the_fetcher_takes(monkeypatch):
    def fetch_openml(name=None, *, data_id=None, return_X_y=False, as_frame="auto"):
        assert (data_id, return_X_y, as_frame) == (61, True, False)
        return np.arange(12.0).reshape(6, 2), np.array(list("ababab"), dtype=object)

    monkeypatch.setattr("sklearn.datasets.fetch_openml", fetch_openml)
    assert load(Data(name="fetch_openml", arguments={"data_id": 61}, download=True)).classes == 2


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("load_sample_images", {}, r"data\.name = load_sample_images does not return \(x, y\)"),
        ("load_digits", {"foo": 1}, r"data\.arguments\.foo: sklearn\.datasets\.load_digits takes n_class, as_frame"),
        ("load_digits", {"return_X_y": False}, r"data\.arguments\.return_X_y: "),
        ("load_digits", {"n_class": "many"}, r"data\.name = load_digits: InvalidParameterError: .*n_class"),
        ("load_boston", {}, r"data\.name = load_boston: sklearn\.datasets has no load_boston"),
    ],
)
def test_loaders_of_sklearn_that_cannot_be_used(name, arguments, words):
    with pytest.raises(ValueError, match=words):
        load(Data(name=name, arguments=arguments))


def test_a_mistake_outside_of_points_is_one_line_too(monkeypatch, capsys):
    from studies.running import runner

    def fail(*_, **__):
        raise KeyError("lost")

    monkeypatch.setattr(runner, "run_study", fail)
    assert main(["run", "digits", "n=6"]) == 1
    line = "stability: error: KeyError: 'lost'; `stability --traceback run digits n=6` shows where it comes from\n"
    assert capsys.readouterr().err == line
    with pytest.raises(KeyError):
        main(["--traceback", "run", "digits", "n=6"])
