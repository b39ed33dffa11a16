"""From torch's exported graph to lensfx's normal form.

Parameters are get_attr nodes named by the role of their reader; regions are inlined; asserts,
no-ops and aliases are gone; `view` is `reshape`; nothing mutates but the trailing writes that
keep an input's or a buffer's visible change.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import fx, nn
from torch.export.graph_signature import InputKind

from lensfx.capture.autocast import SWITCHES, Autocast
from lensfx.capture.decide import Decision
from lensfx.capture.functional import functionalise
from lensfx.capture.no_ops import drop_no_ops
from lensfx.capture.paths import drop_settled, guard_path
from lensfx.errors import CaptureError
from lensfx.graph.names import name_nodes
from lensfx.graph.node import argument, is_op, memory_of, module_path, op_name, outputs_of, where
from lensfx.graph.opaque import is_opaque, opaque_of
from lensfx.graph.ops import constructs, is_impure, writes
from lensfx.graph.program import remove_dead
from lensfx.graph.signature import Leaf

__all__ = ["mark_weights", "normal_form"]

aten = torch.ops.aten
_ROOT = "model."
# An argument of this name would hide what fx's generated code means by it.
_CODE_NAMES = frozenset("self torch device inf nan NoneType fx_pytree pytree".split())

ASSERTS = frozenset(
    {
        aten._assert_tensor_metadata.default,
        aten._assert_scalar.default,
        aten._assert_async.default,
        aten._assert_async.msg,
        aten.sym_constrain_range.default,
        aten.sym_constrain_range_for_size.default,
        torch._check,
    }
)


def normal_form(
    exported: torch.export.ExportedProgram,
    model: nn.Module,
    leaves: Sequence[Leaf],
    constants: Sequence[Any],
    decisions: Sequence[Decision] = (),
) -> tuple[fx.Graph, Mapping[str, torch.Tensor], tuple[str, ...], Mapping[str, str]]:
    """The graph, its tensors by name, parameter names nobody reads, and the alias of each name.

    The last results of `exported` are the values behind `decisions`; a guard on each is put where
    it is known, unless no input and no state has a say in it.

    Raises: CaptureError for regions and mutations that have no functional form.
    """
    builder = _Builder(exported, model, leaves)
    graph = builder.build(constants, decisions)
    functionalise(graph)
    _refuse_parameter_writes(graph, builder.tensors)
    drop_no_ops(graph)
    drop_settled(graph)
    remove_dead(graph)
    mark_weights(graph)
    name_nodes(graph)
    graph.lint()
    read = {str(n.target) for n in graph.nodes if n.op == "get_attr"}
    tensors = {k: t for k, t in builder.tensors.items() if k in read}
    held = {id(t) for t in tensors.values()}
    named = dict(model.named_parameters(remove_duplicate=False))
    unread = tuple(k for k, p in named.items() if id(p) not in held)
    first = {id(t): k for k, t in reversed(tensors.items())}
    aliases = {k: first[id(t)] for k, t in named.items() if id(t) in first and first[id(t)] != k}
    return graph, MappingProxyType(tensors), unread, aliases


class _Builder:
    """Copies an exported graph with its state unlifted and its regions inlined."""

    def __init__(
        self, exported: torch.export.ExportedProgram, model: nn.Module, leaves: Sequence[Leaf]
    ) -> None:
        self.exported = exported
        self.leaves = leaves
        self.graph = fx.Graph()
        self.tensors: dict[str, torch.Tensor] = {}
        self._state: dict[str, tuple[str, torch.Tensor]] = {}
        self._reads: dict[str, fx.Node] = {}
        self._anchor: fx.Node | None = None
        self._no_grad: dict[fx.Node, None] = {}
        self._detached: dict[fx.Node, fx.Node] = {}
        self._depth = 0
        self._autocast = Autocast(self.tensors)
        named = [
            *model.named_parameters(remove_duplicate=False),
            *model.named_buffers(remove_duplicate=False),
        ]
        self._aliases: dict[int, list[str]] = {}
        self._own = dict(named)
        for name, tensor in named:
            self._aliases.setdefault(id(tensor), []).append(name)

    def build(self, constants: Sequence[Any], decisions: Sequence[Decision]) -> fx.Graph:
        env: dict[fx.Node, Any] = {}
        specs = {
            spec.arg.name: spec
            for spec in self.exported.graph_signature.input_specs
            if hasattr(spec.arg, "name")
        }
        names = iter(_identifier(leaf.name) for leaf in self.leaves if leaf.is_tensor)
        for node in self.exported.graph.nodes:
            if node.op == "placeholder":
                spec = specs[node.name]
                if spec.kind is InputKind.USER_INPUT:
                    env[node] = self._input(node, next(names))
                    self._anchor = env[node]
                else:
                    self._state[node.name] = self._lifted(spec)
                    env[node] = _Lazy(node)
        self._copy(self.exported.graph, env, self.exported.graph_module)
        self._output(env, constants, decisions)
        self._refuse_gradless_writes()
        return self.graph

    def _input(self, node: fx.Node, name: str) -> fx.Node:
        twin = self.graph.placeholder(name)
        # The target becomes the argument's name in code, and only names are made unique.
        twin.target = twin.name
        twin.meta = {"val": node.meta["val"]}
        return twin

    def _lifted(self, spec: Any) -> tuple[str, torch.Tensor]:
        target = str(spec.target)
        own = target[len(_ROOT) :] if target.startswith(_ROOT) else target
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
            return own, self._own[own]
        if spec.kind is InputKind.CONSTANT_TENSOR:
            return own, self.exported.constants[target]
        raise CaptureError(
            f"the model holds {target}, a {spec.kind.name.lower().replace('_', ' ')}",
            hint="keep state in tensors; lensfx reads parameters, buffers and constant tensors",
        )

    def _read(self, node: fx.Node, reader: fx.Node) -> fx.Node:
        """A get_attr under the alias that belongs to the reading module.

        Torch sends every use of a tied table to its last alias; the reader's path tells the role.
        """
        given, tensor = self._state[node.name]
        aliases = self._aliases.get(id(tensor), [given])
        path = _path(reader)
        name = next((a for a in aliases if a.rpartition(".")[0] == path), None)
        name = name or (given if len(aliases) == 1 else _closest(aliases, path))
        if name not in self._reads:
            if self._anchor is None:
                twin = self.graph.get_attr(name)
            else:
                with self.graph.inserting_after(self._anchor):
                    twin = self.graph.get_attr(name)
            self._anchor = twin
            twin.meta = {"val": node.meta["val"]}
            self._reads[name] = twin
            self.tensors[name] = tensor
        return self._reads[name]

    def _copy(self, source: fx.Graph, env: dict[fx.Node, Any], owner: Any) -> None:
        for node in source.nodes:
            if node.op in ("placeholder", "output") or is_op(node, *ASSERTS):
                continue
            if is_op(node, *SWITCHES):
                self._switch(node)
                continue
            if node.op == "get_attr":
                env[node] = getattr(owner, str(node.target))
            elif node.op != "call_function":
                raise CaptureError(f"the graph holds a {node.op}, which has no normal form")
            elif _region(node):
                env[node] = self._inline(node, env)
            elif node.target is operator.getitem and isinstance(env.get(node.args[0]), list):
                env[node] = env[node.args[0]][node.args[1]]
            else:
                env[node] = self._twin(node, env)

    def _switch(self, node: fx.Node) -> None:
        """Enter or leave a region that torch has written as a pair of calls."""
        if is_op(node, torch._C._set_grad_enabled):
            self._depth = int(not node.args[0])
        elif is_op(node, torch.amp.autocast_mode._enter_autocast):
            settings: list[Any] = list(node.args[:3])
            self._autocast.enter(*settings)
        else:
            self._autocast.leave()

    def _twin(self, node: fx.Node, env: Mapping[fx.Node, Any]) -> fx.Node:
        def known(n: fx.Node) -> Any:
            value = env[n]
            if isinstance(value, _Lazy):
                return self._read(value.node, node)
            return self._outside(value)

        twin = self.graph.node_copy(node, known)
        stack = {
            key: (str(entry[0])[len(_ROOT) :], *entry[1:])
            for key, entry in (node.meta.get("nn_module_stack") or {}).items()
            if str(entry[0]).startswith(_ROOT)
        }
        twin.meta = {
            "val": node.meta.get("val"),
            "stack_trace": node.meta.get("stack_trace"),
            "nn_module_stack": stack,
        }
        if is_opaque(node):
            # The call lives as long as some graph holds it.
            twin.meta["opaque"] = opaque_of(str(node.args[0]))
        if self._depth:
            self._no_grad[twin] = None
        self._autocast.write_out(twin)
        return twin

    def _inline(self, node: fx.Node, env: Mapping[fx.Node, Any]) -> list[Any]:
        kind = _region(node)
        args: list[Any] = list(node.args)
        first = 4 if kind == "autocast" else 1
        module, given = env[args[first]], args[first + 1 :]
        detached = kind == "grad" and not args[0]
        inner: dict[fx.Node, Any] = {}
        holders = [n for n in module.graph.nodes if n.op == "placeholder"]
        for holder, value in zip(holders, given, strict=True):
            inner[holder] = env[value] if isinstance(value, fx.Node) else value
        self._depth += detached
        settings = args[:3] if kind == "autocast" else None
        if settings:
            self._autocast.enter(*settings)
        self._copy(module.graph, inner, module)
        if settings:
            self._autocast.leave()
        self._depth -= detached
        return [self._result(r, inner, detached) for r in outputs_of(module.graph)]

    def _result(self, value: Any, inner: Mapping[fx.Node, Any], detached: bool) -> Any:
        made = inner[value] if isinstance(value, fx.Node) else value
        if isinstance(made, _Lazy):
            made = self._read(made.node, made.node)
        return self._detach(made) if detached and isinstance(made, fx.Node) else made

    def _outside(self, value: Any) -> Any:
        """What stands for a value made under no_grad where gradients are on."""
        if self._depth or value not in self._no_grad:
            return value
        if value not in self._detached:
            self._detached[value] = self._detach(value)
        return self._detached[value]

    def _detach(self, made: fx.Node) -> fx.Node:
        val = made.meta["val"]
        if not isinstance(val, torch.Tensor) or not val.is_floating_point():
            return made
        twin = self.graph.call_function(aten.detach.default, (made,))
        twin.meta = {**made.meta, "val": val.detach()}
        return twin

    def _refuse_gradless_writes(self) -> None:
        """A value changed under no_grad keeps the gradient it had, which no operator expresses."""
        carriers: set[fx.Node] = set()
        for node in self.graph.nodes:
            val = node.meta.get("val")
            if not isinstance(val, torch.Tensor) or is_op(node, aten.detach.default):
                continue
            tracked = node not in self._no_grad and not carriers.isdisjoint(node.all_input_nodes)
            own = node.op == "get_attr" and self.tensors[str(node.target)].requires_grad
            if own or (tracked and (val.is_floating_point() or val.is_complex())):
                carriers.add(node)
        memories = {memory_of(n) for n in carriers}
        for node in self._no_grad:
            for name in writes(node):
                target = argument(node, name)
                if isinstance(target, fx.Node) and memory_of(target) in memories:
                    raise CaptureError(
                        f"{op_name(node)} under no_grad changes a value that carries a gradient",
                        at=where(node),
                        hint="write it out of place: `x = x + (new - x).detach()`",
                    ).inside(module_path(node))

    def _output(
        self,
        env: Mapping[fx.Node, Any],
        constants: Sequence[Any],
        decisions: Sequence[Decision],
    ) -> None:
        made = outputs_of(self.exported.graph)
        traced = len(made) - len(decisions)
        for k, (value, decision) in enumerate(zip(made[traced:], decisions, strict=True)):
            guard_path(self.graph, _resolve(self, value, env), decision, k)
        first = traced - sum(c is None for c in constants)
        given = iter(_resolve(self, r, env) for r in made[first:traced])
        flat = tuple(next(given) if c is None else c.value for c in constants)
        node = self.graph.output(flat)
        node.meta["val"] = tuple(v.meta["val"] if isinstance(v, fx.Node) else v for v in flat)


class _Lazy:
    """A lifted tensor that becomes a get_attr at its first read, under the reader's name for it."""

    def __init__(self, node: fx.Node) -> None:
        self.node = node


