"""A right rewrite whose output cancels to almost nothing is no broken contract."""

import pytest
import torch
from torch import nn

import lensfx


class Expected(nn.Module):
    """The mean logit under the model's own distribution: large terms, a small sum."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.norm = nn.Embedding(12, 8), nn.LayerNorm(8)
        self.head = nn.Linear(8, 12, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        logits = self.head(self.norm(self.tokens(ids)))
        return (logits * logits.softmax(-1)).sum(-1)


def model(seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = Expected().eval()
        for parameter in made.parameters():
            parameter.data.add_(0.2 * torch.randn_like(parameter))
    return made


@pytest.mark.parametrize("seed", range(12))
def test_sums_that_cancel_raise_no_alarm(seed: int) -> None:
    ids = torch.arange(12).reshape(2, 6)
    proved = lensfx.wrap(model(seed), ids).report.equivalence
    assert [p.name for p in proved.passes] == ["fold-norm", "insert-hooks"]


def test_the_noise_is_that_of_one_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    prove = sys.modules["lensfx.verify.prove"]
    program = lensfx.wrap(model(0), torch.arange(12).reshape(2, 6), verify=False).program.unfolded
    scenario = next(iter(prove.scenarios(program)))
    step = prove.Claims(program, *program.stages[:2])
    finding = next(iter(step.findings(*prove._both(step, scenario), scenario)))
    allowed = step.allowed(scenario, finding)
    assert 1e-16 < allowed < 1e-12
