"""Every code block and command of README.md and docs/*.md is executed or checked; none is left out.

Python with prompts is run by pytest's ``--doctest-glob``; the README's by ``test_readme.py``. Everything else is here. What
takes minutes is run whole by ``make test-slow``.
"""

import ast
import doctest
import importlib.util
import re
import shlex
import tomllib
from collections import Counter
from pathlib import Path

import pytest
import yaml

from tests.pages import DOCS, INLINE, NAMES, PAGES, ROOT, TOKENS, blocks_of

pytest_plugins = "pytester"

BLOCKS = [
    pytest.param(page, token, id=f"{page.name}:{token.map[0] + 1}:{token.info or token.type}")
    for page, tokens in TOKENS.items()
    for token in tokens
    if token.type in ("fence", "code_block")
]
COMMANDS = ("stability", "make", "python", "python3", "pip", "pytest", ".")
PLACEHOLDERS = {
    "STUDY": "digits", "NAME": "digits", "FILE": "digits", "DIR": "results/digits", "KEY=VALUE": "steps=3",
    "FOLDER": "results", "FOLDER…": "results", "QUESTION": "gram",
}  # fmt: skip


@pytest.mark.parametrize(("page", "token"), BLOCKS)
def test_block(page, token, request, monkeypatch, tmp_path):
    """Each block by its language; a language nobody knows how to check fails, and so does one that is not named."""
    if token.type == "code_block":
        assert not looks_like_code(token.content), "code belongs in a fenced block with its language"
        return
    checks = {"python": python, "toml": toml, "sh": shell, "yaml": check_yaml, "text": text, "{toctree}": toctree}
    assert token.info in checks, f"a block of language {token.info!r}: say which, or teach this test to check it"
    monkeypatch.chdir(tmp_path)
    checks[token.info](page, token.content, request)


def looks_like_code(block: str) -> bool:
    """Python statements or a command, rather than a formula."""
    first = {(line.split() or [""])[0].lstrip("$>") for line in block.splitlines()}
    if first & {*COMMANDS, "import", "from", "def", "class"}:
        return True
    try:
        return not all(isinstance(node, ast.Expr) for node in ast.parse(block.strip()).body)
    except SyntaxError:
        return False


def test_formulas_are_told_from_code():
    assert looks_like_code("    stability run digits\n")
    assert looks_like_code("    import torch\n")
    assert looks_like_code("    x = 3\n")
    assert not looks_like_code("    S[θ] = ∫ (T + V) ds.\n")
    assert not looks_like_code("    K_{(i,c),(j,d)} = Σ_{s,t} (ã_{is}·ã_{jt})(δ_{ics}·δ_{jdt}),\n")


def python(page: Path, block: str, request) -> None:
    examples = [example.source for example in doctest.DocTestParser().get_examples(block)]
    for source in examples or [block]:
        ast.parse(source)
    if examples:
        assert page.parent == DOCS, "doctests are run in docs/ only"
    elif "\ndef test_" in block:
        run_as_tests(block, request.getfixturevalue("pytester"))
    elif page.name != "README.md":
        exec(compile(block, page.name, "exec"), {})


def run_as_tests(block: str, pytester) -> None:
    """A test file: its first run writes the baselines, the second holds against them; without the first it fails."""
    quiet = ("-p", "no:cacheprovider", "-p", "no:xdist")
    pytester.syspathinsert(ROOT)
    path = pytester.makepyfile(test_of_a_block=block)
    first = pytester.runpytest_inprocess(*quiet, "--assumptions-update", path)
    assert first.ret == 0
    second = pytester.runpytest_inprocess(*quiet, path)
    assert second.ret == 0
    assert second.parseoutcomes()["passed"] == first.parseoutcomes()["passed"] > 0
    next(pytester.path.glob("*.assumptions.toml")).unlink()
    assert pytester.runpytest_inprocess(*quiet, path).ret == 1


def toml(page: Path, block: str, request) -> None:
    """A study: valid as it stands and in its quick form; run where nothing of the reader's own is missing."""
    from studies import Study, run_study

    path = Path("mine.toml")
    path.write_text(block, encoding="utf-8")
    assert Study.from_toml(path).points()
    study = Study.from_toml(path, ["workers=1"], quick="quick" in tomllib.loads(block))
    own = (study.model.architecture, study.data.name)
    if not any(":" in name or name.endswith(".npz") for name in own):
        assert not run_study(study, Path("results"), progress=False).summary.empty


def shell(page: Path, block: str, request) -> None:
    for line in block.splitlines():
        for command in re.split(r"&&|;", line.partition("#")[0]):
            if command.strip():
                check_command(shlex.split(command), request.config)


def check_yaml(page: Path, block: str, request) -> None:
    assert yaml.safe_load(block)


def text(page: Path, block: str, request) -> None:
    """Trees of folders: what they name is there."""
    if page.name == "studies.md":
        folder = folder_of_results('kind = "tests.studies.light_kind:LIGHT"\n[grid]\nsize = [1]\nseeds = 1')
        holds(folder, block, but=("failed", "figures"))
        return
    assert page.name == "README.md", "a text that nobody checks"
    folders = re.findall(r"(?:^|  )([a-z_]+/)(?=\s)", block, re.MULTILINE)
    assert len(folders) > 5
    for name in folders:
        assert (ROOT / name).is_dir(), name


def folder_of_results(study: str) -> Path:
    from studies import Study, run_study
    from studies.report.page import write_report

    Path("tiny.toml").write_text(study)
    run_study(Study.from_toml("tiny.toml", ["workers=1"]), Path("results"), progress=False)
    write_report(Path("results"))
    return Path("results")


