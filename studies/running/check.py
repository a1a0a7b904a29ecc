"""``stability check``: the assumptions of theorem 3 at every point of a study, with an exit status for continuous integration.

Exit status: 0 all hold; 1 something is violated; 3 nothing is violated but something undecided; 2 input that cannot be used.
"""

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from stability.assumptions.catalogue import CATALOGUE, theorem_key, theorem_keys

if TYPE_CHECKING:
    from stability.assumptions.report import AssumptionReport
    from studies.definition.config import Point, Study


def add_options(command: argparse.ArgumentParser) -> None:
    """The options of ``check`` beyond STUDY, KEY=VALUE and --quick."""
    names = ", ".join(CATALOGUE)
    command.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    command.add_argument(
        "--junit", type=Path, metavar="FILE", help="write JUnit XML, a test case per point and assumption"
    )
    command.add_argument(
        "--limit",
        action="append",
        default=[],
        metavar="NAME=NUMBER",
        help=f"hold an assumption against another limit: {names}",
    )
    command.add_argument(
        "--allow", action="append", default=[], metavar="NAME", help="report it, but do not fail by it"
    )
    command.add_argument("--skip", action="append", default=[], metavar="NAME", help="do not check it")
    command.set_defaults(action=check_study)


def check_study(arguments: argparse.Namespace) -> int:
    """Check every point of the study and return the exit status."""
    from studies.definition.config import Study

    study = Study.from_toml(arguments.study, arguments.overrides, quick=arguments.quick)
    if arguments.junit:
        check_place(arguments.junit)
    options = {"limits": limits_from(arguments.limit), "skip": theorem_keys(arguments.skip, "--skip")}
    allowed = theorem_keys(arguments.allow, "--allow")
    reports: dict[Point, AssumptionReport] = {}
    for point in study.points():
        reports[point] = check_point(study, point, **options)
        if not arguments.json:
            print(f"{point}\n{reports[point]}\n", flush=True)
    counted = {point: report.without(allowed) for point, report in reports.items()}
    verdict = worst(report.verdict for report in counted.values())
    if arguments.json:
        rows = [{"point": str(point), **report.to_dict()} for point, report in reports.items()]
        from stability.assumptions.report import plain

        found = {"study": arguments.study, "verdict": verdict, "allowed": list(allowed), "points": rows}
        print(json.dumps(plain(found), ensure_ascii=False, indent=1))
    else:
        except_for = f", apart from {', '.join(allowed)}" if allowed else ""
        print(f"{arguments.study}: {verdict} at {len(reports)} points{except_for}")
    if arguments.junit:
        write_junit(arguments.junit, arguments.study, counted)
    from stability.assumptions.report import STATUS

    return STATUS[verdict]


def check_point(study: "Study", point: "Point", **options) -> "AssumptionReport":
    """The assumptions on what one point trains: its data, its initialisation, its replacements, its steps."""
    import stability
    from studies.kinds.twins import twins_of
    from studies.running.runner import check_device

    if study.kind != "twins":
        raise ValueError(
            f'check speaks of twins under full-batch metric steps (kind = "twins"); this study is of kind {study.kind!r}'
        )
    check_device(study)
    drawn, replacements = twins_of(study, point)
    at = study.at(point)
    steps = {"lr": at.lr, "mass": point.mass, "output_metric": at.output_metric, "scale": at.metric_scale}
    return stability.check_assumptions(
        drawn.model,
        (drawn.x, drawn.targets),
        steps,
        replacements=replacements,
        steps=at.steps,
        loss=at.loss,
        **options,
    )


def limits_from(texts: list[str]) -> dict[str, float]:
    """{assumption: limit} from NAME=NUMBER. ValueError for what is not of that form.

    >>> limits_from(["no_kernel_drift=0.5"])
    {'no_kernel_drift': 0.5}
    """
    found = {}
    for text in texts:
        name, equals, number = text.partition("=")
        try:
            value = float(number)
        except ValueError:
            value = None
        if not equals or value is None:
            raise ValueError(f"--limit takes NAME=NUMBER, such as no_kernel_drift=0.5; got {text!r}")
        found[theorem_key(name)] = value
    return found


def worst(verdicts) -> str:
    """ "violated" before "undecided" before "holds"."""
    found = set(verdicts)
    return next((v for v in ("violated", "undecided") if v in found), "holds")


def check_place(path: Path) -> None:
    """Raise ValueError where no file can be written, before the hours in which there is nothing to write."""
    if path.is_dir():
        reason = "it is a folder"
    elif not path.parent.is_dir():
        reason = f"there is no folder {path.parent}"
    elif not os.access(path if path.exists() else path.parent, os.W_OK):
        reason = "no permission"
    else:
        return
    raise ValueError(f"--junit {path} cannot be written: {reason}")


def write_junit(path: Path, study: str, reports: "dict[Point, AssumptionReport]") -> None:
    """JUnit XML: violated is a failure, undecided an error. ValueError where the file cannot be written."""
    from stability.assumptions.report import in_words

    cases = [(point, key, report[key]) for point, report in reports.items() for key in report.keys]
    counts = {verdict: sum(v.verdict == verdict for *_, v in cases) for verdict in ("violated", "undecided")}
    numbers = {"tests": str(len(cases)), "failures": str(counts["violated"]), "errors": str(counts["undecided"])}
    top = ElementTree.Element("testsuites", numbers)
    suite = ElementTree.SubElement(top, "testsuite", {"name": f"stability check {study}", **numbers})
    for point, key, found in cases:
        case = ElementTree.SubElement(suite, "testcase", {"classname": f"{study}.{point}", "name": key})
        if found.verdict != "holds":
            kind = "failure" if found.verdict == "violated" else "error"
            ElementTree.SubElement(case, kind, {"message": in_words(found), "type": found.verdict}).text = in_words(
                found
            )
    try:
        ElementTree.ElementTree(top).write(path, encoding="utf-8", xml_declaration=True)
    except OSError as error:
        raise ValueError(f"--junit {path} cannot be written: {error.strerror}") from error
