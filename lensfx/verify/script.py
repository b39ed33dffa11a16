"""A script that shows one wrong rewrite: the smallest graph around it, before and after, as torch.

Values that both graphs compute alike become the arguments: drawn at random in the shapes and
sizes of the failing run, or written out where they are small or no numbers to draw.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from lensfx.graph.node import outputs_of
from lensfx.graph.ops import is_hook
from lensfx.graph.program import Program
from lensfx.verify.claims import Claims, Finding
from lensfx.verify.contract import UpToLogitShift
from lensfx.verify.inputs import Scenario
from lensfx.verify.values import Values, widened_args

__all__ = ["script_of"]

# A tensor of so few numbers is written out: masks, positions, single rows.
SMALL = 64
MODULES = {"_operator": "operator", "operator": "operator", "math": "math", "torch": "torch"}


class _Unwritable(Exception):
    """Something of the graph has no form as plain torch code."""


def script_of(
    title: str, base: Program, claims: Claims, finding: Finding, scenario: Scenario
) -> str:
    """The script, whose failure has been seen; empty where none could be written that fails."""
    for whole in (False, True):
        try:
            text = _Script(base, claims, finding, scenario, whole).text(title)
        except Exception:
            # A script is an extra: whatever stands in its way, the error itself must be raised.
            continue
        if _fails(text, any_way=not finding.slope and not finding.difference.index):
            return text
    return ""


def _fails(text: str, any_way: bool) -> bool:
    """Whether the script's assertion fails; `any_way` if it may also be that it cannot be run."""
    kept = torch.get_default_dtype()
    try:
        with torch.random.fork_rng(devices=[]):
            exec(compile(text, "<script>", "exec"), {"__name__": "__main__", "print": _silent})
    except AssertionError:
        return True
    except Exception:
        return any_way
    finally:
        torch.set_default_dtype(kept)
    return False


def _silent(*texts: Any) -> None:
    return None


@dataclass(frozen=True)
class _Function:
    """One side: its nodes in order and the node or nodes it returns."""

    nodes: tuple[fx.Node, ...]
    result: Any


