"""Data sets: scikit-learn's, files, the user's own; label noise; downloads that are not allowed or not possible."""

import os
import sys
import urllib.error

import numpy as np
import pandas as pd
import pytest
import torch

from studies.data import download
from studies.data.datasets import dataset, load, with_label_noise
from studies.definition.config import ConfigError, Study
from studies.definition.training import Data


@pytest.mark.parametrize(
    ("name", "shape", "classes"),
    [("digits", (1797, 64), 10), ("wine", (178, 13), 3), ("iris", (150, 4), 3), ("breast_cancer", (569, 30), 2)],
)
def test_classification_sets_have_one_hot_targets_and_rows_of_norm_root_8(name, shape, classes):
    loaded = load(Data(name=name))
    assert loaded.inputs.shape == shape
    assert loaded.classes == classes
    np.testing.assert_array_equal(loaded.targets.sum(1), 1)
    norms = np.linalg.norm(loaded.inputs, axis=1)
    assert np.sqrt(np.mean(norms**2)) == pytest.approx(np.sqrt(8))
    if name == "digits":
        np.testing.assert_allclose(norms, np.sqrt(8))


def test_regression_targets_are_standardised_and_raw_inputs_are_left_alone():
    from sklearn.datasets import load_diabetes

    loaded = load(Data(name="diabetes", inputs="raw"))
    np.testing.assert_array_equal(loaded.inputs, load_diabetes().data)
    assert loaded.targets.mean() == pytest.approx(0, abs=1e-12)
    assert loaded.targets.std() == pytest.approx(1)
    assert load(Data(name="linnerud")).targets.shape == (20, 3)
    assert load(Data(name="load_iris")).classes == 3  # by the loader's own name too


def frame():
    rows = np.random.default_rng(0).standard_normal((30, 3))
    return pd.DataFrame(rows, columns=["a", "b", "y"]).assign(label=["one", "two", "three"] * 10)


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_tables_with_their_target_columns(ending, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    table = frame()
    table.to_csv("t.csv", index=False)
    table.to_parquet("t.parquet", index=False)
    words = load(Data(name=f"t.{ending}", target="label"))
    assert words.classes == 3
    np.testing.assert_allclose(words.inputs, table[["a", "b", "y"]].to_numpy())
    table.drop(columns="label").to_csv("n.csv", index=False)
    real = load(Data(name="n.csv", target="y, b"))
    assert real.classes == 0
    np.testing.assert_allclose(real.targets, table[["y", "b"]].to_numpy())
    with pytest.raises(
        ValueError, match=r"data\.target = 'z' should name the target column of t\.csv .* a, b, y, label"
    ):
        load(Data(name="t.csv", target="z"))
    with pytest.raises(ValueError, match="columns label are no numbers"):
        load(Data(name="t.csv", target="y"))


def test_arrays_from_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    x, y = np.random.default_rng(0).standard_normal((20, 1, 4, 4)), np.arange(20) % 2
    np.savez("d.npz", x=x, y=y)
    loaded = load(Data(name="d.npz"))
    np.testing.assert_array_equal(loaded.inputs, x)
    assert loaded.classes == 2
    np.savez("wrong.npz", inputs=x)
    with pytest.raises(ValueError, match=r"wrong\.npz holds inputs; expected the arrays x .* and y"):
        load(Data(name="wrong.npz"))
    with pytest.raises(ValueError, match=r"no such file; paths are taken from the current folder"):
        load(Data(name="missing.npz"))


def test_what_a_file_holds_is_part_of_the_key(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez("d.npz", x=np.ones((20, 3)), y=np.arange(20) % 2)
    study = Study.from_toml("digits", ["n=2", "mass=1", "seeds=1", "data.name=d.npz"])
    before = study.points()[0].key
    assert study.points()[0].key == before
    np.savez("d.npz", x=np.zeros((21, 3)), y=np.arange(21) % 2)
    assert study.points()[0].key != before


def test_a_file_that_changes_within_a_process_gives_its_new_numbers(tmp_path, monkeypatch):
    """However soon: the clock of the file system may not have moved, and the size may be the same."""
    from studies.running import outcome
    from studies.running.outcome import attempt

    monkeypatch.chdir(tmp_path)
    y, stamp = np.arange(20) % 2, 10**18
    for value in (1.0, 2.0, 3.0):
        np.savez("d.npz", x=np.full((20, 3), value), y=y)
        assert load(Data(name="d.npz")).inputs[0, 0] == value
    os.utime("d.npz", ns=(stamp, stamp))  # long ago: from here on the digest is remembered
    before = ["n=2", "width=2", "mass=1", "seeds=1", "steps=1", "replacements=1", "held_out=2", "data.name=d.npz"]
    study = Study.from_toml("digits", before)
    point = study.points()[0]
    assert attempt(study, point).failure is None
    np.savez("d.npz", x=np.full((20, 3), 4.0), y=y)
    failure = attempt(study, point).failure  # other numbers are not stored under the old key
    assert failure.kind == "input"
    assert "data.name = d.npz on " in failure.message
    assert "start it again" in failure.message
    assert attempt(study, study.points()[0]).failure is None

    def changes_it(study, point):
        np.savez("d.npz", x=np.full((20, 3), 5.0), y=y)

    point = study.points()[0]
    tables, failure = outcome._once(changes_it, study, point, 1)  # too late for the numbers, or not: nobody knows
    assert tables is None
    assert failure.kind == "input"
    os.unlink("d.npz")
    assert "no such file; paths are taken from the current folder there" in attempt(study, point).failure.message


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path, monkeypatch):
    from studies.data import files

    monkeypatch.chdir(tmp_path)
    np.savez("d.npz", x=np.ones((20, 3)), y=np.arange(20))
    read = files.read_file

    def slowly(*arguments):
        np.savez("d.npz", x=np.zeros((20, 3)), y=np.arange(20))
        return read(*arguments)

    monkeypatch.setattr(files, "read_file", slowly)
    with pytest.raises(ValueError, match=r"data\.name = d\.npz was changed while it was read; start again"):
        load(Data(name="d.npz"))


def test_a_function_that_is_loaded_again_gives_its_new_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    for rows in (5, 6):
        (tmp_path / "changing.py").write_text(
            f"import numpy as np\ndef xy(): return np.ones(({rows}, 2)), np.ones({rows})\n"
        )
        sys.modules.pop("changing", None)
        assert len(load(Data(name="changing:xy")).inputs) == rows


MODULE = """
import numpy as np, torch
from torch.utils.data import TensorDataset
def arrays(rows=12): return np.ones((rows, 2)), np.arange(rows) % 3
def as_dataset(): return TensorDataset(torch.arange(10.0).reshape(5, 2), torch.tensor([0, 1, 0, 1, 1]))
def nothing(): return 3
"""


def test_functions_and_torch_datasets_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "my_data.py").write_text(MODULE)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    assert load(Data(name="my_data:arrays", arguments={"rows": 9})).targets.shape == (9, 3)
    loaded = load(Data(name="my_data:as_dataset"))
    np.testing.assert_array_equal(loaded.inputs, np.arange(10.0).reshape(5, 2))
    assert loaded.classes == 2
    with pytest.raises(ValueError, match=r"my_data:nothing returned a int; expected \(x, y\) or a torch Dataset"):
        load(Data(name="my_data:nothing"))
    with pytest.raises(ValueError, match="cannot be imported"):
        load(Data(name="my_data:absent"))


