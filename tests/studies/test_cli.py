import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import stability
from nt_kernel.errors import NumericalError
from optim import StepTooLargeError
from studies import cli, load_results
from studies.cli import main
from studies.definition.config import Study, shipped_studies
from studies.running.engines import PointsFailed
from tests.studies.fake_twins import fake_train_twins

ROOT = Path(cli.__file__).parent.parent
SMALL = ["n=6,12", "mass=1", "seeds=1", "replacements=1", "width=8", "steps=2", "workers=1"]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def fake(monkeypatch):
    """Train nothing and draw nothing."""

    def write_report(out):
        (out / "report.html").write_text("drawn")
        return out / "report.html"

    monkeypatch.setattr(stability, "train_twins", fake_train_twins, raising=False)
    monkeypatch.setattr(stability, "Replacement", SimpleNamespace, raising=False)
    monkeypatch.setitem(sys.modules, "studies.report.page", SimpleNamespace(write_report=write_report))


def refused(capsys, *argv, status=2):
    """Run a command that must fail; its one line on stderr."""
    try:
        code = main(list(argv))
    except SystemExit as exit:  # argparse's own way
        code = exit.code
    out, err = capsys.readouterr()
    assert code == status, err
    lines = [line for line in err.splitlines() if "so far" not in line and line.strip()]
    assert len(lines) == 1, err
    assert out == ""
    assert lines[0].startswith("stability: error: ")
    return lines[0]


@pytest.mark.parametrize(
    "argv", [["--help"], ["list"], ["show", "digits"], ["run", "--help"], ["run", "digits", "n=0"]]
)
def test_light_commands_load_nothing_heavy(argv):
    program = (
        "import sys; from studies.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "finally: print('\\nheavy:', [m for m in ('torch', 'pandas', 'matplotlib', 'sklearn') if m in sys.modules])"
    )
    answer = subprocess.run([sys.executable, "-c", program, *argv], capture_output=True, text=True, cwd=ROOT)
    assert "heavy: []" in answer.stdout


def test_importing_the_package_loads_no_torch():
    program = "import studies, sys; studies.Study; print('torch' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    assert answer.stdout == "False\n"


