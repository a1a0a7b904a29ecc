import math
import tomllib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from studies.definition.config import ConfigError, Study, shipped_studies, source_text
from studies.definition.config_text import flatten, nearest, parse_value, to_toml
from studies.kinds.twins import TwinStudy

MINIMAL = "[grid]\nn = [6, 12]\nmass = [1.0]\n"


def test_digits_is_the_study_that_was_asked_for():
    study = Study.from_toml("digits")
    grid = study.grid
    assert (grid.n, grid.mass, grid.width) == ([6, 12, 24, 48], [1.0, 0.1, 0.01], [128])
    assert (grid.seeds, grid.replacements, study.data.held_out) == (3, 4, 200)
    assert (study.lr, study.steps, study.dtype, study.loss) == (0.1, 200, "float64", "squared")
    assert (study.optimizer, study.scale) == ("woodbury", "mean")
    assert (study.model.hidden, study.model.activation) == (2, "tanh")
    assert len(study.points()) == 36
    assert max(Study.from_toml("digits-large").grid.n) == 256


@pytest.mark.parametrize("name", shipped_studies())
def test_shipped_studies_are_sound_and_have_a_quick_version_with_the_same_keys(name):
    study, quick = Study.from_toml(name), Study.from_toml(name, quick=True)
    assert study.title
    assert study.question
    assert type(quick) is type(study)
    assert quick.axes().keys() == study.axes().keys()
    assert effort(quick) < effort(study) / 4


@pytest.mark.parametrize("name", shipped_studies())
def test_shipped_files_show_where_they_run(name):
    """A study goes to a GPU, or to more cores, by a key that is there to be seen."""
    text = shipped_studies()[name].read_text(encoding="utf-8")
    assert text.startswith("# ")
    assert {"device", "dtype", "workers", "threads"} <= tomllib.loads(text).keys()


def effort(study):
    """In the units of the study's kind; kinds without steps count them in their work, or have none."""
    return sum(study.kind_object.work(study, point) for point in study.points()) * getattr(study, "steps", 1)


@pytest.mark.parametrize("name", shipped_studies())
def test_written_out_a_study_reads_back_equal(name, tmp_path):
    more = ["lr=auto", "output_metric=squared", "mass=1e-7,3"] if name == "digits" else []
    study = Study.from_toml(name, ['title="a \\"quoted\\" title"', "workers=2", *more])
    (tmp_path / "again.toml").write_text(study.to_toml(), encoding="utf-8")
    assert Study.from_toml(tmp_path / "again.toml") == study


values = st.one_of(st.integers(-(2**62), 2**62), st.floats(allow_nan=False), st.text(max_size=5), st.booleans())
tables = st.dictionaries(st.sampled_from("abc"), values | st.lists(values, max_size=3))


@settings(deadline=None)
@given(tables, st.dictionaries(st.sampled_from("xy"), tables))
def test_toml_text_reads_back_equal(plain, nested):
    assert tomllib.loads(to_toml(plain | nested)) == plain | nested


def test_toml_of_nan():
    assert math.isnan(tomllib.loads(to_toml({"a": math.nan}))["a"])


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("n=6", "grid.n", [6]),
        ("n=6,12", "grid.n", [6, 12]),
        ("n=[6, 12]", "grid.n", [6, 12]),
        ("n=[6,.12e2]", "grid.n", [6, 12]),
        ("grid.mass=.1,1e-2", "grid.mass", [0.1, 0.01]),
        ("mass = 1", "grid.mass", [1.0]),
        ("lr=auto", "lr", "auto"),
        ("lr=0.5", "lr", 0.5),
        ("hidden=0", "model.hidden", 0),
        ("optimizer=sgd", "optimizer", "sgd"),
        ('optimizer="sgd"', "optimizer", "sgd"),
        ("title=7 of 9", "title", "7 of 9"),
        ("steps=1e3", "steps", 1000),
    ],
)
def test_overrides(override, key, value):
    assert flatten(Study.from_toml("digits", [override]).to_dict())[key] == value


