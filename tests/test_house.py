"""The rules of the house that a reader of one file cannot see: who imports whom, and how long."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ENGINE = sorted((ROOT / "lensfx").rglob("*.py"))
PASSES = sorted((ROOT / "passes").glob("*.py"))
LAYERS = ("graph", "capture", "rewrite", "analysis", "verify", "report", "run")

MAY_IMPORT = {
    "errors": set(),
    "graph": {"graph", "errors"},
    "capture": {"capture", "graph", "errors"},
    "rewrite": {"rewrite", "graph", "errors"},
    "analysis": {"analysis", "graph", "rewrite", "errors"},
    "verify": {"verify", "graph", "rewrite", "analysis", "errors"},
    "report": {"report", "graph", "rewrite", "analysis", "verify", "errors"},
    "run": {"run", *LAYERS, "errors"},
}
PUBLIC = {f"lensfx.{part}" for part in ("errors", "graph", "rewrite", "analysis", "verify")}
ARCHITECTURES = re.compile(
    r"gpt|llama|bert|gemma|mistral|qwen|(?<![a-z])t5|falcon|mixtral|nanogpt", re.IGNORECASE
)


def label(path: Path) -> str:
    return str(path.relative_to(ROOT))


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(path: Path) -> Iterator[tuple[str, ast.AST]]:
    """Every module a file imports, at its top or inside a function, with the statement."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # `from lensfx import passes` names a module by its last part.
            start = "." * node.level + (node.module or "")
            yield from ((f"{start}.{alias.name}", node) for alias in node.names)


def layers(path: Path) -> set[str]:
    """The parts of lensfx that a file imports; what comes from the root itself is ``."""
    found = set()
    for name, _ in imported(path):
        parts = name.split(".")
        if parts[0] == "lensfx":
            known = parts[1] if len(parts) > 1 else ""
            is_part = (ROOT / "lensfx" / known).is_dir() or (
                ROOT / "lensfx" / f"{known}.py"
            ).exists()
            found.add(known if known and (is_part or known == "passes") else "")
    return found


@pytest.mark.parametrize("layer", MAY_IMPORT)
def test_imports_go_one_way(layer: str) -> None:
    home = ROOT / "lensfx" / layer
    for path in [home.with_suffix(".py")] if not home.is_dir() else sorted(home.rglob("*.py")):
        allowed = MAY_IMPORT[layer]
        # The default pipeline is the one thing the engine takes from above.
        extra = {"passes"} if label(path) == "lensfx/rewrite/pipeline.py" else set()
        assert layers(path) <= allowed | extra, label(path)


def test_capture_is_imported_by_run_and_the_root_only() -> None:
    readers = {label(p) for p in ENGINE if "capture" in layers(p)}
    outside = {r for r in readers if not r.startswith(("lensfx/capture/", "lensfx/run/"))}
    assert outside <= {"lensfx/__init__.py"}


def test_imports_are_written_out() -> None:
    for path in ENGINE + PASSES:
        assert not [n for n, _ in imported(path) if n.startswith(".")], label(path)


def test_the_engine_takes_passes_in_one_function_only() -> None:
    places = []
    for path in ENGINE:
        for function in ast.walk(tree_of(path)):
            if isinstance(function, ast.FunctionDef):
                inside = {id(n) for n in ast.walk(function)}
                names = [n for n, s in imported(path) if id(s) in inside]
                places += [(label(path), function.name) for n in names if _is_passes(n)]
        total = sum(_is_passes(n) for n, _ in imported(path))
        assert total == sum(place == label(path) for place, _ in places), label(path)
    assert places == [("lensfx/rewrite/pipeline.py", "default")]


def _is_passes(name: str) -> bool:
    return name == "lensfx.passes" or name.startswith("lensfx.passes.")


@pytest.mark.parametrize("path", PASSES, ids=label)
def test_passes_are_written_against_public_names(path: Path) -> None:
    for name, statement in imported(path):
        module = name.rpartition(".")[0] if isinstance(statement, ast.ImportFrom) else name
        if module.split(".")[0] != "lensfx":
            continue
        if path.name == "__init__.py":
            assert module.startswith("lensfx.passes."), name
        else:
            assert module in PUBLIC, f"{label(path)} imports {name}"


