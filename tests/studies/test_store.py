import errno
import json
import os
import time
import tomllib

import pytest

from studies.definition.config import Study
from studies.results import store, whole
from studies.results.frames import TABLES
from studies.results.store import collect, is_finished, load_results, open_folder, write_point
from studies.results.whole import DiskFullError, FolderError, write_whole
from tests.studies.fake_twins import tables

STUDY = Study.from_toml("digits", ["n=6,12", "mass=1", "seeds=1", "replacements=1"])
FACTS = {"commit": "abc", "date": "2026-01-01"}


@pytest.fixture
def folder(tmp_path):
    out = tmp_path / "deep" / "results"
    for point in open_folder(out, STUDY, FACTS):
        write_point(out, point, tables(point), {"seconds": 1.5})
    return out


def test_a_new_folder_holds_the_config_as_run_with_its_provenance(folder):
    config = tomllib.loads((folder / "config.toml").read_text())
    assert config["provenance"] == FACTS
    assert config["grid"]["n"] == [6, 12]
    assert store.read_study(folder) == STUDY
    assert Study.from_toml(folder / "config.toml") == STUDY


def test_finished_points_are_not_due_again(folder):
    assert open_folder(folder, STUDY, FACTS) == []
    record = json.loads((folder / "points" / STUDY.points()[0].key / "point.json").read_text())
    assert record["seconds"] == 1.5
    assert set(record["sha256"]) == set(TABLES)


def test_the_config_of_a_complete_folder_keeps_its_provenance(folder):
    open_folder(folder, STUDY, {"commit": "later"})
    assert tomllib.loads((folder / "config.toml").read_text())["provenance"] == FACTS


def test_a_grown_or_shrunk_worker_count_continues(folder):
    assert open_folder(folder, Study.from_toml(folder / "config.toml", ["workers=7"]), FACTS) == []


def test_another_thread_count_is_another_study(folder):
    with pytest.raises(FolderError, match="threads is 1 there, 2 here"):
        open_folder(folder, Study.from_toml(folder / "config.toml", ["threads=2"]), FACTS)


def test_a_folder_in_which_no_point_was_finished_becomes_the_next_studys(tmp_path):
    open_folder(tmp_path, Study.from_toml("digits", ["lr=5"]), FACTS)
    (tmp_path / "points" / ".n6-half-written").mkdir()
    assert open_folder(tmp_path, STUDY, {"commit": "later"}) == STUDY.points()
    assert store.read_study(tmp_path) == STUDY
    assert tomllib.loads((tmp_path / "config.toml").read_text())["provenance"] == {"commit": "later"}


@pytest.mark.parametrize("left", ["one point", "tables"])
def test_a_folder_that_holds_any_result_does_not(folder, left):
    collect(folder, STUDY)
    store.shutil.rmtree(folder / "points" / STUDY.points()[0].key)
    if left == "one point":
        (folder / "summary.parquet").unlink()
    else:
        store.shutil.rmtree(folder / "points" / STUDY.points()[1].key)
    with pytest.raises(FolderError, match=r"lr is 0\.1 there, 0\.2 here"):
        open_folder(folder, Study.from_toml(folder / "config.toml", ["lr=0.2"]), FACTS)