def test_the_last_override_of_a_key_counts_and_overrides_come_after_quick():
    study = Study.from_toml("digits", ["n=3", "n=4"], quick=True)
    assert study.grid.n == [4]
    assert study.steps == 60


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["mas=1"], ["unknown key mas = 1", "did you mean grid.mass?"]),
        (["grid.sed=1"], ["unknown key grid.sed", "did you mean grid.seeds?"]),
        (["optimiser=sgd"], ["did you mean optimizer?"]),
        (["mass=0"], ["grid.mass[0] = 0", "greater than 0"]),
        (["mass=1,-1"], ["grid.mass[1] = -1"]),
        (["mass=nan"], ["grid.mass[0] = nan", "finite"]),
        (["mass=inf"], ["grid.mass[0] = inf", "finite"]),
        (["mass=heavy"], ["grid.mass[0] = 'heavy'", "number"]),
        (["mass=[]"], ["grid.mass = []", "should not be empty"]),
        (["n=0"], ["grid.n[0] = 0", "greater than or equal to 1"]),
        (["n=6.5"], ["grid.n[0] = 6.5"]),
        (["n=[6,12"], ["grid.n[0] = '[6,12'", "valid integer"]),
        (["n=6,12]"], ["grid.n[0] = '6,12]'", "valid integer"]),
        (["n=6,6"], ["grid.n = [6, 6]", "twice"]),
        (["replacements=0"], ["grid.replacements = 0"]),
        (["seeds=0"], ["grid.seeds = 0"]),
        (["steps=0"], ["steps = 0"]),
        (["steps=true"], ["steps = True", "should not be true or false"]),
        (["lr=0"], ["lr = 0", 'a positive number or "auto"']),
        (["lr=nan"], ["lr = nan"]),
        (["lr=auot"], ["lr = 'auot'"]),
        (["seed=-1"], ["seed = -1"]),
        (["workers=0"], ["workers = 0"]),
        (["output_metric=idenity"], ["output_metric = 'idenity'", "did you mean identity?"]),
        (["optimizer=adam"], ["optimizer = 'adam'", "woodbury, sgd"]),
        (["dtype=float16"], ["dtype = 'float16'", "did you mean float64?"]),
        (["device=gpu"], ["device = 'gpu'", "cpu, cuda"]),
        (["activation=tan"], ["model.activation = 'tan'", "did you mean tanh?"]),
        (["name=digts"], ["data.name = 'digts'", "did you mean digits?"]),
        (["foo"], ["'foo' should be written key=value"]),
        (
            ["zzz=1"],
            ["unknown key zzz = 1, valid are title, question, kind,", "steps", "grid.n", "model.activation"],
        ),
        (["=1"], ["unknown key  = 1, valid are"]),
        (["seeds=999999"], ["grid.seeds = 999999 makes a grid of 11999988 points"]),
        (["hidden=1e9"], ["model.hidden = 1000000000.0", "less than or equal to 100"]),
        (["seed=1e30"], ["seed = 1e+30"]),
        (["width=10000000000000000000000"], ["grid.width[0] = 1", "less than or equal to 1000000"]),
        (["threads=100000"], ["threads = 100000", "less than or equal to 256"]),
        (
            ["lr=auto", "optimizer=sgd"],
            ["lr = 'auto' does not go with optimizer=sgd:", "write a number, such as lr=0.1"],
        ),
        (["lr=auto", "scale=sum"], ["lr = 'auto' does not go with scale=sum: it needs optimizer=woodbury, scale=mean"]),
        (["lr=auto", "output_metric=cross_entropy"], ["output_metric=cross_entropy:", "identity or squared"]),
        (["lr=auto", "optimizer=sgd", "scale=none"], ["lr = 'auto' does not go with optimizer=sgd, scale=none:"]),
    ],
)
def test_bad_keys_and_values_are_named(overrides, words):
    with pytest.raises(ConfigError) as failure:
        Study.from_toml("digits", overrides)
    assert len(failure.value.errors) == 1
    assert all(word in str(failure.value) for word in words), str(failure.value)