class _Script:
    def __init__(
        self, base: Program, claims: Claims, finding: Finding, scenario: Scenario, whole: bool
    ) -> None:
        self.claims, self.finding, self.scenario = claims, finding, scenario
        before, after = claims.before.graph, claims.after.graph
        left, right = self._ends(before, after)
        same = _alike(before, after)
        if whole:
            same = {a: b for a, b in same.items() if a.op in ("placeholder", "get_attr")}
        stored = [n for g in (before, after) for n in g.nodes if n.op == "get_attr"]
        self.left = self._function(left, {*same, *stored})
        self.right = self._function(right, {*same.values(), *stored})
        back = {b: a for a, b in same.items()}
        nodes = (*self.left.nodes, *self.right.nodes)
        read = {back.get(m, m): None for n in nodes for m in n.all_input_nodes}
        read |= {back.get(n, n): None for n in (left, right)}
        self.names = {n: _name(n) for g in (after, before) for n in g.nodes}
        self.names |= {b: self.names[a] for a, b in same.items()}
        # A stored tensor that several nodes read, maybe under several names, is one argument.
        first: dict[int, fx.Node] = {}
        for n in stored:
            held = first.setdefault(id(base.tensors[str(n.target)]), n)
            self.names[n] = self.names[held]
        read = {first[id(base.tensors[str(n.target)])] if n in stored else n: None for n in read}
        self.given = [n for n in read if n not in nodes]

    def _ends(self, before: fx.Graph, after: fx.Graph) -> tuple[fx.Node, fx.Node]:
        """The value that differs, on both sides."""
        if self.finding.site is not None:
            old, new = self.finding.site
            return _named(before, old), _named(after, new)
        k = self.finding.output
        if k is None:
            raise _Unwritable
        return outputs_of(before)[k], outputs_of(after)[k]

    def _function(self, result: fx.Node, known: set[fx.Node]) -> _Function:
        needed: set[fx.Node] = set()
        stack = [result]
        while stack:
            node = stack.pop()
            if node not in needed and node not in known:
                needed.add(node)
                stack.extend(node.all_input_nodes)
        return _Function(tuple(sorted(needed)), result)

    def text(self, title: str) -> str:
        """The whole file."""
        bits = self.claims.in_bits
        computed = [n.name for n in self.given if n.op != "get_attr"]
        values = dict(Values(self.claims.before.graph, computed, exact=bits)(self.scenario).named)
        for n in self.given:
            if n.op == "get_attr":
                values[n.name] = self.scenario.weights[str(n.target)]
        args = ", ".join(self.names[n] for n in self.given)
        lines = [
            f'"""{_plain(title)}\n\n{_ABOUT}\n"""\n',
            "import math\nimport operator\n\nimport torch\n",
            "aten = torch.ops.aten\ninf, nan = math.inf, math.nan",
            "torch.manual_seed(0)",
            "" if bits else "torch.set_default_dtype(torch.float64)",
            "",
            *(f"{self.names[n]} = {_made(values[n.name])}" for n in self.given),
            "",
            *self._def("before", self.left, args),
            *self._def("after", self.right, args),
            "",
            *self._results(args),
            *self._compared(),
        ]
        return "\n".join(lines) + "\n"

    def _def(self, name: str, function: _Function, args: str) -> Iterator[str]:
        yield f"\ndef {name}({args}):"
        for node in function.nodes:
            yield f"    {self.names[node]} = {self._call(node)}"
        yield f"    return {self.names[function.result]}\n"

    def _call(self, node: fx.Node) -> str:
        names = self.names
        if node.op != "call_function":
            raise _Unwritable
        if is_hook(node):
            return names[node.args[0]]  # type: ignore[index]
        dtype = self.scenario.dtype or torch.float64
        args, kwargs = (node.args, node.kwargs)
        if not self.claims.in_bits:
            args, kwargs = widened_args(node, dtype)
        given = [_form(a, names) for a in args]
        given += [f"{k}={_form(v, names)}" for k, v in kwargs.items()]
        return f"{_target(node.target)}({', '.join(given)})"

    def _results(self, args: str) -> Iterator[str]:
        if not self.finding.slope:
            yield f"a, b = before({args}), after({args})"
            return
        yield f"args = [t for t in ({args},) if t.is_floating_point()]"
        yield "for t in args:"
        yield "    t.requires_grad_()"
        yield "\n\ndef gradient(result):"
        yield "    torch.manual_seed(1)"
        yield "    v = torch.randn_like(result)"
        yield "    found = [None] * len(args)"
        yield "    if result.requires_grad:"
        yield "        found = torch.autograd.grad(result, args, v, allow_unused=True)"
        yield "    pairs = zip(args, found)"
        yield "    zeros = (torch.zeros_like(t) if g is None else g for t, g in pairs)"
        yield "    return torch.cat([g.flatten() for g in zeros])\n\n"
        yield f"a, b = gradient(before({args})), gradient(after({args}))"

    def _compared(self) -> Iterator[str]:
        if self.claims.in_bits:
            yield "same = torch.equal(a.nan_to_num(), b.nan_to_num())"
            yield "same = same and torch.equal(a.signbit(), b.signbit())"
            yield 'assert same, "these must have the same bits"'
            return
        rule = self.finding.rule
        if isinstance(rule, UpToLogitShift) and not self.finding.slope:
            yield f"a, b = (t.movedim({rule.axis}, -1) for t in (a, b))"
            if self.finding.mean:
                yield "a, b = b - b.mean(-1, keepdim=True), b"
            else:
                yield "# All numbers of a row may move together."
                yield "b = b - (b - a).mean(-1, keepdim=True)"
                yield "a, b = (t - a.mean(-1, keepdim=True) for t in (a, b))"
        yield 'assert a.shape == b.shape, f"{a.shape} became {b.shape}"'
        yield "a, b = (t.double().nan_to_num() for t in (a, b))"
        yield "a, b = (t.reshape(-1, t.shape[-1] if t.ndim else 1) for t in (a, b))"
        yield "size = a.norm(dim=-1)"
        yield "error = float(((a - b).norm(dim=-1) / size.clamp(min=1e-3 * size.median())).max())"
        yield 'print(f"relative error {error:.1e}")'
        yield f'assert error <= {rule.bound!r}, f"relative error {{error:.1e}}"'


