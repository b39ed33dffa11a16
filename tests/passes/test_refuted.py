"""What reviewers broke: models and passes that were once rewritten, proved or mapped wrongly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import randomise
from torch import Tensor, nn

import lensfx
from lensfx import ContractError, LensError, Pipeline, PipelineError, RewriteError
from lensfx import passes as p
from lensfx.rewrite import Any as AnyNode
from lensfx.rewrite import Edit, Match, Op, Pass, Rule
from lensfx.verify import Exact, check, prove

aten = torch.ops.aten
D = 8
FORMS = (p.CanonicalLinear(), p.CanonicalNorm())


class Net(nn.Module):
    """Parts to build from, and a forward that uses some of them."""

    def __init__(self, forward: Callable[[Net, Tensor], Any]) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.a, self.b = nn.LayerNorm(D), nn.LayerNorm(D)
            self.q, self.k, self.v, self.o = (nn.Linear(D, D) for _ in range(4))
            self.wide = nn.Linear(D, 3 * D)
            self.one = nn.Linear(D, 1)
            self.both = nn.Linear(2 * D, D)
            self.vector = nn.Parameter(torch.randn(D))
            self.experts = nn.Parameter(torch.randn(4, 2 * D, 3))
            self.row = nn.Parameter(torch.randn(1, D, 5))
        self.body = (forward,)

    def forward(self, x: Tensor) -> Any:
        return self.body[0](self, x)


def net(forward: Callable[[Net, Tensor], Any]) -> Net:
    return randomise(Net(forward), 1).double().eval()


def inputs(batch: int = 2, length: int = 5, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, D, dtype=torch.float64, generator=generator)


def window(m: Net, x: Tensor) -> Tensor:
    q, k, v = m.wide(x).chunk(3, -1)
    i = torch.arange(x.shape[1])
    seen = (i[:, None] >= i) & (i[:, None] < 24)
    return m.o(F.scaled_dot_product_attention(q, k, v, attn_mask=seen))


def repeated(m: Net, x: Tensor) -> Tensor:
    return torch.einsum("bsd,sdo->bo", m.a(x), m.row)


def spread(m: Net, x: Tensor) -> Tensor:
    return m.o(torch.einsum("bqk,bkd->bqd", m.one(x).softmax(-1), m.v(x)))


def side_by_side(m: Net, x: Tensor) -> Tensor:
    return torch.einsum("bsd,edo->beso", torch.cat([m.a(x), m.b(x)], -1), m.experts)


def picked(m: Net, x: Tensor) -> Tensor:
    chosen = m.experts[x[:, :1, 0].long().clamp(0, 3).flatten()]
    return torch.cat([m.a(x), m.b(x)], -1) @ chosen


def whole_numbers(m: Net, x: Tensor) -> Tensor:
    return m.o(m.a(x - x.mean(-1, keepdim=True).long()))


def less_the_largest(m: Net, x: Tensor) -> Tensor:
    scores = m.q(x) @ m.k(x).mT
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return weights / weights.sum(-1, keepdim=True) @ m.v(x)


def one_vector(m: Net, x: Tensor) -> Tensor:
    return F.linear(m.a(x), m.vector)


def nothing_left(m: Net, x: Tensor) -> Any:
    y = m.o(m.a(x))
    return y, F.kl_div(y.log_softmax(-1), y.softmax(-1), reduction="sum")


def empty_piece(m: Net, x: Tensor) -> Tensor:
    y = m.q(x)
    return torch.cat([y[..., :D] * 2, y[..., D:]], -1)


FOLDS = (*FORMS, p.FoldNorm(), p.CenterWriters(), p.FoldValueBias(), p.FoldKeyBias())
RIGHT: dict[str, tuple[Callable[[Net, Tensor], Any], tuple[Pass, ...]]] = {
    "a mask that ends": (window, FOLDS),
    "a weight repeated over positions": (repeated, FOLDS),
    "one weight for all keys": (spread, FOLDS),
    "two norms, one product": (side_by_side, FOLDS),
    "two norms, picked experts": (picked, FOLDS),
    "two norms, the largest subtracted": (less_the_largest, FOLDS),
    "a mean rounded": (whole_numbers, (*FORMS, p.LayerNormToRMS())),
    "a vector as weight": (one_vector, Pipeline.default().passes),
    "an output that is zero": (nothing_left, FOLDS),
    "a piece of no channels": (empty_piece, (*FORMS, p.SplitFused())),
}


@pytest.mark.parametrize("name", RIGHT)
def test_the_rewritten_model_is_the_model(name: str) -> None:
    forward, passes = RIGHT[name]
    model = net(forward)
    program = Pipeline(passes).run(lensfx.capture(model, inputs()))
    assert prove(program).worst <= 1e-12
    lens = lensfx.Lens(program)
    for shape in ((2, 5), (1, 1), (3, 30)):
        x = inputs(*shape, seed=3)
        want, got = model(x), lens(x)
        pairs = zip(want, got, strict=True) if isinstance(want, tuple) else [(want, got)]
        for a, b in pairs:
            torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-10)


def test_split_norms_that_meet() -> None:
    def joined(m: Net, x: Tensor) -> Any:
        both = torch.cat([m.a(x), m.b(x)], -1)
        return m.both(both), both.abs()

    def shown(m: Net, x: Tensor) -> Any:
        a, b = m.a(x), m.b(x)
        return m.both(torch.cat([a, b], -1)), a, b

    for forward in (joined, shown):
        model = net(forward)
        program = Pipeline((*FORMS, p.FoldNorm(split=True))).run(lensfx.capture(model, inputs()))
        assert prove(program).worst <= 1e-12
        assert check(model, program, inputs=[inputs(seed=4)]).error <= 1e-12


class Pictures(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c, self.bn, self.l = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.l(self.bn(self.c(x)).tanh().mean((2, 3)))
        return out


def test_folded_statistics_follow_those_of_the_model() -> None:
    model = Pictures().double().eval()
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    lens = lensfx.wrap(model, x, passes=(p.FoldBatchNorm(expect=1),))
    model.train()(x)
    model.eval()
    torch.testing.assert_close(lens(x), model(x))


def test_a_weight_that_the_model_rounds_stays_rounded() -> None:
    def rounded(m: Net, x: Tensor) -> Tensor:
        return F.linear(m.a(x), m.q.weight.to(torch.float8_e4m3fn).to(x.dtype), m.q.bias)

    model = net(rounded).float()
    x = inputs().float()
    torch.testing.assert_close(lensfx.wrap(model, x)(x), model(x), rtol=1e-5, atol=1e-5)


# raw values


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.e, self.n, self.u = nn.Embedding(11, D), nn.LayerNorm(D), nn.Linear(D, 11)

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.u(self.n(self.e(ids))) * 0.25
        return out


def test_what_a_pass_does_not_say_is_computed_again() -> None:
    model, ids = randomise(Scaled(), 2).double().eval(), torch.arange(10).reshape(2, 5)
    lens = lensfx.wrap(model, ids, passes=(p.FoldScale(expect=1),))
    _, cache = lens.run_with_cache(ids)
    _, own = lens.raw.run_with_cache(ids)
    torch.testing.assert_close(cache.raw("unembed.hook_out"), own["unembed.hook_out"])
    with pytest.raises(LensError, match=r"the model before any pass has no value|no pass says"):
        lens.to_raw("unembed.hook_out", cache["unembed.hook_out"])


def test_a_frozen_model_has_no_map_to_the_raw_one() -> None:
    model, ids = randomise(Scaled(), 2).double().eval(), torch.arange(10).reshape(2, 5)
    lens = lensfx.wrap(model, ids, passes=(p.FreezeNorm(expect=1),))
    other = ids.flip(0)
    _, cache = lens.run_with_cache(other)
    _, own = lens.raw.run_with_cache(other)
    torch.testing.assert_close(cache.raw("unembed.hook_in"), own["unembed.hook_in"])
    with pytest.raises(LensError, match="another function of the model"):
        lens.to_raw("unembed.hook_in", cache["unembed.hook_in"])


# the proof


NORM = Op("n", (aten.layer_norm.default,), {"input": AnyNode("x")})


def passing(rewrite: Callable[[Match, Edit], None], pattern: Op = NORM) -> Pass:
    @dataclass(frozen=True)
    class Mine(Pass):
        rules = (Rule(pattern, lambda m: None, rewrite),)
        contract = Exact()

    return Mine()


def test_a_mask_that_is_dropped_is_seen_though_the_example_masks_nothing() -> None:
    class Masked(nn.Module):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return x.sum(-1).masked_fill(mask == 0, -1e9).softmax(-1)

    fill = Op("f", (aten.masked_fill.Scalar,), {"self": AnyNode("x")})
    drop = passing(lambda m, e: e.before(m.f).replace(m.f, m.x), fill)
    x, mask = inputs(), torch.ones(2, 5, dtype=torch.int64)
    with pytest.raises(ContractError, match="mine broke its contract"):
        lensfx.wrap(Masked(), x, mask, passes=(drop,))


def test_a_cast_that_costs_digits_is_seen() -> None:
    def narrow(m: Match, edit: Edit) -> None:
        at = edit.after(m.n)
        readers = list(m.n.users)
        small = at.call(aten.to.dtype, m.n, torch.bfloat16)
        back = at.call(aten.to.dtype, small, torch.float32)
        for reader in readers:
            at.redirect(reader, m.n, back)

    model = net(lambda m, x: m.o(m.a(x))).float()
    with pytest.raises(ContractError, match="times the rounding noise"):
        lensfx.wrap(model, inputs().float(), passes=(passing(narrow),))


def test_a_pass_that_writes_to_a_parameter_is_refused() -> None:
    def write(m: Match, edit: Edit) -> None:
        with torch.no_grad():
            edit.tensors["a.weight"].mul_(1.0)
        edit.before(m.n).set(m.n, eps=1e-5)

    model = net(lambda m, x: m.o(m.a(x)))
    with pytest.raises(RewriteError, match=r"mine wrote to a\.weight"):
        lensfx.wrap(model, inputs(), passes=(passing(write),))


def test_a_false_claim_about_a_change_maps_nothing() -> None:
    def claimed(m: Match, edit: Edit) -> None:
        at = edit.before(m.n)
        g = m.n.args[2]
        at.set(m.n, weight=at.call(aten.mul.Tensor, g, 2.0), bias=None)
        (reader,) = m.n.users
        at = edit.before(reader)
        W, b = reader.args[1], m.n.args[3]
        half = at.call(aten.mul.Tensor, W, 0.5)
        at.set(reader, weight=half)
        edit.changes(m.n, scale=at.call(aten.full_like.default, g, 7.0))
        assert b is None

    model = net(lambda m, x: m.o(F.layer_norm(x, [D], m.a.weight)))
    lens = lensfx.wrap(model, inputs(), passes=(passing(claimed),))
    _, cache = lens.run_with_cache(inputs())
    name = next(n for n in cache if n.endswith("layer_norm"))
    with pytest.raises(LensError, match="no pass says how it changed"):
        lens.to_raw(name, cache[name])
    _, own = lens.raw.run_with_cache(inputs())
    torch.testing.assert_close(cache.raw(name), own[name])


# arguments


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Pipeline(3), "is no list of passes"),
        (lambda: Pipeline(p.FoldNorm()), "is no list of passes"),
        (lambda: Pipeline.default(fold_ln="no"), "says neither True nor False"),
        (lambda: Pipeline([p.FoldNorm(expect=-1)]), "which is no count"),
        (lambda: Pipeline([p.FoldNorm(expect=1.5)]), "which is no count"),
    ],
)
def test_what_is_no_pipeline(make: Callable[[], Any], words: str) -> None:
    with pytest.raises(PipelineError, match=words):
        make()


def test_a_contract_that_is_none() -> None:
    @dataclass(frozen=True)
    class Loose(Pass):
        rules = (Rule(NORM, lambda m: None, lambda m, e: e.before(m.n).set(m.n, eps=1e-5)),)
        contract = "exact"

    with pytest.raises(PipelineError, match="which is no contract"):
        lensfx.wrap(net(lambda m, x: m.o(m.a(x))), inputs(), passes=(Loose(),))
