"""InsertHooks: the canonical names sit on the values they name, and an edit goes everywhere."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace as renamed
from itertools import pairwise
from typing import Any

import pytest
import torch
from graphs import Sketch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from lensfx.passes import InsertHooks
from models import CASES
from torch import Tensor, fx

from lensfx import ContractError, Lens, Pipeline, Program, capture
from lensfx.graph import graph_text, is_hook, native_name
from lensfx.rewrite import Edit, Match, Rule, Sites
from lensfx.verify import Observes, check, prove

aten = torch.ops.aten
module = importlib.import_module("lensfx.passes.insert_hooks")
WIDTH, VOCAB = 8, 11
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
Part = Callable[["Writer", fx.Node], fx.Node]


class Writer:
    """Writes a decoder; `kinds` says of each block what it adds: `a`, `m`, `am`, `|` parallel."""

    def __init__(self, dtype: torch.dtype = torch.float32, *lead: int | str) -> None:
        self.s, self.dtype, self.path = Sketch(), dtype, ""
        self.ids = self.s.input("ids", *(lead or ("B", "T")), dtype=torch.int64)
        self.affine = True

    def __call__(self, name: str, *args: Any) -> fx.Node:
        packet, _, overload = name.partition(".")
        target = getattr(getattr(aten, packet), overload or "default")
        return self.s.call(target, *args, path=self.path)

    def weight(self, *sizes: int) -> fx.Node:
        return self.s.weight(f"w{len(self.s.tensors)}", *sizes, dtype=self.dtype)

    def norm(self, x: fx.Node) -> fx.Node:
        vectors = (self.weight(WIDTH), self.weight(WIDTH)) if self.affine else ()
        return self("layer_norm", x, [WIDTH], *vectors)

    def linear(self, x: fx.Node, out: int = WIDTH) -> fx.Node:
        return self("linear", x, self.weight(out, int(x.meta["val"].shape[-1])))

    def attn(self, h: fx.Node) -> fx.Node:
        q, k, v = (self("unsqueeze", self.linear(h), 1) for _ in range(3))
        z = self("scaled_dot_product_attention", q, k, v, None, 0.0, True)
        return self.linear(self("squeeze.dim", z, 1))

    def mlp(self, h: fx.Node) -> fx.Node:
        return self.linear(self("relu", self.linear(h, 12)))

    def block(self, x: fx.Node, kind: str) -> fx.Node:
        if kind == "am":
            return self.block(self.block(x, "a"), "m")
        if kind == "|":
            h = self.norm(x)
            return self("add.Tensor", self("add.Tensor", x, self.attn(h)), self.mlp(h))
        part = self.attn if kind == "a" else self.mlp
        return self("add.Tensor", x, part(self.norm(x)))

    def decoder(self, kinds: list[str], positions: str = "slice") -> Program:
        x = self("embedding", self.weight(VOCAB, WIDTH), self.ids)
        if positions:
            table = self.weight(16 if positions == "slice" else 5, WIDTH)
            length = self("sym_size.int", self.ids, 1) if positions == "slice" else 0
            places = self("slice.Tensor", table, 0, 0, length) if positions == "slice" else table
            x = self("add.Tensor", x, places)
        for i, kind in enumerate(kinds):
            self.path = f"h.{i}"
            x = self.block(x, kind)
        self.path = "head"
        return self.s.done(self.linear(self.norm(x), VOCAB))


def hooked(before: Program) -> Program:
    return Pipeline([InsertHooks()]).run(before)


def names(lens: Lens) -> list[str]:
    return [n for n in lens.hook_names if "hook_" in n]


def assert_sums(cache: Any, blocks: int) -> None:
    """Bitwise: each block begins with the last one's end, and adds exactly what it says."""
    got = {k: v for k, v in cache.items() if ".hook_" in k}
    for i in range(blocks):
        at = {
            k.rpartition("hook_")[2]: v for k, v in got.items() if k.startswith(f"blocks.{i}.hook")
        }
        total = at["resid_pre"]
        if "attn_out" in at:
            total = total + at["attn_out"]
        if "resid_mid" in at:
            assert torch.equal(total, at["resid_mid"])
        if "mlp_out" in at:
            total = total + at["mlp_out"]
        assert torch.equal(total, at["resid_post"])
        if i:
            assert torch.equal(got[f"blocks.{i - 1}.hook_resid_post"], at["resid_pre"])
    start = cache["hook_embed"]
    if "hook_pos_embed" in cache:
        start = start + cache["hook_pos_embed"]
    assert torch.equal(start, got["blocks.0.hook_resid_pre"])


