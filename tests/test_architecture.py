"""The shape of the code: which floor imports which, what loads what, and what no file may contain."""

import ast
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
TREES = {name: ast.parse(path.read_text(encoding="utf-8"), name) for name, path in zip(NAMES, FILES, strict=True)}


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


@pytest.mark.parametrize("name", NAMES)
def test_imports_go_downwards_only(name):
    own = name.partition("/")[0]
    above = set(FLOORS[FLOORS.index(own) + 1 :])
    assert not imported(TREES[name]) & (above | {"tests", "benchmarks", "examples"})


def modules(tree: ast.AST) -> set[str]:
    """Full names of the modules that a file imports from."""
    nodes = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
    return {node.module for node in nodes if node.module} | {
        alias.name for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names
    }


@pytest.mark.parametrize("name", NAMES)
def test_rooms_of_a_floor_import_those_before_them(name):
    floor, _, inside = name.partition("/")
    order, room = ROOMS.get(floor), inside.partition("/")[0].removesuffix(".py")
    if order is None or room == "__init__":
        return
    others = {m.split(".")[1] for m in modules(TREES[name]) if m.startswith(floor + ".")}
    assert others <= set(order[: order.index(room) + 1])


@pytest.mark.parametrize("name", NAMES)
def test_no_cycles_of_relative_imports(name):
    assert not any(isinstance(node, ast.ImportFrom) and node.level for node in ast.walk(TREES[name])), (
        "write the full name"
    )


@pytest.mark.parametrize("name", NAMES)
def test_what_no_file_contains(name):
    tree = TREES[name]
    assert not any(isinstance(node, ast.Assert) for node in ast.walk(tree)), "raise ValueError instead of assert"
    assert ".cuda" not in calls(tree), "take device and dtype from the model"
    assert not calls(tree) & {
        "set_default_dtype",
        ".set_default_dtype",
        ".set_num_threads",
        ".simplefilter",
    } or name.startswith("studies/")
    if not name.startswith("studies/"):
        assert "print" not in calls(tree)
        assert not calls(tree) & {".manual_seed"} or uses_own_generator(tree)


def uses_own_generator(tree: ast.AST) -> bool:
    """Every .manual_seed(…) is on a torch.Generator(…) made on the spot: the global stream is not touched."""
    seeds = [n.func for n in ast.walk(tree) if isinstance(n, ast.Call) and getattr(n.func, "attr", "") == "manual_seed"]
    return all(isinstance(f.value, ast.Call) and getattr(f.value.func, "attr", "") == "Generator" for f in seeds)


@pytest.mark.parametrize("name", NAMES)
def test_files_are_short(name):
    assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) <= 400, "one idea per file: split it"


@pytest.mark.parametrize("name", NAMES)
def test_every_file_says_what_it_is(name):
    assert ast.get_docstring(TREES[name])


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