def test_a_download_is_asked_for_and_a_machine_without_network_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("CONTRACTION_STABILITY_DATA", str(tmp_path))
    with pytest.raises(ValueError, match=r"mnist is not on this machine .* write data\.download=true"):
        load(Data(name="mnist"))

    def no_network(*_, **__):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr("sklearn.datasets.fetch_openml", no_network)
    with pytest.raises(
        ValueError, match=r"could not be downloaded .*Name or service .*numpy\.savez .*data\.name=FILE\.npz"
    ):
        load(Data(name="mnist", download=True))
    assert not list(tmp_path.iterdir())

    def fetch(title, *, version, **_):
        assert (title, version) == ("mnist_784", 1)
        return np.random.default_rng(0).integers(0, 256, (30, 784)), np.array(list("0123456789") * 3)

    monkeypatch.setattr("sklearn.datasets.fetch_openml", fetch)
    first = load(Data(name="mnist", download=True))
    assert first.image == (1, 28, 28)
    np.testing.assert_allclose(np.linalg.norm(first.inputs, axis=1), np.sqrt(8))
    monkeypatch.setattr("sklearn.datasets.fetch_openml", no_network)
    again = load(Data(name="mnist"))  # from the cache: no download to be allowed
    np.testing.assert_array_equal(first.inputs, again.inputs)
    assert download.cache_folder() == tmp_path


def test_label_noise_is_nested_and_of_the_size_that_was_asked_for():
    clean = np.eye(10)[np.random.default_rng(1).integers(0, 10, 4000)]
    stream = np.random.SeedSequence(3)
    wrong = {level: (with_label_noise(clean, 10, level, stream) != clean).any(1) for level in (0.0, 0.2, 0.5)}
    assert not wrong[0.0].any()
    assert wrong[0.2].mean() == pytest.approx(0.2, abs=0.03)
    assert (wrong[0.5] | ~wrong[0.2]).all()  # wrong at 0.2 means wrong at 0.5
    y = np.random.default_rng(2).standard_normal((4000, 1)) * 5
    assert (with_label_noise(y, 0, 0.3, stream) - y).std() == pytest.approx(1.5, rel=0.1)


def test_label_noise_spares_the_held_out_rows():
    from studies.data.subsets import draw

    base = ["n=24", "mass=1", "seeds=1", "width=4"]
    clean, noisy = (Study.from_toml("digits", [*base, f"data.label_noise={level}"]) for level in (0, 1))
    one, two = (draw(study, study.points()[0]) for study in (clean, noisy))
    assert torch.equal(one.x, two.x)
    assert torch.equal(one.held_out_targets, two.held_out_targets)
    assert not (one.targets.argmax(1) == two.targets.argmax(1)).any()
    assert not (one.replacement_targets.argmax(1) == two.replacement_targets.argmax(1)).any()


@pytest.mark.parametrize("name", ["minst", "data.txt", "a:b:c"])
def test_names_that_are_none(name):
    with pytest.raises(ConfigError, match=r"data\.name = "):
        Study.from_toml("digits", [f"data.name={name}"])


def test_a_loader_that_sklearn_has_not():
    with pytest.raises(ValueError, match="has no load_nothing"):
        load(Data(name="load_nothing"))


def test_dataset_is_read_only():
    with pytest.raises(ValueError, match="read-only"):
        dataset("digits")[0][0] = 0
