"""What a branch is: attention, another mixer, an MLP, a mixture of experts, or an injection."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from lensfx.analysis.structure.attention import SDPA, Core, cores, is_product
from lensfx.analysis.structure.facts import MLP, AttentionBranch, Branch, Layout, Note, Place
from lensfx.analysis.structure.flow import Flow, is_weight_linear
from lensfx.analysis.structure.heads import described
from lensfx.analysis.structure.labels import Labels
from lensfx.analysis.structure.layout import count, row_layout
from lensfx.analysis.structure.mixing import mixing
from lensfx.analysis.structure.normalise import Norm
from lensfx.analysis.structure.streams import Region
from lensfx.graph.node import is_op, is_weight, op_name
from lensfx.graph.ops import VIEWS

__all__ = ["Branches"]

aten = torch.ops.aten

_STRONG = frozenset({"contract", "softmax", "scan", "select", "unknown", "fft"})
_INJECTED = 6
_QUIET = frozenset({"mul", "add", "sub", "div", "getitem", "neg", "where", "masked_fill", "cat"})


class Branches:
    """Describes the region behind a write."""

    def __init__(
        self, flow: Flow, labels: Labels, norms: dict[fx.Node, Norm], above: dict[Any, Any]
    ) -> None:
        self.flow, self.labels, self.norms, self.above = flow, labels, norms, above
        self.attention: dict[int, tuple[AttentionBranch, ...]] = {}
        self._crossing: frozenset[fx.Node] = frozenset()

    def branch(self, region: Region, value: fx.Node) -> Branch:
        """The branch behind a write, its kind and the norms by which it reads the stream."""
        nodes = region.nodes
        mixes = mixing(self.labels, nodes)
        found_cores = list(cores(self.flow, self.labels, nodes))
        cross = self._cross(region) or any(map(self._apart, found_cores))
        found = tuple(
            described(self.flow, self.labels, self.above, core, set(nodes), cross)
            for core in found_cores
        )
        self._crossing = frozenset(region.crossing)
        notes = [Note("its nodes multiply nothing by a weight", value)] if not nodes else []
        stacked = self._stacked(found_cores)
        if stacked:
            notes.append(Note("attentions one behind the other in one branch", value))
            found = ()
        kind = self._kind(nodes, mixes, found, cross and bool(found))
        branch = Branch(
            kind,
            tuple(nodes),
            tuple(region.entries),
            tuple(self._norms(region)),
            tuple(region.crossing),
            mixes,
            tuple(notes),
            not stacked,
        )
        self.attention[id(branch)] = found
        return branch

    def _cross(self, region: Region) -> bool:
        """Whether a branch reads another stream than the one it writes to."""
        return any(
            self.labels.has_positions(a for axis in self.labels.of.get(n, []) for a in axis)
            for n in region.foreign
        )

    def _stacked(self, found: list[Core]) -> bool:
        """Whether one attention weighs values that come from another one: a stack of layers."""
        return any(a is not b and self.flow.reaches(a.z, b.value) for a in found for b in found)

    def _apart(self, core: Core) -> bool:
        """Whether queries and keys run along positions of different inputs."""
        sides = []
        for node in (core.query, core.key):
            atoms = [a for axis in self.labels.of.get(node, []) for a in axis]
            sides.append({self.labels.root[a.label] for a in atoms if self.labels.is_position(a)})
        return all(sides) and not sides[0] & sides[1]

    def _kind(
        self,
        nodes: list[fx.Node],
        mixes: tuple[str, ...],
        found: tuple[AttentionBranch, ...],
        cross: bool,
    ) -> str:
        linears = [n for n in nodes if is_weight_linear(n)]
        if found:
            return "cross_attention" if cross else "attention"
        if mixes:
            return "mixer" if linears or set(mixes) & _STRONG else "inject"
        quiet = all(op_name(n) in _QUIET or "view" in op_name(n) for n in nodes)
        if not linears and (len(nodes) <= _INJECTED or quiet):
            return "inject"
        if any(op_name(n) == "topk" or "grouped_mm" in str(n.target) for n in nodes):
            return "moe"
        return "gated_mlp" if self._product(nodes) is not None else "mlp"

    def _norms(self, region: Region) -> list[Norm]:
        """The norms whose input is a stream value that the branch reads.

        Where the stream is copies side by side, those of a weighed sum of them, or of all of them.
        """
        read = {entry for entry, _ in region.entries}
        inside = set(region.nodes)
        found: dict[int, tuple[int, Norm]] = {}
        for node in region.nodes:
            norm = self.norms.get(node)
            steps = self._steps(norm.value, read, inside) if norm is not None else None
            if norm is not None and steps is not None:
                found[id(norm.bare)] = steps, norm
        best = min((steps for steps, _ in found.values()), default=0)
        return [norm for steps, norm in found.values() if steps == best]

    def _steps(self, value: fx.Node, read: set[fx.Node], inside: set[fx.Node]) -> int | None:
        """0 if a value is one that is read, 1 a weighed sum of its copies, 2 a view of it."""
        stack, seen, weighed = [value], {value}, False
        while stack:
            node = stack.pop()
            if node in read:
                return 0 if node is value else (1 if weighed else 2)
            if node not in inside or not self._weighs(node):
                continue
            weighed |= node.target not in VIEWS
            new = [d for d in self.flow.deps[node] if d not in seen]
            seen.update(new)
            stack.extend(new)
        return None

    def _weighs(self, node: fx.Node) -> bool:
        """Whether an operator is a view, a product entry by entry, or a sum over copies."""
        if node.target in VIEWS or op_name(node) == "mul":
            return True
        if op_name(node) not in ("sum", "mean", "matmul", "bmm", "einsum"):
            return False
        last = [self.labels.of.get(n, [()])[-1:] for n in (node, self.flow.deps[node][-1])]
        return last[0] == last[1] and not self.labels.position_mixes(node)

    def _product(self, nodes: list[fx.Node]) -> fx.Node | None:
        """A product of two values each of which has a projection of its own behind it.

        And one ahead: what multiplies the result of the last projection is a gate of the write.
        """
        inside = set(nodes)
        linears = [n for n in nodes if is_weight_linear(n)]
        for node in reversed(nodes):
            deps = self.flow.deps[node]
            if op_name(node) == "glu":
                return node
            if op_name(node) != "mul" or len(deps) != 2:
                continue
            a, b = (self._projections(d, inside) for d in deps)
            if a and b and not a & b and any(self.flow.reaches(node, n) for n in linears):
                return node
        return None

    def _projections(self, node: fx.Node, inside: set[fx.Node]) -> set[fx.Node]:
        """The nearest projections, or pieces of one, that a value is computed from."""
        found: set[fx.Node] = set()
        stack, seen = [node], {node}
        while stack:
            n = stack.pop()
            if n in self._crossing:
                found.add(n)
            if n not in inside:
                continue
            piece = op_name(n) in ("getitem", "slice", "select") and self._below_linear(n)
            if is_weight_linear(n) or piece:
                found.add(n)
                continue
            new = [d for d in self.flow.deps[n] if d not in seen]
            seen.update(new)
            stack.extend(new)
        return found

    def _below_linear(self, node: fx.Node) -> bool:
        while not is_weight_linear(node):
            deps = self.flow.deps[node]
            name = op_name(node)
            views = name in ("getitem", "slice", "select", "split", "chunk", "split_with_sizes")
            if len(deps) != 1 or not (
                views or "view" in name or "reshape" in name or name in _QUIET
            ):
                return False
            node = deps[0]
        return True

    def mlp(self, branch: Branch, value: fx.Node) -> MLP | None:
        """The parts of a channel mixer."""
        if branch.kind not in ("mlp", "gated_mlp", "moe"):
            return None
        nodes = list(branch.nodes)
        inside = set(nodes)
        self._crossing = frozenset(branch.crossing)
        router = self._router(nodes) if branch.kind == "moe" else None
        if router is not None:
            return self._experts(nodes, router)
        linears = [n for n in nodes if is_weight_linear(n)]
        if not linears:
            return None
        down = self._down(value, inside)
        product = self._product(nodes) if branch.kind == "gated_mlp" else None
        if down is None:
            return MLP(None, None, None, None, None, None, nodes=tuple(nodes))
        read = self._read(down)
        post = self._place(read, inside)
        if product is not None and op_name(product) == "mul":
            return self._gated(product, post, down, inside, nodes)
        ups = self._projections(read, inside)
        up = next(iter(ups)) if len(ups) == 1 else None
        pre = self._place(self._biased(up, inside), inside) if up is not None else None
        acts = self._activations(up, read, inside) if up is not None else []
        return MLP(
            pre if acts else None,
            post,
            None,
            None,
            self._linear(up),
            down,
            _one(acts),
            nodes=tuple(nodes),
        )

    def _gated(
        self,
        product: fx.Node,
        post: Place | None,
        down: fx.Node,
        inside: set[fx.Node],
        nodes: list[fx.Node],
    ) -> MLP:
        sides = []
        for dep in self.flow.deps[product]:
            found = self._projections(dep, inside)
            one = next(iter(found)) if len(found) == 1 else None
            acts = self._activations(one, dep, inside) if one is not None else []
            sides.append((one, acts, dep))
        # The operand itself: it may be a projection that was scaled or added to.
        gate, up = sorted(sides, key=lambda s: not s[1])
        return MLP(
            self._place(gate[0] and self._biased(gate[0], inside), inside),
            post,
            self._place(up[2], inside),
            self._linear(gate[0]),
            self._linear(up[0]),
            down,
            _one(gate[1]),
            nodes=tuple(nodes),
        )

    def _experts(self, nodes: list[fx.Node], router: fx.Node) -> MLP:
        number = count(self.labels.features(router))
        weights = [
            n
            for n in nodes
            if op_name(n) in ("softmax", "sigmoid") and self.flow.reaches(router, n)
        ]
        weights = [n for n in weights if count(self.labels.features(n)) == number]
        picks = [n for n in nodes if op_name(n) == "topk" and self.flow.reaches(router, n)]
        indices = [r for n in picks for r in n.users if op_name(r) == "getitem" and r.args[1] == 1]
        inside = set(nodes)
        return MLP(
            None,
            None,
            None,
            None,
            None,
            None,
            router=router,
            expert_weights=self._place(weights[0], inside) if weights else None,
            expert_indices=self._place(indices[0], inside) if indices else None,
            experts=number,
            nodes=tuple(nodes),
        )

    def _router(self, nodes: list[fx.Node]) -> fx.Node | None:
        for node in nodes:
            if op_name(node) == "topk":
                path: Any = node
                while isinstance(path, fx.Node) and path in set(nodes):
                    if is_weight_linear(path):
                        return path
                    path = self.above.get(path)
        return None

    def _down(self, value: fx.Node, inside: set[fx.Node]) -> fx.Node | None:
        """The last projection: what is written is it, up to views, scales, shifts and a norm."""
        node: Any = self.flow.rep(value)
        while isinstance(node, fx.Node) and node in inside:
            if is_weight_linear(node):
                return node
            wide = self._wide(node)
            node = wide[0] if len(wide) == 1 else self.above.get(node)
        return None

    def _wide(self, node: fx.Node) -> list[fx.Node]:
        """The operands of a product that have the features of the result, not one number each."""
        deps = self.flow.deps[node]
        if op_name(node) != "mul" or len(deps) != 2:
            return []
        return [d for d in deps if self.labels.of.get(d, [()])[-1]]

    def _read(self, linear: fx.Node) -> fx.Node:
        """What a projection reads, before views that only flatten rows."""
        node = self.flow.deps[linear][0]
        while "view" in op_name(node) or "reshape" in op_name(node):
            node = self.flow.deps[node][0]
        return node

    def _linear(self, node: fx.Node | None) -> fx.Node | None:
        while node is not None and not is_weight_linear(node):
            deps = self.flow.deps[node]
            node = deps[0] if len(deps) == 1 else None
        return node

    def _place(self, node: fx.Node | None, inside: set[fx.Node]) -> Place | None:
        """A value as `[batch, pos, features]`; of views of it the first one with these axes."""
        if node is None:
            return None
        first = node
        while True:
            layout = row_layout(self.labels, node)
            if layout is not None:
                # One row of features for each position: experts side by side are another thing.
                return Place(node, layout) if len(layout.order) <= 3 else None
            read = self.flow.readers[node]
            if len(read) != 1 or read[0].target not in VIEWS or read[0] not in inside:
                break
            node = read[0]
        axes = self.labels.of.get(first, [])
        rows = len(axes) == 2 and len(axes[0]) == 2 and all(map(self.labels.is_sequence, axes[0]))
        return Place(first, Layout((), (0, 1)), rows=True) if rows else None

    def _biased(self, node: fx.Node, inside: set[fx.Node]) -> fx.Node:
        """A projection with the bias that is added to it where it stands alone."""
        while True:
            read = self.flow.readers[node]
            if len(read) != 1 or read[0] not in inside or len(self.flow.deps[read[0]]) != 1:
                return node
            shift = is_op(read[0], aten.add.Tensor) and any(map(is_weight, read[0].all_input_nodes))
            if not shift and read[0].target not in VIEWS:
                return node
            node = read[0]

    def _activations(self, first: fx.Node, last: fx.Node, inside: set[fx.Node]) -> list[str]:
        """The non-linear operators between two values."""
        between = (self.flow.above[last] | 1 << self.flow.rank[last]) & ~(
            self.flow.above[first] | 1 << self.flow.rank[first]
        )
        nodes = [n for n in self.flow.members(between) if n in inside]
        return [op_name(n) for n in nodes if self._bends(n)][::-1]

    def _bends(self, node: fx.Node) -> bool:
        name = op_name(node)
        if is_product(self.flow, node) or node.target is SDPA:
            return False
        if name == "mul":
            return len(self.flow.deps[node]) > 1 or node.args[0] is node.args[1]
        plain = name in ("add", "sub", "div", "neg", "getitem", "cat", "slice", "to", "clone")
        return (
            not plain
            and "view" not in name
            and "reshape" not in name
            and not is_weight_linear(node)
        )


def _one(acts: list[str]) -> str:
    """The name of an activation that is one operator; several are listed in order."""
    return "+".join(dict.fromkeys(acts))
