"""Which tensors of a traced program share memory, and what is known of one such place."""

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
from lensfx.graph.node import argument, module_path, op_name, schema_names, where
from lensfx.graph.ops import DROPOUTS, is_impure

aten = torch.ops.aten
STATS = {aten.batch_norm.default: "training", aten.instance_norm.default: "use_input_stats"}


@dataclass(eq=False, repr=False, slots=True)
class Place:
    """One tensor of the traced program: `node` made it, `value` is what it held when last visited.

    `seen` is the parent's value that `value` agrees with; `newer` says it was written since then.
    `origin` is the first ancestor with the same gradient and storage, `whole` says that all of the
    memory is covered.
    """

    node: fx.Node
    value: fx.Node
    parent: Place = field(init=False)
    origin: Place = field(init=False)
    root: Place = field(init=False)
    depth: int = 0
    seen: fx.Node | None = None
    newer: bool = False
    whole: bool = True
    undo: Callable[[Any, Place], fx.Node] | None = None
    blocked: str = ""
    focus: Place = field(init=False)  # of a root: the place last visited in its memory
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


def aliased_inputs(node: fx.Node) -> Sequence[fx.Node]:
    """The inputs whose memory the node's value, or a piece of it, shares."""
    # Fake tensors hide that idle dropout returns its input and that a lifted constant is copied.
    if node.target in DROPOUTS:
        idle = not argument(node, "train") or argument(node, "p") == 0
        return node.all_input_nodes[:1] if idle else ()
    if node.op == "output" or node.target is aten.lift_fresh_copy.default:
        return ()
    val = node.meta.get("val")
    made = {memory_id(v) for v in (val if isinstance(val, list | tuple) else (val,))} - {0}
    return [n for n in node.all_input_nodes if memory_id(n.meta.get("val")) in made] if made else ()


def memory_id(val: Any) -> int:
    """An identity of the memory a tensor lies in; 0 for what is no tensor."""
    return int(val.untyped_storage()._cdata) if isinstance(val, torch.Tensor) else 0


def is_constant(node: fx.Node) -> bool:
    """Whether the node reads a tensor that needs no gradient."""
    return node.op == "get_attr" and not getattr(node.meta.get("val"), "requires_grad", True)


def is_parameter(node: fx.Node) -> bool:
    """Whether the node reads a parameter of the module that owns the graph."""
    owner = node.graph.owning_module
    held = None if owner is None else operator.attrgetter(str(node.target))(owner)
    return isinstance(held, nn.Parameter)


def symbol_of(size: Any) -> Any:
    """A size as a number, or as the expression that it is in the sizes of the inputs."""
    if isinstance(size, int):
        return size
    return int(size.node.expr) if size.node.expr.is_Integer else size.node.expr


def hint_of(size: Any) -> int:
    """The size in the example call."""
    return size if isinstance(size, int) else int(size.node.hint or 0)


def equal_sizes(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether two lists of sizes are the same expressions; never a guard."""
    return [symbol_of(s) for s in a] == [symbol_of(s) for s in b]


def strides_of(val: torch.Tensor) -> list[Any]:
    """The strides of the axes longer than one."""
    sizes = zip(val.shape, val.stride(), strict=True)
    return [symbol_of(stride) for size, stride in sizes if symbol_of(size) != 1]


def same_layout(value: fx.Node, place: Place) -> bool:
    """Whether a value lies in memory as the place does."""
    return strides_of(value.meta["val"]) == strides_of(place.val)


def same_place(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two views show the same elements in the same way."""
    kinds = [(v.dtype, v.is_conj(), v.is_neg(), symbol_of(v.storage_offset())) for v in (a, b)]
    return kinds[0] == kinds[1] and equal_sizes(a.shape, b.shape) and strides_of(a) == strides_of(b)


def fake_result(node: fx.Node) -> Any:
    """The fake value of a call on the fake values of its inputs."""
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
def functional_form(target: Any) -> Any:
    """The overload that computes what an operator writes, found by name and schema, or None."""
    name, space = target.overloadpacket.__name__, getattr(torch.ops, target.namespace)
    wanted = taken_names([a for a in target._schema.arguments if not a.is_out])
    stem = f"__{name[3:]}" if name.startswith("__i") else name.removesuffix("_")
    found = {}
    for packet in (getattr(space, n, None) for n in (stem, f"{stem}_functional")):
        for overload in packet.overloads() if packet else ():
            op = getattr(packet, overload)
            schema = op._schema
            if not schema.is_mutable and len(schema.returns) == 1:
                if taken_names(schema.arguments) == wanted:
                    found[overload] = op
    return found.get(target._overloadname, next(iter(found.values()), None))


def handed_arguments(node: fx.Node, form: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments for the functional form, which has no `out` and sometimes fewer defaults."""
    known = {a.name for a in form._schema.arguments}
    needed = sum(not a.kwarg_only and not a.has_default_value() for a in form._schema.arguments)
    names = schema_names(node.target)[len(node.args) : needed]
    more = [argument(node, name) for name in names if name not in node.kwargs]
    return (*node.args, *more), {k: v for k, v in node.kwargs.items() if k in known}


def taken_names(arguments: Sequence[Any]) -> list[tuple[str, str]]:
    """Name and type of each argument that an operator takes."""
    # The first is named `self` or `input`, without a rule.
    return [(a.name if i else "", str(a.type)) for i, a in enumerate(arguments)]


def is_view_form(form: Any) -> bool:
    """Whether an operator returns a view of an argument."""
    return form is not None and form._schema.returns[0].alias_info is not None


def updates_stats(node: fx.Node) -> bool:
    """Whether the node is a norm that updates running statistics."""
    return node.target in STATS and is_impure(node)


def check_stats(node: fx.Node) -> None:
    """Refuse running statistics that something else reads or writes."""
    for name in ("running_mean", "running_var"):
        buffer = argument(node, name)
        for user in buffer.users:
            if not updates_stats(user):
                why = f"%{buffer.name} is also used by {op_name(user)}"
                refuse(node, None, f"it updates {name} in training, and {why}")


def refuse(node: fx.Node, place: Place | None, why: str) -> NoReturn:
    """Raise a CaptureError that says what is written and why it cannot be functional."""
    name = op_name(node)
    stem = name.removesuffix("_")
    instead = f"x = x.{stem}(...)" if hasattr(torch.Tensor, stem) else "x = torch.where(...)"
    into = "" if place is None else f" into %{place.node.name}"
    raise CaptureError(
        f"{name} writes{into} and cannot be made functional: {why}",
        at=where(node),
        hint=f"write it out of place: `{instead}`",
    ).inside(module_path(node))
