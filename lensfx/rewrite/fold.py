"""fold: evaluate what depends on parameters only, keep names, break ties, drop dead weights."""

from __future__ import annotations

from dataclasses import replace
from posixpath import commonpath, dirname
from types import MappingProxyType
from typing import Any

import torch
from torch import fx, nn

from lensfx.graph.blocks import evaluate
from lensfx.graph.choice import choices
from lensfx.graph.formula import formula_of
from lensfx.graph.names import free_name
from lensfx.graph.node import arguments, dtype_of, is_op, is_weight, shape_of
from lensfx.graph.ops import CASTS
from lensfx.graph.program import Formula, Program, copy_graph, remove_dead
from lensfx.graph.views import same_shape

__all__ = ["fold"]

aten = torch.ops.aten
_SLACK = 1e-4
_JOINS = (aten.cat.default, aten.stack.default)


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
        formula = _formula(name, root, program)
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
    """Weight expressions holding at least one node of a pass, read by something that is none.

    Where the model itself rounds a weight, as to eight bits, that is a part of what it computes:
    such an expression stays one.
    """
    made: dict[fx.Node, bool] = {}
    rounded: set[fx.Node] = set()
    for node in graph.nodes:
        if is_weight(node):
            if _narrows(node) or not rounded.isdisjoint(node.all_input_nodes):
                rounded.add(node)
            made[node] = "lensfx" in node.meta or any(
                made.get(n, False) for n in node.all_input_nodes
            )
    return [
        n
        for n, own in made.items()
        if own
        and n not in rounded
        and dtype_of(n) is not None
        and any(not is_weight(u) for u in n.users)
    ]


def _formula(name: str, root: fx.Node, program: Program) -> Formula:
    """The formula of a root, with what its sources are where no checkpoint holds them."""
    formula = formula_of(name, root)
    over: dict[str, Formula | torch.Tensor] = {}
    for source in formula.sources:
        tensor = program.tensors[source]
        if source in program.formulas:
            over[source] = program.formulas[source]
        elif not isinstance(tensor, nn.Parameter):
            over[source] = tensor
    return replace(formula, over=MappingProxyType(over))


def _narrows(node: fx.Node) -> bool:
    """Whether a cast of the model takes digits off a weight."""
    if "lensfx" in node.meta or not is_op(node, *CASTS) or not node.all_input_nodes:
        return False
    before, after = dtype_of(node.all_input_nodes[0]), dtype_of(node)
    real = [d for d in (before, after) if d is not None and d.is_floating_point]
    return len(real) == 2 and torch.finfo(real[1]).eps > torch.finfo(real[0]).eps


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
    """A name for a parameter that did not exist: `q.bias` beside the `q.weight` of its reader.

    What is made of the weights of several modules is named after the module around them.
    """
    for reader in root.users:
        if reader.op != "call_function" or not hasattr(reader.target, "_schema"):
            continue
        given = arguments(reader)
        role = next((k for k, v in given.items() if v is root), None)
        leaves = [leaf.replace(".", "/") for leaf in _leaves(given.get("weight"))]
        if role is not None and leaves:
            prefix = commonpath([dirname(leaf) for leaf in leaves]).replace("/", ".")
            return f"{prefix}.{role}" if prefix else role
    return None


def _leaves(weight: Any) -> list[str]:
    """The matrices that a weight is made of side by side; one it is a changed copy of is alone."""
    if not isinstance(weight, fx.Node):
        return []
    if weight.op == "get_attr":
        return [str(weight.target)]
    inputs = weight.all_input_nodes
    return [leaf for n in (inputs if is_op(weight, *_JOINS) else inputs[:1]) for leaf in _leaves(n)]
