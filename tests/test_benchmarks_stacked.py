"""The page of stacked twins times the right thing: both ways take the steps of K separate optimizers. No time is asserted."""

import pytest
import torch

from benchmarks import stacked
from benchmarks.__main__ import main
from benchmarks.timing import Settings

FAST = Settings(rounds=2, turn=0.0, workers=False)
WAYS = ["Woodbury, stacked", "Woodbury, loop", "gradient descent, stacked", "gradient descent, loop"]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("K", [1, 3])
def test_every_way_takes_the_steps_of_separate_optimizers(K, dtype):
    found = stacked.contenders("W1", 4, K, dtype, "cpu")
    assert list(found) == WAYS
    assert all(contender.error <= stacked.TOLERANCE[dtype] for contender in found.values())


def test_every_twin_has_a_row_of_its_own():
    _, x, targets = stacked.twins("W1", 5, 3, "float64", "cpu")
    assert (x.shape, targets.shape) == ((3, 5, 64), (3, 5, 10))
    differ = [[not torch.equal(x[i, row], x[j, row]) for row in range(5)] for i, j in [(0, 1), (0, 2), (1, 2)]]
    assert differ == [
        [True, True, False, False, False],
        [True, False, True, False, False],
        [False, True, True, False, False],
    ]
    with pytest.raises(ValueError, match="6 twins of 5 samples"):
        stacked.twins("W1", 5, 6, "float64", "cpu")


@pytest.mark.parametrize("way", stacked.WAYS.values())
@pytest.mark.parametrize("name", stacked.STACKED)
def test_what_is_timed_trains_every_twin(way, name):
    model, x, targets = stacked.twins("W1", 4, 2, "float64", "cpu")
    run = way(name, model, x, targets)

    def losses():
        one = lambda params, x, a: stacked.loss_of(torch.func.functional_call(model, params, (x,)), a)  # noqa: E731
        return torch.func.vmap(one)(run.parameters(), x, targets)

    before = losses()
    for _ in range(3):
        run()
    assert (losses() < before).all()


@pytest.mark.parametrize("way", ["STACKED", "LOOPED"])
def test_another_step_is_not_timed(way, monkeypatch):
    wrong = {"STACKED": stacked.WoodburyStep(0.11), "LOOPED": lambda model: stacked.Woodbury(model, lr=0.11)}[way]
    monkeypatch.setitem(getattr(stacked, way), "Woodbury", wrong)
    rows = {row.name: row.note for row in stacked.entries(FAST, [("W1", 4, 2, "float32")])}
    assert rows["Woodbury, stacked"] == "disagrees, not timed"
    assert rows["gradient descent, stacked"] == ""


def test_the_page_is_written(tmp_path):
    assert main(["stacked", "--quick", "--rounds", "1", "--out", str(tmp_path)]) == 0
    text = (tmp_path / "stacked-cpu-quick.md").read_text(encoding="utf-8")
    assert "| W1, n = 8, K = 2, float32 | Woodbury, stacked |" in text
    assert "- W1, n = 8, K = 2, float32: Woodbury, stacked " in text
    assert "Unfinished" not in text