# fires


def test_the_smallest_graph(golden: Callable[[str, str], None]) -> None:
    before = Writer().decoder(["m"])
    after = hooked(before)
    golden("insert_hooks.before", graph_text(before.graph))
    golden("insert_hooks.after", graph_text(after.graph))
    assert [e.note for e in after.journal] == [
        "unembed.hook_out",
        "unembed.hook_in",
        "blocks.0.hook_resid_post",
        "blocks.0.hook_mlp_out",
        "blocks.0.mlp.hook_post",
        "blocks.0.mlp.hook_pre",
        "blocks.0.hook_mlp_in",
        "blocks.0.hook_resid_pre",
        "hook_pos_embed",
        "hook_embed",
    ]


FIRST = ["hook_embed", "hook_pos_embed"]
LAST = ["ln_final.hook_scale", "ln_final.hook_normalized", "unembed.hook_in", "unembed.hook_out"]


# In the order in which the sketches below compute them.
INPUTS = [
    "hook_attn_in", "hook_q_input", "attn.hook_q", "hook_k_input", "attn.hook_k", "hook_v_input",
    "attn.hook_v",
]  # fmt: skip
CORE = [f"attn.hook_{n}" for n in ("attn_scores", "pattern", "z", "result")] + ["hook_attn_out"]
MLP = ["mlp.hook_pre", "mlp.hook_post", "hook_mlp_out"]


def norm_names(number: int) -> list[str]:
    return [f"ln{number}.hook_scale", f"ln{number}.hook_normalized"]


def block_names(i: int, kind: str = "am") -> list[str]:
    found = ["hook_resid_pre"]
    if kind != "m":
        found += [*norm_names(1), *INPUTS, *CORE]
    if kind == "am":
        found += ["hook_resid_mid"]
    if kind in ("am", "m"):
        found += ["hook_mlp_in", *norm_names(2 if kind == "am" else 1)]
    if kind != "a":
        found += MLP
    return [f"blocks.{i}.{name}" for name in (*found, "hook_resid_post")]


def post_names(i: int) -> list[str]:
    """A block whose norms come after its writes."""
    norms = [f"blocks.{i}.{n}" for n in (*norm_names(1), *norm_names(2))]
    return [*(n for n in block_names(i) if ".ln" not in n), *norms]


def bare_names(i: int) -> list[str]:
    return [n for n in block_names(i) if ".ln" not in n]


def llama_names(i: int) -> list[str]:
    names = [n for n in block_names(i) if "attn_in" not in n]
    return [*names, f"blocks.{i}.mlp.hook_pre_linear"]


PRE = [*FIRST, *block_names(0), *block_names(1), *LAST]
ENDS = ["hook_embed", "unembed.hook_in", "unembed.hook_out"]
HEAD = ["unembed.hook_in", "unembed.hook_out"]
EXPECTED = {
    "nanogpt": PRE,
    "nanogpt_scaled_embedding": PRE,
    "nanogpt_shared_block": [*FIRST, *(n for i in range(3) for n in block_names(i)), *LAST],
    "llamalike": ["hook_embed", *llama_names(0), *llama_names(1), *LAST],
    "hf_bert": [*FIRST, *post_names(0), *post_names(1), *HEAD],
    # Every norm is behind a write, the last one too.
    "norm_residual": [n for n in PRE if "ln_final" not in n],
    "no_norm": [*FIRST, *bare_names(0), *bare_names(1), *HEAD],
}


@pytest.fixture(scope="module", params=EXPECTED)
def case(request: pytest.FixtureRequest) -> tuple[str, Lens, Any]:
    found = CASES[request.param]
    args, kwargs = found.inputs(2, 7, 0)
    program = Pipeline.default().run(capture(found.build(), *args, **kwargs))
    return request.param, Lens(program), (args, kwargs)


