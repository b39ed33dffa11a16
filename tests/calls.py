"""Random calls of the operators that the gauge knows, and the graph of one call."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from lensfx.graph.ops import hook_point

aten = torch.ops.aten


class Draw:
    """Random arguments of operators, made of nothing but integers."""

    def __init__(self, integer: Callable[[int, int], int]) -> None:
        self.int = integer

    def pick(self, *options: Any) -> Any:
        return options[self.int(0, len(options) - 1)]

    def some(self, n: int) -> list[int]:
        bits = self.int(0, 2**n - 1)
        return [i for i in range(n) if bits >> i & 1]

    def shape(self, low: int = 1, high: int = 4) -> list[int]:
        return [self.int(1, 3) for _ in range(self.int(low, high))]

    def plain(self, *shape: int) -> Tensor:
        seed = torch.Generator().manual_seed(self.int(0, 999))
        return torch.randn(shape, generator=seed, dtype=torch.float64)

    def x(self, *shape: int, of: Callable[[Tensor], Tensor] = lambda t: t) -> Tensor:
        """A tensor made by `expand` along some axes, so that it is known not to vary there."""
        same = self.some(len(shape)) if self.int(0, 1) else []
        return of(self.plain(*[1 if i in same else n for i, n in enumerate(shape)])).expand(shape)

    def any(self, low: int = 1, high: int = 4) -> Tensor:
        return self.x(*self.shape(low, high))

    def ids(self, top: int, *shape: int) -> Tensor:
        return self.x(*shape, of=lambda t: (t * 97).long() % top)

    def mask(self, *shape: int) -> Tensor:
        return self.x(*shape, of=lambda t: t > 0)

    def within(self, shape: Any) -> list[int]:
        """A shape that broadcasts to this one."""
        ones = self.some(len(shape))
        own = [1 if i in ones else n for i, n in enumerate(shape)]
        return own[self.int(0, len(own)) if self.int(0, 1) else 0 :]

    def dim(self, x: Tensor) -> int:
        return self.int(-x.ndim, x.ndim - 1)

    def flag(self) -> bool:
        return self.int(0, 1) == 1

    def regrouped(self) -> tuple[list[int], list[int]]:
        """Two shapes of one buffer."""
        sizes = [self.int(1, 3) for _ in range(self.int(1, 5))]
        cuts = [[i for i in self.some(len(sizes)) if i] for _ in "ab"]
        a, b = ([prod(sizes[i:j]) for i, j in zip([0, *c], [*c, None], strict=True)] for c in cuts)
        return a, b


FLOATS = (torch.float64, torch.complex128, torch.int64)
NAMED: dict[str, Callable[[Draw, Tensor, str], Any]] = {
    "dim": lambda d, x, kind: d.some(x.ndim) if "List" in kind else d.dim(x),
    "dims": lambda d, x, _: d.some(x.ndim),
    "index": lambda d, x, kind: d.ids(1, 3) if kind == "Tensor" else 0,
    "other": lambda d, x, kind: d.x(*d.within(x.shape)) if kind == "Tensor" else -1.5,
    "p": lambda d, x, _: 0.5,
    "dtype": lambda d, x, _: d.pick(*FLOATS),
    "device": lambda d, x, _: "cpu",
    "alpha": lambda d, x, _: d.int(-2, 2),
    "rounding_mode": lambda d, x, _: d.pick(None, "floor"),
    **dict.fromkeys("dim0 dim1 axis0 axis1 source destination".split(), lambda d, x, _: d.dim(x)),
    **dict.fromkeys("keepdim descending stable train".split(), lambda d, x, _: d.flag()),
    **dict.fromkeys("split_size chunks sections repeats".split(), lambda d, x, _: d.int(1, 2)),
    **dict.fromkeys("unbiased half_to_float start correction".split(), lambda d, x, _: 0),
    **dict.fromkeys("k length".split(), lambda d, x, _: 1),
}
DRAWN = {"dim", "dims", "keepdim", "descending", "alpha", "rounding_mode", "unbiased", "correction"}
RANKS = {aten.t.default: (1, 2), aten.mT.default: (2, 4), aten.numpy_T.default: (2, 2)}


def by_schema(target: Any, d: Draw) -> tuple[Any, ...]:
    x, kwargs = d.any(*RANKS.get(target, (2 if "feature" in str(target) else 1, 4))), {}
    for a in target._schema.arguments[1:]:
        if "Optional" in str(a.type) and a.name == "dim" and d.int(0, 2) == 0:
            kwargs[a.name] = None
        elif not a.has_default_value() or a.name in DRAWN:
            kwargs[a.name] = NAMED[a.name](d, x, str(a.type))
    return x, kwargs


def of_any(make: Callable[[Draw, Tensor], tuple[Any, ...]], low: int = 1) -> Any:
    """Calls on a tensor of any shape, drawn first."""

    def draw(d: Draw) -> tuple[Any, ...]:
        x = d.any(low)
        return (x, *make(d, x))

    return draw


def index_call(d: Draw) -> tuple[Any, ...]:
    x, shape = d.any(), d.shape(1, 2)
    if d.int(0, 3) == 0:
        at = d.int(0, x.ndim - 1)
        return x, [*[None] * at, d.mask(*x.shape[at : d.int(at + 1, x.ndim)])]
    indices = [d.ids(n, *d.within(shape)) if d.flag() else None for n in x.shape]
    return x, indices if any(i is not None for i in indices) else [d.ids(len(x), *shape)]


def norm_call(d: Draw) -> tuple[Any, ...]:
    x = d.any()
    shape = list(x.shape[d.int(0, x.ndim - 1) :])
    return x, shape, d.pick(None, d.x(*shape)), d.pick(None, d.x(*shape))


def loss_call(d: Draw) -> tuple[Any, ...]:
    x = d.any(1, 3)
    at = min(1, x.ndim - 1)
    target = d.ids(x.shape[at], *x.shape[:at], *x.shape[at + 1 :])
    return x, target, d.pick(None, d.x(x.shape[at]).abs()), d.int(0, 2), -100, d.pick(0.0, 0.1)


def attention_call(d: Draw) -> tuple[Any, ...]:
    b, h, q, s, e, v = (d.int(1, 3) for _ in range(6))
    grouped = d.flag()
    mask = d.pick(None, d.x(*d.pick((q, s), (b, 1, q, s), (q, 1))), d.mask(b, 1, q, s))
    sizes = ((b, h * (1 + grouped), q, e), (b, h, s, e), (b, h, s, v))
    rest = {"is_causal": mask is None and d.flag(), "enable_gqa": grouped}
    return (*(d.x(*size) for size in sizes), mask, 0.0, rest)


def linear_call(d: Draw) -> tuple[Any, ...]:
    x, o = d.any(), d.int(1, 3)
    if d.int(0, 4) == 0:
        return x, d.x(x.shape[-1])
    return x, d.x(o, x.shape[-1]), d.pick(None, d.x(o))


def matmul_call(d: Draw) -> tuple[Any, ...]:
    batch, n, k, m = d.shape(0, 2), d.int(1, 3), d.int(1, 3), d.int(1, 3)
    left = d.x(k) if d.int(0, 3) == 0 else d.x(*d.within(batch), n, k)
    return left, d.x(k) if d.int(0, 3) == 0 else d.x(*d.within(batch), k, m)


def product_call(d: Draw, *, batch: bool) -> tuple[Any, ...]:
    b, n, k, m = [d.int(1, 3)][: int(batch)], d.int(1, 3), d.int(1, 3), d.int(1, 3)
    return d.x(*d.within((*b, n, m))), d.x(*b, n, k), d.x(*b, k, m)


EQUATIONS = ("bij,bjk->bik", "ij,kj", "bhqd,bhkd->bhqk", "i,j->ij", "ii,ij->ij", "bij,bij,bj->i")


def einsum_call(d: Draw) -> tuple[Any, ...]:
    equation = d.pick(*EQUATIONS)
    size = {letter: d.int(1, 3) for letter in equation}
    operands = equation.partition("->")[0].split(",")
    return equation, [d.x(*(size[letter] for letter in o)) for o in operands]


FILLS = (0.0, 3.0, -1e4, -float("inf"))


def of_shape(make: Callable[[Draw, list[int]], tuple[Any, ...]]) -> Any:
    return lambda d: make(d, d.shape())


def along_one(make: Callable[[Draw, Tensor, int], tuple[Any, ...]]) -> Any:
    return of_any(lambda d, x: make(d, x, d.int(0, x.ndim - 1)))


CASES: dict[str, Callable[[Draw], tuple[Any, ...]]] = {
    "to.dtype_layout _to_copy": of_any(lambda d, x: ({"dtype": d.pick(*FLOATS)},)),
    "to.other type_as": of_any(lambda d, x: (d.any().to(d.pick(*FLOATS)),)),
    "reshape view _unsafe_view": lambda d: (lambda a, b: (d.plain(*a), b))(*d.regrouped()),
    "view_as reshape_as": lambda d: tuple(d.plain(*s) for s in d.regrouped()),
    "flatten.using_ints": along_one(lambda d, x, a: (a, d.int(a, x.ndim - 1))),
    "unflatten.int": lambda d: (d.x(2, 6, d.int(1, 3)), 1, d.pick([2, 3], [6, 1], [3, -1])),
    "permute": of_any(lambda d, x: (sorted(range(x.ndim), key=lambda _: d.int(0, 9)),)),
    "movedim.intlist": of_any(lambda d, x: ([0, 1], [d.pick(1, -1), 0]), 2),
    "slice.Tensor": along_one(lambda d, x, a: (a, d.int(0, 1), d.int(2, 9), d.int(1, 2))),
    "split.sizes split_with_sizes": along_one(lambda d, x, a: ([1, x.shape[a] - 1], a)),
    "tensor_split.indices": along_one(lambda d, x, a: ([1], a)),
    "logsumexp": along_one(lambda d, x, a: ([a], d.flag())),
    "roll": along_one(lambda d, x, a: ([1], d.pick([], [a]))),
    "repeat_interleave.self_Tensor": along_one(
        lambda d, x, a: (torch.tensor([2]), d.pick(None, a))
    ),
    "repeat tile": of_any(lambda d, x: ([2, *(d.int(1, 2) for _ in x.shape)],)),
    "expand broadcast_to": of_shape(lambda d, s: (d.x(*d.within(s)), s)),
    "expand_as": of_shape(lambda d, s: (d.x(*d.within(s)), d.x(*s))),
    "index.Tensor": index_call,
    "gather": along_one(lambda d, x, a: (a, d.ids(x.shape[a], *(d.int(1, n) for n in x.shape)))),
    "embedding": lambda d: (d.x(3, d.int(1, 3)), d.ids(3, *d.shape(0, 3))),
    "masked_fill.Scalar": of_any(lambda d, x: (d.mask(*d.within(x.shape)), d.pick(*FILLS))),
    "masked_fill.Tensor": of_any(lambda d, x: (d.mask(*d.within(x.shape)), d.plain())),
    "where.self": of_shape(lambda d, s: (d.mask(*s), d.x(*s), d.x(*d.within(s)))),
    "where.ScalarSelf": of_shape(lambda d, s: (d.mask(*d.within(s)), d.pick(*FILLS), d.x(*s))),
    "where.ScalarOther": of_shape(lambda d, s: (d.mask(*s), d.x(*d.within(s)), d.pick(*FILLS))),
    "cat concat": of_shape(lambda d, s: ([d.x(*s), d.x(*s)], d.int(-len(s), len(s) - 1))),
    "stack": of_shape(lambda d, s: ([d.x(*s), d.x(*s)], d.int(-len(s) - 1, len(s)))),
    "pad": lambda d: (d.any(3, 3), [d.int(0, 1), 1], d.pick("constant", "replicate")),
    "constant_pad_nd": along_one(lambda d, x, a: ([d.int(0, 1) for _ in range(2 * a + 2)],)),
    "slice_scatter": along_one(lambda d, x, a: (d.x(*x.narrow(a, 0, 1).shape), a, 0, 1)),
    "select_scatter": along_one(lambda d, x, a: (d.x(*x.select(a, 0).shape), a, 0)),
    "layer_norm": norm_call,
    "rms_norm": lambda d: norm_call(d)[:3],
    "group_norm": of_any(lambda d, x: (d.pick(1, x.shape[1]),), 2),
    "cross_entropy_loss": loss_call,
    "scaled_dot_product_attention": attention_call,
    "linear": linear_call,
    "matmul": matmul_call,
    "mm": lambda d: product_call(d, batch=False)[1:],
    "bmm": lambda d: product_call(d, batch=True)[1:],
    "addmm": lambda d: (*product_call(d, batch=False), {"beta": 2, "alpha": -3}),
    "baddbmm": lambda d: (*product_call(d, batch=True), {"beta": 2, "alpha": -3}),
    "mv": lambda d: (d.x(2, 3), d.x(3)),
    "dot": lambda d: (d.x(3), d.x(3)),
    "einsum": einsum_call,
}


def op(name: str) -> Any:
    packet, _, overload = name.partition(".")
    return getattr(getattr(aten, packet), overload or "default")


MAKERS = {op(name): make for names, make in CASES.items() for name in names.split()}
MAKERS[hook_point] = lambda d: (d.any(), "name")


def drawn(target: Any, d: Draw) -> tuple[list[Any], dict[str, Any]]:
    made = MAKERS[target](d) if target in MAKERS else by_schema(target, d)
    return (list(made[:-1]), made[-1]) if isinstance(made[-1], dict) else (list(made), {})


def graph_of(target: Any, args: list[Any], kwargs: dict[str, Any]) -> tuple[fx.Node, Any]:
    """The node of one call, and a function from an argument to the node it has become."""
    graph, known = fx.Graph(), {}

    def place(t: Any) -> Any:
        if isinstance(t, Tensor) and id(t) not in known:
            base = t
            for axis in (a for a, n in enumerate(t.shape) if n > 1 and t.stride(a) == 0):
                base = base.narrow(axis, 0, 1)
            known[id(t)] = node = graph.placeholder(f"x{len(known)}")
            node.meta["val"] = base
            if base.shape != t.shape:
                known[id(t)] = graph.call_function(aten.expand.default, (node, list(t.shape)))
                known[id(t)].meta["val"] = t
        return known.get(id(t), t)

    placed = pytree.tree_map(place, (tuple(args), kwargs))
    call = graph.call_function(target, *placed)
    call.meta["val"] = target(*args, **kwargs)
    return call, place
