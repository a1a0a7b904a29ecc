"""The plugin in test runs of other projects: messages, baselines, markers, classes, parameters, reruns, and what it loads.

Most projects below hold numbers of their own (``assumption.constant``) or verdicts made by hand, so that no run loads torch.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from stability.assumptions import AssumptionViolated, ConstantMoved
from stability.assumptions.controls import axes, linear
from stability.assumptions.verdict import Assumption
from stability.regression.baselines import update
from stability.regression.fixture import AssumptionCheck, Options

pytest_plugins = "pytester"

ROOT = Path(__file__).resolve().parent.parent.parent
QUIET = ("-p", "stability.pytest_plugin", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:randomly")
VERDICTS = """
from stability.assumptions.report import AssumptionReport
from stability.assumptions.verdict import Assumption
def drift(value, verdict="holds", step=3):
    return Assumption("no kernel drift", "share", value, 0.5, 0.5 - value, verdict, "measured", "P8", replaced=2, step=step)
def rate(value, verdict="holds", sample=1):
    return Assumption("positive rate", "ξ", value, 0.0, value, verdict, "measured", "P5", layer="0", sample=sample)
"""


@pytest.fixture
def project(pytester):
    """``project(text)`` writes test_lab.py; ``project.run(…)`` runs it in this process."""

    class Project:
        baselines = pytester.path / "test_lab.assumptions.toml"
        path = pytester.path

        def __call__(self, text):
            pytester.makepyfile(test_lab=VERDICTS + text)
            return self

        def run(self, *options):
            return pytester.runpytest_inprocess(*QUIET, *options)

        def subprocess(self, *options):
            return pytester.runpytest_subprocess(*options)

    pytester.syspathinsert(ROOT)
    return Project()


def said(result) -> str:
    return "\n".join(line for line in result.outlines if line.startswith("E  "))


def test_the_first_run_asks_for_a_baseline_and_the_update_writes_it(project):
    project("def test_rate(assumption):\n    assumption.require(rate(0.25))")
    missing = project.run()
    missing.assert_outcomes(failed=1)
    assert "BaselineMissing: no baseline for positive_rate of test_rate" in said(missing)
    assert "pytest --assumptions-update" in said(missing)
    written = project.run("--assumptions-update")
    written.assert_outcomes(passed=1)
    assert f"1 baseline written: {project.baselines}" in written.outlines
    project.run().assert_outcomes(passed=1)
    text = project.baselines.read_text()
    for line in ("[test_rate.positive_rate]", "value = 0.25", 'layer = "0"', "sample = 1", "date = ", "torch = "):
        assert line in text


def test_a_violated_assumption_and_a_constant_that_moved_fail_differently(project):
    project("def test_rate(assumption):\n    assumption.require(rate(0.25))").run("--assumptions-update")
    project("def test_rate(assumption):\n    assumption.require(rate(0.0, 'violated'))")
    violated = said(project.run())
    assert "AssumptionViolated: assumption violated: positive rate (P5) is violated: ξ = 0, threshold 0" in violated
    assert "at layer '0', sample 1" in violated
    assert "moved" not in violated
    project("def test_rate(assumption):\n    assumption.require(rate(0.3, sample=4))")
    moved = said(project.run())
    assert (
        "ConstantMoved: constant moved: positive_rate has moved from its baseline: ξ = 0.3, baseline 0.25 of 20"
        in moved
    )
    assert "+0.05 (+20 %), tolerance ±0.0025; now at layer '0', sample 4, then at layer '0', sample 1" in moved
    assert "--assumptions-update, and commit test_lab.assumptions.toml" in moved
    assert "violated" not in moved
    project.run("--assumptions-update").assert_outcomes(passed=1)
    project.run().assert_outcomes(passed=1)


def test_an_update_does_not_bless_what_is_violated(project):
    project("def test_rate(assumption):\n    assumption.require(rate(0.0, 'violated'))")
    project.run("--assumptions-update").assert_outcomes(failed=1)
    assert not project.baselines.exists()


def test_undecided_fails_unless_allowed_and_allowed_constants_are_still_held(project):
    text = """