def test_list_and_show(capsys):
    assert main(["list"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in listed} == set(shipped_studies())
    titles = {line.index(Study.from_toml(line.split()[0]).title) for line in listed}
    assert len(titles) == 1  # one column
    assert main(["show", "digits", "n=6", "--quick", "mass=1"]) == 0
    shown = capsys.readouterr().out
    assert "n = [6]" in shown
    assert "steps = 60" in shown
    assert "# 2 points, 4 twin pairs" in shown


def test_show_keeps_the_comments_of_a_study_that_is_not_changed(capsys, tmp_path):
    main(["show", "digits"])
    shown = capsys.readouterr().out
    assert shown.startswith(shipped_studies()["digits"].read_text(encoding="utf-8"))
    assert shown.endswith("# 36 points, 144 twin pairs\n")
    (tmp_path / "mine.toml").write_text("# my own\n[grid]\nn = 2  # two\nmass = 1\n")
    main(["show", "mine.toml"])
    assert "# my own\n[grid]\nn = 2  # two\n" in capsys.readouterr().out


@pytest.mark.parametrize("changes", [[], ["n=6"]])
def test_what_show_prints_can_be_run(changes, capsys, tmp_path):
    main(["show", "digits", *changes])
    (tmp_path / "mine.toml").write_text(capsys.readouterr().out)
    assert Study.from_toml("mine.toml") == Study.from_toml("digits", changes)


def test_run_then_report(fake, capsys, tmp_path):
    # Overrides are taken on either side of an option.
    assert main(["run", "digits", *SMALL[:3], "--out", "deep/out", *SMALL[3:]]) == 0
    assert capsys.readouterr().out == "report: deep/out/report.html\n"
    assert len(load_results(tmp_path / "deep/out").summary) == 2
    assert 'command = "stability' in (tmp_path / "deep/out/config.toml").read_text()
    (tmp_path / "deep/out/report.html").unlink()
    (tmp_path / "deep/out/summary.parquet").unlink()
    assert main(["report", "deep/out"]) == 0
    assert (tmp_path / "deep/out/report.html").read_text() == "drawn"
    assert len(load_results(tmp_path / "deep/out").summary) == 2


def test_results_go_below_the_name_of_the_study(fake, tmp_path):
    assert main(["run", "digits", *SMALL]) == 0
    assert main(["run", "digits", "--quick", *SMALL]) == 0
    (tmp_path / "own.toml").write_text("[grid]\nn = 2\nmass = 1\nwidth = 4\nseeds = 1\n")
    assert main(["run", "own.toml", "steps=1"]) == 0
    assert {path.name for path in (tmp_path / "results").iterdir()} == {"digits", "digits-quick", "own"}


def test_compare_leaves_out_labels_and_says_what_its_differences_are(fake, capsys):
    for out, lr in (("one", "0.1"), ("two", "0.2")):
        assert main(["run", "digits", *SMALL, f"lr={lr}", "--out", out]) == 0
    capsys.readouterr()
    assert main(["compare", "one", "two"]) == 0
    shown = capsys.readouterr().out
    assert "largest relative difference" in shown
    listed = {line.split()[0] for line in shown.splitlines() if line.strip()}
    assert {"measured_sup", "xi"} <= listed
    assert not {"replaced", "replacement", "seed", "n"} & listed


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "required"),
        (["rnu", "digits"], "rnu"),
        (["run"], "STUDY"),
        (["run", "digits", "--fast"], "--fast"),
        (["report", "results", "n=6"], "n=6"),
        (["run", "digit"], "did you mean digits?"),
        (["run", "no.toml"], "no such study"),
        (["run", "digits", "n"], "should be written key=value"),
        (["run", "digits", "mas=1"], "did you mean grid.mass?"),
        (["show", "digits", "zzz=1"], "unknown key zzz = 1, valid are title, question, kind, "),
        (["run", "digits", "optimizer=sgd", "lr=auto"], "lr = 'auto' does not go with optimizer=sgd: "),
        (["run", "digits", "mass=0"], "grid.mass[0] = 0"),
        (["run", "digits", "mass=-1"], "grid.mass[0] = -1"),
        (["run", "digits", "mass=nan"], "grid.mass[0] = nan"),
        (["run", "digits", "output_metric=idenity"], "did you mean identity?"),
        (["run", "digits", "optimizer=adam"], "should be one of woodbury, sgd"),
        (["run", "digits", "n=2000"], "the data set has 1797 rows"),
        (["run", "digits", "device=cuda:99"], "write device=cpu"),
        (["run", "digits", "--out", "file"], "is a file"),
        (["run", "digits", "--out", "file/below"], "cannot use the folder file/below: Not a directory"),
        (["run", "digits", "--out", "foreign"], "not a results folder"),
        (["run", "digits", *SMALL, "lr=0.2", "--out", "other"], "another config (lr is 0.1 there, 0.2 here)"),
        (["report", "file"], "file"),
        (["report", "missing"], "missing"),
        (["report", "foreign"], "no summary.parquet in foreign: it is not the folder of a study run; give another one"),
        (["report", "started"], "no point of the study is finished; `stability resume started` continues it"),
        (
            ["check", "digits", "--junit", "nowhere/x.xml"],
            "--junit nowhere/x.xml cannot be written: there is no folder",
        ),
        (["check", "digits", "--junit", "foreign"], "--junit foreign cannot be written: it is a folder"),
        (["show", "digits", "lr=-1", "n=0"], "lr = -1"),
    ],
)
def test_bad_input_is_one_line_and_status_2(argv, words, fake, capsys, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "notes").write_text("")
    (tmp_path / "started").mkdir()
    (tmp_path / "started" / "config.toml").write_text("[grid]\nn = 2\n[provenance]\n")
    assert main(["run", "digits", *SMALL, "--out", "other"]) == 0
    if argv[:1] == ["report"]:
        monkeypatch.delitem(sys.modules, "studies.report.page")
        pytest.importorskip("studies.report.page")
    capsys.readouterr()
    assert words in refused(capsys, *argv)


