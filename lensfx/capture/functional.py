"""In-place operators to functional ones: afterwards a node is a value, never a memory cell.

    y = x.view(-1); y.add_(1); return x    ->    y1 = add(view(x), 1); return reshape(y1, [2, 3])

Only the writing nodes and the readers of what they wrote are touched. Each tensor of the traced
program is a *place* in some memory, and the places in one memory form a tree of views. The newest
value is kept at the place last visited, the focus. A visit elsewhere first climbs from the focus
by the inverse of each view (`slice_scatter`, `permute`, `reshape`), then descends by replaying
views, so work is done only for places that are read after a write.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from lensfx.capture.inverses import (
    detached_value,
    inverse_of,
    scattered_value,
    untouched_value,
    view_call,
)
from lensfx.capture.places import (
    Place,
    aliased_inputs,
    check_stats,
    equal_sizes,
    fake_result,
    functional_form,
    handed_arguments,
    hint_of,
    is_constant,
    is_parameter,
    is_view_form,
    memory_id,
    refuse,
    same_layout,
    same_place,
    symbol_of,
    updates_stats,
)
from lensfx.graph.node import argument, is_op
from lensfx.graph.ops import is_impure, reads_data, writes

__all__ = ["functionalise"]

aten = torch.ops.aten
SOURCES: dict[Any, str] = {aten.copy_.default: "src", aten.fill_.Tensor: "value"}
# These overwrite without reading, and their namesakes would read.
FILLS: dict[Any, Any] = {
    aten.zero_.default: aten.zeros_like.default,
    aten.fill_.Scalar: aten.full_like.default,
}
STARTS = ("placeholder", "get_attr")


def functionalise(graph: fx.Graph) -> None:
    """The graph computes what it did and no node writes, but for one `copy_` per changed input.

    Those stand right before the output and keep changes of inputs and buffers visible. A training
    `batch_norm` keeps updating its running statistics. New nodes carry a fake value and the module
    path and source line of the write that they come from.

    Raises: CaptureError naming the write that has no functional form.
    """
    if any(writes(n) or updates_stats(n) for n in graph.nodes):
        _Functionaliser(graph).run()


class _Functionaliser:
    """One walk over a graph in its order; new nodes go in front of the node `at`."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.at: fx.Node
        self.places: dict[fx.Node, Place] = {}
        self.lists: dict[Any, list[tuple[Place, fx.Node, bool]]] = {}
        self.sizes: dict[Any, fx.Node] = {}
        self.memory: dict[int, Place] = {}
        self.gradless: set[fx.Node] = set()
        self.changed: dict[Place, None] = {}
        self.viewed: set[Place] = set()
        self.replaced: list[fx.Node] = []
        self.spare: list[tuple[fx.Node, Place]] = []

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
        if node.op in STARTS:
            self._enter(node)
        elif written := writes(node):
            self._write(node, written)
        else:
            if updates_stats(node):
                check_stats(node)
            shared = [(self._place(n), n in node.args[:1]) for n in aliased_inputs(node)]
            self._redirect(node)
            self._register(node, [(place, place.value, first) for place, first in shared])
            if node.op == "output":
                self._epilogue()

    def _note(self, node: fx.Node) -> None:
        val, inputs = node.meta.get("val"), node.all_input_nodes
        if isinstance(val, torch.SymInt):
            self.sizes.setdefault(symbol_of(val), node)
        exact = isinstance(val, torch.Tensor) and not (val.is_floating_point() or val.is_complex())
        computed = node.op == "call_function" and all(
            n in self.gradless or not reads_data(node, n) for n in inputs
        )
        if exact or computed or is_constant(node):
            self.gradless.add(node)

    def _enter(self, node: fx.Node) -> None:
        val = node.meta.get("val")
        if not isinstance(val, torch.Tensor):
            return
        place = self._place(node)
        if node.op == "get_attr" and is_parameter(node):
            place.blocked = f"{node.target} is a parameter"
        twin = self.memory.setdefault(memory_id(val), place)
        if node.op == twin.node.op == "get_attr" and same_place(val, twin.val):
            self.places[node] = twin
        elif twin is not place:
            names = f"%{twin.node.name} and %{node.name}"
            twin.blocked = place.blocked = f"{names} share memory in the example"

    def _place(self, node: fx.Node) -> Place:
        if node not in self.places:
            place = self.places[node] = Place(node, node)
            place.parent = place.origin = place.root = place.focus = place
        return self.places[node]

    def _register(self, node: fx.Node, shared: list[tuple[Place, fx.Node, bool]]) -> None:
        val = node.meta.get("val")
        if isinstance(val, list | tuple) and shared:
            self.lists[node] = shared
            self.spare.append((node, shared[0][0].root))
        elif isinstance(val, torch.Tensor):
            if node.target is operator.getitem:
                pieces = self.lists.get(node.args[0], [])
                shared = [p for p in pieces if memory_id(p[0].val) == memory_id(val)]
            for parent, seen, first in shared[:1]:
                place = self._view(node, parent, seen)
                known = first and (place.undo is not None or node.target is not operator.getitem)
                if place.undo is not untouched_value and not known:
                    place.root.blocked = f"%{node.name} is a view of it that cannot be replayed"

    def _view(self, node: fx.Node, parent: Place, seen: fx.Node) -> Place:
        place = self.places[node] = Place(node, node, depth=parent.depth + 1, seen=seen)
        place.parent, place.root = parent, parent.root
        place.undo, why = inverse_of(node, parent.val)
        place.blocked = parent.blocked or why
        hidden = place.undo is detached_value or memory_id(place.val) != memory_id(parent.val)
        place.origin = place if hidden else parent.origin
        place.whole = parent.whole and place.undo is not scattered_value
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

    def _read(self, place: Place) -> fx.Node:
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

    def _climb(self, place: Place) -> None:
        if not place.newer:
            return
        assert place.undo is not None
        assert place.root.writer is not None
        if place.undo is detached_value and place.parent.value not in self.gradless:
            why = f"%{place.parent.node.name} is read later and would lose its gradient"
            refuse(place.root.writer, place, why)
        self._assign(place.parent, place.undo(self, place))
        place.newer = False
        place.seen = place.parent.value if same_layout(place.value, place) else None

    def _descend(self, place: Place) -> None:
        if place.undo is untouched_value:
            place.value = place.parent.value
        else:
            target, args, kwargs = view_call(self, place)
            place.value = self.emit(place.root, target, place.parent.value, *args, **kwargs)
        place.seen = place.parent.value

    def _assign(self, place: Place, value: fx.Node) -> None:
        place.value, place.newer = value, place.depth > 0
        if not same_layout(value, place):
            # Kernels may round differently on other strides, so these stay as they were in eager.
            if place.newer:
                self._climb(place)
            else:
                place.value = self._relaid(value, place)

    def _relaid(self, value: fx.Node, place: Place) -> fx.Node:
        order = sorted(range(place.val.ndim), key=lambda axis: -hint_of(place.val.stride(axis)))
        back = sorted(range(place.val.ndim), key=order.__getitem__)
        contiguous = {"memory_format": torch.contiguous_format}
        if order == back == sorted(order):
            return self.emit(place, aten.clone.default, value, **contiguous)
        value = self.emit(place, aten.permute.default, value, order)
        value = self.emit(place, aten.clone.default, value, **contiguous)
        return self.emit(place, aten.permute.default, value, back)

    def _write(self, node: fx.Node, written: tuple[str, ...]) -> None:
        place, form = self._target(node, written), functional_form(node.target)
        given = SOURCES.get(node.target)
        source = self.places.get(argument(node, given)) if given else None
        self._redirect(node)
        self.replaced.append(node)
        self.places[node] = place
        # The second half of `x[i] += 1` puts back what is there.
        if source and source.origin is place.origin and same_place(source.val, place.val):
            place.root.writer = place.root.writer or node
            return
        self._read(place)
        place.root.writer = node
        if is_view_form(form):
            view = self.emit(place.root, form, *node.args, **node.kwargs)
            view.meta["val"] = node.meta["val"]
            self.places[node] = self._view(view, place, place.value)
            return
        self.changed[place.root] = None
        if given:
            lent = source is not None and source.root.node.op in STARTS
            self._assign(place, self._copied(argument(node, given), place, lent=lent))
        else:
            self._assign(place, self._new_value(node, place, form))

    def _target(self, node: fx.Node, written: tuple[str, ...]) -> Place:
        arg, form = argument(node, written[0]), functional_form(node.target)
        if len(written) > 1 or not isinstance(arg, fx.Node):
            refuse(node, None, "it writes several tensors at once")
        place = self._place(arg)
        why = place.blocked or place.root.blocked
        if is_view_form(form):
            # `to` and `contiguous` may return the input itself, and then nothing tells them apart.
            root = place.root
            given = root.node.op in STARTS and same_place(place.val, root.val)
            changes = not same_place(place.val, node.meta["val"])
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
            refuse(node, place, why)
        return place

    def _new_value(self, node: fx.Node, place: Place, form: Any) -> fx.Node:
        args, kwargs = handed_arguments(node, form)
        try:
            value = self.emit(place.root, FILLS.get(node.target, form), *args, **kwargs)
        except RuntimeError:
            refuse(node, place, f"torch cannot tell the shape of {form} here")
        if value.meta["val"].dtype != place.val.dtype:
            value = self.emit(place.root, aten._to_copy.default, value, dtype=place.val.dtype)
        if not equal_sizes(value.meta["val"].shape, place.val.shape):
            if [*map(hint_of, value.meta["val"].shape)] != [*map(hint_of, place.val.shape)]:
                refuse(node, place, "it changes the size of its argument")
            # A size that is 1 in the example was taken for one that is always 1.
            value.meta["val"] = place.val
        return value

    def _copied(self, value: fx.Node, place: Place, *, lent: bool) -> fx.Node:
        old, new = place.val, value.meta["val"]
        kinds = [k for k in ("dtype", "device") if getattr(old, k) != getattr(new, k)]
        if kinds:
            cast = {k: getattr(old, k) for k in kinds}
            value = self.emit(place.root, aten._to_copy.default, value, **cast)
        spread = not equal_sizes(old.shape, new.shape)
        if spread:
            value = self.emit(place.root, aten.expand.default, value, self.shape(place))
        if place.whole and (spread or (lent and not kinds)):
            # The last writes must not change what another input gets.
            layout = {"memory_format": torch.contiguous_format} if spread else {}
            value = self.emit(place.root, aten.clone.default, value, **layout)
        return value

    def _epilogue(self) -> None:
        roots = [root for root in self.changed if root.node.op in STARTS]
        for root, value in [(root, self._read(root)) for root in roots]:
            self.emit(root, aten.copy_.default, root.node, value)

    def shape(self, place: Place) -> list[int | fx.Node]:
        """The sizes of a place, each a number or a node that computes it."""
        return [self.size(place.root, place.node, i) for i in range(place.val.ndim)]

    def size(self, root: Place, node: fx.Node, axis: int) -> int | fx.Node:
        """One size of a node's tensor: a number, or a node that computes it, known or new."""
        size = symbol_of(node.meta["val"].shape[axis])
        if isinstance(size, int):
            return size
        if size not in self.sizes:
            self.emit(root, aten.sym_size.int, node, axis)
        return self.sizes[size]

    def emit(self, root: Place, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A new call in front of the current node, with fake value and the last write's origin."""
        with self.graph.inserting_before(self.at):
            name = str(getattr(target, "overloadpacket", target).__name__)
            node = self.graph.create_node("call_function", target, args, kwargs, name)
        node.meta["val"] = fake_result(node)
        origin = {} if root.writer is None else root.writer.meta
        for key in ("nn_module_stack", "stack_trace"):
            if key in origin:
                node.meta[key] = origin[key]
        self.spare.append((node, root))
        self._note(node)
        return node