def test_the_names_of_a_model(case: tuple[str, Lens, Any]) -> None:
    name, lens, (args, kwargs) = case
    # Which of q, k and v a model computes first is its own affair.
    assert sorted(names(lens)) == sorted(EXPECTED[name])
    _, cache = lens.run_with_cache(*args, **kwargs)
    assert set(EXPECTED[name]) <= set(cache)
    # Behind a post-norm the stream is another value than the sum.
    if name not in ("hf_bert", "norm_residual"):
        assert_sums(cache, sum("resid_pre" in n for n in EXPECTED[name]))
    assert lens.report.passes["InsertHooks"].refused == ()


def test_the_scale_of_the_embedding_is_in_the_embedding() -> None:
    found = CASES["nanogpt_scaled_embedding"]
    model, (args, _) = found.build(), found.inputs(2, 7, 0)
    _, cache = Lens(hooked(capture(model, *args))).run_with_cache(*args)
    assert torch.equal(cache["hook_embed"], model.transformer.wte(args[0]) * 32**0.5)


# contract


@settings(max_examples=20)
@given(data=st.lists(st.integers(0, 10**6), min_size=9, max_size=9))
def test_looking_changes_no_bit(data: list[int]) -> None:
    pick = iter(data)

    def of(*options: Any) -> Any:
        return options[next(pick) % len(options)]

    w = Writer(of(*DTYPES), of("B", 1, 2), 5)
    w.affine = of(True, False)
    kinds = [of("a", "m", "am", "|") for _ in range(of(1, 2, 3))]
    # Where half a block stands next to another, what belongs together is a matter of taste.
    assume(all("m" not in p or p == ("m", "m") for p in pairwise(kinds)))
    before = w.decoder(kinds, of("slice", "table", ""))
    after = hooked(before)
    assert prove(after).worst == 0.0
    lens = Lens(after)
    assert check(before, lens, up_to=Observes()).error == 0.0
    example = before.example[0]
    out, cache = lens.run_with_cache(example)
    assert torch.equal(out[0], before(example)[0])
    assert_sums(cache, len(kinds))
    wanted = [n for i, kind in enumerate(kinds) for n in block_names(i, kind)]
    assert [n for n in names(lens) if n.startswith("blocks.")] == wanted


def edited(name: str, change: Callable[[Tensor], Tensor], **given: Any) -> tuple[Any, Any]:
    """The cache of a two-block decoder, as it is and with one value changed."""
    before = given.get("program") or Writer().decoder(["am", "am"])
    lens = Lens(hooked(before))
    plain = lens.run_with_cache(*before.example)[1]
    with lens.hooks(fwd_hooks=[(name, lambda value, hook: change(value))]):
        return plain, lens.run_with_cache(*before.example)[1]


@pytest.mark.parametrize(
    "name",
    [
        "hook_embed",
        "hook_pos_embed",
        "blocks.0.hook_resid_pre",
        "blocks.0.hook_attn_out",
        "blocks.0.hook_resid_mid",
        "blocks.0.hook_mlp_out",
        "blocks.0.hook_resid_post",
        "blocks.1.hook_resid_pre",
    ],
)
def test_an_edit_reaches_the_skip_connection(name: str) -> None:
    plain, changed = edited(name, lambda value: value.flip(0) * 2 + 1)
    assert torch.equal(changed[name], plain[name].flip(0) * 2 + 1)
    steps = [n for n in plain if "ln" not in n and "hook_" in n and "unembed" not in n]
    for earlier in steps[: steps.index(name)]:
        assert torch.equal(changed[earlier], plain[earlier])
    for later in ("blocks.1.hook_resid_post", "unembed.hook_out"):
        assert not torch.equal(changed[later], plain[later])
    # Where the stream itself was changed, what is carried on is the changed value.
    at, _, what = name.rpartition(".hook_")
    if what == "resid_mid":
        assert torch.equal(
            changed[f"{at}.hook_resid_post"], changed[name] + changed[f"{at}.hook_mlp_out"]
        )
    if what == "attn_out":
        assert torch.equal(
            changed[f"{at}.hook_resid_mid"], plain[f"{at}.hook_resid_pre"] + changed[name]
        )


