"""All verdicts and constants of a test run on one page, as HTML or JSON."""

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path

from stability.assumptions.report import plain
from stability.assumptions.verdict import place_of

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem; color: #1a1a1a }
table { border-collapse: collapse; width: 100%; margin: .5rem 0 1.5rem }
th, td { text-align: left; padding: .25rem .75rem .25rem 0; border-bottom: 1px solid #ddd; vertical-align: top }
td.number { font-variant-numeric: tabular-nums; white-space: nowrap }
.violated, .moved, .failed { color: #b00020; font-weight: 600 } .undecided, .no { color: #8a5a00; font-weight: 600 }
.holds, .passed { color: #1b6e3c } pre { white-space: pre-wrap; background: #f6f6f6; padding: .75rem }
"""


def write_page(path: Path, kind: str, seen: Sequence[dict]) -> None:
    """``seen``: one record per test that used the fixture (``stability.pytest_plugin``). ``kind``: "html" or "json"."""
    text = json.dumps(plain({"tests": list(seen)}), ensure_ascii=False, indent=1) if kind == "json" else html(seen)
    path.write_text(text + "\n", encoding="utf-8")


def html(seen: Sequence[dict]) -> str:
    """One section per test: outcome, failure, its verdicts and constants."""
    parts = [
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Assumptions</title>',
        f"<style>{_STYLE}</style><h1>Assumptions</h1>",
        f"<p>{len(seen)} tests used the fixture <code>assumption</code>; "
        f"{sum(record['outcome'] == 'failed' for record in seen)} failed.</p>",
    ]
    for record in seen:
        parts.append(
            f'<h2>{escape(record["nodeid"])} <span class="{record["outcome"]}">{record["outcome"]}</span></h2>'
        )
        if record["message"]:
            parts.append(f"<pre>{escape(record['failure'])}: {escape(record['message'])}</pre>")
        if record["verdicts"]:
            columns = (
                "assumption",
                "verdict",
                "quantity",
                "value",
                "threshold",
                "margin",
                "where",
                "reason",
                "equations",
            )
            parts.append(_table(columns, [_verdict(v) for v in record["verdicts"]]))
        if record["constants"]:
            columns = ("constant", "state", "value", "baseline", "rtol", "atol", "where")
            parts.append(_table(columns, [_constant(c) for c in record["constants"]]))
    return "".join(parts) + "</html>"


def _verdict(v: dict) -> list:
    place = place_of(v["layer"], v["sample"], v["step"], v["replaced"])
    numbers = (v["value"], v["threshold"], v["margin"])
    return [v["assumption"], v["verdict"], v["quantity"], *numbers, place, v["reason"], v["equation"]]


def _constant(c: dict) -> list:
    place = place_of(*(c.get(k, d) for k, d in (("layer", ""), ("sample", -1), ("step", -1), ("replaced", -1))))
    return [c["name"], c["state"], c["value"], *(c.get(k, "") for k in ("baseline", "rtol", "atol")), place]


def _table(columns: Sequence[str], rows: Sequence[Sequence]) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _cell(value) -> str:
    if isinstance(value, float):
        return f'<td class="number">{value:.5g}</td>'
    state = str(value).partition(" ")[0]
    mark = f' class="{state}"' if state in ("violated", "undecided", "holds", "moved", "no") else ""
    return f"<td{mark}>{escape(str(value))}</td>"
