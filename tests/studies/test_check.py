"""``stability check``: exit status, tables, JSON and JUnit of the assumptions at the points of a study."""

import json
import subprocess
import sys
from xml.etree import ElementTree

import pytest

import stability
from stability import AssumptionReport
from stability.assumptions.verdict import Assumption
from studies.cli import main
from studies.definition.config import Study

SMALL = ["check", "digits", "n=5", "mass=1", "seeds=1", "replacements=1", "width=8", "steps=3"]


def verdict(name, kind, value=0.5):
    return Assumption(name, "q", value, 1.0, 1 - value, kind, "a reason", "P5", replaced=2)


@pytest.fixture
def fake(monkeypatch):
    """``fake(kind, …)``: one report per point, with these verdicts on the first three assumptions."""

    def install(*kinds):
        names = ("positive rate", "full row rank", "no kernel drift")
        found = [verdict(name, kind) for name, kind in zip(names, kinds, strict=False)]
        monkeypatch.setattr(
            "studies.running.check.check_point", lambda *_, **__: AssumptionReport(tuple(found), {"n": 5})
        )

    return install


@pytest.mark.parametrize(
    ("kinds", "options", "status"),
    [
        (["holds", "holds"], [], 0),
        (["holds", "undecided"], [], 3),
        (["undecided", "violated"], [], 1),
        (["holds", "violated"], ["--allow", "full_row_rank"], 0),
        (["undecided", "violated"], ["--allow", "full_row_rank"], 3),
    ],
)
def test_the_exit_status_is_the_worst_verdict_that_counts(fake, capsys, kinds, options, status):
    fake(*kinds)
    assert main([*SMALL, *options]) == status
    out = capsys.readouterr().out
    assert "positive rate" in out
    word = {0: "holds", 1: "violated", 3: "undecided"}[status]
    assert f"digits: {word} at 1 points" in out


@pytest.mark.parametrize("option", ["--skip=dissipation", "--allow=dissipation", "--limit=dissipation=1"])
def test_assumptions_of_other_systems_are_refused(fake, capsys, option):
    fake("holds")
    assert main([*SMALL, option]) == 2
    assert "no assumption of theorem 3; naim_assumptions" in capsys.readouterr().err


def test_quick_checks_the_points_of_the_quick_study(fake, capsys):
    fake("holds")
    assert main(["check", "digits", "--quick"]) == 0
    quick = len(Study.from_toml("digits", [], quick=True).points())
    assert quick < len(Study.from_toml("digits", []).points())
    assert f"digits: holds at {quick} points" in capsys.readouterr().out


def test_a_study_of_another_kind_is_refused(capsys):
    assert main(["check", "mini-batch"]) == 2
    assert "this study is of kind 'loops'" in capsys.readouterr().err


def test_a_study_is_checked_with_its_own_data_steps_and_replacements(monkeypatch, capsys):
    seen = {}

    def check(model, data, optimizer, **options):
        seen.update(options, optimizer=optimizer, n=len(data[0]), width=model[0].out_features)
        return AssumptionReport((verdict("positive rate", "holds"),))

    monkeypatch.setattr(stability, "check_assumptions", check, raising=False)
    limits = ["--limit", "no_kernel_drift=0.5", "--limit", "positive rate=0.1", "--skip", "determinism"]
    assert main([*SMALL, "optimizer=sgd", "lr=0.02", *limits]) == 0
    assert seen["limits"] == {"no_kernel_drift": 0.5, "positive_rate": 0.1}
    assert seen["optimizer"] == {"lr": 0.02, "mass": 1.0, "output_metric": "identity", "scale": "none"}
    assert (seen["n"], seen["width"], seen["steps"], seen["skip"], len(seen["replacements"])) == (
        5,
        8,
        3,
        ("determinism",),
        1,
    )


def test_json_is_all_that_is_printed_and_says_what_the_tables_say(capsys):
    limits = [word for limit in ("no_kernel_drift=9", "one_metric=9", "gradient_flow=9") for word in ("--limit", limit)]
    assert main([*SMALL, "--json", *limits]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["verdict"], len(found["points"])) == ("holds", 1)
    keys = {row["key"]: row for row in found["points"][0]["assumptions"]}
    assert set(keys) == set(stability.assumptions.CATALOGUE)
    assert keys["no_kernel_drift"]["threshold"] == 9
    assert found["points"][0]["context"]["parameters"] == 8 * 64 + 8 + 72 + 90


def test_junit_has_a_case_per_point_and_assumption(fake, tmp_path, capsys):
    fake("holds", "violated", "undecided")
    path = tmp_path / "junit.xml"
    assert main([*SMALL[:2], *SMALL[3:], "n=5,6", "--junit", str(path)]) == 1
    (suite,) = ElementTree.parse(path).getroot()
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors")) == ("6", "2", "2")
    case = next(c for c in suite if c.get("name") == "full_row_rank")
    assert case.get("classname") == "digits.n=5, width=8, mass=1, seed=0"
    assert "full row rank (P5) is violated: q = 0.5" in case.find("failure").get("message")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--limit", "no_kernel_drift"], "--limit takes NAME=NUMBER"),
        (["--limit", "no_kernel_drif=1"], "did you mean 'no_kernel_drift'"),
        (["--limit", "step_limit=5"], "at most 2"),
        (["--skip", "all"], "unknown assumption 'all'"),
        (["n=0"], "grid.n"),
        (["--junit", "/nowhere/at/all.xml", "--skip", "determinism"], "cannot be written"),
    ],
)
def test_what_cannot_be_used_is_status_2_and_one_line(fake, capsys, options, said):
    if "--junit" in options:
        fake("holds")
    status = main([*SMALL, *options])
    assert status == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1


def test_help_loads_no_torch():
    program = "import sys; from studies.cli import main\ntry: main(['check', '--help'])\nexcept SystemExit: pass\n"
    program += "print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert out.endswith("False\n")
    assert "--junit" in out
