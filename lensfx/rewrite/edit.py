"""Edit: the only code that changes a graph. It places nodes, sets metadata, keeps the journal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from lensfx.errors import RewriteError
from lensfx.graph.formula import formula_of
from lensfx.graph.names import free_name, native_name
from lensfx.graph.node import (
    arguments,
    is_weight,
    module_path,
    op_name,
    schema_names,
    source_line,
    value_of,
    where,
)
from lensfx.graph.ops import constructs, is_hook, is_impure, readers
from lensfx.graph.program import Change, Rewrite
from lensfx.graph.views import same_shape
from lensfx.rewrite.fakes import Fakes, Unrunnable

__all__ = ["At", "Edit"]


@dataclass
class _Open:
    """What the rewrite in progress has touched so far."""

    root: fx.Node
    root_facts: tuple[str, str, str]
    interior: frozenset[fx.Node]
    touched: dict[fx.Node, None] = field(default_factory=dict)
    added: list[fx.Node] = field(default_factory=list)
    removed: int = 0
    loose: list[fx.Node] = field(default_factory=list)
    note: str = ""
    shifted: tuple[int, ...] = ()
    kept: dict[fx.Node, int | None] = field(default_factory=dict)
    centred: list[fx.Node] = field(default_factory=list)
    changes: dict[fx.Node, Change] = field(default_factory=dict)


class Edit:
    """Changes one graph on behalf of one pass; every committed rewrite is in `journal`.

    `tensors` are the stored tensors it knows, `added` those that the pass brought along.
    """

    def __init__(
        self,
        graph: fx.Graph,
        pass_name: str,
        first: int = 0,
        tensors: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        self.graph = graph
        self.pass_name = pass_name
        self.journal: list[Rewrite] = []
        self.tensors = {} if tensors is None else tensors
        self.added: dict[str, torch.Tensor] = {}
        self._first = first
        self._open: _Open | None = None
        # Which value of the graph before this pass a node stands for; added nodes have none.
        self._origin = {n: n.name for n in graph.nodes}
        self._taken = dict.fromkeys((native_name(n) for n in graph.nodes), 0)
        self._fakes = Fakes(graph)

    def begin(self, root: fx.Node, interior: Iterable[fx.Node] = ()) -> None:
        """Start a rewrite at `root`; values inside `interior` are not claimed to be kept."""
        facts = (root.name, module_path(root), source_line(root))
        self._open = _Open(root, facts, frozenset(interior))

    def before(self, node: fx.Node) -> At:
        """A place right before `node`, whose module path and source line new nodes take on."""
        return At(self, node)

    def after(self, node: fx.Node) -> At:
        """A place right after `node`, whose module path and source line new nodes take on."""
        return At(self, node, behind=True)

    def remark(self, note: str, shifted: Iterable[int] = ()) -> None:
        """Say in the journal why this site was right, and which outputs the contract lets move."""
        state = self._state()
        state.note, state.shifted = note, tuple(shifted)

    def keeps(self, node: fx.Node, up_to: int | None = None, centred: bool = False) -> None:
        """Claim that this rewrite keeps a value that it does not write itself, or leaves it moved.

        `up_to` is the axis along which it may have moved by a constant, `centred` says that its
        mean along that axis is 0 afterwards. The proof compares what is claimed.
        """
        state = self._state()
        state.kept[node] = None if up_to is None else up_to % max(1, _rank(node))
        if centred:
            state.centred.append(node)

    def changes(
        self,
        node: fx.Node,
        *,
        scale: fx.Node | None = None,
        shift: fx.Node | None = None,
        turn: fx.Node | None = None,
        free: Iterable[int] = (),
    ) -> None:
        """Say that a value is no longer what it was, and how that follows from what it is.

        `was = (now * scale + shift) @ turn`; each is a weight that broadcasts against the value.
        `free`: along these axes a constant was taken off that cannot be told any more.
        """
        parts = {"scale": scale, "shift": shift, "turn": turn}
        made = {k: None if n is None else formula_of(k, n) for k, n in parts.items()}
        self._state().changes[node] = Change(node.name, **made, free=tuple(sorted(free)))

    def constant(self, name: str, tensor: torch.Tensor) -> fx.Node:
        """A read of a tensor that the pass brings along, stored in the program under `name`.

        Raises: RewriteError if the program has another tensor of that name.
        """
        known = self.added.get(name, self.tensors.get(name))
        same = known is None or (known.shape == tensor.shape and torch.equal(known, tensor))
        if not same:
            raise RewriteError(
                f"{self.pass_name} would store a tensor as {name}, which is another one already",
                at=where(self._state().root),
                hint="give it a name that the model does not use",
            )
        value = self.added.setdefault(name, tensor if known is None else known)
        first = next(iter(self.graph.nodes))
        with self.graph.inserting_before(first):
            node = self.graph.get_attr(name)
        node.meta = {"val": self._fakes.of(value), "weight": True}
        return node

    def commit(self) -> Rewrite:
        """Close the rewrite: remove what nobody reads any more and write the journal entry."""
        state = self._state()
        for node in state.loose:
            self._drop(node)
        touched = [n for n in state.touched if n not in state.changes and self._visible(n)]
        claimed = dict.fromkeys(touched) | {n: a for n, a in state.kept.items() if not n._erased}
        sites = tuple((self._origin[n], n.name) for n in claimed if n in self._origin)
        name, path, line = state.root_facts
        entry = Rewrite(
            index=self._first + len(self.journal),
            pass_name=self.pass_name,
            root=name,
            path=path,
            line=line,
            sites=sites,
            added=sum(not n._erased for n in state.added),
            removed=state.removed,
            note=state.note,
            shifted=state.shifted,
            shifts=tuple((n.name, a) for n, a in claimed.items() if a is not None),
            centred=tuple(n.name for n in state.centred if not n._erased),
            changes=tuple(c for n, c in state.changes.items() if not n._erased),
        )
        self.journal.append(entry)
        self._open = None
        return entry

    def _state(self) -> _Open:
        if self._open is None:
            raise RewriteError("an edit was made outside a rewrite")
        return self._open

    def _visible(self, node: fx.Node) -> bool:
        """Whether something that this rewrite did not touch reads the value."""
        state = self._state()
        if node._erased or node in state.interior:
            return False
        inside = {*state.touched, *state.added, *state.interior}
        return any(u not in inside for u in readers(node))

    def _drop(self, node: fx.Node) -> None:
        stack = [node]
        while stack:
            n = stack.pop()
            if n._erased or n.users or is_impure(n):
                continue
            stack.extend(n.all_input_nodes)
            self.graph.erase_node(n)
            self._state().removed += 1

    def fake(self, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The fake value of a call on the fake values of its inputs.

        Raises: RewriteError if the call cannot run on them.
        """
        try:
            return self._fakes.call(target, args, kwargs)
        except Unrunnable as error:
            raise RewriteError(
                f"{self.pass_name} makes a call that cannot run: {target}: {error}",
                at=where(self._state().root),
                hint="check the shapes the rule assumes in its `unless`",
            ) from error.__cause__