import pytest
def test_undecided(assumption):
    assumption.require(rate(0.0, "undecided"))
@pytest.mark.assumption(undecided="pass", baseline=False)
def test_passes(assumption):
    assumption.require(rate(0.0, "undecided"))
@pytest.mark.assumption(allow=["no_kernel_drift"])
def test_allowed(assumption):
    assumption.require(AssumptionReport((drift({value}, "violated"),)))
"""
    project(text.format(value=0.7))
    first = project.run("--assumptions-update")
    first.assert_outcomes(passed=2, failed=1)
    assert "positive rate (P5) is undecided" in said(first)
    moved = project(text.format(value=0.8)).run("-k", "allowed")
    assert "no_kernel_drift has moved" in said(moved)
    assert "now at step 3, twin of sample 2" in said(moved)


def test_tolerances_of_the_call_the_marker_and_the_file(project):
    text = """
import pytest
@pytest.mark.assumption(rtol=0.1)
class TestLab:
    def test_marker(self, assumption):
        assumption.constant("a", 1.0 + SHIFT)
    @pytest.mark.assumption(tolerances={"a": {"atol": 0.3}})
    def test_of_one(self, assumption):
        assumption.constant("a", 1.0 + SHIFT)
    def test_call(self, assumption):
        assumption.constant("a", 1.0 + SHIFT, rtol=0.3)
    def test_file(self, assumption):
        assumption.constant("a", 1.0 + SHIFT)
"""
    project("SHIFT = 0\n" + text).run("--assumptions-update")
    written = project.baselines.read_text()
    project.baselines.write_text(re.sub(r'(\["TestLab::test_file"\.a\]\n)', r'\1rtol = 0.3\nnote = "noisy"\n', written))
    project("SHIFT = 0.2\n" + text)
    project.run().assert_outcomes(failed=1, passed=3)
    project.run("--assumptions-update").assert_outcomes(passed=4)
    assert 'value = 1.2\nrtol = 0.3\nnote = "noisy"' in project.baselines.read_text()
    project("SHIFT = 0.05\n" + text).run().assert_outcomes(failed=1, passed=3)  # marker: 0.15 of 1.2 is above 10 %


def test_parameters_and_classes_have_baselines_of_their_own(project):
    text = """
import pytest
class TestOuter:
    class TestInner:
        @pytest.mark.parametrize("n", [1, 2])
        def test_n(self, n, assumption):
            assumption.constant("n", n)
@pytest.mark.parametrize("name", ["a.b", "[x]", 'quo"te'])
def test_odd(name, assumption):
    assumption.constant("length", len(name))
"""
    project(text).run("--assumptions-update").assert_outcomes(passed=5)
    assert '["TestOuter::TestInner::test_n[2]".n]\nvalue = 2.0' in project.baselines.read_text()
    project.run().assert_outcomes(passed=5)
    project(text.replace('"n", n)', '"n", n + (n == 2))')).run().assert_outcomes(passed=4, failed=1)


def test_the_decorator_runs_a_test_once_per_assumption(project):
    project("""
from stability.testing import each_assumption
@each_assumption
def test_all(name):
    assert name
@each_assumption(only=["one_metric", "G ⪰ μI"], argument="key")
def test_some(key):
    assert key
""")
    from stability.assumptions import CATALOGUE

    result = project.run("-v")
    result.assert_outcomes(passed=len(CATALOGUE) + 2)
    for line in ("*test_all?positive_rate? PASSED*", "*test_some?metric_floor? PASSED*"):
        result.stdout.fnmatch_lines([line])


def test_a_test_that_is_run_again_has_one_baseline_and_passes_when_its_last_run_does(project):
    """What pytest-rerunfailures does: the same item through the run protocol again, its first failure logged as a rerun."""
    (project.path / "conftest.py").write_text("""
import pytest
from _pytest.runner import runtestprotocol
@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item, nextitem):
    for attempt in range(2):
        item._initrequest()
        reports = runtestprotocol(item, nextitem=nextitem, log=False)
        again = attempt == 0 and any(r.failed for r in reports)
        for report in reports:
            if again and report.failed:
                report.outcome = "rerun"
            item.ihook.pytest_runtest_logreport(report=report)
        if not again:
            return True
