"""fold: evaluate what depends on parameters only, keep names, break ties, drop dead weights."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import fx, nn

from lensfx.graph.choice import choices
from lensfx.graph.names import free_name
from lensfx.graph.node import arguments, dtype_of, is_weight, shape_of
from lensfx.graph.program import Program, copy_graph, remove_dead
from lensfx.graph.views import same_shape
from lensfx.rewrite.blocks import evaluate
from lensfx.rewrite.formula import formula_of

__all__ = ["fold"]

aten = torch.ops.aten
_SLACK = 1e-4


def fold(program: Program) -> Program:
    """The program with every parameter expression that a pass wrote evaluated once.

    Computed in float64 and rounded once to the expression's dtype. A folded parameter keeps the
    name of the one it replaces where nobody else reads that one, else it is `name_folded`; a new
    bias is named beside its weight. `formulas` says what each came from. No stored tensor is
    written to, and parameters that no pass touched stay the same objects. Memory beside the
    results: one tensor in float64, large matrices in blocks of rows.
    """
    graph, _ = copy_graph(program.graph)
    _loosen(graph, bool(program.journal))
    roots = _roots(graph)
    if not roots:
        return replace(program, graph=graph, unfolded=program) if program.journal else program
    tensors = dict(program.tensors)
    formulas = dict(program.formulas)
    names = _names(graph, roots)
    for root in roots:
        name = names[root]
        formula = formula_of(name, root)
        value = evaluate(root, lambda n: program.tensors[str(n.target)], _dtype(root))
        grad = any(program.tensors[s].requires_grad for s in formula.sources)
        is_param = any(isinstance(program.tensors[s], nn.Parameter) for s in formula.sources)
        tensors[name] = nn.Parameter(value, requires_grad=grad) if is_param else value
        formulas[name] = formula
        with graph.inserting_before(root):
            read = graph.get_attr(name)
        read.meta = {**root.meta, "val": root.meta["val"], "weight": True}
        read.meta.pop("lensfx", None)
        read.meta.pop("native", None)
        # An expression over this one is still to be evaluated from the parameters as they were.
        root.replace_all_uses_with(read, delete_user_cb=lambda user: not is_weight(user))
    remove_dead(graph)
    graph.lint()
    alive = {str(n.target) for n in graph.nodes if n.op == "get_attr"}
    return replace(
        program,
        graph=graph,
        tensors=MappingProxyType({k: t for k, t in tensors.items() if k in alive}),
        formulas=MappingProxyType({k: f for k, f in formulas.items() if k in alive}),
        unfolded=program,
    )


def _loosen(graph: fx.Graph, rewritten: bool) -> None:
    """A number that is part of the captured path is the same only up to rounding after rewrites."""
    for node in choices(graph) if rewritten else ():
        if isinstance(node.args[1], float):
            node.args = (*node.args[:4], _SLACK)


def _roots(graph: fx.Graph) -> list[fx.Node]:
    """Weight expressions holding at least one node of a pass, read by something that is none."""
    made: dict[fx.Node, bool] = {}
    for node in graph.nodes:
        if is_weight(node):
            made[node] = "lensfx" in node.meta or any(
                made.get(n, False) for n in node.all_input_nodes
            )
    return [
        n
        for n, own in made.items()
        if own and dtype_of(n) is not None and any(not is_weight(u) for u in n.users)
    ]


def _dtype(node: fx.Node) -> torch.dtype:
    dtype = dtype_of(node)
    assert dtype is not None
    return dtype


def _names(graph: fx.Graph, roots: list[fx.Node]) -> dict[fx.Node, str]:
    folded = set(roots)
    taken = dict.fromkeys((str(n.target) for n in graph.nodes if n.op == "get_attr"), 0)
    claimed: dict[str, list[fx.Node]] = {}
    for root in roots:
        leaf = _spine(root)
        if leaf is not None:
            claimed.setdefault(str(leaf.target), []).append(root)
    names: dict[fx.Node, str] = {}
    for root in roots:
        leaf = _spine(root)
        if leaf is None:
            names[root] = free_name(_beside(root) or "folded", taken)
            continue
        name = str(leaf.target)
        alone = claimed[name] == [root] and _read_only_by(leaf, folded)
        names[root] = name if alone else free_name(f"{name}_folded", taken)
    return names


def _spine(root: fx.Node) -> fx.Node | None:
    """The stored parameter that the expression is a changed copy of: same shape, first operand."""
    node: Any = root
    while isinstance(node, fx.Node) and node.op != "get_attr":
        node = next((a for a in node.args if isinstance(a, fx.Node)), None)
    if not isinstance(node, fx.Node):
        return None
    shape, wanted = shape_of(node), shape_of(root)
    if shape is None or wanted is None:
        return None
    transposed = len(shape) == 2 and same_shape(shape[::-1], wanted)
    return node if same_shape(shape, wanted) or transposed else None


def _read_only_by(leaf: fx.Node, folded: set[fx.Node]) -> bool:
    """Whether every use of a parameter ends in expressions that are folded away."""
    stack, seen = list(leaf.users), set()
    while stack:
        node = stack.pop()
        if node in folded or node in seen:
            continue
        if not is_weight(node):
            return False
        seen.add(node)
        stack.extend(node.users)
    return True


def _beside(root: fx.Node) -> str | None:
    """A name for a parameter that did not exist: `q.bias` beside the `q.weight` of its reader."""
    for reader in root.users:
        if reader.op != "call_function" or not hasattr(reader.target, "_schema"):
            continue
        given = arguments(reader)
        role = next((k for k, v in given.items() if v is root), None)
        weight = given.get("weight")
        leaf = weight
        while isinstance(leaf, fx.Node) and leaf.op != "get_attr":
            leaf = next((a for a in leaf.args if isinstance(a, fx.Node)), None)
        if role is not None and isinstance(leaf, fx.Node):
            prefix = str(leaf.target).rpartition(".")[0]
            return f"{prefix}.{role}" if prefix else role
    return None