def test_an_unwritable_folder(fake, capsys, monkeypatch):
    def refuse(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("studies.results.whole.tempfile.mkstemp", refuse)
    line = refused(capsys, "run", "digits", *SMALL, "--out", "out")
    assert "cannot use the folder out: Permission denied; give another one" in line


@pytest.mark.parametrize(
    ("number", "status", "words"),
    [
        (errno.EACCES, 2, "cannot use the folder out: Permission denied (figures); give another one"),
        (errno.EROFS, 2, "cannot use the folder out: Read-only file system (figures); give another one"),
        (errno.ENOSPC, 1, "the disk of out is full; make room and give the same command again"),
    ],
)
def test_a_report_that_cannot_be_written(number, status, words, fake, capsys, monkeypatch):
    def refuse(out):
        raise OSError(number, os.strerror(number), str(out / "figures"))

    assert main(["run", "digits", *SMALL, "--out", "out"]) == 0
    capsys.readouterr()
    monkeypatch.setattr(sys.modules["studies.report.page"], "write_report", refuse)
    assert words in refused(capsys, "report", "out", status=status)
    assert words in refused(capsys, "run", "digits", *SMALL, "--out", "out", status=status)


def test_tables_that_cannot_be_written_for_a_report(fake, capsys, monkeypatch):
    def refuse(**_):
        raise OSError(errno.ENOSPC, "No space left on device")

    assert main(["run", "digits", *SMALL, "--out", "out"]) == 0
    capsys.readouterr()
    monkeypatch.setattr("studies.results.whole.tempfile.mkstemp", refuse)
    assert "the disk of out is full" in refused(capsys, "report", "out", status=1)


def test_a_run_that_failed_does_not_spoil_its_folder(fake, monkeypatch, capsys):
    def refuse(*_, lr, **__):
        raise StepTooLargeError(lr, 0.7, "step 0")

    with monkeypatch.context() as patch:
        patch.setattr(stability, "train_twins", refuse)
        line = refused(capsys, "run", "digits", *SMALL, "lr=5", "--out", "out")
    assert (
        "lr = 5 is too large at 1 of 2 points, the first n=6, width=8, mass=1, seed=0: step 0 needs lr < 2/λ_max"
        in line
    )
    assert main(["run", "digits", *SMALL, "lr=0.1", "--out", "out"]) == 0


@pytest.mark.parametrize(
    ("error", "status", "raised"),
    [
        (ValueError("lr = 3 is too large:\nwrite less than 0.7"), 2, ValueError),
        (TypeError("targets should be a tensor"), 2, ValueError),
        (NumericalError("not positive definite", where="layer '0'", value=-1.0), 1, NumericalError),
        (OSError(5, "Input/output error"), 1, PointsFailed),
    ],
)
def test_what_goes_wrong_in_training_is_one_line_too(error, status, raised, fake, capsys, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(stability, "train_twins", fail)
    line = refused(capsys, "run", "digits", *SMALL, "--out", "out", status=status)
    assert str(error).splitlines()[-1] in line
    with pytest.raises(raised):
        main(["--traceback", "run", "digits", *SMALL, "--out", "out"])


def test_bad_input_that_only_training_can_find(capsys):
    line = refused(capsys, "run", "digits", *SMALL, "lr=50", "--out", "out")
    assert "lr = 50 is too large at 1 of 2 points, " in line
    assert "the first n=6, width=8, mass=1, seed=0: step 0 needs lr < 2/λ_max = " in line


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_data_that_is_no_number(value, capsys, monkeypatch):
    inputs, labels = np.ones((300, 4)), np.arange(300) % 2
    inputs[17, 3] = value
    np.savez("broken.npz", x=inputs, y=labels)
    line = refused(capsys, "run", "digits", *SMALL, "data.name=broken.npz", "--out", "out")
    assert "data.name = broken.npz: inputs that are no finite number in 1 rows, the first 17" in line


def test_a_mistake_of_ours_keeps_its_traceback(fake, capsys, monkeypatch, tmp_path):
    def fail(*_, **__):
        return 1 / 0

    monkeypatch.setattr(stability, "train_twins", fail)
    line = refused(capsys, "run", "digits", *SMALL, "--out", "out", status=1)
    assert "2 of 2 points failed, 3 times, the first at n=6" in line
    assert "ZeroDivisionError: division by zero; tracebacks are in its folder failed" in line
    records = [json.loads(file.read_text()) for file in (tmp_path / "out/failed").iterdir()]
    assert len(records) == 2
    assert all("in fail\n" in record["traceback"] and record["attempts"] == 3 for record in records)
    monkeypatch.setattr(stability, "train_twins", fake_train_twins)
    assert main(["run", "digits", *SMALL, "--out", "out"]) == 0
    assert not list((tmp_path / "out/failed").iterdir())  # a point that is finished has not failed


def test_an_interrupt_is_status_130_and_says_how_to_continue(fake, capsys, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(stability, "train_twins", interrupt)
    assert main(["run", "digits", *SMALL, "--out", "out"]) == 130
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "stability: interrupted: 0 of 2 points are finished and kept in out; the same command continues"


def test_the_current_folder_is_searched_last(fake, tmp_path):
    first = list(sys.path)
    main(["list"])
    assert sys.path[: len(first)] == first
    assert sys.path[-1] == str(tmp_path)
    assert sys.path.index(str(ROOT)) < sys.path.index(str(tmp_path))


@pytest.mark.parametrize("name", ["nt_kernel", "optim", "stability"])
@pytest.mark.parametrize("kind", ["package", "folder", "file"])
def test_a_folder_of_the_same_name_that_comes_first_is_named(name, kind, tmp_path):
    if kind == "file":
        shadow = tmp_path / f"{name}.py"
        shadow.write_text("")
    else:
        shadow = tmp_path / name
        shadow.mkdir()
    if kind == "package":
        shadow = shadow / "__init__.py"
        shadow.write_text("")
    program = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import studies"
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    if kind == "folder" and answer.returncode == 0:
        return  # without __init__.py a folder gives way to a package that is found on sys.path
    assert answer.stderr.splitlines()[-1].startswith(f"ImportError: {shadow} hides contraction-stability's own ")


def test_a_reader_that_has_gone_is_no_error():
    command = f"{sys.executable} -m studies.cli show digits | head -1"
    answer = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True, cwd=ROOT)
    assert answer.stderr == ""