def test_every_error_is_reported_at_once():
    with pytest.raises(ConfigError) as failure:
        Study.from_toml("digits", ["mas=1", "n=0", "lr=auto", "scale=sum", "output_metric=x", "activation=step"])
    assert len(failure.value.errors) == 5
    assert any(error.startswith("lr = 'auto' does not go with scale=sum: ") for error in failure.value.errors)
    assert "\n" not in str(failure.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("n = [", ["not valid TOML"]),
        ("[grid]\nmass = [1.0]\n", ["grid.n is missing"]),
        (MINIMAL + "[modle]\nhidden = 1\n", ["unknown key modle", "did you mean model?"]),
        (
            MINIMAL + "[model]\nzzz = 1\n",
            ["unknown key model.zzz = 1, valid are model.architecture, model.hidden, model.activation"],
        ),
        ('lr = "auto"\noptimizer = "sgd"\n' + MINIMAL, ["lr = 'auto' does not go with optimizer=sgd"]),
        ("grid = 3", ["grid = 3"]),
        ("n = [6]\n" + MINIMAL, ["unknown key n", "did you mean grid.n?"]),
    ],
)
def test_bad_files_are_refused(text, words, tmp_path):
    (tmp_path / "study.toml").write_text(text)
    with pytest.raises(ConfigError) as failure:
        Study.from_toml(tmp_path / "study.toml")
    assert all(word in str(failure.value) for word in words), str(failure.value)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["optimizers.foo.class=sgdd"],
            ["the table [optimizers.foo], whose class = 'sgdd' should be", "did you mean sgd?"],
        ),
        (["optimizers.foo.class=3"], ["the table [optimizers.foo], whose class = 3 should be one of woodbury"]),
        (
            ["optimizers.foo.momentum=0.5"],
            ["rlo, woodbury, ", "or a table [optimizers.foo] with a class"],
        ),
    ],
)
def test_an_optimizers_table_without_a_class_that_there_is(overrides, words):
    with pytest.raises(ConfigError) as failure:
        Study.from_toml("optimizers", [*overrides, "optimizer=foo"])
    assert len(failure.value.errors) == 1
    assert all(word in str(failure.value) for word in words), str(failure.value)
    assert " foo, " not in str(failure.value)
    assert "did you mean foo" not in str(failure.value)


def test_unreadable_sources(tmp_path):
    with pytest.raises(ConfigError, match=r"no such study; did you mean digits\?"):
        Study.from_toml("digit")
    with pytest.raises(ConfigError, match="a TOML file was expected"):
        Study.from_toml(tmp_path)
    (tmp_path / "study.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not valid TOML"):
        Study.from_toml(tmp_path / "study.toml")
    (tmp_path / "study.toml").write_text("quick = 3\n" + MINIMAL)
    with pytest.raises(ConfigError, match=r"has no \[quick\] table"):
        Study.from_toml(tmp_path / "study.toml", quick=True)


def keys(*overrides):
    return {(p.n, p.width, p.mass, p.seed): p.key for p in Study.from_toml("digits", overrides).points()}


def test_keys_are_stable_unique_and_readable():
    assert keys() == keys()
    assert len(set(keys().values())) == 36
    assert keys()[48, 128, 0.01, 2].startswith("n48-width128-mass0.01-seed2-")


WITHOUT_EFFECT = ["workers=2", "title=other", "question=why", "n=6,12,24,48,96", "seeds=9"]
WITH_EFFECT = [
    *("lr=0.2", "steps=100", "dtype=float32", "device=cuda", "optimizer=sgd", "scale=sum", "output_metric=squared"),
    *("hidden=1", "activation=relu", "held_out=100", "replacements=5", "n=12,24,48", "threads=2"),
]


@pytest.mark.parametrize("override", WITHOUT_EFFECT)
def test_what_changes_no_number_of_a_point_leaves_its_key(override):
    before, after = keys(), keys(override)
    assert {point: after[point] for point in before} == before


@pytest.mark.parametrize("override", WITH_EFFECT)
def test_what_changes_numbers_changes_the_key(override):
    before, after = keys(), keys(override)
    shared = before.keys() & after.keys()
    assert shared
    assert all(before[point] != after[point] for point in shared)
    assert Study.from_toml("digits", [override]).differences(Study.from_toml("digits"))


def test_differences_say_which_is_which():
    here, there = Study.from_toml("digits", ["lr=0.2", "workers=2"]), Study.from_toml("digits", ["n=6"])
    assert here.differences(there) == ["lr is 0.1 there, 0.2 here", "grid.n is [6] there, [6, 12, 24, 48] here"]


def test_the_text_of_a_study_keeps_its_comments(tmp_path):
    assert "# 1797 images" in source_text("digits")
    (tmp_path / "own.toml").write_text("# mine\n" + MINIMAL)
    assert source_text(tmp_path / "own.toml") == "# mine\n" + MINIMAL


def test_plain_gradient_descent_has_no_pulled_back_term_whatever_the_scale():
    assert keys("optimizer=sgd") == keys("optimizer=sgd", "scale=none")
    assert Study.from_toml("digits", ["optimizer=sgd"]).metric_scale == "none"


def test_seed_shifts_all_seeds():
    assert {seed for *_, seed in keys("seed=10")} == {10, 11, 12}


def test_output_metrics_are_those_of_the_kernel():
    from nt_kernel.metric.output_metric import NAMED

    assert set(TwinStudy.model_fields["output_metric"].annotation.__args__) == set(NAMED)


def test_pieces():
    assert nearest("zzz", ["mass"]) is None
    assert nearest("x", []) is None
    assert parse_value("a, b", list[str]) == ["a", "b"]
