"""What is wrong with a report, told without a browser and with one. An empty list is a sound page."""

from __future__ import annotations

import re
from collections import Counter
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

VOID = {"meta", "link", "br", "img", "hr", "input"}
HEADINGS = ("h1", "h2", "h3", "h4", "h5", "h6")
LEAST_TYPE, LEAST_FIGURE_TYPE = 14, 9  # px at 400 px: running text; the smallest type inside a figure
NARROW, WIDE = 400, 1400
MOST_PAGES = 60


class Page(HTMLParser):
    """Elements with their attributes, in order, and the words; says which tags do not nest."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.astray: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.astray += self.open

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if not self.open or self.open[-1] != tag:
            self.astray.append(tag)
        else:
            self.open.pop()

    def handle_data(self, data):
        self.words.append(data)


def static_faults(text: str) -> list[str]:
    """Of the source: nesting, anchors, addresses outside the page, scripts, names of pictures, headings, contents."""
    page = Page(text)
    tags = [tag for tag, _ in page.elements]
    ids = Counter(a["id"] for _, a in page.elements if "id" in a)
    found = [f"<{tag}> does not nest" for tag in page.astray]
    found += [f"id {name} {count} times" for name, count in ids.items() if count > 1]
    for tag, attributes in page.elements:
        for key in ("href", "xlink:href", "src", "srcset", "data", "action", "poster"):
            value = attributes.get(key)
            if value and value.startswith("#"):
                found += [] if value[1:] in ids else [f"{tag} points to {value}, which is not there"]
            elif value and not value.startswith("data:"):
                found.append(f"{tag} {key}={value} leads out of the page")
        found += [f"{tag} has {key}" for key in attributes if key.startswith("on")]
        if tag == "img" and not attributes.get("alt"):
            found.append("a picture without alt text")
        if tag == "svg" and not (attributes.get("role") == "img" and len(attributes.get("aria-label") or "") > 10):
            found.append("a figure without a name for screen readers")
        if tag == "th" and "scope" not in attributes:
            found.append("a table heading without scope")
    found += ["a script"] * ("script" in tags)
    found += ["a style from elsewhere"] * ("@import" in text)
    found += [f"url({address}) leads out" for address in re.findall(r"url\(([^)#][^)]*)\)", text)]
    found += [f"#{name} is no selector" for name in re.findall(r"#([\w.+-]+) \*\{", text) if re.search(r"[.+]", name)]
    levels = [int(tag[1]) for tag in tags if tag in HEADINGS]
    found += ["not one h1, first"] * (levels[:1] != [1] or levels.count(1) != 1)
    found += [f"h{b} after h{a}" for a, b in pairwise(levels) if b > a + 1]
    root = next((a for tag, a in page.elements if tag == "html"), {})
    found += ["no language"] * (not root.get("lang"))
    found += ["no viewport"] * ("viewport" not in {a.get("name") for tag, a in page.elements if tag == "meta"})
    found += ["no policy"] * ("default-src 'none'" not in text)
    finding = text.partition('class="finding"')[2].partition("</p>")[0]
    found += ["no finding in numbers"] * (not re.search(r"\d", re.sub(r"<[^>]*>", "", finding)))
    found += ["no contents"] * ("nav" not in tags)
    again = text.partition('id="again"')[2]
    found += ["no command to reproduce"] * (not re.search(r"<pre>stability (run|resume|predict) \w+", again))
    figures = re.findall(r"<figure.*?</figure>", text, flags=re.DOTALL)
    found += ["no figure"] * (not figures)
    captions = [
        re.sub(r"<[^>]*>", "", "".join(re.findall(r"<figcaption>(.*?)</figcaption>", f, re.DOTALL))) for f in figures
    ]
    found += [f"caption says too little: {c!r}" for c in captions if len(c) < 80]
    found += [
        f"caption does not say what to see: {c[:60]!r}"
        for c in captions
        if not re.search(r"\b[Ll]ook (for|at|whether|how|where)\b|\bIf a\b", c)
    ]
    found += ["nan reaches the reader"] * any(re.search(r"\bnan\b", word) for word in page.words)
    found += [word for word in ("a-machine-name",) if word in text]
    return found


MEASURE = """() => {
  const root = document.documentElement, wide = root.clientWidth, found = [];
  if (root.scrollWidth > wide) {
    const out = [...document.querySelectorAll('body *')].filter(e => !e.closest('.wide') && !e.closest('pre')
      && e.getBoundingClientRect().right > wide + 1).slice(0, 3).map(e => e.tagName + '.' + e.className);
    found.push(`the page is ${root.scrollWidth} px wide in a window of ${wide}: ${out}`);
  }
  for (const link of document.querySelectorAll('nav a')) {
    const target = document.getElementById(link.getAttribute('href').slice(1));
    if (!target || !target.getClientRects().length) found.push('no target for ' + link.textContent);
  }
  if (!document.querySelectorAll('nav a').length) found.push('no contents');
  for (const picture of document.querySelectorAll('svg[role=img], img')) {
    const name = picture.id || picture.alt, box = picture.getBoundingClientRect();
    if (box.width < 8 || box.height < 8) found.push(`${name} has no size`);
    const frame = (picture.closest('.wide') || picture).getBoundingClientRect();
    if (frame.left < -1 || frame.right > wide + 1) found.push(`${name} leaves the window`);
    if (frame.left - box.left > 1) found.push(`${name} begins left of its frame`);
  }
  const size = e => parseFloat(getComputedStyle(e).fontSize);
  if (size(document.body) < LEAST) found.push(`type of ${size(document.body)} px`);
  for (const e of document.querySelectorAll('p, li, td, th, dd, figcaption, pre'))
    if (size(e) < LEAST && e.getClientRects().length) { found.push(`${e.tagName} of ${size(e)} px`); break; }
  for (const svg of document.querySelectorAll('figure svg[role=img]')) {
    const scale = svg.getBoundingClientRect().width / svg.viewBox.baseVal.width;
    if (6.5 * scale < SMALL) found.push(`${svg.id}: type of ${6.5 * scale} px`);
  }
  return found;
}"""


def browser_faults(browser, path: Path, width: int, scripts: bool = False) -> list[str]:
    """Of the page as drawn in a window of ``width`` pixels: messages, requests, boxes, type. ``scripts``: JavaScript is on."""
    context = browser.new_context(viewport={"width": width, "height": 800}, java_script_enabled=scripts)
    page = context.new_page()
    found: list[str] = []
    page.on(
        "console",
        lambda message: message.type in ("error", "warning") and found.append(f"{message.type}: {message.text}"),
    )
    page.on("pageerror", lambda error: found.append(f"error: {error}"))
    page.on("requestfailed", lambda request: found.append(f"failed: {request.url[:80]}"))
    page.on("request", lambda r: r.url.split(":")[0] not in ("file", "data") and found.append(f"request: {r.url[:80]}"))
    page.goto(path.as_uri(), wait_until="load")
    measure = MEASURE.replace("LEAST", str(LEAST_TYPE)).replace("SMALL", str(LEAST_FIGURE_TYPE))
    found += page.evaluate(measure)
    context.close()
    return found


def printed_pages(browser, path: Path) -> int:
    """Pages of A4 that a print has."""
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(path.as_uri())
    pdf = page.pdf(prefer_css_page_size=True)
    context.close()
    return len(re.findall(rb"/Type\s*/Page\b(?!s)", pdf))