def test_nobody_imports_the_second_copy_of_the_passes() -> None:
    folders = ("lensfx", "passes", "tests", "examples", "benchmarks")
    for path in sorted(p for f in folders for p in (ROOT / f).rglob("*.py")):
        assert not [n for n, _ in imported(path) if n.split(".")[0] == "passes"], label(path)
    assert "passes" not in sys.modules


def test_importing_the_package_loads_no_pass_and_no_big_library() -> None:
    heavy = ("lensfx.passes", "passes", "transformers", "hypothesis")
    code = f"import sys, lensfx; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_passes_lists_every_pass_file() -> None:
    names = {p.stem for p in PASSES} - {"__init__"}
    source = tree_of(ROOT / "passes" / "__init__.py")
    listed = {
        n.module.rpartition(".")[2]: [a.name for a in n.names]
        for n in source.body
        if isinstance(n, ast.ImportFrom) and n.module
    }
    assert set(listed) == names
    for stem, classes in listed.items():
        assert stem.replace("_", "") in [name.lower() for name in classes]
    from lensfx import passes

    assert sorted(passes.__all__) == sorted(c for classes in listed.values() for c in classes)


@pytest.mark.parametrize("path", ENGINE + PASSES, ids=label)
def test_files_are_short(path: Path) -> None:
    most = 120 if path in PASSES else 400
    lines = path.read_text(encoding="utf-8").count("\n")
    assert lines <= most


@pytest.mark.parametrize("path", ENGINE + PASSES, ids=label)
def test_functions_are_short(path: Path) -> None:
    for node in ast.walk(tree_of(path)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            last = node.end_lineno or node.lineno
            length = last - body[0].lineno + 1 if body else 0
            assert length <= 40, f"{node.name} has {length} lines"


def test_no_architecture_is_named() -> None:
    exempt = ("lensfx/demo/", "lensfx/cli.py")
    for path in (p for p in ENGINE + PASSES if not label(p).startswith(exempt)):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            assert not ARCHITECTURES.search(line), f"{label(path)}:{number}: {line.strip()}"


@pytest.mark.parametrize("path", ENGINE, ids=label)
def test_what_is_public_has_a_docstring(path: Path) -> None:
    tree = tree_of(path)
    bare = [] if ast.get_docstring(tree) or not tree.body else ["the module"]
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            bare += [node.name] if not ast.get_docstring(node) else []
            bare += [f"{node.name}.{m}" for m in _undocumented(node)]
    assert not bare


def _undocumented(node: ast.AST) -> list[str]:
    if not isinstance(node, ast.ClassDef):
        return []
    methods = [n for n in node.body if isinstance(n, ast.FunctionDef)]
    return [n.name for n in methods if not n.name.startswith("_") and not ast.get_docstring(n)]


def test_what_a_module_exports_exists() -> None:
    for path in ENGINE:
        tree = tree_of(path)
        exported = [
            ast.literal_eval(n.value)
            for n in tree.body
            if isinstance(n, ast.Assign) and getattr(n.targets[0], "id", "") == "__all__"
        ]
        names = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
        names |= {n.name for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
        names |= {n.rpartition(".")[2] for n, _ in imported(path)}
        for name in exported[0] if exported else []:
            assert name in names, f"{label(path)} exports {name}"


def test_the_wheel_has_every_package() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    block = re.search(r"^packages = \[(.*?)\]", text, re.DOTALL | re.MULTILINE)
    assert block is not None
    listed = set(re.findall(r'"([\w.]+)"', block[1]))
    folders = {p.parent.relative_to(ROOT) for p in ENGINE if p.name == "__init__.py"}
    there = {".".join(folder.parts) for folder in folders} | {"lensfx.passes"}
    # Installed under a name of its own, outside the package that imports torch.
    assert listed == there - {"lensfx.testing.plugin"} | {"lensfx_pytest"}
    bare = {p.parent for p in ENGINE} - {p.parent for p in ENGINE if p.name == "__init__.py"}
    assert not bare
