"""For each class of failure of a capture: what it says, the user's own line, one thing to try."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lensfx
from lensfx import CaptureError, GuardError, LensError

torch.set_num_threads(1)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.l = nn.Linear(4, 4)


class NumpyRoot(Net):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.from_numpy(np.sort(self.l(x).detach().numpy()))


class NumpyInside(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * float(np.quantile(x.detach().numpy(), 0.3))


class Around(Net):
    def __init__(self) -> None:
        super().__init__()
        self.inside = NumpyInside()

    def forward(self, x: Tensor) -> Tensor:
        return self.inside(self.l(x))


class Fails(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.l(x[..., :3])


class Writes(Net):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.l.weight.mul_(0.9)
        return self.l(x)


class Fills(Net):
    def forward(self, x: list[Tensor]) -> Tensor:
        x[0] = x[0] + 1
        return self.l(x[0])


class Counts(Net):
    n = 0

    def forward(self, x: Tensor) -> Tensor:
        self.n = self.n + 1
        return self.l(x) * self.n


class Branches(Net):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return self.l(x)
        return x


class Ties(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.l(x) * 2 if x.shape[0] == 3 else self.l(x)


class Vmaps(Net):
    def forward(self, x: Tensor) -> Tensor:
        return torch.vmap(lambda row: row * row.sum())(self.l(x))


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


X = noise(3, 4)


def packed() -> nn.Module:
    with pytest.warns(DeprecationWarning, match="torch.ao.quantization"):
        return torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(4, 4)).eval())


def scripted() -> nn.Module:
    with pytest.warns(DeprecationWarning, match="deprecated"):
        return torch.jit.trace(nn.Linear(4, 4), X)


def hooked_wrapper() -> nn.Module:
    model = nn.DataParallel(Branches())
    model.register_forward_hook(lambda m, args, out: out * 2)
    return model


def empty(kind: type[nn.Module]) -> nn.Module:
    with lensfx.empty_weights():
        return kind().eval()


Says = tuple[Callable[[], Any], str, str, str]
SAYS: dict[str, Says] = {
    "numpy at the root": (
        lambda: lensfx.capture(NumpyRoot(), X),
        "NumpyRoot cannot be traced: RuntimeError: ",
        "np.sort(self.l(x).detach().numpy())",
        "move that line into a submodule",
    ),
    "strict": (
        lambda: lensfx.capture(Around(), X, strict=True),
        "Around cannot be traced: ",
        "np.quantile(",
        "opaque=['inside']",
    ),
    "no such module": (
        lambda: lensfx.capture(Around(), X, opaque=["insid"]),
        "no submodule to keep opaque is selected by insid",
        "",
        "the closest name is inside",
    ),
    "a call it rejects": (
        lambda: lensfx.capture(Fails(), X),
        "Fails itself fails on this example: RuntimeError: ",
        "self.l(x[..., :3])",
        "call the model with these arguments",
    ),
    "a call it does not take": (
        lambda: lensfx.capture(Fails(), X, y=X),
        "Fails.forward does not accept this call: ",
        "",
        "the signature is (x:",
    ),
    "a parameter written": (
        lambda: lensfx.capture(Writes(), X),
        "forward changes the parameter l.weight in place",
        "self.l.weight.mul_(0.9)",
        "outside forward",
    ),
    "a list filled": (
        lambda: lensfx.capture(Fills(), [X]),
        "forward puts other values into a list or dict that it is given",
        "",
        "return them instead",
    ),
    "state in Python": (
        lambda: lensfx.capture(Counts(), X),
        "Counts keeps n from one call for the next",
        "",
        "register_buffer",
    ),
    "vmap": (
        lambda: lensfx.capture(Vmaps(), X),
        "torch.vmap hides an axis",
        "torch.vmap(",
        "write the batch axis out",
    ),
    "another path": (
        lambda: lensfx.capture(Branches(), X.abs())(-X.abs()),
        "this call takes another path: what decides it is False, True at capture",
        "if x.sum() > 0:",
        "capture again",
    ),
    "a size": (
        lambda: lensfx.capture(Ties(), X)(noise(2, 4)),
        "x.size(0) is 2; the model's code ties it to 3",
        "",
        "capture again",
    ),
    "a sparse input": (
        lambda: lensfx.capture(Branches(), X.to_sparse()),
        "x is a sparse_coo tensor",
        "",
        "to_dense()",
    ),
    "packed weights": (
        lambda: lensfx.capture(packed(), X),
        "keeps packed weights in an object that torch cannot trace",
        "",
        "before its weights were packed",
    ),
    "TorchScript": (
        lambda: lensfx.capture(scripted(), X),
        "is TorchScript, whose Python code is gone",
        "",
        "scripted from",
    ),
    "hooks on a wrapper": (
        lambda: lensfx.capture(hooked_wrapper(), X),
        "there are hooks on the DataParallel wrapper",
        "",
        "on the model inside",
    ),
    "no weights to run with": (
        lambda: lensfx.capture(empty(Ties), X)(X),
        "the program of Ties holds no weights",
        "",
        "lensfx.bind(",
    ),
    "no weights to decide with": (
        lambda: lensfx.capture(empty(Branches), X),
        "Branches cannot be traced: GuardOnDataDependentSymNode: ",
        "if x.sum() > 0:",
        "capture the model with its weights",
    ),
    "nothing to bind": (
        lambda: lensfx.bind(lensfx.capture(empty(Ties), X), 3),  # type: ignore[arg-type]
        "weights are given as int",
        "",
        "pass a state dict",
    ),
    "no cache": (
        lambda: lensfx.capture(Branches(), X, cache=True),
        "Branches does not generate",
        "",
        "without cache=True",
    ),
}


@pytest.mark.filterwarnings("ignore:.*quantize_per_tensor:UserWarning")
@pytest.mark.parametrize("case", SAYS.values(), ids=SAYS)
def test_what_where_and_what_to_try(case: Says, capfd: pytest.CaptureFixture[str]) -> None:
    call, headline, line, hint = case
    with pytest.raises(LensError) as caught:
        call()
    assert isinstance(caught.value, (CaptureError, GuardError, lensfx.RewriteError))
    first, *rest = str(caught.value).splitlines()
    assert headline in first
    assert sum(text.startswith("  try: ") for text in rest) == 1
    assert hint in rest[-1]
    if line:
        assert rest[0].startswith("  at ")
        assert "test_messages.py:" in rest[0]
        assert line in rest[0]
    assert len(rest) <= 2
    assert all(len(text) < 500 for text in (first, *rest))
    assert capfd.readouterr() == ("", "")
