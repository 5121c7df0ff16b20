"""The house: a file imports only from lower floors or its own folder, and stays readable."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "fmjax"
FILES = sorted(PACKAGE.rglob("*.py"))
HOUSE = [
    {"types"},
    {"tree"},
    {"config", "nn", "weights"},
    {"models", "generation_config", "placing"},
    {"hub", "generate", "data", "environments", "metrics"},
    {"tasks"},
    {"train"},
    {"methods", "perf", "report"},
    {"recipes"},
    {"cli"},
    {"__main__"},
]
FLOORS = {room: floor for floor, rooms in enumerate(HOUSE) for room in rooms}


def place(path: Path) -> str:
    """The room a file is in: its folder under fmjax, or its own name."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> list[str]:
    """Full names of the modules a file imports, anywhere in it."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.append(node.module or "")
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            raise AssertionError(f"{path}: relative import")
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down(path):
    here = place(path)
    if here == "__init__":
        return
    for name in imports(path):
        parts = name.split(".")
        if parts[0] != "fmjax" or len(parts) < 2 or parts[1] == here:
            continue
        if parts[1] not in FLOORS:  # a name of fmjax/__init__.py, such as __version__
            assert here == "cli", f"{path} imports {name} from the package's front"
            continue
        assert FLOORS[parts[1]] < FLOORS[here], f"{path} imports {name}, which is not below it"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_third_parties_stay_in_their_rooms(path):
    tops = {name.split(".")[0] for name in imports(path)}
    if place(path) not in ("nn", "models"):
        assert "flax" not in tops
    if place(path) == "weights":
        assert not tops & {"jax", "flax", "torch", "optax", "chex"}
    assert not tops & {"torch", "tensorflow"}


@pytest.mark.parametrize("folder", ["fmjax", "experiments", "benchmarks", "tests"])
def test_files_are_short_and_well_named(folder):
    for path in (ROOT / folder).rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 600, path
        assert path.stem not in ("utils", "helpers", "common", "base"), path


def test_every_room_has_a_floor():
    rooms = {place(path) for path in FILES} - {"__init__"}
    assert rooms <= FLOORS.keys()


def test_train_step_has_no_branch():
    tree = ast.parse((PACKAGE / "train" / "step.py").read_text())
    makers = [
        n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "make_train_step"
    ]
    assert len(makers) == 1
    assert not [n for n in ast.walk(makers[0]) if isinstance(n, ast.If | ast.IfExp | ast.Match)]


def test_one_train_step():
    """Nothing outside train/step.py applies updates to weights."""
    for path in FILES:
        if path != PACKAGE / "train" / "step.py" and path != PACKAGE / "train" / "optim.py":
            assert "apply_updates" not in path.read_text(), path


def test_parameters_are_read_in_one_way():
    """`fmjax.nn.parameter`, which spares the time of module.param."""
    for path in FILES:
        if path.name != "parameter.py":
            assert "self.param(" not in path.read_text(), path


def test_import_is_light():
    """`import fmjax` loads none of the heavy libraries that only some functions need."""
    code = (
        "import sys, fmjax; "
        "print([m for m in ('torch', 'tensorflow', 'transformers', 'tensorflow_datasets', "
        "'sklearn', 'matplotlib', 'grain', 'orbax', 'rich', 'tyro', 'pandas') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_nothing_but_methods_knows_methods():
    """No file outside methods/ imports a method or has something named as one."""
    methods = {path.stem for path in FILES if place(path) == "methods"} - {"__init__"}
    for path in FILES:
        if place(path) in ("methods", "recipes", "cli"):
            continue
        assert not [name for name in imports(path) if name.startswith("fmjax.methods")], path
        nodes = list(ast.walk(ast.parse(path.read_text())))
        names = {node.id for node in nodes if isinstance(node, ast.Name)}
        names |= {node.attr for node in nodes if isinstance(node, ast.Attribute)}
        names |= {node.arg for node in nodes if isinstance(node, ast.arg | ast.keyword)}
        names |= {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        assert not names & methods, f"{path} names {names & methods}"


def test_methods_say_where_they_attach():
    for path in FILES:
        if place(path) != "methods" or path.stem == "__init__":
            continue
        module = importlib.import_module(f"fmjax.methods.{path.stem}")
        arrows = {"variables", "loss", "gradient", "update", "program"}
        assert set(module.ATTACHES) <= arrows, path
        assert module.ATTACHES, path
        assert module.__doc__, path
