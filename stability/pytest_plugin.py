"""pytest plugin: fixture and marker ``assumption``, ``--assumptions-update`` and ``-report`` (docs/regression-tests.md).

Loaded with every pytest run of an environment that has the package, so it imports next to nothing: what a test needs is
imported by the fixture, and torch by the first ``assumption.check``.
"""

import pytest

NAME = "stability.pytest_plugin"
FORMATS = ("html", "json")
_SEEN = pytest.StashKey()


def pytest_addoption(parser):
    group = parser.getgroup("assumptions", "regression tests on assumptions (contraction-stability)")
    group.addoption(
        "--assumptions-update",
        action="store_true",
        help="write the constants of the tests that run into the baselines beside them, instead of comparing",
    )
    group.addoption(
        "--assumptions-report",
        metavar="FORMAT[:FILE]",
        help="html or json: write all verdicts and constants of the run to FILE (assumptions-report.FORMAT)",
    )


def pytest_configure(config):
    config.addinivalue_line(
        "markers",
        "assumption(allow=(), undecided='fail', limits={}, skip=(), rtol=None, atol=None, tolerances={}, baseline=True): "
        "options of the fixture assumption",
    )
    asked = config.getoption("--assumptions-report")
    if asked and asked.partition(":")[0] not in FORMATS:
        raise pytest.UsageError(f"--assumptions-report takes html or json, or html:FILE, json:FILE; got {asked}")
    if not hasattr(config, "workerinput"):  # workers of pytest-xdist send their reports to the one that collects
        config.pluginmanager.register(_Collector(config), f"{NAME}.collector")


@pytest.fixture
def assumption(request):
    """Check the assumptions of a theorem in a test; see ``stability.regression.fixture.AssumptionCheck``."""
    from stability.regression.fixture import AssumptionCheck, Options

    given = {}
    for mark in reversed(
        list(request.node.iter_markers("assumption"))
    ):  # outermost first: the nearest has the last word
        if mark.args:
            raise ValueError(f"pytest.mark.assumption takes keywords only, got {mark.args!r}")
        given |= mark.kwargs
    options = Options.of(given)
    name = options.baseline if isinstance(options.baseline, str) else f"{request.path.stem}.assumptions.toml"
    kinds = (pytest.Class, pytest.Item)
    test = "::".join(node.name for node in request.node.listchain() if isinstance(node, kinds))
    updating = request.config.getoption("--assumptions-update")
    check = AssumptionCheck(test, request.path.parent / name, options, updating=updating)
    request.node.stash[_SEEN] = check
    return check


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    outcome = yield
    check = item.stash.get(_SEEN, None)
    if check is None:
        return
    if call.when == "teardown":
        del item.stash[_SEEN]
        return
    report = outcome.get_result()
    if call.when == "call" or report.failed:
        kind = call.excinfo.typename if call.excinfo else ""
        said = str(call.excinfo.value) if kind in ("AssumptionViolated", "ConstantMoved", "BaselineMissing") else ""
        # Attributes travel from the workers of pytest-xdist with the report.
        report.assumptions = {
            "test": check.test, "file": str(check.path), "failure": kind, "message": said, "verdicts": check.verdicts,
            "constants": check.constants, "updates": check.updates,
        }  # fmt: skip


class _Collector:
    """Takes in the reports of all tests, in the one process that has them all; writes baselines and page at the end."""

    def __init__(self, config):
        self.config = config
        self.seen: list[dict] = []
        self.said: list[str] = []

    def pytest_runtest_logreport(self, report):
        found = getattr(report, "assumptions", None)
        if found is not None:
            self.seen.append({"nodeid": report.nodeid, "outcome": report.outcome, **found})

    def pytest_sessionfinish(self):
        if self.seen and self.config.getoption("--assumptions-update"):
            self._write_baselines()
        asked = self.config.getoption("--assumptions-report")
        if asked:
            from stability.regression.page import write_page

            kind, _, path = asked.partition(":")
            path = self.config.invocation_params.dir / (path or f"assumptions-report.{kind}")
            write_page(path, kind, self.seen)
            self.said.append(f"assumptions report: {path}")

    def _write_baselines(self):
        from pathlib import Path

        from stability.regression.baselines import stamp, update

        files: dict[str, dict] = {}
        for record in self.seen:
            if record["updates"]:
                files.setdefault(record["file"], {}).setdefault(record["test"], {}).update(record["updates"])
        for file, tests in files.items():
            update(Path(file), tests, stamp())
            count = sum(map(len, tests.values()))
            self.said.append(f"{count} baseline{'s' * (count != 1)} written: {file}")

    def pytest_terminal_summary(self, terminalreporter):
        for line in self.said:
            terminalreporter.write_line(line)
