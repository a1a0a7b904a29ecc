"""Exactness to 1e-12 in float64 on architectures drawn at random and on fixed modern ones; float32 errors reported.

``python -m tests.nt_kernel.test_architectures`` prints the errors of the fixed ones in both precisions.
"""

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from nt_kernel import layer_factors
from tests.nt_kernel import architectures as drawn
from tests.nt_kernel.exactness import TOLERANCE, factor_errors, kernel_errors, layer_jacobians, positive_metric
from tests.nt_kernel.modern import MODERN

PER_ENTRY = 10  # 70 in all
PHASES = [Phase.explicit, Phase.generate]  # no shrinking: the story tells the architecture, and minutes are saved
QUIET = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]


def check(a: drawn.Architecture, metrics=("identity", positive_metric)) -> dict[str, float]:
    errors = factor_errors(a) | kernel_errors(a, metrics)
    assert {what: e for what, e in errors.items() if not e <= TOLERANCE} == {}
    return errors


def check_kinds(a: drawn.Architecture) -> None:
    if drawn.KINDS_ARE_CHECKED:
        _, factors = layer_factors(a.model, a.x, output=a.output)
        kinds = {name: kind for f in factors.values() for name, kind in f.kinds.items()}
        assert {n: (kinds[n], kind) for n, kind in a.kinds.items() if n in kinds and kinds[n] != kind} == {}


@pytest.mark.parametrize("entry", drawn.ENTRIES)
def test_drawn_architectures(entry):
    seen = set()

    @settings(max_examples=PER_ENTRY, phases=PHASES, suppress_health_check=QUIET)
    @given(drawn.architectures(entry), st.sampled_from(["identity", positive_metric]))
    def exact(a, metric):
        seen.add(a.story)
        check(a, [metric])
        check_kinds(a)

    exact()
    assert len(seen) >= 8, seen  # at least 56 different ones over the seven entries


@pytest.mark.slow
@pytest.mark.parametrize("entry", drawn.ENTRIES)
def test_many_drawn_architectures(entry):
    @settings(max_examples=60, phases=PHASES, suppress_health_check=QUIET)
    @given(drawn.architectures(entry))
    def exact(a):
        check(a)
        check_kinds(a)

    exact()


@pytest.mark.parametrize("name", MODERN)
def test_modern_architectures(name):
    a = MODERN[name]()
    check(a)
    check_kinds(a)


@pytest.mark.parametrize("name", MODERN)
def test_every_layer_of_the_modern_ones_matters(name):
    a = MODERN[name]()
    sizes = {layer: J.norm().item() for layer, J in layer_jacobians(a.model, a.x).items()}
    assert min(sizes.values()) > 1e-3 * max(sizes.values()), sizes


def single(a: drawn.Architecture) -> drawn.Architecture:
    """The same in float32."""
    cast = lambda t: t.float() if t.is_floating_point() else t  # noqa: E731
    points = [tuple(map(cast, x)) if isinstance(x, tuple) else cast(x) for x in (a.x, a.other)]
    return replace(a, model=a.model.float(), x=points[0], other=points[1])


@pytest.mark.parametrize("name", MODERN)
def test_float32_errors_are_recorded(name, record_property):
    """Factors are of the model's precision, kernels of float64 whatever the model's: H loses no digit."""
    a = single(MODERN[name]())
    errors = factor_errors(a)
    for what, error in errors.items():
        record_property(f"float32 {what}", error)
    assert max(errors.values()) <= 1e-4, errors
    exact = kernel_errors(a, ["identity"])
    assert max(exact.values()) <= TOLERANCE, exact


def main() -> None:
    columns = ["J", "gram", "cross gram", "block gram", "J u", "Jᵀ v"]
    print(f"{'relative error':<24}{'':9}" + "".join(f"{c:>12}" for c in (*columns, "H")))
    for name, make in MODERN.items():
        for a in (make(), single(make())):
            errors = factor_errors(a)
            worst = max(kernel_errors(a).values())
            dtype = str(next(a.model.parameters()).dtype).removeprefix("torch.")
            print(f"{name:<24}{dtype:9}" + "".join(f"{e:12.1e}" for e in (*(errors[c] for c in columns), worst)))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
