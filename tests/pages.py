"""The pages that tests of the documentation read: README.md and docs/*.md, as Markdown tokens."""

from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
NAMES = [page.name for page in PAGES]
PARSER = MarkdownIt("commonmark").enable("table")
TOKENS = {page: PARSER.parse(page.read_text(encoding="utf-8")) for page in PAGES}
CHILDREN = [(page, child) for page, tokens in TOKENS.items() for token in tokens for child in token.children or []]
INLINE = [(page, child.content) for page, child in CHILDREN if child.type == "code_inline"]


def blocks_of(page: Path, language: str) -> list[str]:
    return [t.content for t in TOKENS[page] if t.type == "fence" and t.info == language]
