"""The layers of the house: a module imports only what lies below it, and the auditing half knows no torch.

The rows and bans stand here as a table; the tests walk every import statement of ``harness/``, lazy ones
inside functions included, and name file and line of whoever broke a rule.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "harness"

ROWS: tuple[frozenset[str], ...] = (
    frozenset(
        {
            "errors",
            "cores",
            "terminal",
            "words",
            "strict_yaml",
            "store_url",
            "timestamp_url",
            "settings",
            "privacy",
            "signals",
            "config",
            "config_errors",
            "config_reference",
            "environment",
        }
    ),
    frozenset({"format"}),
    frozenset({"provenance"}),
    frozenset({"report", "audit", "stores", "sweeps"}),
    frozenset({"workers", "checkpoint", "determinism", "data", "model"}),
    frozenset({"tasks"}),
    frozenset({"training", "tracking"}),
    frozenset({"commands", "cli", "__main__"}),
)
"""Bottom row first; a unit imports its own row and those before it."""

INSIDE: dict[str, tuple[frozenset[str], ...]] = {
    "provenance": (frozenset({"signing"}), frozenset({"transparency"}), frozenset({"policy"})),
    "audit": (
        frozenset({"run"}),
        frozenset({"folders"}),
        frozenset({"replay"}),
        frozenset({"tiers"}),
        frozenset({"verification"}),
        frozenset({"diff", "lineage", "exports"}),
    ),
    "training": (
        frozenset({"telemetry"}),
        frozenset({"ranks"}),
        frozenset({"evaluation"}),
        frozenset({"elastic"}),
        frozenset({"step"}),
        frozenset({"statement"}),
        frozenset({"beginning"}),
        frozenset({"replay", "doctor"}),
    ),
}
"""The same of the packages inside of a unit, each alone in its row or beside such as do not need each other.

