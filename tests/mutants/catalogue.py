"""The catalogue: faults of every shipped pass that has a model here which they bite."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from graphs import Sketch
from lensfx.passes import (
    CanonicalLinear,
    CanonicalNorm,
    CenterUnembed,
    ExposeAttention,
    FoldNorm,
    InsertHooks,
    canonical_linear,
    canonical_norm,
    center_unembed,
    expose_attention,
    fold_norm,
    insert_hooks,
)
from models import CASES
from torch import fx

from lensfx import Pipeline, Program, capture
from lensfx.analysis import Proof
from lensfx.rewrite import Edit, Match, Rule, Sites
from mutants.generic import generic
from mutants.harness import FIRST, Mutant, passes_test

aten = torch.ops.aten


def catalogue() -> list[Mutant]:
    """Every mutant, pass by pass."""
    parts = (linears, norms, folds, heads, attentions, hooks, generic)
    return [mutant for part in parts for mutant in part()]


@cache
def captured(name: str) -> Program:
    """A captured model in canonical form, so that the passes behind it have their sites."""
    args, kwargs = CASES[name].inputs(2, 7, 0)
    program = capture(CASES[name].build(), *args, **kwargs)
    return Pipeline([CanonicalLinear(), CanonicalNorm()]).rewrite(program)


def bare(name: str) -> Program:
    """The same without a history, so that only what a mutant runs is proved."""
    none: Any = {"stages": (), "journal": (), "reports": (), "passes": ()}
    return replace(captured(name), **none)


# canonical-linear


def linears() -> Iterator[Mutant]:
    tests = passes_test("canonical_linear")
    for fault in (tests.not_transposed, tests.no_bias, tests.twice_the_bias):
        for place in range(2):
            root = "addmm" + (f"_{place}" if place else "")

            def planted(m: Match, edit: Edit, root: str = root, fault: Any = fault) -> None:
                (fault if m.old.name == root else canonical_linear.replace)(m, edit)

            rule = Rule(canonical_linear.ADDMM, canonical_linear.unless_addmm, planted)
            rules = (rule, *CanonicalLinear.rules[1:])
            yield _linear(f"{fault.__name__}, site {place}", rules, tests.stack, f"h.{place}")
    always = (Rule(canonical_linear.ADDMM, lambda m: None, canonical_linear.replace),)
    for word in ("alpha", "beta"):
        feed = tests.addmm

        def scaled(feed: Any = feed, word: str = word) -> Program:
            return tests.program(lambda s, x: feed(s, x, **{word: 0.5}))

        yield _linear(f"{word} ignored", always, scaled, "%addmm  c")


def _linear(fault: str, rules: Any, before: Any, at: str) -> Mutant:
    passes = (CanonicalLinear(),)
    return Mutant("canonical-linear", fault, CanonicalLinear, "rules", rules, passes, before, at)


# canonical-norm


def norms() -> Iterator[Mutant]:
    tests = passes_test("canonical_norm")
    true = canonical_norm.written_norm
    passes = (CanonicalNorm(),)
    for fault, doctor in tests.DOCTORED.items():

        def planted(m: Match, doctor: Any = doctor) -> Any:
            found = true(m)
            return doctor(found) if "h.1." in str(m.norm.meta["nn_module_stack"]) else found

        yield Mutant(
            "canonical-norm", fault, canonical_norm, "written_norm", planted, passes,
            tests.stack, "h.1.ln",
        )  # fmt: skip
    for case in ("eps outside", "unbiased deviation", "unbiased variance"):

        def taken(m: Match) -> Any:
            return tests.Norm(m.x, True, 8, float(m.eps or 0.0), m.gain)

        def before(case: str = case) -> Program:
            return tests.program(tests.REFUSED[case][0])

        yield Mutant(
            "canonical-norm", f"{case} taken for a norm", canonical_norm, "written_norm", taken,
            passes, before, "%div  ln",
        )  # fmt: skip

    def forgotten(m: Match, edit: Edit) -> None:
        edit.before(m.mul).replace(m.mul, m.norm)

    scaled = Rule(canonical_norm.SCALED, canonical_norm.unless_scaled, forgotten)
    yield Mutant(
        "canonical-norm", "scale forgotten", CanonicalNorm, "rules",
        (CanonicalNorm.rules[0], scaled), passes, tests.stack, "h.",
    )  # fmt: skip


# fold-norm


def folds() -> Iterator[Mutant]:
    """Wrong at every norm, so that the first rewrite is to blame."""
    tests = passes_test("fold_norm")
    for fault, wrong in tests.FAULTS.items():
        yield _fold(fault, wrong, tests.stack)
    for name in ("nanogpt", "llamalike_offset"):
        for fault in ("one plus", "one column", "twice"):
            yield _fold(f"{fault}, on {name}", tests.FAULTS[fault], partial(bare, name))
    yield _fold("detached", _detached, tests.stack)
    passes, rule = (FoldNorm(),), fold_norm.WHOLE
    other = Rule(rule.pattern, rule.unless, _other_eps)
    yield Mutant("fold-norm", "eps changed", fold_norm, "WHOLE", other, passes, tests.stack, FIRST)


right_fold = fold_norm.fold_into
right_replace = fold_norm.WHOLE.replace


def _detached(at: Any, r: Any, g: Any, s: Any) -> dict[str, fx.Node]:
    return right_fold(at, r, at.call(aten.detach.default, g), s)


def _other_eps(m: Match, edit: Edit) -> None:
    right_replace(m, edit)
    edit.before(m.norm).set(m.norm, eps=1e-6)


def _fold(fault: str, instead: Any, before: Any) -> Mutant:
    passes = (FoldNorm(),)
    return Mutant("fold-norm", fault, fold_norm, "fold_into", instead, passes, before, FIRST)


# center-unembed


def heads() -> Iterator[Mutant]:
    tests = passes_test("center_unembed")
    for size, words in ((tests.VOCAB, ""), (tests.WIDTH, ", as many tokens as channels")):
        for wrong in tests.FAULTS:

            def planted(m: Match, at: Any, wrong: Any = wrong) -> Any:
                here = "heads.1" in str(m.root.meta["nn_module_stack"])
                return (wrong if here else tests.right)(m, at)

            def before(size: int = size) -> Program:
                return tests.heads(size)

            yield _head(f"{wrong.__name__}{words}", "centred", planted, before, "heads.1")
    yield _head("soft cap ignored", "dead", _nobody, lambda: capped(aten.tanh.default), "head")
    yield _head("another reader ignored", "dead", _nobody, lambda: capped(aten.exp.default), "head")


def _nobody(value: fx.Node, axes: Any, **allowed: Any) -> Proof:
    """An analysis that says yes to everything."""
    return Proof(value, frozenset(axes), (), ())


def capped(op: Any) -> Program:
    """A head whose logits go through something that sees a shift."""
    s = Sketch()
    x = s.call(aten.layer_norm.default, s.input("x", "B", 8), [8])
    y = s.call(aten.linear.default, x, s.weight("W", 11, 8), path="head")
    program = s.done(s.call(op, y))
    return replace(program, signature=replace(program.signature, outputs=("logits",)))


def _head(fault: str, attribute: str, instead: Any, before: Any, at: str) -> Mutant:
    passes = (CenterUnembed(output=0 if attribute == "dead" else None),)
    return Mutant("center-unembed", fault, center_unembed, attribute, instead, passes, before, at)


# expose-attention


def attentions() -> Iterator[Mutant]:
    tests = passes_test("expose_attention")
    for fault, (wrong, instead, options) in tests.FAULTS.items():

        def planted(
            call: Any, node: fx.Node, env: Any = lambda n: n, wrong: Any = wrong,
            instead: Any = instead,
        ) -> Any:  # fmt: skip
            def spoiled(target: Any, *args: Any, **kwargs: Any) -> Any:
                here = target is wrong and "h.1.attn" in node.meta["nn_module_stack"]
                return instead(call, *args) if here else call(target, *args, **kwargs)

            return tests.lowered(spoiled, node, env)

        def before(options: Any = options) -> Program:
            return tests.stack(*[options] * 3)

        passes = (ExposeAttention(),)
        yield Mutant(
            "expose-attention", fault, expose_attention.attention, "lowered", planted, passes,
            before, "h.1.attn",
        )  # fmt: skip


# insert-hooks


def hooks() -> Iterator[Mutant]:
    tests = passes_test("insert_hooks")
    names = ("hook_embed", "blocks.0.hook_attn_out", "blocks.1.mlp.hook_post", "unembed.hook_out")
    for name in names:
        rules = (tests.planted(name, 1e-7),)
        yield _hook(f"{name} changed", rules, name)
    yield _hook(
        "hook detached", (_detaching("blocks.1.hook_resid_mid"),), "blocks.1.hook_resid_mid"
    )


def _detaching(name: str) -> Rule:
    def wrong(m: Match, edit: Edit) -> None:
        insert_hooks.replace(m, edit)
        if m.point.name == name:
            hook = next(n for n in m.root.users if n.target is insert_hooks.hook_point)
            still = edit.after(hook).call(aten.detach.default, hook)
            for reader in [u for u in hook.users if u is not still]:
                edit.after(hook).redirect(reader, hook, still)

    return Rule(Sites(insert_hooks.find), insert_hooks.unless, wrong)


def _hook(fault: str, rules: Any, at: str) -> Mutant:
    tests = passes_test("insert_hooks")

    def before() -> Program:
        return tests.Writer(torch.float64).decoder(["am", "am", "am"])

    passes = (InsertHooks(),)
    return Mutant("insert-hooks", fault, InsertHooks, "rules", rules, passes, before, at)