def holds(folder: Path, block: str, but: tuple[str, ...]) -> None:
    for line in block.splitlines():
        for name in line.split("  ")[0].split(", "):
            if not name.startswith(but):
                assert list(folder.glob(name.rstrip("/").replace("KEY", "*").replace("TABLE", "*"))), name


@pytest.mark.slow
def test_a_results_folder_holds_what_its_page_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (block,) = blocks_of(DOCS / "studies.md", "text")
    study = "steps = 2\n[grid]\nn = [4]\nwidth = [4]\nseeds = 1\nreplacements = 1"
    holds(folder_of_results(study), block, but=("failed",))


def toctree(page: Path, block: str, request) -> None:
    """A directive of the site, unreadable elsewhere: what it lists is there."""
    assert page.name == "index.md"
    for name in (line for line in block.splitlines() if line and not line.startswith(":")):
        assert name == "api/index" or (DOCS / f"{name}.md").exists(), name


def test_the_doctests_of_the_blocks_are_all_that_pytest_sees():
    """A prompt outside a block, or one that its fence cuts off, would be run and not shown, or the other way round."""
    parser = doctest.DocTestParser()
    for page in PAGES[1:]:
        of_blocks = sum(len(parser.get_examples(block)) for block in blocks_of(page, "python"))
        assert of_blocks == len(parser.get_examples(page.read_text(encoding="utf-8"))), page.name


def check_command(words: list[str], config) -> None:
    words = [PLACEHOLDERS.get(word, word) for word in words]
    program, *rest = words[: words.index(">")] if ">" in words else words
    if program in ("python", "python3"):
        check_python(rest)
    elif program == "stability":
        check_stability(rest)
    elif program == "make":
        for target in rest:
            assert re.search(rf"^{re.escape(target)}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target
    elif program == "pip":
        check_pip(rest)
    elif program == "pytest":
        for option in (word for word in rest if word.startswith("--")):
            config.getoption(option.partition("=")[0].removeprefix("--").replace("-", "_"))
    elif program == ".":
        assert rest == [".venv/bin/activate"]
    else:
        raise AssertionError(f"nobody checks the command {program!r}")


def check_python(rest: list[str]) -> None:
    if rest[0] == "-m":
        assert importlib.util.find_spec(rest[1]), rest[1]
    else:
        assert (ROOT / rest[0]).is_file(), rest[0]


def check_pip(rest: list[str]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert rest[0] == "install"
    for word in rest[1:]:
        ours = re.fullmatch(r"(?:\.|contraction-stability)(?:\[([\w,]+)\])?", word)
        assert word.startswith("--") or word == "torch" or (ROOT / word).is_file() or ours, word
        if ours and ours[1]:
            assert set(ours[1].split(",")) <= set(project["optional-dependencies"])


def check_stability(rest: list[str]) -> None:
    """By the real parser, and the overrides by the study's own; a file of the reader's stands for digits."""
    from studies.cli import parser
    from studies.definition.config import Study, shipped_studies

    if len(rest) == 1 and rest != ["list"]:  # the command as such, in running text
        with pytest.raises(SystemExit) as shown:
            parser().parse_args([*rest, "--help"])
        assert shown.value.code == 0
        return
    arguments, left = parser().parse_known_args(rest)
    assert not [word for word in left if word.startswith("-")], left
    if hasattr(arguments, "study"):
        known = arguments.study in shipped_studies()
        assert known or arguments.study.endswith(".toml"), arguments.study
        Study.from_toml(arguments.study if known else "digits", [*arguments.overrides, *left], quick=arguments.quick)


def test_commands_in_the_text(request):
    seen = Counter()
    for page, code in INLINE:
        program, *more = code.split()[:2] or [""]
        if program in COMMANDS and more:
            plain = re.sub(r"[\[\]…]", "", code) if "KEY=VALUE" in code else code
            try:
                check_command(shlex.split(plain), request.config)
            except (AssertionError, SystemExit, ValueError) as error:
                raise AssertionError(f"{page.name}: `{code}`: {error}") from error
            seen[program] += 1
    assert seen["stability"] > 20
    assert seen["python"] > 5


WRONG = """stability rum digits; stability run digitz; stability run digits mas=1; stability run digits --quik; make studdy;
python -m examples.nowhere; python docs/nothing.py; pip install '.[tests]'; rm -r x; pytest --assumption-update"""


@pytest.mark.parametrize("command", [command.strip() for command in WRONG.split(";")])
def test_wrong_commands_are_found(command, request):
    with pytest.raises((AssertionError, SystemExit, ValueError)):
        check_command(shlex.split(command), request.config)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_commands_run(name, tmp_path, monkeypatch):
    """Every `stability` line of a page's blocks, one after the other in one folder, in its quick form."""
    from studies.cli import main

    monkeypatch.chdir(tmp_path)
    Path("study.toml").write_text((ROOT / "studies/catalogue/digits.toml").read_text(encoding="utf-8"))
    for line in "\n".join(blocks_of(PAGES[NAMES.index(name)], "sh")).splitlines():
        words = shlex.split(line.partition("#")[0])
        if words[:1] == ["stability"]:
            quick = ["--quick"] if words[1] in ("run", "plan", "check") and "--quick" not in words else []
            least = ["n=4", "mass=1", "seeds=1", "steps=5", "replacements=1"] if words[1] == "check" else []
            assert main([*words[1:], *least, *quick]) in ((0, 1, 3) if words[1] == "check" else (0,)), line