class At:
    """One place in the graph under edit."""

    def __init__(self, edit: Edit, anchor: fx.Node, behind: bool = False) -> None:
        self._edit = edit
        self._anchor = anchor
        self._behind = behind

    def call(self, target: Any, /, *args: Any, **kwargs: Any) -> fx.Node:
        """A new operator node here, with value, module path, source line and native name set.

        Raises: RewriteError if an argument is computed later in the graph, or the call cannot run.
        """
        edit, anchor = self._edit, self._anchor
        state = edit._state()
        for node in _nodes_in((args, kwargs)):
            late = anchor < node if self._behind else not node < anchor
            if late:
                raise RewriteError(
                    f"{edit.pass_name} would read {node.name} before it is computed",
                    at=where(anchor),
                    hint="place the new node after the last of its inputs",
                )
        val = edit.fake(target, args, kwargs)
        insert = edit.graph.inserting_after if self._behind else edit.graph.inserting_before
        with insert(anchor):
            node = edit.graph.call_function(target, args, kwargs)
        if self._behind:
            self._anchor = node
        node.meta = {
            "val": val,
            "nn_module_stack": anchor.meta.get("nn_module_stack"),
            "stack_trace": anchor.meta.get("stack_trace"),
            "lensfx": (edit.pass_name, edit._first + len(edit.journal)),
        }
        node.meta["weight"] = _depends_on_weights_only(node)
        path = module_path(node)
        wanted = f"{path}.{op_name(node)}" if path else op_name(node)
        node.meta["native"] = str(args[1]) if is_hook(node) else free_name(wanted, edit._taken)
        state.added.append(node)
        return node

    def set(self, node: fx.Node, /, **named: Any) -> None:
        """Change arguments of a node by schema name; the node keeps its name, shape and dtype.

        Raises: RewriteError if the shape or dtype would change, or an input comes too late.
        """
        edit = self._edit
        state = edit._state()
        for value in _nodes_in(named):
            if not value < node:
                raise RewriteError(
                    f"{edit.pass_name} would read {value.name} before it is computed",
                    at=where(node),
                )
        given = {**arguments(node), **named}
        unknown = named.keys() - set(schema_names(node.target))
        if unknown:
            raise RewriteError(f"{node.target} has no argument {sorted(unknown)}", at=where(node))
        args, kwargs = _call_form(node.target, given)
        val = edit.fake(node.target, args, kwargs)
        _same_kind(edit, node, val)
        state.touched[node] = None
        state.loose.extend(node.all_input_nodes)
        node.args, node.kwargs = args, kwargs
        _renew_weight_marks([node])

    def replace(self, old: fx.Node, new: fx.Node) -> None:
        """Let every reader of `old` read `new` instead, and remove `old`.

        Raises: RewriteError if the two differ in shape or dtype.
        """
        edit = self._edit
        state = edit._state()
        _same_kind(edit, old, value_of(new))
        told = old.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
        _renew_weight_marks(told)
        if op_name(old) == op_name(new) and not is_hook(new):
            # The same operator in the same place: users know it by the name it had.
            new.meta["native"], old.meta["native"] = native_name(old), native_name(new)
        if old in edit._origin:
            edit._origin[new] = edit._origin.pop(old)
        state.touched.pop(old, None)
        state.touched[new] = None
        state.loose.append(old)

    def redirect(self, reader: fx.Node, old: fx.Node, new: fx.Node) -> None:
        """Let one reader read `new` where it read `old`."""
        edit = self._edit
        _same_kind(edit, old, value_of(new))
        reader.replace_input_with(old, new)
        _renew_weight_marks([reader])
        edit._state().touched[reader] = None
        edit._state().loose.append(old)


