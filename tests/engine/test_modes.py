"""What is replaced while a model is traced, and that all of it is put back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import lensfx
from lensfx.capture.autocast import flat_regions
from lensfx.capture.decide import as_if_traced
from lensfx.capture.modes import SizeBranches, as_in_eager, fresh_casts, within
from lensfx.capture.patching import patched


class Base:
    word = "inherited"

    @classmethod
    def kind(cls) -> str:
        return cls.__name__


class Owner(Base):
    own = "own"


OWNERS: tuple[Any, ...] = (
    torch.Tensor,
    nn.Parameter,
    nn.Module,
    torch.fx.Graph,
    torch.autograd.Function,
    torch.compiler,
    torch.SymBool,
    torch.SymInt,
    torch.SymFloat,
)


def held() -> list[dict[str, Any]]:
    return [dict(vars(owner)) for owner in OWNERS]


def test_what_was_defined_or_inherited_is_back() -> None:
    before = dict(vars(Owner))
    with patched(Owner, own="other", word="nearer", kind=classmethod(lambda cls: "other")):
        assert (Owner.own, Owner.word, Owner.kind()) == ("other", "nearer", "other")
        assert Base.word == "inherited"
    assert dict(vars(Owner)) == before
    assert (Owner.own, Owner.word, Owner.kind()) == ("own", "inherited", "Owner")


def test_an_error_inside_or_on_the_way_in_leaves_nothing_behind() -> None:
    before = dict(vars(Owner))
    with pytest.raises(ValueError, match="inside"), patched(Owner, own="other", word="nearer"):
        raise ValueError("inside")
    assert dict(vars(Owner)) == before
    with pytest.raises(AttributeError), patched(Owner, own="other", __dict__={}):
        pass
    assert dict(vars(Owner)) == before


@pytest.mark.parametrize(
    "made",
    [
        fresh_casts,
        SizeBranches,
        flat_regions,
        as_if_traced,
        lensfx.empty_weights,
        lambda: within(1.0),
        lambda: as_in_eager(0),
        lambda: as_in_eager(2),
    ],
)
def test_torch_is_as_it_was(made: Any) -> None:
    before = held()
    with made():
        pass
    assert held() == before
    with pytest.raises(ValueError, match="inside"), made():
        raise ValueError("inside")
    assert held() == before


@pytest.mark.parametrize(
    ("said", "told"), [(0, []), (1, ["compiling"]), (2, ["compiling", "exporting"])]
)
def test_a_model_is_told_no_more_than_was_said(said: int, told: list[str]) -> None:
    everything = dict.fromkeys(("is_compiling", "is_exporting"), lambda: True)
    with patched(torch.compiler, **everything), as_in_eager(said):
        asked = {
            name: getattr(torch.compiler, f"is_{name}")() for name in ("compiling", "exporting")
        }
    assert [name for name, answer in asked.items() if answer] == told
