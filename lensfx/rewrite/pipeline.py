"""Pipeline: run passes in the written order, check that order, report what fired and what not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import fx

from lensfx.errors import LensError, PipelineError, RewriteError
from lensfx.graph.node import module_path, where
from lensfx.graph.program import Program, Rewrite, Stage, copy_graph, remove_dead
from lensfx.graph.threads import one_at_a_time
from lensfx.rewrite.edit import Edit
from lensfx.rewrite.fold import fold
from lensfx.rewrite.match import Match, Miss, match, root_targets
from lensfx.rewrite.pattern import Sites
from lensfx.rewrite.rule import Pass, PassReport, Refusal, Rule

__all__ = ["Pipeline", "apply"]


class Pipeline:
    """An ordered list of passes, run as written.

    Raises: PipelineError if an entry is no pass, or stands before a pass that it needs.
    """

    def __init__(self, passes: Iterable[Pass], *, strict: bool = False) -> None:
        if isinstance(passes, Pass) or not isinstance(passes, Iterable):
            raise PipelineError(f"{passes!r} is no list of passes", hint=f"Pipeline([{passes!r}])")
        self.passes = tuple(passes)
        self.strict = strict
        for entry in self.passes:
            if not isinstance(entry, Pass):
                raise PipelineError(
                    f"{entry!r} is not a pass",
                    hint="a pipeline takes instances such as passes.FoldNorm()",
                )
            if not (entry.expect is None or (type(entry.expect) is int and entry.expect >= 0)):
                raise PipelineError(f"{entry.name} has expect={entry.expect!r}, which is no count")
        _check_order(self.passes, ())

    @classmethod
    def default(
        cls,
        *,
        fold_ln: bool = True,
        center_writing_weights: bool = True,
        center_unembed: bool = True,
        fold_value_biases: bool = True,
        refactor_factored_attn_matrices: bool = False,
    ) -> Pipeline:
        """What `wrap` runs: canonical forms, folds, centring, hook points.

        The options are those of TransformerLens' processing of weights, each one pass: FoldNorm,
        CenterWriters, CenterUnembed, FoldValueBias, RefactorAttention.
        """
        from lensfx import passes as p

        chosen: list[tuple[bool, type[Pass]]] = [
            (fold_ln, p.FoldNorm),
            (center_writing_weights, p.CenterWriters),
            (center_unembed, p.CenterUnembed),
            (fold_value_biases, p.FoldValueBias),
            (refactor_factored_attn_matrices, p.RefactorAttention),
        ]
        for wanted, kind in chosen:
            if not isinstance(wanted, bool):
                raise PipelineError(f"{wanted!r} says neither True nor False to {kind.__name__}")
        folds = [kind() for wanted, kind in chosen if wanted]
        return cls((p.CanonicalLinear(), p.CanonicalNorm(), *folds, p.InsertHooks()))

    @one_at_a_time
    def run(self, program: Program) -> Program:
        """The rewritten program, its weights folded; `program` itself is unchanged.

        Raises: PipelineError if the program has been through passes that must come later, if a
        pass fires another number of times than its `expect`, or, when `strict`, not at all.
        """
        return fold(self.rewrite(program))

    @one_at_a_time
    def rewrite(self, program: Program, *, limit: int | None = None) -> Program:
        """The rewritten program with weights still written as expressions over the old ones.

        `limit` stops after that many rewrites: a prefix of the journal is a program.
        """
        _check_order(self.passes, program.reports)
        start = len(program.journal)
        if not program.stages or program.unfolded is not None:
            first = (Stage("start", None, program.graph),)
            program = replace(program, stages=first, unfolded=None)
        for entry in self.passes:
            left = None if limit is None else limit - (len(program.journal) - start)
            program = apply(entry, program, left)
            if limit is None:
                self._check_count(entry, program.reports[-1])
        return program

    def _check_count(self, entry: Pass, report: PassReport) -> None:
        fired, wanted = len(report.fired), entry.expect
        if wanted is not None and fired != wanted:
            problem = f"{entry.name} fired {fired} times, {wanted} expected"
        elif self.strict and not fired:
            problem = f"{entry.name} fired nowhere"
        else:
            return
        places = [str(r) for r in (*report.refused[:3], *report.fired[:3])] or ["no site was found"]
        raise PipelineError(problem, at=places, hint="look at program.reports for every refusal")

    def __repr__(self) -> str:
        return f"Pipeline({list(self.passes)})"


def _check_order(passes: tuple[Pass, ...], done: tuple[PassReport, ...]) -> None:
    for i, entry in enumerate(passes):
        late = [p.name for p in passes[i + 1 :] if p.name in entry.needs]
        if late:
            raise PipelineError(
                f"{entry.name} stands before {late[0]}, which must run first",
                hint=f"write {late[0]} before {entry.name}",
            )
    for report in done:
        early = [p.name for p in passes if p.name in report.needs]
        if early:
            raise PipelineError(
                f"{early[0]} must run before {report.name}, which this program has been through",
                hint=f"start from the captured program and write {early[0]} before {report.name}",
            )


def apply(entry: Pass, program: Program, limit: int | None = None) -> Program:
    """The program after one pass, or after its first `limit` rewrites."""
    left_alone = _nothing_to_do(entry, program)
    if left_alone is not None:
        return _reported(entry, program, program.graph, (), left_alone)
    graph, _ = copy_graph(program.graph)
    edit = Edit(graph, entry.name, len(program.journal), program.tensors)
    written = {name: t._version for name, t in program.tensors.items()}
    working = program.with_graph(graph)
    refused: list[Refusal] = []
    for rule in entry.rules:
        _sweep(rule, working, edit, refused, limit)
    _refuse_writes(entry, program, written)
    remove_dead(graph)
    try:
        graph.lint()
    except RuntimeError as error:
        raise RewriteError(f"{entry.name} left a broken graph: {error}") from error
    program = replace(program, tensors=_with(program.tensors, edit.added))
    return _reported(entry, program, graph, _living(edit.journal, graph), refused)


def _refuse_writes(entry: Pass, program: Program, before: Mapping[str, int]) -> None:
    changed = [name for name, t in program.tensors.items() if t._version != before[name]]
    if changed:
        raise RewriteError(
            f"{entry.name} wrote to {changed[0]}, a tensor of the model itself",
            hint="a pass adds nodes that compute a new value, and writes to none",
        )


def _with(
    tensors: Mapping[str, torch.Tensor], added: Mapping[str, torch.Tensor]
) -> Mapping[str, torch.Tensor]:
    return MappingProxyType({**tensors, **added}) if added else tensors


def _nothing_to_do(entry: Pass, program: Program) -> list[Refusal] | None:
    """The refusals of a pass that would fire nowhere, found without a copy of the graph."""
    refused: list[Refusal] = []
    for rule in entry.rules:
        for root, found in _found(rule, program):
            reason = _reason(rule, found)
            if reason is None:
                return None
            if reason.words:
                refused.append(Refusal.at(root, module_path(root), reason.words, reason.blame))
    return refused


def _reported(
    entry: Pass,
    program: Program,
    graph: fx.Graph,
    journal: tuple[Rewrite, ...],
    refused: list[Refusal],
) -> Program:
    notes = tuple(
        f"{need} has not run: sites only it brings into form are not seen"
        for need in entry.needs
        if need.startswith("canonical") and need not in program.passes
    )
    report = PassReport(entry.name, journal, _unique(refused), notes, entry.needs, entry)
    stage = (Stage(entry.name, entry, graph, journal),) if journal else ()
    return program.with_graph(
        graph,
        passes=(*program.passes, entry.name),
        journal=(*program.journal, *journal),
        reports=(*program.reports, report),
        stages=(*program.stages, *stage),
    )


@dataclass(frozen=True)
class _Reason:
    words: str
    blame: fx.Node


def _reason(rule: Rule, found: Match | Miss) -> _Reason | None:
    """Why a rule does not fire on what was found; empty words where that is nobody's business."""
    if isinstance(found, Miss):
        return _Reason(found.reason if found.at_site else "", found.node)
    try:
        words = rule.unless(found)
    except LensError:
        raise
    except Exception as error:
        raise RewriteError(
            f"a rule failed to say whether it applies: {type(error).__name__}: {error}",
            at=where(found.root),
            hint="its `unless` has to answer for whatever its pattern finds",
        ) from error
    return None if words is None else _Reason(words, found.root)


