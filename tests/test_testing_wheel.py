"""A pass written outside the repository, tested with what an installed wheel brings."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

PASS = '''
from dataclasses import dataclass

import torch
from lensfx.rewrite import Any, Maybe, Op, Param, Pass, Rule
from lensfx.verify import Exact

aten = torch.ops.aten
LINEAR = Op(
    "linear",
    (aten.linear.default,),
    {"input": Any("x"), "weight": Param("W", axes=2), "bias": Maybe(Param("b"))},
)


def unless(m):
    return "there is no bias" if m.b is None else None


def replace(m, edit):
    at = edit.before(m.linear)
    bare = at.call(aten.linear.default, m.x, m.W)
    at.replace(m.linear, at.call(aten.add.Tensor, bare, m.b))


def forget(m, edit):
    edit.before(m.linear).set(m.linear, bias=None)


@dataclass(frozen=True)
class BiasOut(Pass):
    """linear(x; W, b)  =  linear(x; W) + b"""

    rules = (Rule(LINEAR, unless, replace),)
    contract = Exact()
    needs = ("canonical-linear",)


@dataclass(frozen=True)
class BiasLost(Pass):
    rules = (Rule(LINEAR, unless, forget),)
    contract = Exact()
'''

TESTS = """
import lensfx
import pytest
from hypothesis import given, settings
from lensfx.testing import inputs_for, models, pass_machine, pipelines, programs
from lensfx.verify import UpToLogitShift, prove
from mine import BiasLost, BiasOut

DEFAULT = lensfx.Pipeline.default().passes
FEW = settings(max_examples=6)
SMALL = programs(only=["mlp", "norm", "bias", "head"])
HEADS = programs(only=["norm"], head=["untied", "biased"])


def test_the_package_is_the_installed_one():
    assert "installed" in lensfx.__file__
    assert settings.default.derandomize


@FEW
@given(program=SMALL, pipeline=pipelines((BiasOut(), *DEFAULT)))
def test_it_keeps_its_contract(program, pipeline, equivalent):
    rewritten = pipeline.run(program)
    prove(rewritten)
    equivalent(program, rewritten, up_to=UpToLogitShift())


TestOrders = pass_machine((BiasOut(), *DEFAULT[:3]), programs=HEADS).TestCase
TestOrders.settings = settings(TestOrders.settings, max_examples=5)


class TestWrong(pass_machine((BiasOut(), BiasLost()), programs=HEADS).TestCase):
    settings = settings(TestOrders.settings, max_examples=20)


@FEW
@given(program=HEADS)
def test_the_wrong_one(program):
    prove(lensfx.Pipeline((BiasLost(),)).run(program))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the wheel of this tree is installed into, built from a copy of the sources."""
    base = tmp_path_factory.mktemp("wheel")
    source, target = base / "source", base / "installed"
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("lensfx", "passes"):
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    install = "pip install -q --no-deps --no-build-isolation --no-index --target"
    command = [sys.executable, "-m", *install.split(), str(target), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target


def run(installed: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": f"{installed}{os.pathsep}{folder}"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_a_user_s_pass_is_tested_from_an_installed_wheel(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(PASS)
    (tmp_path / "test_mine.py").write_text(TESTS)
    profile = "--hypothesis-profile=lensfx-ci"
    done = run(installed, tmp_path, profile, "-W", "error")
    text = done.stdout + done.stderr
    assert "2 failed, 3 passed" in text, text
    for name in ("test_the_wrong_one", "TestWrong"):
        assert f"test_mine.py::{name}" in text
    assert "captured(Recipe(head='biased'))" in text
    assert "state.run_bias_lost()" in text
    assert "bias-lost broke its contract exact" in text
    again = run(installed, tmp_path, profile, "-W", "error", "-k", "wrong or Wrong").stdout
    assert blobs(again) == blobs(text)
    assert blobs(text)


def blobs(text: str) -> list[str]:
    """What hypothesis prints of the examples that fail, with the bytes that draw them again."""
    marks = ("state.", "program=", "@reproduce_failure", "You can reproduce")
    return [line.strip() for line in text.splitlines() if any(m in line for m in marks)]


def test_the_plugin_loads_neither_torch_nor_hypothesis(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "test_nothing.py").write_text(
        "import sys\n\n\ndef test_nothing():\n"
        "    assert 'lensfx_pytest' in sys.modules\n"
        "    assert not {'torch', 'lensfx', 'hypothesis'} & set(sys.modules)\n"
    )
    done = run(installed, tmp_path)
    assert "1 passed" in done.stdout, done.stdout + done.stderr


def test_without_hypothesis_only_the_strategies_are_missing(
    installed: Path, tmp_path: Path
) -> None:
    (tmp_path / "hypothesis.py").write_text("raise ImportError('not installed')\n")
    (tmp_path / "test_bare.py").write_text(
        "import lensfx.testing as kit\nimport pytest\nimport torch\nfrom lensfx import LensError\n"
        "\n\ndef test_bare(equivalent):\n"
        "    model = kit.Recipe(head='tied').build()\n"
        "    equivalent(model, model, inputs=[torch.tensor([[1, 2]])])\n"
        "    for ask in (kit.models, kit.programs, kit.pipelines, kit.pass_machine):\n"
        "        with pytest.raises(LensError, match='hypothesis, which is not installed'):\n"
        "            ask()\n"
        "    with pytest.raises(LensError, match='inputs_for.. draws examples'):\n"
        "        kit.inputs_for(model, torch.tensor([[1, 2]]))\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{installed}"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:hypothesispytest"]
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert "1 passed" in done.stdout, done.stdout + done.stderr
