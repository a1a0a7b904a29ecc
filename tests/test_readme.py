"""What the README shows runs."""

import re
import shlex
from pathlib import Path

import pytest

from docs.refresh_readme import with_finding

README = (Path(__file__).resolve().parent.parent / "README.md").read_text()


def test_the_python_blocks_run_one_after_the_other(capsys):
    scope: dict = {}
    for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(compile(block, "README.md", "exec"), scope)
    assert scope["ntk"].matrix.shape == (30, 30)
    assert scope["ntk"].xi > 0
    assert scope["pair"]["T0"] > scope["pair"]["measured_sup"] > 0
    assert len(scope["study"].points()) == 6
    assert "no kernel drift violated" in capsys.readouterr().out


def test_the_commands_parse(capsys):
    from studies.cli import parser
    from studies.definition.config import Study

    commands = re.findall(r"^stability (run [^#\n]*)", README, re.MULTILINE)
    assert commands
    for command in commands:
        arguments, overrides = parser().parse_known_args(shlex.split(command))
        Study.from_toml(arguments.study, [*arguments.overrides, *overrides], quick=arguments.quick)


def test_every_make_target_that_is_named_exists():
    makefile = (Path(__file__).resolve().parent.parent / "Makefile").read_text()
    for target in re.findall(r"\bmake ([a-z-]+)", README):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_the_finding_needs_its_markers():
    assert "1.7 times" in with_finding(README, "T0 is 1.7 times")
    with pytest.raises(ValueError, match="no '<!-- finding"):
        with_finding("no markers", "x")
