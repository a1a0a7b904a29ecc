"""Baselines: what is written is read back, nothing of the user's is lost, and writers at the same time do not lose values."""

import multiprocessing
import tomllib

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from stability.regression.baselines import Constant, moved, read, to_toml, tolerances, update

NAMES = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=12)
NUMBERS = st.floats(allow_nan=False)
TABLES = st.dictionaries(
    NAMES, st.dictionaries(NAMES, st.fixed_dictionaries({"value": NUMBERS, "layer": NAMES, "step": st.integers(0, 9)}))
)


@given(TABLES)
def test_any_names_and_numbers_come_back_from_toml(tests):
    assert tomllib.loads(to_toml(tests)) == tests


@example(value=1.15, base=1.0, rtol=0.1, atol=0.1)  # within the sum of both tolerances, beyond each
@given(
    value=st.floats(-1e6, 1e6), base=st.floats(-1e6, 1e6), rtol=st.floats(0, 1), atol=st.floats(0, 1e3),
)  # fmt: skip
def test_moved_is_the_stated_inequality(value, base, rtol, atol):
    text = moved(Constant("a", "a", value), {"a": {"value": base}}, rtol, atol)
    assert bool(text) == (abs(value - base) > max(rtol * abs(base), atol))


def test_infinite_values_equal_themselves_only():
    inf = float("inf")
    assert moved(Constant("a", "a", inf), {"a": {"value": inf}}, 0.1, 1.0) == ""
    assert moved(Constant("a", "a", 1.0), {"a": {"value": inf}}, 0.1, 1.0)
    assert moved(Constant("a", "a", float("nan")), {"a": {"value": 1.0}}, 0.1, 1.0)


def test_the_nearest_tolerance_counts():
    table = {"atol": 0.5, "a": {"value": 1.0, "rtol": 0.3}}
    assert tolerances(table, "a", {"rtol": 0.2, "atol": 0.1}, noise=9.0) == (0.3, 0.5)
    assert tolerances({}, "a", {"rtol": 0.2}, noise=9.0) == (0.2, 9.0)
    assert tolerances({}, "a", {}, noise=0.0) == (0.01, 0.0)
    with pytest.raises(ValueError, match="rtol of a must be a number >= 0, got 'x'"):
        tolerances({"a": {"rtol": "x"}}, "a", {}, 0.0)


def test_an_update_keeps_other_tests_other_constants_and_tolerances(tmp_path):
    path = tmp_path / "test_lab.assumptions.toml"
    path.write_text(
        '[old.a]\nvalue = 1\n\n[new]\nrtol = 0.5\n\n[new.a]\nvalue = 1\natol = 2.0\nnote = "mine"\nstep = 7\n'
    )
    update(path, {"new": {"a": {"value": 3.0}, "b": {"value": 4.0}}}, {"date": "2026-01-01"})
    assert read(path) == {
        "old": {"a": {"value": 1}},
        "new": {
            "rtol": 0.5,
            "date": "2026-01-01",
            "a": {"value": 3.0, "atol": 2.0, "note": "mine"},
            "b": {"value": 4.0},
        },
    }


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "test_lab.assumptions.toml"
    update(path, {"t": {"a": {"value": 1.0}}}, {})
    before = path.read_text()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        update(path, {"t": {"a": {"value": 2.0}}}, {})
    assert path.read_text() == before
    assert list(tmp_path.iterdir()) == [path]


def _write(path, worker):
    for step in range(8):
        update(path, {f"test_{worker}": {f"c{step}": {"value": float(step)}}}, {})


def test_writers_at_the_same_time_lose_nothing(tmp_path):
    path, context = tmp_path / "test_lab.assumptions.toml", multiprocessing.get_context("fork")
    workers = [context.Process(target=_write, args=(path, worker)) for worker in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    found = read(path)
    assert {test: len(entries) for test, entries in found.items()} == {f"test_{w}": 8 for w in range(4)}
    assert list(tmp_path.iterdir()) == [path]
