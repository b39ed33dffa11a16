"""Patterns, rules, passes and the pipeline that runs them."""

from lensfx.rewrite import attention
from lensfx.rewrite.attention import Lowered, Lowering, lowered
from lensfx.rewrite.edit import At, Edit
from lensfx.rewrite.fold import fold
from lensfx.rewrite.match import Match, Miss, match
from lensfx.rewrite.pattern import (
    Any,
    Const,
    EveryReader,
    Maybe,
    OneOf,
    Op,
    Param,
    Ref,
    Sites,
    Through,
)
from lensfx.rewrite.pipeline import Pipeline
from lensfx.rewrite.rule import Pass, PassReport, Refusal, Rule

__all__ = [
    "Any",
    "At",
    "Const",
    "Edit",
    "EveryReader",
    "Lowered",
    "Lowering",
    "Match",
    "Maybe",
    "Miss",
    "OneOf",
    "Op",
    "Param",
    "Pass",
    "PassReport",
    "Pipeline",
    "Ref",
    "Refusal",
    "Rule",
    "Sites",
    "Through",
    "attention",
    "fold",
    "lowered",
    "match",
]