""")
    text = """
tries = []
def test_flaky(assumption):
    tries.append(1)
    assumption.require(rate(0.0, "violated") if len(tries) == 1 else rate(0.5))
def test_steady(assumption):
    assumption.constant("two", 2)
"""
    project(text).run("--assumptions-update").assert_outcomes(passed=2)
    assert project.baselines.read_text().count("value = ") == 2
    project(text).run().assert_outcomes(passed=2)


def test_other_plugins_may_be_off_and_this_one_too(project):
    project("def test_one(assumption):\n    assumption.constant('one', 1)")
    run = ("-p", "contraction_stability_pytest", *QUIET[2:])
    off = [word for name in ("terminal", "junitxml", "logging", "doctest") for word in ("-p", f"no:{name}")]
    assert project.subprocess(*run, *off, "--assumptions-update").ret == 0
    assert "value = 1.0" in project.baselines.read_text()
    project("def test_plain():\n    pass")
    assert project.subprocess(*run, "-p", "no:stability.pytest_plugin").ret == 0


def test_the_installed_entry_point_is_there_and_can_be_left_out(project):
    project("def test_plain():\n    pass")
    quiet = ("-p", "no:cacheprovider", "-p", "no:xdist")
    assert "--assumptions-update" in project.subprocess(*quiet, "--help").stdout.str()
    left_out = project.subprocess(*quiet, "-p", "no:contraction_stability_pytest", "--help")
    assert "--assumptions-update" not in left_out.stdout.str()


def test_wrong_options_say_what_to_write(project):
    project("""
import pytest
@pytest.mark.assumption(rtoll=0.1)
def test_marker(assumption): pass
@pytest.mark.assumption(allow="one_metric")
def test_allow(assumption): pass
""")
    errors = said(project.run())
    assert "pytest.mark.assumption takes allow, undecided, limits" in errors
    assert "write ['one_metric']" in errors
    assert "takes html or json" in "\n".join(project.run("--assumptions-report=pdf").errlines)
    project("def test_a(assumption):\n    assumption.constant('a', 1)")
    project.baselines.write_text("[test_a.a]\nvalue = 'one'")
    assert "[test_a.a] needs value = a number, got 'one'" in said(project.run())
    project.baselines.write_text("[test_a")
    assert "test_lab.assumptions.toml is not valid TOML" in said(project.run())


def test_the_page_of_a_run(project):
    project("""
def test_good(assumption):
    assumption.constant("a<b", 1)
def test_bad(assumption):
    assumption.require(drift(0.9, "violated"))
""").run("--assumptions-update")
    project.run("--assumptions-report=json:found.json", "--assumptions-report=html")
    page = (project.path / "assumptions-report.html").read_text()
    assert '<td class="violated">violated</td>' in page
    assert "a&lt;b" in page
    project.run("--assumptions-report=json:found.json")
    tests = {t["test"]: t for t in json.loads((project.path / "found.json").read_text())["tests"]}
    assert tests["test_good"]["constants"][0] | {"rtol": 0} == {
        "name": "a<b", "quantity": "a<b", "value": 1.0, "baseline": 1.0, "rtol": 0, "atol": 0.0, "state": "at its baseline"
    }  # fmt: skip
    assert (tests["test_bad"]["failure"], tests["test_bad"]["outcome"]) == ("AssumptionViolated", "failed")
    assert tests["test_bad"]["verdicts"][0]["step"] == 3


@pytest.mark.slow
def test_workers_of_xdist_write_one_whole_file(project):
    pytest.importorskip("xdist")
    project("""
import pytest
@pytest.mark.xdist_group("all")
def test_grouped(assumption):
    assumption.constant("n", 0)
@pytest.mark.parametrize("n", range(20))
def test_n(n, assumption):
    assumption.constant("n", n)
