"""examples/ci as what it is, a project of its own: it passes, and each kind of change fails with its own message."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "examples" / "ci"


@pytest.fixture
def project(tmp_path):
    """``project(*changes, options)``: a copy with some text replaced in its model, tested by a Python of its own."""
    shutil.copytree(SOURCE, tmp_path / "ci", ignore=shutil.ignore_patterns("__pycache__", ".pytest_cache"))

    def run(old="", new="", options=()):
        model = tmp_path / "ci" / "tinylab" / "model.py"
        text = (SOURCE / "tinylab" / "model.py").read_text()
        assert old in text
        model.write_text(text.replace(old, new))
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-p",
            "contraction_stability_pytest",
            "-p",
            "no:cacheprovider",
            *options,
        ]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        environment.pop("PYTEST_ADDOPTS", None)
        done = subprocess.run(
            command, cwd=tmp_path / "ci", env=environment, capture_output=True, text=True, check=False
        )
        return done.returncode, done.stdout + done.stderr

    return run


@pytest.mark.slow
def test_it_passes_as_it_is_and_says_what_changed(project):
    status, out = project()
    assert status == 0, out
    assert "16 passed" in out
    status, out = project("torch.tanh", "torch.relu")
    assert status == 1
    assert "AssumptionViolated: assumption violated: C¹ activations (P8) is violated" in out
    assert "calls relu, which has a kink), at layer '1'" in out
    status, out = project("else 0.1", "else 0.2", ["--assumptions-report=html"])
    assert status == 1
    assert "AssumptionViolated" not in out
    assert re.search(r"positive_rate has moved from its baseline: .* \(\+14\.5 %\), tolerance", out)


def test_its_files_fit_together():
    workflow = (SOURCE / ".github" / "workflows" / "stability.yml").read_text()
    assert "pytest --numprocesses 2 --junitxml junit.xml --assumptions-report=html" in workflow
    readme = (SOURCE / "README.md").read_text()
    for name in ("tests/test_stability.py", "tests/test_stability.assumptions.toml", "tinylab/model.py"):
        assert (SOURCE / name).exists()
        assert name in readme


@pytest.mark.slow
def test_it_runs_in_an_environment_of_its_own(tmp_path):
    """Installed into a fresh environment: the entry point alone turns the plugin on, with two workers as in the workflow."""
    shutil.copytree(SOURCE, tmp_path / "ci")
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env" / "bin" / "python"
    site = next((tmp_path / "env" / "lib").glob("python*")) / "site-packages"
    # torch and what else is needed come from where these tests run; the two projects are installed.
    others = [path for path in sys.path if path.endswith("site-packages")]
    (site / "others.pth").write_text("\n".join(others))
    install = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(python),
        "install",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
    ]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")} | {
        "OMP_NUM_THREADS": "1"
    }
    _copy_of_what_is_installed(tmp_path / "source")
    for source in (tmp_path / "source", tmp_path / "ci"):
        subprocess.run([*install, str(source)], env=environment, check=True)
    done = subprocess.run(
        [python, "-m", "pytest", "--numprocesses", "2", "--assumptions-report=html"],
        cwd=tmp_path / "ci", env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "16 passed" in done.stdout
    assert "AssumptionCheck" not in done.stdout
    assert (tmp_path / "ci" / "assumptions-report.html").exists()
    program = "import contraction_stability_pytest, stability, importlib.metadata as m; "
    program += "print(stability.__file__, m.distribution('contraction-stability').locate_file(''))"
    out = subprocess.run(
        [python, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert all(path.startswith(str(site)) for path in out.stdout.split())  # not the working tree these tests run in


def _copy_of_what_is_installed(where: Path) -> None:
    """The sources that pyproject.toml names: a build writes beside them, and what else lies about is large."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    where.mkdir()
    for name in ("pyproject.toml", settings["project"]["readme"], *settings["project"]["license-files"]):
        shutil.copy(ROOT / name, where)
    for name in settings["tool"]["setuptools"]["py-modules"]:
        shutil.copy(ROOT / f"{name}.py", where)
    for name in {package.partition(".")[0] for package in settings["tool"]["setuptools"]["packages"]}:
        shutil.copytree(ROOT / name, where / name, ignore=shutil.ignore_patterns("__pycache__"))