def _resolve(builder: _Builder, value: Any, env: Mapping[fx.Node, Any]) -> Any:
    made = env[value] if isinstance(value, fx.Node) else value
    if isinstance(made, _Lazy):
        return builder._read(made.node, made.node)
    return builder._outside(made) if isinstance(made, fx.Node) else made


def _region(node: fx.Node) -> str:
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        name = node.target.name()
        if name == "wrap_with_set_grad_enabled":
            return "grad"
        if name == "wrap_with_autocast":
            return "autocast"
        raise CaptureError(
            f"the model uses the higher-order operator {name}, which has no normal form",
            at=where(node),
            hint="replace it by plain tensor code in this model",
        ).inside(_path(node))
    if str(getattr(node.target, "__module__", "")).startswith("torch._functorch"):
        raise CaptureError(
            "torch.vmap hides an axis that no graph can show",
            at=where(node),
            hint="write the batch axis out, or move the call into a submodule that can stay opaque",
        ).inside(_path(node))
    return ""


def _path(node: fx.Node) -> str:
    path = module_path(node)
    return path[len(_ROOT) :] if path.startswith(_ROOT) else ""


def _closest(aliases: Sequence[str], path: str) -> str:
    def shared(name: str) -> int:
        pairs = zip(name.split("."), path.split("."), strict=False)
        return next((i for i, (a, b) in enumerate(pairs) if a != b), 99)

    return max(aliases, key=shared)