@pytest.mark.parametrize("name", [*(f"{table}.parquet" for table in TABLES), "point.json"])
@pytest.mark.parametrize("harm", ["missing", "truncated", "flipped"])
def test_a_damaged_point_is_due_again_and_replaced_by_a_whole_one(folder, name, harm):
    point = STUDY.points()[0]
    file = folder / "points" / point.key / name
    content = bytearray(file.read_bytes())
    if harm == "missing":
        file.unlink()
    elif harm == "truncated":
        file.write_bytes(content[: len(content) // 2])
    else:
        content[content.index(b"sha256") if name == "point.json" else len(content) // 2] ^= 1
        file.write_bytes(content)
    assert open_folder(folder, STUDY, FACTS) == [point]
    write_point(folder, point, tables(point), {})
    assert is_finished(folder, point)
    assert open_folder(folder, STUDY, FACTS) == []


def test_a_point_folder_of_another_name_is_not_that_point(folder):
    first, second = STUDY.points()
    store.shutil.rmtree(folder / "points" / first.key)
    os.rename(folder / "points" / second.key, folder / "points" / first.key)
    assert not is_finished(folder, first)


def test_foreign_folders_are_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("ten years of work")
    with pytest.raises(FolderError, match=r"not a results folder: .* is not empty and has no config\.toml"):
        open_folder(tmp_path, STUDY, FACTS)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("text", ["name = 'somebody else'", "no toml", "[provenance]\n[engine]\n", "\udcff"])
def test_a_config_that_is_not_ours_is_refused(tmp_path, text):
    (tmp_path / "config.toml").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(FolderError, match="not a results folder"):
        open_folder(tmp_path, STUDY, FACTS)
    assert (tmp_path / "config.toml").read_bytes() == text.encode(errors="surrogateescape")


def test_the_results_of_another_config_are_refused_with_the_keys_that_differ(folder):
    other = Study.from_toml(folder / "config.toml", ["lr=0.2", "n=6", "workers=3"])
    with pytest.raises(FolderError, match=r"another config") as refusal:
        open_folder(folder, other, FACTS)
    assert "lr is 0.1 there, 0.2 here" in str(refusal.value)
    assert "grid.n is [6, 12] there, [6] here" in str(refusal.value)
    assert "workers" not in str(refusal.value)
    assert "--out" in str(refusal.value)


def test_a_file_and_an_unwritable_place_are_refused(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(FolderError, match="is a file"):
        open_folder(tmp_path / "file", STUDY, FACTS)
    with pytest.raises(FolderError, match=r"cannot use the folder .*Not a directory"):
        open_folder(tmp_path / "file" / "below", STUDY, FACTS)

    def refuse(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(whole.tempfile, "mkstemp", refuse)  # the tests may run as a user whom no mode bit stops
    with pytest.raises(FolderError, match=r"cannot use the folder .*Permission denied"):
        open_folder(tmp_path / "new", STUDY, FACTS)


@pytest.mark.parametrize("write", ["open_folder", "write_point", "collect"])
@pytest.mark.parametrize(
    ("number", "kind", "words"),
    [
        (errno.ENOSPC, DiskFullError, "the disk of .* is full; make room .* finished points are kept"),
        (errno.EACCES, FolderError, "cannot use the folder .*: Permission denied"),
    ],
)
def test_whatever_the_system_refuses_is_said_in_one_line(write, number, kind, words, folder, monkeypatch):
    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    first = STUDY.points()[0]
    content = tables(first)
    if write == "open_folder":
        store.shutil.rmtree(folder / "points" / first.key)
    monkeypatch.setattr(whole.os, "fsync", refuse)
    calls = {
        "open_folder": lambda: open_folder(folder, STUDY, FACTS),
        "write_point": lambda: write_point(folder, first, content, {}),
        "collect": lambda: collect(folder, STUDY),
    }
    with pytest.raises(kind, match=words) as failure:
        calls[write]()
    assert "\n" not in str(failure.value)


def test_a_refused_file_is_named_unless_it_is_a_temporary_one():
    for file, named in [("deep/out/figures", True), ("deep/out/.a.parquet.x1", False), ("deep/out", False)]:
        with pytest.raises(FolderError) as failure, store.usable("deep/out"):
            raise FileExistsError(17, "File exists", file)
        assert ("(figures)" in str(failure.value)) == named


def test_what_a_killed_process_left_is_cleared_but_not_what_another_is_writing(folder):
    old, young = folder / "points" / ".old", folder / "points" / ".young"
    old.mkdir()
    young.mkdir()
    os.utime(old, (time.time() - 2 * store.STALE,) * 2)
    open_folder(folder, STUDY, FACTS)
    assert not old.exists()
    assert young.exists()


def test_an_end_before_the_config_was_in_place_leaves_a_folder_that_can_be_used(tmp_path):
    (tmp_path / ".config.toml.x1y2").write_text("half")
    assert open_folder(tmp_path, STUDY, FACTS) == STUDY.points()


def test_a_failed_write_leaves_the_old_file_and_nothing_beside_it(tmp_path):
    (tmp_path / "a").write_text("old")

    def fail(path):
        path.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_whole(tmp_path / "a", fail)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a", "old")]


def test_a_point_that_fails_to_be_written_leaves_nothing(folder, monkeypatch):
    point = STUDY.points()[0]
    store.shutil.rmtree(folder / "points" / point.key)
    monkeypatch.setattr(store, "_checksum", lambda path: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_point(folder, point, tables(point), {})
    assert [path.name for path in (folder / "points").iterdir()] == [STUDY.points()[1].key]


def test_collected_tables_are_sorted_and_hold_the_finished_points_of_this_study(folder):
    assert collect(folder, STUDY) == 2
    results = load_results(folder)
    assert list(results.summary["n"]) == [6, 12]
    assert list(results.trajectories["step"]) == [0, 1, 2, 0, 1, 2]
    assert results.config["lr"] == 0.1
    assert {path.name for path in folder.iterdir()} == {
        "config.toml",
        "points",
        *(f"{name}.parquet" for name in TABLES),
    }


def test_results_of_a_killed_run_load(folder):
    store.shutil.rmtree(folder / "points" / STUDY.points()[0].key)
    assert list(load_results(folder).summary["n"]) == [12]


def test_nothing_to_load(tmp_path):
    with pytest.raises(ValueError, match=r"summary\.parquet"):
        load_results(tmp_path)
    open_folder(tmp_path / "new", STUDY, FACTS)
    with pytest.raises(ValueError, match=r"summary\.parquet"):
        load_results(tmp_path / "new")


def test_two_runs_within_a_second_leave_two_records(tmp_path):
    facts = {"started": "2026-11-29T00:00:00", "host": "here"}
    for finished in (7, 1):
        store.write_run(tmp_path, facts | {"finished": finished})
    found = [json.loads(path.read_text())["finished"] for path in (tmp_path / "runs").iterdir()]
    assert sorted(found) == [1, 7]
