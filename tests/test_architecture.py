"""The shape of the code: which floor imports which, what loads what, and what no file may contain."""

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = ["nt_kernel", "optim", "stability", "studies"]  # each imports only those before it
ROOMS = {
    "nt_kernel": ["house", "errors", "products", "mass", "capture", "factors", "spectra", "metric", "kernels"],
    "optim": [
        "steps",
        "options",
        "lyapunov",
        "riemannian",
        "stacks",
        "movements",
        "model_optimizer",
        "woodbury",
        "rlo",
        "naim",
        "naim_lyapunov",
        "minimizing_movement",
        "flow",
    ],
    "studies": [
        "catalogue",
        "definition",
        "results",
        "data",
        "experiments",
        "findings",
        "figures",
        "report",
        "kinds",
        "running",
        "sensitivity",
        "cli",
    ],
}
FILES = [path for floor in FLOORS for path in sorted((ROOT / floor).rglob("*.py"))]
NAMES = [str(path.relative_to(ROOT)) for path in FILES]


@functools.cache
def trees() -> dict[str, ast.Module]:
    return {name: ast.parse(path.read_text(encoding="utf-8"), name) for name, path in zip(NAMES, FILES, strict=True)}


def imported(tree: ast.AST) -> set[str]:
    """Top-level names of everything a file imports, anywhere in it, by statement or by import_module("name")."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) == "import_module":
            found |= {arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant)}
    return {name.partition(".")[0] for name in found}


def calls(tree: ast.AST) -> set[str]:
    """Names of everything a file calls: ``print`` for print(…), ``.cuda`` for x.cuda(…)."""
    functions = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return {f.id for f in functions if isinstance(f, ast.Name)} | {
        f".{f.attr}" for f in functions if isinstance(f, ast.Attribute)
    }


def test_the_reader_of_imports_reads():
    tree = ast.parse(
        "import a.b\nfrom c.d import e\nfrom . import f\n"
        "def g():\n  import h\n  import_module('i.j')\n  importlib.import_module('k')"
    )
    assert imported(tree) == {"a", "c", "h", "i", "k"}
    assert calls(ast.parse("print(x.cuda())")) == {"print", ".cuda"}


def test_every_floor_has_files():
    assert {name.partition("/")[0] for name in NAMES} == set(FLOORS)


def offenders(rule) -> dict[str, object]:
    """The files of which ``rule(name, tree)`` says something, with what it says."""
    return {name: found for name, tree in trees().items() if (found := rule(name, tree))}


def test_imports_go_downwards_only():
    def upwards(name, tree):
        above = set(FLOORS[FLOORS.index(name.partition("/")[0]) + 1 :])
        return imported(tree) & (above | {"tests", "benchmarks", "examples"})

    assert offenders(upwards) == {}


def modules(tree: ast.AST) -> set[str]:
    """Full names of the modules that a file imports from."""
    nodes = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
    return {node.module for node in nodes if node.module} | {
        alias.name for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names
    }


def test_rooms_of_a_floor_import_those_before_them():
    def later_rooms(name, tree):
        floor, _, inside = name.partition("/")
        order, room = ROOMS.get(floor), inside.partition("/")[0].removesuffix(".py")
        if order is None or room == "__init__":
            return set()
        others = {m.split(".")[1] for m in modules(tree) if m.startswith(floor + ".")}
        return others - set(order[: order.index(room) + 1])

    assert offenders(later_rooms) == {}


def test_no_cycles_of_relative_imports():
    def relative(_, tree):
        return ["write the full name" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level]

    assert offenders(relative) == {}


GLOBAL = {"set_default_dtype", ".set_default_dtype", ".set_num_threads", ".simplefilter", "print"}


def unwanted(name: str, tree: ast.AST) -> list[str]:
    """What a file of the packages must not contain."""
    called = calls(tree)
    found = ["raise ValueError instead of assert"] * any(isinstance(node, ast.Assert) for node in ast.walk(tree))
    found += ["take device and dtype from the model"] * (".cuda" in called)
    if not name.startswith("studies/"):
        found += sorted(called & GLOBAL)
        found += ["the global stream is seeded"] * (".manual_seed" in called and not uses_own_generator(tree))
    return found


def test_what_no_file_contains():
    assert offenders(unwanted) == {}


def test_what_no_file_contains_is_seen():
    code = "assert x\nx.cuda()\nprint(x)\ntorch.manual_seed(0)\ntorch.set_num_threads(1)"
    assert len(unwanted("optim/x.py", ast.parse(code))) == 5
    assert len(unwanted("studies/x.py", ast.parse(code))) == 2
    assert unwanted("optim/x.py", ast.parse("torch.Generator().manual_seed(0)")) == []


def uses_own_generator(tree: ast.AST) -> bool:
    """Every .manual_seed(…) is on a torch.Generator(…) made on the spot: the global stream is not touched."""
    seeds = [n.func for n in ast.walk(tree) if isinstance(n, ast.Call) and getattr(n.func, "attr", "") == "manual_seed"]
    return all(isinstance(f.value, ast.Call) and getattr(f.value.func, "attr", "") == "Generator" for f in seeds)


def test_files_are_short():
    lengths = {name: len((ROOT / name).read_text(encoding="utf-8").splitlines()) for name in NAMES}
    assert {name: n for name, n in lengths.items() if n > 400} == {}, "one idea per file: split it"


def test_every_file_says_what_it_is():
    assert offenders(lambda _, tree: not ast.get_docstring(tree)) == {}


def loaded_by(program: str) -> set[str]:
    """Top-level modules in memory after ``program`` ran in a fresh interpreter."""
    program += "\nimport sys; print(' '.join({name.partition('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


HEAVY = {"scipy", "pandas", "sklearn", "cvxpy", "matplotlib", "seaborn", "pyarrow", "pydantic", "jinja2", "ray"}


def test_the_packages_load_nothing_until_asked():
    assert not loaded_by("import nt_kernel, optim, stability, studies") & (HEAVY | {"torch", "numpy"})


def test_a_kernel_and_a_step_load_torch_only():
    program = """
import torch
from nt_kernel import generalized_ntk, empirical_ntk
from optim import Woodbury, woodbury_step
model = torch.nn.Linear(2, 1)
x = torch.ones(2, 2)
generalized_ntk(model, x).xi
empirical_ntk(model, x)
opt = Woodbury(model)
model(x).sum().backward()
opt.step()
"""
    loaded = loaded_by(program)
    assert "torch" in loaded
    assert not loaded & HEAVY


@pytest.mark.parametrize("package", FLOORS)
def test_public_names_exist_and_are_listed(package):
    module = __import__(package)
    for name in getattr(module, "__all__", []):
        assert getattr(module, name) is not None
        assert not (ROOT / package / f"{name}.py").exists(), "once imported, the file would stand in for the name"
    assert set(getattr(module, "__all__", [])) <= set(dir(module))
    with pytest.raises(AttributeError):
        module.no_such_name  # noqa: B018
