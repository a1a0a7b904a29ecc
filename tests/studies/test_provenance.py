import subprocess
import tomllib

from studies.definition.config_text import to_toml
from studies.results.provenance import commit, provenance


def test_facts_are_plain_text_that_toml_keeps():
    facts = provenance(["stability", "run", "digits", "title=a b"])
    assert facts["command"] == "stability run digits 'title=a b'"
    assert facts["torch"][0].isdigit()
    assert {"date", "host", "python", "platform", "commit", "contraction-stability"} <= facts.keys()
    assert tomllib.loads(to_toml({"provenance": facts})) == {"provenance": facts}


def git(folder, *arguments):
    identity = ["-c", "user.name=n", "-c", "user.email=e@e", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *identity, "-C", folder, *arguments], check=True, capture_output=True)


def test_commit_is_that_of_tracked_source_and_says_when_it_was_changed(tmp_path):
    source = tmp_path / "package"
    source.mkdir()
    (source / "__init__.py").write_text("")
    assert commit(source) is None  # no checkout
    git(tmp_path, "init")
    assert commit(source) is None  # below somebody else's checkout, as in a virtual environment
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "first")
    assert len(commit(source)) == 40
    (source / "__init__.py").write_text("changed")
    assert commit(source).endswith("+changes")


def test_without_git_there_is_no_commit(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit(tmp_path) is None