_ABOUT = """Both functions are the smallest part of the graph around that rewrite. What both compute
alike is an argument, random in the shape and size of the run that failed."""


def _alike(before: fx.Graph, after: fx.Graph) -> dict[fx.Node, fx.Node]:
    """Nodes that compute the same from the same on both sides."""
    there = {n.name: n for n in after.nodes}
    found: dict[fx.Node, fx.Node] = {}
    for node in before.nodes:
        twin = there.get(node.name)
        if twin is None or (node.op, node.target) != (twin.op, twin.target):
            continue
        if node.op == "output" or any(n not in found for n in node.all_input_nodes):
            continue
        args = fx.node.map_arg((node.args, node.kwargs), found.__getitem__)
        if args == (twin.args, twin.kwargs):
            found[node] = twin
    return found


def _plain(text: str) -> str:
    """Text that is safe inside a docstring."""
    return text.replace("\\", "/").replace('"', "'")


def _named(graph: fx.Graph, name: str) -> fx.Node:
    return next(n for n in graph.nodes if n.name == name)


def _name(node: fx.Node) -> str:
    return f"{node.name}_" if node.name in _RESERVED else node.name


_RESERVED = {
    "a",
    "b",
    "aten",
    "math",
    "operator",
    "torch",
    "inf",
    "nan",
    "size",
    "error",
    "same",
    "args",
    "gradient",
    "before",
    "after",
}


def _target(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        if target.namespace == "aten":
            return str(target)
        return f"torch.ops.{target}"
    if target is operator.getitem:
        return "operator.getitem"
    module = MODULES.get(getattr(target, "__module__", ""))
    if module is None:
        raise _Unwritable
    return f"{module}.{target.__name__}"


def _form(value: Any, names: dict[fx.Node, str]) -> str:
    if isinstance(value, fx.Node):
        return names[value]
    if isinstance(value, (list, tuple)):
        parts = [_form(v, names) for v in value]
        return f"[{', '.join(parts)}]" if isinstance(value, list) else f"({', '.join(parts)},)"
    if isinstance(value, torch.device):
        return f"torch.device({str(value)!r})"
    if isinstance(value, slice):
        return f"slice({', '.join(_form(v, names) for v in (value.start, value.stop, value.step))})"
    return repr(value)


def _made(value: Any) -> str:
    """A value of the failing run: drawn again if it is a tensor of many numbers, else as it is."""
    if not isinstance(value, Tensor):
        return repr(value)
    value, dtype = value.detach(), str(value.dtype)
    finite = not value.is_floating_point() or bool(value.isfinite().all())
    if value.numel() <= SMALL or not finite:
        return f"torch.tensor({value.tolist()!r}, dtype={dtype})"
    shape = list(value.shape)
    if value.dtype is torch.bool:
        return f"torch.rand({shape}) < {float(value.double().mean())!r}"
    if value.is_complex():
        return f"torch.randn({shape}, dtype={dtype})"
    if not value.is_floating_point():
        low, high = int(value.min()), int(value.max()) + 1
        return f"torch.randint({low}, {high}, {shape}, dtype={dtype})"
    mean, spread = float(value.mean()), float(value.std())
    centre = f" + {mean:.3g}" if abs(mean) > spread else ""
    return f"torch.randn({shape}, dtype={dtype}) * {spread:.3g}{centre}"