def test_zero_attention_leaves_the_stream() -> None:
    _, changed = edited("blocks.0.hook_attn_out", torch.zeros_like)
    assert torch.equal(changed["blocks.0.hook_resid_mid"], changed["blocks.0.hook_resid_pre"])


def test_unembed_in_is_read_by_the_head_alone() -> None:
    plain, changed = edited("unembed.hook_in", torch.zeros_like)
    assert torch.equal(changed["ln_final.hook_normalized"], plain["ln_final.hook_normalized"])
    assert torch.equal(changed["unembed.hook_out"], torch.zeros_like(plain["unembed.hook_out"]))


def test_a_table_of_positions_read_whole_can_be_edited() -> None:
    program = Writer(torch.float32, "B", 5).decoder(["m"], "table")
    plain, changed = edited("hook_pos_embed", torch.zeros_like, program=program)
    assert torch.equal(changed["blocks.0.hook_resid_pre"], plain["hook_embed"])


@pytest.mark.parametrize("affine", [True, False])
def test_the_scale_is_the_divisor_and_an_edit_of_it_acts(affine: bool) -> None:
    w = Writer(torch.float64)
    w.affine = affine
    program = w.decoder(["am"])
    plain, changed = edited("blocks.0.ln2.hook_scale", lambda value: value * 2, program=program)
    x = plain["blocks.0.hook_resid_mid"]
    scale = (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(plain["blocks.0.ln2.hook_scale"], scale, rtol=1e-14, atol=0)
    halved = (x - x.mean(-1, keepdim=True)) / (2 * scale)
    torch.testing.assert_close(
        changed["blocks.0.ln2.hook_normalized"], halved.detach(), rtol=1e-12, atol=1e-14
    )
    norm = next(n for n in hooked(program).graph.nodes if n.name == "layer_norm_1")
    g, b = (
        (program.tensors[str(n.target)] for n in norm.args[2:4])
        if affine
        else (torch.ones(WIDTH), torch.zeros(WIDTH))
    )
    read = native_name(norm)
    torch.testing.assert_close(changed[read], (halved * g + b).detach(), rtol=1e-12, atol=1e-14)


# refuses


def post_norm(w: Writer, x: fx.Node) -> fx.Node:
    return w.norm(w("add.Tensor", x, w.attn(x)))


def mixer(w: Writer, x: fx.Node) -> fx.Node:
    return w("add.Tensor", x, w.linear(w("cumsum", w.norm(x), 1)))


def gate(w: Writer, x: fx.Node) -> fx.Node:
    return w("mul.Tensor", w("add.Tensor", x, w.mlp(w.norm(x))), w.linear(x))


def sketch(block: Part) -> Program:
    w = Writer()
    w.path = "h"
    x = w("embedding", w.weight(VOCAB, WIDTH), w.ids)
    for _ in range(2):
        x = block(w, x)
    return w.s.done(w.linear(w.norm(x), VOCAB))


def test_what_has_no_stream_gets_the_names_of_its_ends() -> None:
    after = hooked(sketch(gate))
    (refused,) = after.reports[-1].refused
    assert refused.reason == "no hook points on blocks: no residual stream leads to an output"
    assert (refused.root, refused.blame) == ("output", "%output")
    assert names(Lens(after)) == ENDS
    assert prove(after).worst == 0.0


OTHERS: dict[str, tuple[Part, list[str]]] = {
    "post-norm": (post_norm, ["hook_resid_pre", *INPUTS, *CORE, "hook_resid_post", *norm_names(1)]),
    "mixer": (
        mixer,
        ["hook_resid_pre", "mixer.hook_in", *norm_names(1), "mixer.hook_out", "hook_resid_post"],
    ),
    "raw": (
        lambda w, x: w("add.Tensor", x, w.attn(x)),
        ["hook_resid_pre", *INPUTS, *CORE, "hook_resid_post"],
    ),
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_kinds_of_block_are_named_too(case: str) -> None:
    block, wanted = OTHERS[case]
    after = hooked(sketch(block))
    assert after.reports[-1].refused == ()
    inside = [n for n in names(Lens(after)) if n.startswith("blocks.")]
    assert inside == [f"blocks.{i}.{n}" for i in (0, 1) for n in wanted]
    assert prove(after).worst == 0.0


def test_no_tokens_no_names() -> None:
    s = Sketch()
    x = s.input("x", "B", WIDTH)
    before = s.done(s.call(aten.tanh.default, x))
    after = hooked(before)
    assert [(r.root, r.reason) for r in after.reports[-1].refused] == [
        ("output", "no hook points on blocks: no residual stream leads to an output")
    ]
    assert graph_text(after.graph) == graph_text(before.graph)


# faults


def planted(name: str, by: float) -> Rule:
    """The rule with one hook that adds a number to what it should only name."""

    def wrong(m: Match, edit: Edit) -> None:
        point = m.point
        if point.name != name:
            return module.replace(m, edit)
        told = module.readers(m.root) if point.only is None else list(point.only)
        at = edit.after(m.root)
        value = at.call(module.hook_point, m.root, point.name)
        value = at.call(aten.add.Tensor, value, by)
        for reader in told:
            at.redirect(reader, m.root, value)
        edit.remark(point.name)

    return Rule(Sites(module.find), module.unless, wrong)


@pytest.mark.parametrize(
    "name",
    [
        "hook_embed",
        "blocks.0.hook_resid_pre",
        "blocks.0.hook_attn_out",
        "blocks.1.hook_resid_mid",
        "blocks.1.mlp.hook_pre",
        "blocks.1.mlp.hook_post",
        "blocks.2.hook_mlp_out",
        "unembed.hook_out",
    ],
)
def test_a_hook_that_changes_its_value_is_found_and_named(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(InsertHooks, "rules", (planted(name, 1e-7),))
    with pytest.raises(ContractError) as caught:
        prove(hooked(Writer(torch.float64).decoder(["am", "am", "am"])))
    first, second, *_ = str(caught.value).splitlines()
    assert first.startswith("insert-hooks broke its contract observes: ")
    assert "float64" not in first
    assert f"  {name}  (rewrite " in second


def test_a_sign_of_zero_is_a_change(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(InsertHooks, "rules", (planted("hook_embed", 0.0),))
    w = Writer()
    table = w.s.stored("table", torch.full((VOCAB, WIDTH), -0.0))
    with pytest.raises(ContractError, match="the sign of a zero differs"):
        prove(hooked(w.s.done(w("embedding", table, w.ids))))


def test_a_name_on_another_value_is_not_for_the_proof_but_for_the_sums(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = module.structure
    swapped = {"blocks.0.hook_attn_out": "blocks.0.hook_mlp_out"}
    swapped |= {v: k for k, v in swapped.items()}

    def wrong(program: Program) -> Any:
        found = right(program)
        points = tuple(renamed(p, name=swapped.get(p.name, p.name)) for p in found.points)
        return renamed(found, points=points)

    monkeypatch.setattr(module, "structure", wrong)
    before = Writer().decoder(["am"])
    after = hooked(before)
    assert prove(after).worst == 0.0
    with pytest.raises(AssertionError):
        assert_sums(Lens(after).run_with_cache(*before.example)[1], 1)


# again


def test_a_second_run_changes_nothing_and_every_node_is_described() -> None:
    for before in (Writer().decoder(["am", "|"]), Writer().decoder(["a", "m"], "")):
        after = hooked(before)
        again = hooked(after)
        assert again.reports[-1].fired == ()
        assert graph_text(again.graph) == graph_text(after.graph)
        calls = [n for n in after.graph.nodes if n.op == "call_function"]
        assert all(n.meta.get("val") is not None and native_name(n) for n in calls)
        assert [n.args[1] for n in calls if is_hook(n)] == [
            native_name(n) for n in calls if is_hook(n)
        ]
        assert dict(after.tensors) == dict(before.tensors)
        assert all(after.tensors[k] is before.tensors[k] for k in before.tensors)