def _identifier(name: str) -> str:
    text = "".join(c if c.isalnum() else "_" for c in name).strip("_") or "input"
    return f"{text}_" if text in _CODE_NAMES else text


def _refuse_parameter_writes(graph: fx.Graph, tensors: Mapping[str, torch.Tensor]) -> None:
    for node in graph.nodes:
        for name in writes(node) if node.op == "call_function" else ():
            target = node.args[0] if name == "self" else None
            if isinstance(target, fx.Node) and target.op == "get_attr":
                if isinstance(tensors[str(target.target)], nn.Parameter):
                    raise CaptureError(
                        f"forward changes the parameter {target.target} in place",
                        at=where(node),
                        hint="update parameters outside forward",
                    )


def mark_weights(graph: fx.Graph) -> None:
    """Note on every node whether its value depends on parameters and constants only."""
    written = {n.args[0] for n in graph.nodes if is_op(n, aten.copy_.default) and not n.users}
    for node in graph.nodes:
        if node.op == "get_attr":
            node.meta["weight"] = node not in written
        elif node.op == "call_function" and not is_impure(node) and not is_opaque(node):
            inputs = node.all_input_nodes
            node.meta["weight"] = constructs(node) or (
                bool(inputs) and all(n.meta.get("weight") for n in inputs)
            )