""")
    run = ("-p", "stability.pytest_plugin", "-p", "no:cacheprovider", "-n", "2", "--dist", "loadgroup")
    written = project.subprocess(*run, "--assumptions-update")
    written.assert_outcomes(passed=21)
    assert f"21 baselines written: {project.baselines}" in written.outlines
    assert not [path for path in project.path.iterdir() if path.name.startswith(".test_lab")]
    again = project.subprocess(*run, "--assumptions-report=json:all.json")
    again.assert_outcomes(passed=21)
    assert len(json.loads((project.path / "all.json").read_text())["tests"]) == 21


def test_the_fixture_measures_a_model_with_the_limits_of_the_marker(tmp_path):
    options = Options.of({"limits": {"gradient_flow": 1e-6, "one_metric": 5.0}, "skip": ["determinism"]})
    assumption = AssumptionCheck("test_model", tmp_path / "none.toml", options, updating=True)
    x, a, twins = axes(3)
    call = (linear(3), (x, a), {"lr": 0.1, "scale": "none"})
    report = assumption.check(*call, replacements=twins, steps=3, limits={"one_metric": 6.0})
    assert "determinism" not in report.keys
    assert (report["gradient_flow"].threshold, report["one_metric"].threshold) == (1e-6, 6.0)
    assert not assumption.verdicts
    with pytest.raises(AssumptionViolated, match=r"gradient flow .* is violated.* threshold 1e-06"):
        assumption(*call, replacements=twins, steps=3)
    assert len(assumption.verdicts) == len(report)
    assert not assumption.updates


def test_what_is_rounding_may_move_without_a_word(tmp_path):
    """Where a value is noise (1e-9 of drift in one run, 3e-9 in the next), 1 % of it is no tolerance."""

    def found(value):
        return Assumption("no kernel drift", "share", value, 1e-6, 1e-6 - value, "holds", "", "P8")

    path = tmp_path / "lab.assumptions.toml"
    first = AssumptionCheck("test", path, Options(), updating=True)
    first.require(found(1e-9))
    update(path, {"test": first.updates}, {})
    AssumptionCheck("test", path, Options()).require(found(3e-9))
    with pytest.raises(ConstantMoved):
        AssumptionCheck("test", path, Options(atol=0.0)).require(found(3e-9))


def test_loading_the_plugin_loads_next_to_nothing():
    """What a foreign test run pays: the modules that the entry point brings in beyond pytest's own."""
    program = """
import sys, _pytest.config, pytest
before = set(sys.modules)
import contraction_stability_pytest
from _pytest.config import get_config
config = get_config()
config.pluginmanager.register(contraction_stability_pytest, "contraction_stability_pytest")
assert config.pluginmanager.has_plugin("stability.pytest_plugin")
print(*sorted(m for m in set(sys.modules) - before if not m.startswith(("_pytest", "pytest"))))
"""
    run = [sys.executable, "-c", program]
    loaded = set(subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split())
    ours = {name for name in loaded if name.split(".")[0] in ("nt_kernel", "optim", "stability", "studies")}
    assert ours == {"nt_kernel", "nt_kernel.house", "stability", "stability.pytest_plugin"}
    third = {"torch", "numpy", "scipy", "pandas", "jinja2", "pydantic", "sklearn", "cvxpy"}
    assert not {name.split(".")[0] for name in loaded} & third
    assert len(loaded) < 25


def test_loading_the_plugin_takes_a_small_part_of_what_pytest_itself_takes():
    program = """
import time, pytest
start = time.process_time()
import contraction_stability_pytest
from stability import pytest_plugin
print(time.process_time() - start)
"""
    run = [sys.executable, "-c", program]
    times = [float(subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=True).stdout) for _ in range(3)]
    assert min(times) < 0.05


def test_a_project_with_a_folder_called_optim_keeps_its_tests(project):
    (project.path / "optim").mkdir()
    (project.path / "optim" / "__init__.py").write_text("")
    (project.path / "test_plain.py").write_text(
        "def test_plain():\n    import optim\n    assert 'pytest' in optim.__file__"
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "contraction_stability_pytest", "-p", "no:cacheprovider"],
        cwd=project.path, env={"PYTHONPATH": f"{project.path}:{ROOT}", "PATH": ""}, capture_output=True, text=True,
    )  # fmt: skip
    assert "1 passed" in done.stdout
    assert "contraction-stability: plugin off" in done.stdout
