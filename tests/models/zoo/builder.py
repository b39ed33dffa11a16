"""A tiny model of an architecture and a call it accepts, found by trying."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from models.case import randomise

from .architectures import Architecture
from .configs import small_config
from .inputs import Plan, arguments, plans
from .sizes import all_rules

LENGTH = 9
_CHOICES = re.compile(rf"shape '\[-1, {LENGTH}\]' is invalid")
_SIZES = re.compile(r"size of tensor a \((\d+)\) must match the size of tensor b \((\d+)\)")
_ROWS = re.compile(rf"shape '\[-1, (\d+), {LENGTH}\]' is invalid")
_COUNTS = re.compile(r"tokens:? (\d+),? (?:and )?(?:\w+ )?features:? (\d+)")


class NotBuiltError(Exception):
    """No sizes and inputs were found that this model runs with."""


@dataclass(frozen=True)
class Built:
    """A model with random parameters and the plan of a call that it accepts."""

    model: nn.Module
    plan: Plan
    rules: str

    def inputs(self, batch: int, length: int) -> dict[str, Any]:
        """The keyword arguments of a call with this batch and text length."""
        return arguments(self.model, self.plan, batch, length)


def build(architecture: Architecture) -> Built:
    """The smallest model that runs, in eval mode, every parameter redrawn.

    Raises: NotBuiltError with the first reason of each attempt.
    """
    _, model_class = architecture.classes()
    # The mapping's config may be that of a larger model, of which this class is a part.
    config_class = model_class.config_class
    reasons: list[str] = []
    tried: set[str] = set()
    for rules in all_rules():
        try:
            config = small_config(config_class, rules)
            if (text := config.to_json_string(use_diff=False)) in tried:
                continue
            tried.add(text)
            model = _model(config, model_class, rules.largest)
        except Exception as error:
            reasons.append(f"[{rules}] {_said(error)}")
            continue
        found = _callable_plan(model, reasons)
        if found is not None:
            return Built(model, found, str(rules))
    raise NotBuiltError("; ".join(dict.fromkeys(reasons)))


def _model(config: Any, model_class: Any, largest: int) -> nn.Module:
    # A constructor may write into its config.
    again = copy.deepcopy(config)
    with torch.device("meta"):
        size = sum(p.numel() for p in model_class(config).parameters())
    if size > largest:
        raise ValueError(f"{size:,} parameters")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model_class(again)
    return randomise(model.float(), 0).eval()


def _callable_plan(model: nn.Module, reasons: list[str]) -> Plan | None:
    for plan in plans(model):
        for repaired in _repairs(model, plan, reasons):
            return repaired
    return None


def _repairs(model: nn.Module, plan: Plan, reasons: list[str]) -> Iterator[Plan]:
    for _ in range(4):
        try:
            with torch.no_grad():
                out = model(**arguments(model, plan, 2, LENGTH))
                model(**arguments(model, plan, 2, LENGTH))
        except Exception as error:
            repaired = _repaired(plan, error)
            if repaired is None:
                reasons.append(f"({plan}) {_said(error)}")
                return
            plan = repaired
            continue
        if any(isinstance(v, torch.Tensor) for v in pytree.tree_leaves(out)) or out is not None:
            yield plan
            return


def _repaired(plan: Plan, error: Exception) -> Plan | None:
    """The plan with what the model's complaint asks for."""
    if (counts := _COUNTS.search(str(error))) and plan.image_tokens == 0:
        return replace(plan, image_tokens=max(1, int(counts[2]) // 2))
    if _CHOICES.search(str(error)) and plan.choices == 0:
        return replace(plan, choices=2)
    if (asked := _ROWS.search(str(error))) and plan.rows == 1:
        return replace(plan, rows=int(asked[1]))
    # Two sequences that the model adds up; the text is the one whose length is free.
    if (sizes := _SIZES.search(str(error))) and plan.length == 0:
        lengths = [int(size) for size in sizes.groups()]
        other = [n for n in lengths if n != LENGTH]
        if LENGTH in lengths and other and other[0] > 1:
            return replace(plan, length=other[0])
    return None


def _said(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = " ".join(lines[:3])
    return f"{type(error).__name__}: {told[:240]}"
