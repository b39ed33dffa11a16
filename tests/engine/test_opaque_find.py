"""Which module cannot be traced is found from the error, or chosen by path, type or object."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from opaque_parts import Detour, Flat, Loop, Net, Outer, given, net, plain
from torch import nn
from torch.export import Dim

from lensfx.capture.opaque import chosen, failing_module, reason
from lensfx.errors import CaptureError

torch.set_num_threads(1)


def traced_error(model: nn.Module) -> Exception:
    dims = ({0: Dim.AUTO, 1: Dim.AUTO},)
    with pytest.raises(Exception) as caught:  # noqa: PT011
        torch.export.export(Flat(model), (given((2, 5)),), dynamic_shapes=dims, strict=False)
    return caught.value


def test_the_smallest_failing_module_is_found() -> None:
    model = net(lambda m, h: m.last(m.part(h)), Outer())
    error = traced_error(model)
    assert failing_module(model, error, []) == "part"
    assert failing_module(model, error, ["part"]) is None
    assert "opaque_parts.py" in reason(error)
    assert "x.sum().item() > -1e9" in reason(error)
    plainer = net(plain, nn.Sequential(nn.Linear(6, 6), Loop()))
    error = traced_error(plainer)
    assert failing_module(plainer, error, []) == "part.1"
    assert failing_module(plainer, error, ["part.1"]) == "part"
    branch = net(lambda m, h: m.last(h) if h.sum() > 0 else h, Loop())
    assert failing_module(branch, traced_error(branch), []) is None


def decorated(forward: Any) -> Any:
    def outside(*args: Any) -> Any:
        return forward(*args) if args[1].sum() > 0 else args[1]

    return outside


class Decorated(nn.Linear):
    forward = decorated(nn.Linear.forward)


def test_a_wrapped_forward_and_a_chained_error_are_found() -> None:
    model = net(plain, Decorated(6, 6))
    error = traced_error(model)
    assert failing_module(model, error, []) == "part"
    outer = RuntimeError("tracing failed")
    outer.__cause__ = error
    assert failing_module(model, outer, []) == "part"
    assert "args[1].sum() > 0" in reason(outer)


def test_parts_are_chosen_by_path_type_and_object() -> None:
    model = net(plain, nn.Sequential(Loop(), Detour()))
    assert list(chosen(model, ["part.0"])) == ["part.0"]
    assert list(chosen(model, [Loop, nn.Linear])) == ["part.0", "first", "part.1.lin", "last"]
    assert list(chosen(model, [model.part])) == ["part"]
    with pytest.raises(CaptureError, match=r"by part\.2\n  try: the closest name is part\.[01]"):
        chosen(model, ["part.2"])
    with pytest.raises(CaptureError, match="by Looped\n  try: the closest name is Loop"):
        chosen(model, [type("Looped", (nn.Module,), {})])
    for whole in ("", Net, model):
        with pytest.raises(CaptureError, match="is the whole model"):
            chosen(model, [whole])
