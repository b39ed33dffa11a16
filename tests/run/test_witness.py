"""The second witness: claims of a structure that numbers contradict lose their names."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from fixtures.models import BUILDERS, IDS
from models import CASES

import lensfx
from lensfx.analysis import Structure, structure
from lensfx.analysis.structure import AttentionBranch, Place, Write
from lensfx.run import variants
from lensfx.verify import witness
from lensfx.verify.witness import witnessed

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def program() -> lensfx.Program:
    return lensfx.capture(BUILDERS["llama"](attention="eager").eval(), IDS, use_cache=False)


def changed(found: Structure, kind: str, change: Any) -> Structure:
    """The structure with every write of a kind changed, in its stream and in its blocks."""
    stream = found.streams[-1]
    new = {id(w): change(w) if w.kind == kind else w for w in stream.writes}

    def swap(write: Write | None) -> Write | None:
        return None if write is None else new[id(write)]

    blocks = tuple(
        replace(
            block,
            writes=tuple(new[id(w)] for w in block.writes),
            attn_write=swap(block.attn_write),
            mlp_write=swap(block.mlp_write),
        )
        for block in stream.blocks
    )
    writes = tuple(new[id(w)] for w in stream.writes)
    return replace(found, streams=(replace(stream, writes=writes, blocks=blocks),))


def attention(**changes: Any) -> Any:
    def change(write: Write) -> Write:
        (found,) = write.attention
        assert isinstance(found, AttentionBranch)
        return replace(write, attention=(replace(found, **changes),))

    return change


def test_a_right_structure_is_confirmed(program: lensfx.Program) -> None:
    found = witnessed(program, structure(program))
    assert not found.demoted
    # In each block: two sums, two branches on a changed stream, rows, and another pattern.
    assert found.checked == 2 * 6
    assert dict(found.causal) == {"blocks.0.attn": True, "blocks.1.attn": True}


def test_an_attention_without_a_mask_is_not_causal() -> None:
    case = CASES["hf_bert"]
    args, kwargs = case.inputs(2, 7, 0)
    program = lensfx.capture(case.build(), *args, **kwargs)
    found = witnessed(program, structure(program))
    assert not found.demoted
    assert set(found.causal.values()) == {False}


def test_an_mlp_that_joins_positions_loses_its_names(program: lensfx.Program) -> None:
    def claim(write: Write) -> Write:
        return replace(write, branch=replace(write.branch, mixes=()))

    found = witnessed(program, changed(structure(program), "attention", claim))
    assert set(found.demoted) == {f"blocks.{i}.hook_attn_out" for i in (0, 1)}
    assert "changes with the stream at another" in found.demoted["blocks.0.hook_attn_out"]


def test_a_write_with_the_wrong_sign_loses_its_name(program: lensfx.Program) -> None:
    found = witnessed(
        program, changed(structure(program), "gated_mlp", lambda w: replace(w, sign=-1.0))
    )
    assert set(found.demoted) == {f"blocks.{i}.hook_mlp_out" for i in (0, 1)}
    assert "is not carry and write" in found.demoted["blocks.1.hook_mlp_out"]


def test_scores_are_no_pattern(program: lensfx.Program) -> None:
    right = structure(program)
    first = right.blocks[0].attn
    assert first is not None
    found = witnessed(program, changed(right, "attention", attention(pattern=first.scores)))
    assert "a row of its pattern sums to" in found.demoted["blocks.0.attn.hook_pattern"]
    assert "blocks.0.attn.hook_attn_scores" in found.demoted


def test_a_pattern_that_nobody_reads_is_none(program: lensfx.Program) -> None:
    right = structure(program)
    second = right.blocks[1].attn
    assert second is not None
    assert isinstance(second.pattern, Place)
    found = witnessed(program, changed(right, "attention", attention(pattern=second.pattern)))
    # The first block's result does not come from the second one's pattern.
    reason = found.demoted["blocks.0.attn.hook_pattern"]
    assert reason == "another pattern in its place changes nothing"
    assert not any(name.startswith("blocks.1") for name in found.demoted)


def test_what_is_demoted_is_no_hook_name_and_the_report_says_why(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def doubting(program: lensfx.Program, found: Structure) -> witness.Witness:
        wrong = changed(found, "mlp", lambda w: replace(w, sign=-1.0))
        return witnessed(program, wrong)

    monkeypatch.setattr(variants, "witnessed", doubting)
    lens = lensfx.wrap(BUILDERS["gpt2"]().eval(), IDS, use_cache=False)
    assert "blocks.0.hook_mlp_out" not in lens.hook_names
    assert "blocks.0.hook_attn_out" in lens.hook_names
    assert "no blocks.0.hook_mlp_out" in str(lens.report)
    with pytest.raises(lensfx.LensError, match="hook_mlp_out"):
        lens.run_with_cache(IDS, names_filter="blocks.0.hook_mlp_out")
    out, cache = lens.run_with_cache(IDS)
    native = [n for n in cache if n.startswith("transformer.h.0.mlp.c_proj")]
    assert native
    assert out.logits.shape == (2, 7, 37)


def test_the_check_can_be_left_out() -> None:
    lens = lensfx.wrap(BUILDERS["gpt2"]().eval(), IDS, use_cache=False, verify=False)
    assert lens.report.witness is None


def test_the_model_is_as_it_was_and_no_random_numbers_are_used_up(program: lensfx.Program) -> None:
    before = {name: t.clone() for name, t in program.tensors.items()}
    state = torch.get_rng_state()
    witnessed(program, structure(program))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(t, before[n]) for n, t in program.tensors.items())
