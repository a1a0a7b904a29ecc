"""The pages of the API reference, from the packages' own lists of public names: one page for each floor and room.

A name is described once, on the page of the package in which it is defined and under the shortest path that is public; other
paths to it are named there. Names that the pages import by the path of a module stand below those of its package.
"""

import ast
import doctest
import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

FLOORS = ("nt_kernel", "optim", "stability", "studies")
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Entry:
    """One public thing: the path it is described under, other public paths to it, and what it is."""

    path: str
    thing: object
    home: str
    aliases: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.path.rpartition(".")[2]

    @property
    def summary(self) -> str:
        """The first sentence of its docstring, or of the words at a constant."""
        text = (inspect.getdoc(self.thing) if _describable(self.thing) else constant_words(self.home, self.name)) or ""
        first = " ".join(text.partition("\n\n")[0].split())
        return re.split(r"(?<=[^.\s]{2}[.:])\s(?=[A-Z`])|:$", first)[0].rstrip(":")


@dataclass
class Room:
    """The page of one package: its public names, and those that the documentation imports by their module."""

    package: str
    what: str
    public: list[Entry] = field(default_factory=list)
    by_module: list[Entry] = field(default_factory=list)
    elsewhere: list[Entry] = field(
        default_factory=list
    )  # of a floor: described on the page of the room that defines them


def packages() -> list[ModuleType]:
    """The four floors and every package in them."""
    found = []
    for floor in FLOORS:
        top = importlib.import_module(floor)
        found.append(top)
        for item in pkgutil.walk_packages(top.__path__, f"{floor}."):
            if item.ispkg:
                found.append(importlib.import_module(item.name))
    return found


def _describable(thing: object) -> bool:
    return inspect.isclass(thing) or inspect.isroutine(thing)


def constant_words(package: str, name: str) -> str:
    """What stands at a constant of a package or module: the string below it, or the comment above or beside it.

    >>> constant_words("studies.figures", "COLUMN")
    'Width of one column of a two-column page, inches.'
    """
    home = importlib.import_module(package)
    files = sorted(Path(home.__path__[0]).glob("*.py")) if hasattr(home, "__path__") else [Path(home.__file__)]
    for path in files:
        text = path.read_text(encoding="utf-8")
        body = ast.parse(text).body
        for node, after in zip(body, [*body[1:], None], strict=True):
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            if not any(getattr(target, "id", "") == name for target in targets):
                continue
            if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                return inspect.cleandoc(str(after.value.value))
            above = text.splitlines()[: node.lineno - 1]
            comment = []
            while above and above[-1].startswith("#"):
                comment.insert(0, above.pop().lstrip("# "))
            beside = text.splitlines()[node.lineno - 1].partition("  # ")[2]
            return " ".join(comment) or beside
    return ""


def public_paths(modules: Iterable[ModuleType]) -> dict[str, object]:
    """Every name in the ``__all__`` of a package, by its path."""
    return {
        f"{module.__name__}.{name}": getattr(module, name)
        for module in modules
        for name in getattr(module, "__all__", ())
    }


def entries(paths: Mapping[str, object]) -> list[Entry]:
    """One entry for each thing, under its shortest path on the floor where it is defined.

    >>> import collections
    >>> [(e.path, e.aliases) for e in entries(dict.fromkeys(["a.b.deque", "b.deque"], collections.deque))]
    [('b.deque', ('a.b.deque',))]
    """
    same: dict[object, list[str]] = {}
    for path, thing in paths.items():
        same.setdefault(id(thing) if _describable(thing) else path, []).append(path)
    found = []
    for group in same.values():
        thing = paths[group[0]]
        home = thing.__module__ if _describable(thing) else group[0].rpartition(".")[0]
        floor = home.partition(".")[0]
        path, *others = sorted(group, key=lambda p: (p.partition(".")[0] != floor, p.count("."), p))
        found.append(Entry(path, thing, home, tuple(others)))
    return found


def imported_by_module(texts: Iterable[str]) -> list[tuple[str, str]]:
    """(module, name) of every ``from MODULE import NAME`` of ours in the Python blocks of pages, in order, each once.

    >>> imported_by_module(["```python\\n>>> from optim.flow import metric_flow\\n>>> import torch\\n```"])
    [('optim.flow', 'metric_flow')]
    """
    found: dict[tuple[str, str], None] = {}
    for text in texts:
        for language, block in FENCE.findall(text):
            if language != "python":
                continue
            examples = doctest.DocTestParser().get_examples(block) if ">>>" in block else []
            source = "".join(example.source for example in examples) if examples else block
            for node in ast.walk(ast.parse(source)):
                if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in FLOORS:
                    found |= {(node.module, alias.name): None for alias in node.names}
    return list(found)