def _living(journal: list[Rewrite], graph: fx.Graph) -> tuple[Rewrite, ...]:
    """The journal without claims on values that a later rewrite of the pass replaced or changed."""
    names = {n.name for n in graph.nodes}
    living: list[Rewrite] = []
    for entry in reversed(journal):
        sites = tuple(s for s in entry.sites if s[1] in names)
        living.append(replace(entry, sites=sites))
        names -= {c.value for c in entry.changes} - {name for name, _ in entry.shifts}
    return tuple(reversed(living))


def _sweep(
    rule: Rule, program: Program, edit: Edit, refused: list[Refusal], limit: int | None
) -> None:
    for root, found in _found(rule, program):
        if limit is not None and len(edit.journal) >= limit:
            return
        reason = _reason(rule, found)
        if reason is None:
            assert isinstance(found, Match)
            _fire(rule, found, root, edit)
        elif reason.words:
            refused.append(Refusal.at(root, module_path(root), reason.words, reason.blame))


def _found(rule: Rule, program: Program) -> Iterator[tuple[fx.Node, Match | Miss]]:
    """Every root with what was found there, from the outputs backwards, as the graph is now."""
    if isinstance(rule.pattern, Sites):
        found = rule.pattern.find(program)
        for site in found if rule.pattern.live else list(found):
            yield (site.site or site.node if isinstance(site, Miss) else site.root), site
        return
    targets = dict.fromkeys(root_targets(rule.pattern))
    roots = [n for t in targets for n in _calls(program.graph, t)]
    for root in sorted(roots, reverse=True):
        if not root._erased:
            yield root, match(rule.pattern, root, program)


def _fire(rule: Rule, found: Match, root: fx.Node, edit: Edit) -> None:
    place = where(root)
    edit.begin(root, found.interior)
    try:
        rule.replace(found, edit)
    except LensError:
        raise
    except Exception as error:
        raise RewriteError(
            f"{edit.pass_name} failed while rewriting: {type(error).__name__}: {error}",
            at=place,
            hint="let the rule's `unless` refuse this site",
        ) from error
    edit.commit()


def _calls(graph: fx.Graph, target: Any) -> list[fx.Node]:
    return list(graph.find_nodes(op="call_function", target=target, sort=False))


def _unique(refused: list[Refusal]) -> tuple[Refusal, ...]:
    return tuple(dict.fromkeys(refused))
