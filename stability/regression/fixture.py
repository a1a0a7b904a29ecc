"""What the fixture ``assumption`` is: it measures, requires, and holds constants against their baselines."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from stability.assumptions.catalogue import CATALOGUE, KEY_OF, known_key, known_keys, theorem_keys
from stability.assumptions.failures import AssumptionViolated, BaselineMissing, ConstantMoved
from stability.assumptions.report import AssumptionReport, in_words
from stability.assumptions.verdict import Assumption, worst_first
from stability.regression.baselines import TOLERANCES, Constant, moved, read, tolerances

UNDECIDED = ("fail", "pass")


@dataclass(frozen=True)
class Options:
    """What the marker ``assumption`` takes.

    ``allow``: assumptions known to fail; their constants are held against the baseline all the same. ``undecided``: "fail"
    or "pass". ``limits``, ``skip``: of ``check_assumptions``. ``rtol``, ``atol``: of all constants; ``tolerances``
    {constant: {"rtol": …, "atol": …}}. ``baseline``: False for none, or a file name beside the test.
    """

    allow: tuple[str, ...] = ()
    undecided: str = "fail"
    limits: Mapping[str, float] = field(default_factory=dict)
    skip: tuple[str, ...] = ()
    rtol: float | None = None
    atol: float | None = None
    tolerances: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    baseline: bool | str = True

    @classmethod
    def of(cls, given: Mapping) -> "Options":
        """Checked: ValueError/TypeError that says what the marker takes."""
        for name in given:
            if name not in cls.__dataclass_fields__:
                raise ValueError(
                    f"pytest.mark.assumption takes {', '.join(cls.__dataclass_fields__)}; got {name} = {given[name]!r}"
                )
        found = dict(given)
        for name, keys in (("allow", known_keys), ("skip", theorem_keys)):
            if name in found:
                found[name] = keys(found[name], name)
        if found.get("undecided", "fail") not in UNDECIDED:
            raise ValueError(f"undecided must be 'fail' or 'pass', got {found['undecided']!r}")
        return cls(**found)

    def tolerance(self, name: str) -> dict[str, float]:
        """As the marker gives it for one constant."""
        own = dict(self.tolerances.get(name, {}))
        if unknown := set(own) - set(TOLERANCES):
            raise ValueError(f"tolerances of {name} are rtol and atol, got {', '.join(sorted(unknown))}")
        return {k: v for k in TOLERANCES if (v := own.get(k, getattr(self, k))) is not None}


class AssumptionCheck:
    """The fixture: ``assumption(model, data, optimizer)`` measures, fails where something is violated, else compares.

    ``test`` names the test within its module, ``path`` is the baseline file; ``updating`` collects values instead of
    comparing. ``verdicts``, ``constants`` and ``updates`` are what it saw, for the page and for writing baselines.
    """

    def __init__(self, test: str, path: Path, options: Options, *, updating: bool = False):
        self.test, self.path, self.options, self.updating = test, path, options, updating
        self.verdicts: list[dict] = []
        self.constants: list[dict] = []
        self.updates: dict[str, dict] = {}

    def __call__(self, model, data, optimizer=None, **options) -> AssumptionReport:
        """:meth:`check`, then :meth:`require`."""
        return self.require(self.check(model, data, optimizer, **options))

    def check(self, model, data, optimizer=None, **options) -> AssumptionReport:
        """``check_assumptions`` with the marker's ``limits`` and ``skip``; requires nothing."""
        from stability.assumptions.check import check_assumptions

        options = {"skip": self.options.skip} | options
        options["limits"] = {**self.options.limits, **(options.get("limits") or {})}
        return check_assumptions(model, data, optimizer, **options)

    def require(self, found: AssumptionReport | Assumption, *, allow: Iterable[str] = (), undecided: str | None = None):
        """``found`` itself, where its assumptions hold and their constants are at their baselines.

        Raises AssumptionViolated first; only what holds (or is allowed to fail) is then compared: ConstantMoved,
        BaselineMissing. A quantity measured on several twins counts with its worst one.
        """
        allowed = {*self.options.allow, *known_keys(allow, "allow")}
        report = found if isinstance(found, AssumptionReport) else AssumptionReport((found,))
        self.verdicts += [{"key": KEY_OF.get(v.assumption, v.assumption), **v.to_dict()} for v in report]
        failing = ("violated",) if (undecided or self.options.undecided) == "pass" else ("violated", "undecided")
        failed = [v for v in report if v.verdict in failing and KEY_OF[v.assumption] not in allowed]
        if failed:
            raise AssumptionViolated(
                "assumption violated: " + "; ".join(in_words(v) for v in sorted(failed, key=worst_first))
            )
        self._compare([_constant(key, report[key]) for key in report.keys if report[key].value == report[key].value])
        return found

    def constant(
        self, name: str, value: float, *, rtol: float | None = None, atol: float | None = None, layer: str = "",
        sample: int = -1, step: int = -1,
    ) -> float:  # fmt: skip
        """Any number of your own, held against its baseline; returns it."""
        given = {k: v for k, v in (("rtol", rtol), ("atol", atol)) if v is not None}
        self._compare([Constant(name, name, float(value), layer, sample, step)], given)
        return value

    def _compare(self, constants: list[Constant], given: Mapping[str, float] | None = None) -> None:
        if self.options.baseline is False:
            return
        if self.updating:
            self.updates |= {c.name: c.entry() for c in constants}
            self.constants += [
                {"name": c.name, "quantity": c.quantity, **c.entry(), "state": "updated"} for c in constants
            ]
            return
        table = read(self.path).get(self.test, {})
        missing, said = [], []
        for c in constants:
            state = {"name": c.name, "quantity": c.quantity, **c.entry()}
            if c.name not in table:
                missing.append(c.name)
                self.constants.append(state | {"state": "no baseline"})
                continue
            noise = CATALOGUE[c.name].noise if c.name in CATALOGUE else 0.0
            rtol, atol = tolerances(table, c.name, {**self.options.tolerance(c.name), **(given or {})}, noise)
            text = moved(c, table, rtol, atol)
            said += [text] if text else []
            state |= {"baseline": float(table[c.name]["value"]), "rtol": rtol, "atol": atol}
            self.constants.append(state | {"state": "moved" if text else "at its baseline"})
        advice = f"pytest --assumptions-update, and commit {self.path.name}"
        if said:
            raise ConstantMoved(f"constant moved: {'; '.join(said)}. If the change is meant: {advice}")
        if missing:
            raise BaselineMissing(f"no baseline for {', '.join(missing)} of {self.test} in {self.path}: run {advice}")


def _constant(key: str, v: Assumption) -> Constant:
    return Constant(known_key(key), v.quantity, v.value, v.layer, v.sample, v.step, v.replaced)