def rooms(texts: Iterable[str]) -> list[Room]:
    """The pages, in the order of the floors; ``texts`` are the pages whose imports count."""
    modules = packages()
    pages = {m.__name__: Room(m.__name__, inspect.getdoc(m).partition("\n\n")[0].replace("\n", " ")) for m in modules}
    seen = set()
    for entry in entries(public_paths(modules)):
        package = entry.home if entry.home in pages else entry.home.rpartition(".")[0]
        pages[package].public.append(entry)
        if package != entry.path.rpartition(".")[0]:
            pages[entry.path.rpartition(".")[0]].elsewhere.append(entry)
        seen.add(id(entry.thing))
    for module, name in imported_by_module(texts):
        thing = getattr(importlib.import_module(module), name)
        if id(thing) in seen or inspect.ismodule(thing):
            continue
        seen.add(id(thing))
        package = module if module in pages else module.rpartition(".")[0]
        pages[package].by_module.append(Entry(f"{module}.{name}", thing, module))
    for page in pages.values():
        page.elsewhere.sort(key=lambda e: e.name.lower())
        page.public.sort(key=lambda e: e.name.lower())
        page.by_module.sort(key=lambda e: e.path.lower())
    return [page for page in pages.values() if page.public or page.by_module or page.elsewhere]


def page_text(room: Room) -> str:
    """A page: the package in one line, a line for each name, and what autodoc says of each."""
    lines = [f"# {room.package}", "", _escaped(room.what), ""]
    for title, listed in (("", room.public), ("By the path of their module", room.by_module)):
        if not listed:
            continue
        lines += [f"## {title}", ""] if title else []
        lines += ["| name | |", "|---|---|"]
        lines += [f"| [`{e.name}`](#{e.path}) | {_escaped(e.summary)} |" for e in listed]
        lines += [""]
        for entry in listed:
            lines += ["```{eval-rst}", *_directive(entry), "```", ""]
    if room.elsewhere:
        lines += [f"## Imported from {room.package}, described with its room", "", "| name | |", "|---|---|"]
        lines += [f"| [`{e.name}`](#{e.path}) | {_escaped(e.summary)} |" for e in room.elsewhere]
        lines += [""]
    return "\n".join(lines)


def _directive(entry: Entry) -> list[str]:
    if not _describable(entry.thing):  # autodoc would describe its type
        text = constant_words(entry.home, entry.name).splitlines()
        return [
            f".. py:data:: {entry.path}",
            f"   :type: {type(entry.thing).__name__}",
            "",
            *(f"   {line}" for line in text),
        ]
    kind = "class" if inspect.isclass(entry.thing) else "function"
    lines = [f".. auto{kind}:: {entry.path}"]
    if kind == "class":
        lines += ["   :members:"]
    if entry.aliases:
        lines += ["", "   Also as " + ", ".join(f"``{path}``" for path in entry.aliases) + "."]
    return lines


def _escaped(text: str) -> str:
    """A sentence of a docstring in a Markdown table: code as code, bars and stars as they stand.

    >>> _escaped(":class:`~optim.RLO` of ``x``: |e| ≤ a*b")
    '`RLO` of `x`: \\\\|e\\\\| ≤ a\\\\*b'
    """
    text = re.sub(r":\w+:`~?([^`]+)`", lambda m: f"`{m[1].rpartition('.')[2]}`", text).replace("``", "`")
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(p.replace("|", "\\|") if p.startswith("`") else re.sub(r"([|*_<\[])", r"\\\1", p) for p in parts)


def write(folder: Path, texts: Iterable[str]) -> list[Path]:
    """The pages into ``folder``, one file for each and ``index.md`` over them; files that are as they were are left alone."""
    folder.mkdir(parents=True, exist_ok=True)
    found = rooms(texts)
    listing = [
        "# API reference",
        "",
        "Every public name, on the page of the package that defines it. Import it by the path it is listed under.",
        "",
        "| package | |",
        "|---|---|",
        *(f"| [`{room.package}`]({room.package}.md) | {_escaped(room.what)} |" for room in found),
        "",
        "```{toctree}",
        ":hidden:",
        "",
        *(room.package for room in found),
        "```",
        "",
    ]
    texts_by_name = {f"{room.package}.md": page_text(room) for room in found} | {"index.md": "\n".join(listing)}
    for stale in set(folder.glob("*.md")) - {folder / name for name in texts_by_name}:
        stale.unlink()
    for name, text in texts_by_name.items():
        path = folder / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
    return [folder / name for name in texts_by_name]