An import for types alone counts for nothing here. Modules that lie in no package are free.
"""

HEAVY = frozenset(
    {"torch", "numpy", "accelerate", "safetensors", "wandb", "tokenizers", "tqdm", "xxhash", "jinja2"}
)
"""What only `pip install '.[train]'` brings."""

WITHOUT_TORCH = frozenset().union(*ROWS[:4])
"""Units of the auditing half: not even a lazy import of `HEAVY`."""

CONFIG_UNITS = frozenset({"config", "settings"})
"""What imports pydantic."""

WITHOUT_PYDANTIC = frozenset(
    {
        "format",
        "provenance",
        "audit",
        "stores",
        "report",
        "cores",
        "terminal",
        "words",
        "errors",
        "strict_yaml",
        "store_url",
        "timestamp_url",
    }
)
"""On the path of `harness verify`, which starts in under 0.4 s."""


@dataclass(frozen=True)
class Import:
    """One imported module at one line."""

    file: Path
    line: int
    module: str
    types_only: bool


def imports_of(file: Path, root: Path) -> Iterator[Import]:
    """Every module that ``file`` names in an import statement, relative ones resolved against ``root``."""
    tree = ast.parse(file.read_text(encoding="utf-8"), filename=str(file))
    types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in node.body
    }
    package = ".".join(file.relative_to(root).parent.parts)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, base] if base else parents)
            # `from harness import config` names a module, `from harness.config import load` does not.
            whole = base == "harness" or base.removeprefix("harness.") in INSIDE
            names = [f"{base}.{alias.name}" for alias in node.names] if whole else [base]
        else:
            continue
        for name in names:
            yield Import(file, node.lineno, name, id(node) in types)


def all_imports(root: Path = ROOT) -> list[Import]:
    """The imports of every module of the package under ``root``."""
    files = sorted((root / "harness").rglob("*.py"))
    return [found for file in files for found in imports_of(file, root)]


def unit_of_file(file: Path, root: Path = ROOT) -> str:
    """The package or top module that ``file`` belongs to; `__init__` for the root of the package."""
    parts = file.relative_to(root / "harness").parts
    return parts[0].removesuffix(".py")


def unit_of_module(module: str) -> str | None:
    """The unit that ``module`` belongs to; None when it is not ours or is the root of the package."""
    parts = module.split(".")
    if parts[0] != "harness" or len(parts) == 1 or parts[1].startswith("__version__"):
        return None
    return parts[1]


def row_of(unit: str) -> int:
    """Index of the row that lists ``unit``."""
    for number, row in enumerate(ROWS):
        if unit in row:
            return number
    raise AssertionError(f"harness/{unit} is in no row of the map: add it to tests/test_import_direction.py")


def upward(root: Path = ROOT) -> list[str]:
    """Imports that point up the map, as `file:line imports module`."""
    broken = []
    for found in all_imports(root):
        source, target = unit_of_file(found.file, root), unit_of_module(found.module)
        if source == "__init__" or target is None:
            continue
        if row_of(target) > row_of(source):
            broken.append(_line(found, root))
    return broken


def upward_inside(root: Path = ROOT) -> list[str]:
    """Imports between packages of one unit that point up `INSIDE`, or sideways."""
    broken = []
    for found in all_imports(root):
        file, parts = found.file.relative_to(root / "harness").parts, found.module.split(".")
        if found.types_only or len(file) < 3 or len(parts) < 3 or parts[:2] != ["harness", file[0]]:
            continue
        rows = {name: number for number, row in enumerate(INSIDE[file[0]]) for name in row}
        source, target = file[1], parts[2]
        if target in rows and source != target and rows[target] >= rows[source]:
            broken.append(_line(found, root))
    return broken


def banned(units: frozenset[str], packages: frozenset[str], root: Path = ROOT) -> list[str]:
    """Imports of ``packages`` anywhere in ``units``."""
    return [
        _line(found, root)
        for found in all_imports(root)
        if unit_of_file(found.file, root) in units and found.module.split(".")[0] in packages
    ]


def _line(found: Import, root: Path) -> str:
    return f"{found.file.relative_to(root)}:{found.line} imports {found.module}"


def test_every_module_imports_only_its_own_row_and_the_rows_below() -> None:
    """Oracle: the map in docs/architecture.md, written down as `ROWS`."""
    assert upward() == []


def test_the_packages_of_a_unit_import_only_those_before_them() -> None:
    """Oracle: the order in which the docstring of each unit names its packages, written down as `INSIDE`."""
    assert upward_inside() == []


def test_every_unit_of_the_package_has_a_place_on_the_map() -> None:
    """Oracle: the folder itself; a new package must be put into a row before it can be imported."""
    for unit in (path for path in PACKAGE.iterdir() if path.is_dir()):
        inside = {path.parent.name for path in unit.glob("*/__init__.py")}
        assert inside == frozenset().union(*INSIDE.get(unit.name, ())), unit
    entries = [path for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()]
    for path in entries:
        if path.stem != "__init__":
            row_of(path.stem)


def test_the_auditing_half_imports_no_training_package_even_lazily() -> None:
    """Oracle: the list of what the extra `train` brings; `import` inside a function counts as well."""
    assert banned(WITHOUT_TORCH, HEAVY) == []


def test_the_path_of_verify_imports_no_pydantic_and_nothing_that_does() -> None:
    """Oracle: pydantic costs about 0.1 s of start-up; config and settings are what imports it."""
    assert banned(WITHOUT_PYDANTIC, frozenset({"pydantic"})) == []
    through = [
        _line(found, ROOT)
        for found in all_imports()
        if unit_of_file(found.file) in WITHOUT_PYDANTIC and unit_of_module(found.module) in CONFIG_UNITS
    ]
    assert through == []


def test_checkpoint_determinism_and_provenance_do_not_need_the_training_loop() -> None:
    """Oracle: docs/architecture.md: users who bring their own loop want these parts alone."""
    trainer = {"training", "tasks", "tracking"}
    own_loop = {"checkpoint", "determinism", "provenance", "data", "model"}
    broken = [
        _line(found, ROOT)
        for found in all_imports()
        if unit_of_file(found.file) in own_loop and unit_of_module(found.module) in trainer
    ]
    assert broken == []


def test_every_package_says_what_lives_in_it() -> None:
    """Oracle: the folder itself; whoever adds a module says there what it is for (verbs do in `--help`)."""
    for package in PACKAGE.glob("*/**/__init__.py"):
        if package.parent.name == "commands":
            continue
        told = ast.get_docstring(ast.parse(package.read_text(encoding="utf-8"))) or ""
        there = {path.stem for path in package.parent.glob("*.py")} - {"__init__"}
        assert {name for name in there if f"`{name}`" not in told} == set(), package


@pytest.mark.parametrize(
    ("source", "where"),
    [
        ("import harness.training.loop\n", "harness/format/bad.py"),
        ("def f():\n    from harness import training\n", "harness/format/bad.py"),
        ("from ..training import loop\n", "harness/format/bad.py"),
        ("def f():\n    from harness.tasks.task import Task\n", "harness/data/bad.py"),
    ],
)
def test_a_planted_import_that_points_up_is_found(tmp_path: Path, source: str, where: str) -> None:
    """Oracle: the planted line itself; a check that cannot fail would check nothing."""
    path = tmp_path / where
    path.parent.mkdir(parents=True)
    path.write_text(source)
    assert len(upward(tmp_path)) == 1


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from harness.audit.verification import verify\n", 1),
        ("def f():\n    from harness.audit import lineage\n", 1),
        ("from ..replay.segment import Segment\n", 1),
        ("from harness.audit import run\nfrom harness.audit.run import seen\n", 0),
        ("if TYPE_CHECKING:\n    from harness.audit.replay.segment import Segment\n", 0),
    ],
)
def test_a_planted_import_that_points_up_inside_of_a_unit_is_found(
    tmp_path: Path, source: str, found: int
) -> None:
    """Oracle: the planted line itself, in a package that may import one below it only."""
    path = tmp_path / "harness" / "audit" / "folders" / "bad.py"
    path.parent.mkdir(parents=True)
    path.write_text(source)
    assert len(upward_inside(tmp_path)) == found


def test_a_planted_lazy_import_of_torch_is_found(tmp_path: Path) -> None:
    """Oracle: the planted line itself."""
    path = tmp_path / "harness" / "audit" / "bad.py"
    path.parent.mkdir(parents=True)
    path.write_text("def f() -> None:\n    import torch.nn\n")
    assert banned(WITHOUT_TORCH, HEAVY, tmp_path) == ["harness/audit/bad.py:2 imports torch.nn"]


def loaded_by(statement: str) -> set[str]:
    """Top names in ``sys.modules`` after ``statement`` ran in a fresh interpreter."""
    code = (
        f"import sys, json; {statement}; print(json.dumps(sorted({{m.split('.')[0] for m in sys.modules}})))"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(json.loads(ran.stdout))


@pytest.mark.parametrize("verb", ["verify", "show", "lineage", "diff", "kernels", "report", "watch", "keys"])
def test_an_auditing_verb_loads_neither_a_training_package_nor_pydantic(verb: str) -> None:
    """Oracle: ``sys.modules`` of a fresh interpreter, which also sees what our dependencies import."""
    assert loaded_by(f"import harness.commands.{verb}") & (HEAVY | {"pydantic"}) == set()


def test_no_verb_imports_torch_before_it_is_called() -> None:
    """Oracle: ``sys.modules`` after importing every command module, so that `--help` is quick everywhere."""
    verbs = "from harness.cli import VERBS; import importlib"
    everything = f"{verbs}; [importlib.import_module('harness.commands.' + verb) for verb in VERBS]"
    assert loaded_by(everything) & HEAVY == set()
