"""In-place operators to functional ones: afterwards a node is a value, never a memory cell.

    y = x.view(-1); y.add_(1); return x    ->    y1 = add(view(x), 1); return reshape(y1, [2, 3])

Only the writing nodes and the readers of what they wrote are touched. Each tensor of the traced
program is a *place* in some memory, and the places in one memory form a tree of views. The newest
value is kept at the place last visited, the focus. A visit elsewhere first climbs from the focus
by the inverse of each view (`slice_scatter`, `permute`, `reshape`), then descends by replaying
views, so work is done only for places that are read after a write.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NoReturn

import torch
from torch import fx, nn
from torch._subclasses import FakeTensor

from lensfx.errors import CaptureError
from lensfx.graph.node import argument, is_op, op_name, schema_names, where
from lensfx.graph.ops import DROPOUTS, is_impure, reads_data, writes

__all__ = ["functionalise"]

aten = torch.ops.aten
_SOURCES: dict[Any, str] = {aten.copy_.default: "src", aten.fill_.Tensor: "value"}
# These overwrite without reading, and their namesakes would read.
_FILLS: dict[Any, Any] = {
    aten.zero_.default: aten.zeros_like.default,
    aten.fill_.Scalar: aten.full_like.default,
}
_STATS = {aten.batch_norm.default: "training", aten.instance_norm.default: "use_input_stats"}
_STARTS = ("placeholder", "get_attr")


@dataclass(eq=False, repr=False, slots=True)
class _Place:
    """One tensor of the traced program: `node` made it, `value` is what it held when last visited.

    `seen` is the parent's value that `value` agrees with; `newer` says it was written since then.
    `origin` is the first ancestor with the same gradient and storage, `whole` says that all of the
    memory is covered.
    """

    node: fx.Node
    value: fx.Node
    parent: _Place = field(init=False)
    origin: _Place = field(init=False)
    root: _Place = field(init=False)
    depth: int = 0
    seen: fx.Node | None = None
    newer: bool = False
    whole: bool = True
    undo: _Undo | None = None
    blocked: str = ""
    focus: _Place = field(init=False)  # of a root: the place last visited in its memory
    writer: fx.Node | None = None  # of a root: the last write into its memory

    @property
    def stale(self) -> bool:
        """Whether the parent has changed since, so that the value must be derived again."""
        return self.depth > 0 and not self.newer and self.seen is not self.parent.value

    @property
    def val(self) -> torch.Tensor:
        """The fake tensor that the place was traced as."""
        val: torch.Tensor = self.node.meta["val"]
        return val


def functionalise(graph: fx.Graph) -> None:
    """The graph computes what it did and no node writes, but for one `copy_` per changed input.

    Those stand right before the output and keep changes of inputs and buffers visible. A training
    `batch_norm` keeps updating its running statistics. New nodes carry a fake value and the module
    path and source line of the write that they come from.

    Raises: CaptureError naming the write that has no functional form.
    """
    if any(writes(n) or _updates_stats(n) for n in graph.nodes):
        _Functionaliser(graph).run()


class _Functionaliser:
    """One walk over a graph in its order; new nodes go in front of the node `at`."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.at: fx.Node
        self.places: dict[fx.Node, _Place] = {}
        self.lists: dict[Any, list[tuple[_Place, fx.Node, bool]]] = {}
        self.sizes: dict[Any, fx.Node] = {}
        self.memory: dict[int, _Place] = {}
        self.gradless: set[fx.Node] = set()
        self.changed: dict[_Place, None] = {}
        self.viewed: set[_Place] = set()
        self.replaced: list[fx.Node] = []
        self.spare: list[tuple[fx.Node, _Place]] = []

    def run(self) -> None:
        """Rewrite the whole graph."""
        for node in list(self.graph.nodes):
            self.at = node
            self._visit(node)
            self._note(node)
        for node in reversed(self.replaced):
            self.graph.erase_node(node)
        for node, root in reversed(self.spare):
            if root.writer is not None and not node.users and not is_impure(node):
                self.graph.erase_node(node)
        self.graph.lint()

    def _visit(self, node: fx.Node) -> None:
        if node.op in _STARTS:
            self._enter(node)
        elif written := writes(node):
            self._write(node, written)
        else:
            if _updates_stats(node):
                _check_stats(node)
            shared = [(self._place(n), n in node.args[:1]) for n in _aliased(node)]
            self._redirect(node)
            self._register(node, [(place, place.value, first) for place, first in shared])
            if node.op == "output":
                self._epilogue()

    def _note(self, node: fx.Node) -> None:
        val, inputs = node.meta.get("val"), node.all_input_nodes
        if isinstance(val, torch.SymInt):
            self.sizes.setdefault(_symbol(val), node)
        exact = isinstance(val, torch.Tensor) and not (val.is_floating_point() or val.is_complex())
        computed = node.op == "call_function" and all(
            n in self.gradless or not reads_data(node, n) for n in inputs
        )
        if exact or computed or _is_constant(node):
            self.gradless.add(node)

    def _enter(self, node: fx.Node) -> None:
        val = node.meta.get("val")
        if not isinstance(val, torch.Tensor):
            return
        place = self._place(node)
        if node.op == "get_attr" and _is_parameter(node):
            place.blocked = f"{node.target} is a parameter"
        twin = self.memory.setdefault(_memory(val), place)
        if node.op == twin.node.op == "get_attr" and _same_place(val, twin.val):
            self.places[node] = twin
        elif twin is not place:
            names = f"%{twin.node.name} and %{node.name}"
            twin.blocked = place.blocked = f"{names} share memory in the example"

    def _place(self, node: fx.Node) -> _Place:
        if node not in self.places:
            place = self.places[node] = _Place(node, node)
            place.parent = place.origin = place.root = place.focus = place
        return self.places[node]

    def _register(self, node: fx.Node, shared: list[tuple[_Place, fx.Node, bool]]) -> None:
        val = node.meta.get("val")
        if isinstance(val, list | tuple) and shared:
            self.lists[node] = shared
            self.spare.append((node, shared[0][0].root))
        elif isinstance(val, torch.Tensor):
            if node.target is operator.getitem:
                pieces = self.lists.get(node.args[0], [])
                shared = [p for p in pieces if _memory(p[0].val) == _memory(val)]
            for parent, seen, first in shared[:1]:
                place = self._view(node, parent, seen)
                known = first and (place.undo is not None or node.target is not operator.getitem)
                if place.undo is not _same and not known:
                    place.root.blocked = f"%{node.name} is a view of it that cannot be replayed"

    def _view(self, node: fx.Node, parent: _Place, seen: fx.Node) -> _Place:
        place = self.places[node] = _Place(node, node, depth=parent.depth + 1, seen=seen)
        place.parent, place.root = parent, parent.root
        place.undo, why = _inverse(node, parent.val)
        place.blocked = parent.blocked or why
        hidden = place.undo is _detached or _memory(place.val) != _memory(parent.val)
        place.origin = place if hidden else parent.origin
        place.whole = parent.whole and place.undo is not _scatter
        self.spare.append((node, place.root))
        self.viewed.add(place.root)
        return place

    def _redirect(self, node: fx.Node) -> None:
        """Let the node read what its arguments hold now."""
        swap: dict[fx.Node, fx.Node] = {}
        for n in node.all_input_nodes:
            place = self.places.get(n)
            if place is not None and place.root.writer is not None:
                blind = is_op(node, aten._assert_tensor_metadata.default) or not reads_data(node, n)
                swap[n] = place.node if blind else self._read(place)
        if swap:
            node.args = fx.map_arg(node.args, lambda n: swap.get(n, n))
            node.kwargs = fx.map_arg(node.kwargs, lambda n: swap.get(n, n))

    def _read(self, place: _Place) -> fx.Node:
        up, down, trail = place.root.focus, place, []
        while up is not down:
            if up.depth >= down.depth:
                self._climb(up)
                up = up.parent
            else:
                trail.append(down)
                down = down.parent
        while down.stale:
            trail.append(down)
            down = down.parent
        for below in reversed(trail):
            if below.stale:
                self._descend(below)
        place.root.focus = place
        return place.value

    def _climb(self, place: _Place) -> None:
        if not place.newer:
            return
        assert place.undo is not None
        assert place.root.writer is not None
        if place.undo is _detached and place.parent.value not in self.gradless:
            why = f"%{place.parent.node.name} is read later and would lose its gradient"
            _refuse(place.root.writer, place, why)
        self._assign(place.parent, place.undo(self, place))
        place.newer = False
        place.seen = place.parent.value if _same_layout(place.value, place) else None

    def _descend(self, place: _Place) -> None:
        if place.undo is _same:
            place.value = place.parent.value
        else:
            target, args, kwargs = _call(self, place)
            place.value = self.emit(place.root, target, place.parent.value, *args, **kwargs)
        place.seen = place.parent.value

    def _assign(self, place: _Place, value: fx.Node) -> None:
        place.value, place.newer = value, place.depth > 0
        if not _same_layout(value, place):
            # Kernels may round differently on other strides, so these stay as they were in eager.
            if place.newer:
                self._climb(place)
            else:
                place.value = self._relaid(value, place)

    def _relaid(self, value: fx.Node, place: _Place) -> fx.Node:
        order = sorted(range(place.val.ndim), key=lambda axis: -_hint(place.val.stride(axis)))
        back = sorted(range(place.val.ndim), key=order.__getitem__)
        contiguous = {"memory_format": torch.contiguous_format}
        if order == back == sorted(order):
            return self.emit(place, aten.clone.default, value, **contiguous)
        value = self.emit(place, aten.permute.default, value, order)
        value = self.emit(place, aten.clone.default, value, **contiguous)
        return self.emit(place, aten.permute.default, value, back)

    def _write(self, node: fx.Node, written: tuple[str, ...]) -> None:
        place, form = self._target(node, written), _functional(node.target)
        given = _SOURCES.get(node.target)
        source = self.places.get(argument(node, given)) if given else None
        self._redirect(node)
        self.replaced.append(node)
        self.places[node] = place
        # The second half of `x[i] += 1` puts back what is there.
        if source and source.origin is place.origin and _same_place(source.val, place.val):
            place.root.writer = place.root.writer or node
            return
        self._read(place)
        place.root.writer = node
        if _is_view(form):
            view = self.emit(place.root, form, *node.args, **node.kwargs)
            view.meta["val"] = node.meta["val"]
            self.places[node] = self._view(view, place, place.value)
            return
        self.changed[place.root] = None
        if given:
            lent = source is not None and source.root.node.op in _STARTS
            self._assign(place, self._copied(argument(node, given), place, lent=lent))
        else:
            self._assign(place, self._new_value(node, place, form))

    def _target(self, node: fx.Node, written: tuple[str, ...]) -> _Place:
        arg, form = argument(node, written[0]), _functional(node.target)
        if len(written) > 1 or not isinstance(arg, fx.Node):
            _refuse(node, None, "it writes several tensors at once")
        place = self._place(arg)
        why = place.blocked or place.root.blocked
        if _is_view(form):
            # `to` and `contiguous` may return the input itself, and then nothing tells them apart.
            root = place.root
            given = root.node.op in _STARTS and _same_place(place.val, root.val)
            changes = not _same_place(place.val, node.meta["val"])
            why = "the caller would see the new shape" if given and changes else ""
            if is_op(node, aten.detach_.default) and place.value not in self.gradless:
                why = (
                    "its views would lose their gradient too" if place.root in self.viewed else why
                )
        elif torch.Tag.inplace_view in getattr(node.target, "tags", ()):
            why = why or "it gives its argument other memory"
        elif form is None:
            why = why or "it has no functional form"
        if why:
            _refuse(node, place, why)
        return place

    def _new_value(self, node: fx.Node, place: _Place, form: Any) -> fx.Node:
        args, kwargs = _handed(node, form)
        try:
            value = self.emit(place.root, _FILLS.get(node.target, form), *args, **kwargs)
        except RuntimeError:
            _refuse(node, place, f"torch cannot tell the shape of {form} here")
        if value.meta["val"].dtype != place.val.dtype:
            value = self.emit(place.root, aten._to_copy.default, value, dtype=place.val.dtype)
        if not _equal(value.meta["val"].shape, place.val.shape):
            if [*map(_hint, value.meta["val"].shape)] != [*map(_hint, place.val.shape)]:
                _refuse(node, place, "it changes the size of its argument")
            # A size that is 1 in the example was taken for one that is always 1.
            value.meta["val"] = place.val
        return value

    def _copied(self, value: fx.Node, place: _Place, *, lent: bool) -> fx.Node:
        old, new = place.val, value.meta["val"]
        kinds = [k for k in ("dtype", "device") if getattr(old, k) != getattr(new, k)]
        if kinds:
            cast = {k: getattr(old, k) for k in kinds}
            value = self.emit(place.root, aten._to_copy.default, value, **cast)
        spread = not _equal(old.shape, new.shape)
        if spread:
            value = self.emit(place.root, aten.expand.default, value, self.shape(place))
        if place.whole and (spread or (lent and not kinds)):
            # The last writes must not change what another input gets.
            layout = {"memory_format": torch.contiguous_format} if spread else {}
            value = self.emit(place.root, aten.clone.default, value, **layout)
        return value

    def _epilogue(self) -> None:
        roots = [root for root in self.changed if root.node.op in _STARTS]
        for root, value in [(root, self._read(root)) for root in roots]:
            self.emit(root, aten.copy_.default, root.node, value)

    def shape(self, place: _Place) -> list[int | fx.Node]:
        """The sizes of a place, each a number or a node that computes it."""
        return [self.size(place.root, place.node, i) for i in range(place.val.ndim)]

    def size(self, root: _Place, node: fx.Node, axis: int) -> int | fx.Node:
        """One size of a node's tensor: a number, or a node that computes it, known or new."""
        size = _symbol(node.meta["val"].shape[axis])
        if isinstance(size, int):
            return size
        if size not in self.sizes:
            self.emit(root, aten.sym_size.int, node, axis)
        return self.sizes[size]

    def emit(self, root: _Place, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A new call in front of the current node, with fake value and the last write's origin."""
        with self.graph.inserting_before(self.at):
            name = str(getattr(target, "overloadpacket", target).__name__)
            node = self.graph.create_node("call_function", target, args, kwargs, name)
        node.meta["val"] = _fake(node)
        origin = {} if root.writer is None else root.writer.meta
        for key in ("nn_module_stack", "stack_trace"):
            if key in origin:
                node.meta[key] = origin[key]
        self.spare.append((node, root))
        self._note(node)
        return node


_Undo = Callable[[_Functionaliser, _Place], fx.Node]
_Call = tuple[Any, tuple[Any, ...], dict[str, Any]]


def _same(work: _Functionaliser, place: _Place) -> fx.Node:
    return place.value


def _detached(work: _Functionaliser, place: _Place) -> fx.Node:
    return work.emit(place.root, aten.detach.default, place.value)


def _scatter(work: _Functionaliser, place: _Place) -> fx.Node:
    target, args, kwargs = _call(work, place)
    scatter = _SCATTERS[target]
    return work.emit(place.root, scatter, place.parent.value, place.value, *args, **kwargs)


def _permute(work: _Functionaliser, place: _Place) -> fx.Node:
    target, args, kwargs = _call(work, place)
    rank = place.val.ndim
    # Each axis of the probe is known by its size, so one call tells where every axis goes.
    probe = target(torch.empty(*range(2, 2 + rank), device="meta"), *args, **kwargs)
    back = sorted(range(rank), key=lambda axis: int(probe.shape[axis]))
    return work.emit(place.root, aten.permute.default, place.value, back)


def _squeeze(work: _Functionaliser, place: _Place) -> fx.Node:
    return work.emit(place.root, aten.squeeze.dim, place.value, argument(place.node, "dim"))


def _reshape(work: _Functionaliser, place: _Place) -> fx.Node:
    return work.emit(place.root, aten.reshape.default, place.value, work.shape(place.parent))


_SCATTERS = {
    aten.slice.Tensor: aten.slice_scatter.default,
    aten.select.int: aten.select_scatter.default,
    aten.diagonal.default: aten.diagonal_scatter.default,
}
_EXPANDS = ("expand", "expand_as", "broadcast_to")
_INVERSES: dict[str, _Undo] = {
    **dict.fromkeys(("slice", "select", "diagonal", "narrow", "unbind", "split"), _scatter),
    **dict.fromkeys(("split_with_sizes", "chunk", "tensor_split"), _scatter),
    **dict.fromkeys(("transpose", "swapaxes", "swapdims", "permute", "movedim"), _permute),
    **dict.fromkeys(("moveaxis", "t", "numpy_T", "mT"), _permute),
    **dict.fromkeys(("view", "reshape", "view_as", "reshape_as", "flatten"), _reshape),
    **dict.fromkeys(("unflatten", "ravel", "squeeze", "atleast_1d", "atleast_2d"), _reshape),
    "atleast_3d": _reshape,
    "unsqueeze": _squeeze,
}


def _inverse(node: fx.Node, before: torch.Tensor) -> tuple[_Undo | None, str]:
    """How a new value of the view becomes one of what it views, or why that is not possible."""
    after, maker = node.meta["val"], node
    if node.target is operator.getitem:
        maker = node.all_input_nodes[0]
    name = op_name(maker)
    if _same_place(before, after) or node.target in DROPOUTS:
        return (_detached if name == "detach" else _same), ""
    if before.dtype != after.dtype:
        return None, f"{name} reads the memory as another dtype"
    if name in _EXPANDS:
        if _equal(*([s for s in v.shape if _symbol(s) != 1] for v in (before, after))):
            return _reshape, ""
        return None, f"{name} lets several elements share one place in memory"
    undo = _INVERSES.get(name)
    return undo, "" if undo else f"the view {name} has no inverse here"


def _call(work: _Functionaliser, place: _Place) -> _Call:
    """The operator of a view and what it takes beside its input; a piece of a split is a slice."""
    node, root = place.node, place.root
    if is_op(node, aten.narrow.default):
        dim, start, length = (argument(node, n) for n in ("dim", "start", "length"))
        stop = _add(work, root, start, length)
        # A start from the end, as in (-2, 2), has no number for the end itself.
        return aten.slice.Tensor, (dim, start, None if start and stop == 0 else stop), {}
    if node.target is not operator.getitem:
        return node.target, node.args[1:], node.kwargs
    whole, index = node.args
    assert isinstance(whole, fx.Node)
    assert isinstance(index, int)
    dim, start, end = argument(whole, "dim"), 0, 0
    if is_op(whole, aten.unbind.int):
        return aten.select.int, (dim, index), {}
    for i, piece in enumerate(whole.meta["val"][: index + 1]):
        size = _symbol(piece.shape[dim])
        if not isinstance(size, int):
            size = work.size(root, work.emit(root, operator.getitem, whole, i), dim)
        start, end = end, _add(work, root, end, size)
    return aten.slice.Tensor, (dim, start, end), {}


def _add(work: _Functionaliser, root: _Place, a: Any, b: Any) -> Any:
    if isinstance(a, int) and isinstance(b, int):
        return a + b
    return b if a == 0 else work.emit(root, operator.add, a, b)


def _aliased(node: fx.Node) -> Sequence[fx.Node]:
    """The inputs whose memory the node's value, or a piece of it, shares."""
    # Fake tensors hide that idle dropout returns its input and that a lifted constant is copied.
    if node.target in DROPOUTS:
        idle = not argument(node, "train") or argument(node, "p") == 0
        return node.all_input_nodes[:1] if idle else ()
    if node.op == "output" or node.target is aten.lift_fresh_copy.default:
        return ()
    val = node.meta.get("val")
    made = {_memory(v) for v in (val if isinstance(val, list | tuple) else (val,))} - {0}
    return [n for n in node.all_input_nodes if _memory(n.meta.get("val")) in made] if made else ()


def _memory(val: Any) -> int:
    return int(val.untyped_storage()._cdata) if isinstance(val, torch.Tensor) else 0


def _is_constant(node: fx.Node) -> bool:
    return node.op == "get_attr" and not getattr(node.meta.get("val"), "requires_grad", True)


def _is_parameter(node: fx.Node) -> bool:
    owner = node.graph.owning_module
    held = None if owner is None else operator.attrgetter(str(node.target))(owner)
    return isinstance(held, nn.Parameter)


def _symbol(size: Any) -> Any:
    """A size as a number, or as the expression that it is in the sizes of the inputs."""
    if isinstance(size, int):
        return size
    return int(size.node.expr) if size.node.expr.is_Integer else size.node.expr


def _hint(size: Any) -> int:
    return size if isinstance(size, int) else int(size.node.hint or 0)


def _equal(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether two lists of sizes are the same expressions; never a guard."""
    return [_symbol(s) for s in a] == [_symbol(s) for s in b]


def _strides(val: torch.Tensor) -> list[Any]:
    sizes = zip(val.shape, val.stride(), strict=True)
    return [_symbol(stride) for size, stride in sizes if _symbol(size) != 1]


def _same_layout(value: fx.Node, place: _Place) -> bool:
    return _strides(value.meta["val"]) == _strides(place.val)


def _same_place(a: torch.Tensor, b: torch.Tensor) -> bool:
    kinds = [(v.dtype, v.is_conj(), v.is_neg(), _symbol(v.storage_offset())) for v in (a, b)]
    return kinds[0] == kinds[1] and _equal(a.shape, b.shape) and _strides(a) == _strides(b)


def _fake(node: fx.Node) -> Any:
    vals = [n.meta["val"] for n in node.all_input_nodes]
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        for mode in [v.fake_mode for v in vals if isinstance(v, FakeTensor)][:1]:
            stack.enter_context(mode)
            if mode.shape_env is not None:
                # What holds for the example's sizes must not become an assumption of the graph.
                stack.enter_context(mode.shape_env.suppress_guards())
        return node.target(*args, **kwargs)  # type: ignore[operator]


@cache
def _functional(target: Any) -> Any:
    """The overload that computes what an operator writes, found by name and schema, or None."""
    name, space = target.overloadpacket.__name__, getattr(torch.ops, target.namespace)
    wanted = _taken([a for a in target._schema.arguments if not a.is_out])
    stem = f"__{name[3:]}" if name.startswith("__i") else name.removesuffix("_")
    found = {}
    for packet in (getattr(space, n, None) for n in (stem, f"{stem}_functional")):
        for overload in packet.overloads() if packet else ():
            op = getattr(packet, overload)
            schema = op._schema
            if not schema.is_mutable and len(schema.returns) == 1:
                if _taken(schema.arguments) == wanted:
                    found[overload] = op
    return found.get(target._overloadname, next(iter(found.values()), None))


def _handed(node: fx.Node, form: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments for the functional form, which has no `out` and sometimes fewer defaults."""
    known = {a.name for a in form._schema.arguments}
    needed = sum(not a.kwarg_only and not a.has_default_value() for a in form._schema.arguments)
    names = schema_names(node.target)[len(node.args) : needed]
    more = [argument(node, name) for name in names if name not in node.kwargs]
    return (*node.args, *more), {k: v for k, v in node.kwargs.items() if k in known}


def _taken(arguments: Sequence[Any]) -> list[tuple[str, str]]:
    # The first is named `self` or `input`, without a rule.
    return [(a.name if i else "", str(a.type)) for i, a in enumerate(arguments)]


def _is_view(form: Any) -> bool:
    return form is not None and form._schema.returns[0].alias_info is not None


def _updates_stats(node: fx.Node) -> bool:
    return node.target in _STATS and is_impure(node)


def _check_stats(node: fx.Node) -> None:
    for name in ("running_mean", "running_var"):
        buffer = argument(node, name)
        for user in buffer.users:
            if not _updates_stats(user):
                why = f"%{buffer.name} is also used by {op_name(user)}"
                _refuse(node, None, f"it updates {name} in training, and {why}")


def _refuse(node: fx.Node, place: _Place | None, why: str) -> NoReturn:
    name = op_name(node)
    stem = name.removesuffix("_")
    instead = f"x = x.{stem}(...)" if hasattr(torch.Tensor, stem) else "x = torch.where(...)"
    into = "" if place is None else f" into %{place.node.name}"
    raise CaptureError(
        f"{name} writes{into} and cannot be made functional: {why}",
        at=where(node),
        hint=f"write it out of place: `{instead}`",
    )