def _rank(node: fx.Node) -> int:
    val = value_of(node)
    return val.ndim if isinstance(val, torch.Tensor) else 0


def _depends_on_weights_only(node: fx.Node) -> bool:
    inputs = node.all_input_nodes
    return all(map(is_weight, inputs)) if inputs else constructs(node)


def _renew_weight_marks(changed: Iterable[fx.Node]) -> None:
    """Bring the marks of nodes with new inputs up to date, and of what reads them."""
    stack = list(changed)
    while stack:
        node = stack.pop()
        if node.op == "call_function" and is_weight(node) != _depends_on_weights_only(node):
            node.meta["weight"] = not is_weight(node)
            stack.extend(node.users)


def _same_kind(edit: Edit, old: fx.Node, val: Any) -> None:
    before, after = _tensors(value_of(old)), _tensors(val)
    same = len(before) == len(after) and all(
        same_shape(a.shape, b.shape) and a.dtype == b.dtype
        for a, b in zip(before, after, strict=True)
    )
    if not same:
        raise RewriteError(
            f"{edit.pass_name} would change {old.name} from {_kinds(before)} to {_kinds(after)}",
            at=where(old),
            hint="a rewrite keeps the shape and dtype of the values others read",
        )


def _tensors(val: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(val) if isinstance(leaf, torch.Tensor)]


def _kinds(tensors: Iterable[torch.Tensor]) -> str:
    return ", ".join(f"{t.dtype} {tuple(t.shape)}" for t in tensors) or "no tensor"


def _call_form(target: Any, given: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments in the shortest form that the schema allows: trailing defaults left out."""
    positional = [a for a in target._schema.arguments if not a.kwarg_only]
    keep = len(positional)
    while keep and _is_default(positional[keep - 1], given[positional[keep - 1].name]):
        keep -= 1
    kwargs = {
        a.name: given[a.name]
        for a in target._schema.arguments
        if a.kwarg_only and not _is_default(a, given[a.name])
    }
    return tuple(given[a.name] for a in positional[:keep]), kwargs


def _is_default(argument: Any, value: Any) -> bool:
    if isinstance(value, fx.Node) or not argument.has_default_value():
        return False
    return type(value) is type(argument.default_value) and bool(value == argument.default_value)


def _nodes_in(tree: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.node.map_arg(tree, found.append)
    return found
