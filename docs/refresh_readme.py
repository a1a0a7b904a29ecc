"""Put the main figure and the numbers of a finished digits study into the README: ``make readme`` after ``make study``."""

import re
import shutil
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"(<!-- finding:[^\n]*-->\n).*?(<!-- /finding -->)", re.DOTALL)


def with_finding(readme: str, finding: str) -> str:
    """The README text with ``finding`` between its markers.

    >>> with_finding("a\\n<!-- finding: x -->\\nold\\n<!-- /finding -->", "new")
    'a\\n<!-- finding: x -->\\nnew\\n<!-- /finding -->'
    """
    if not BLOCK.search(readme):
        raise ValueError("the README has no '<!-- finding: … -->' … '<!-- /finding -->' block")
    return BLOCK.sub(lambda match: f"{match[1]}{finding}\n{match[2]}", readme)


def main(results: Path) -> None:
    from studies import load_results
    from studies.report.paragraph import headline

    finding = textwrap.fill(headline(load_results(results)), 140, break_on_hyphens=False)
    (ROOT / "docs" / "figures").mkdir(exist_ok=True)
    shutil.copy(results / "figures" / "bounds.png", ROOT / "docs" / "figures" / "bounds.png")
    readme = ROOT / "README.md"
    readme.write_text(with_finding(readme.read_text(), finding))


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "results/digits"))
