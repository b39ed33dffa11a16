"""A small grammar of transformers: a Recipe is one of its sentences.

    recipe = Recipe(norm="rms", attention="sdpa")
    model = recipe.build()
    model(*recipe.inputs(batch=2, length=5))

Every combination of the options is a model that runs at every batch and every length up to
POSITIONS, and none looks at values, so a capture of it has to be dynamic in both.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from lensfx.testing.parts import WIDTH, Attention, Experts, Feed, Residual, norm_of

__all__ = ["OPTIONS", "POSITIONS", "Decoder", "Recipe"]

POSITIONS = 12

# The first choice is the plainest: a failing model shrinks towards it. What is listed more than
# once is drawn more often: small models, because a capture costs by the node.
OPTIONS: dict[str, tuple[Any, ...]] = {
    "attention": (
        *("none", "none", "none", "matmul", "sdpa", "sdpa"),
        *("float_softmax", "linear", "sinks", "off_by_one"),
    ),
    "mlp": (
        *("none", "none", "none", "gelu", "relu_squared", "swiglu", "geglu_fused"),
        *("experts", "experts_shared"),
    ),
    "norm": (
        *("none", "none", "layer", "rms", "layer_bare", "rms_bare"),
        *("layer_hand", "rms_hand", "rms_one"),
    ),
    "order": ("pre", "pre", "post", "parallel", "sandwich"),
    "layers": (*(1,) * 10, 2, "shared"),
    "head": ("none", "untied", "biased", "tied", "pooled"),
    "bias": (False, True),
    "heads": (1, 2, 4),
    "groups": (1, 2),
    "projection": ("separate", "fused", "einsum"),
    "mask": ("none", "causal", "padding", "causal_padding"),
    "qk_norm": (False, False, True),
    "score_cap": (False, False, True),
    "positions": ("none", "none", "learned", "rotary", "rotary_partial", "sinusoidal"),
    "residual": ("plain", "constant", "scalar", "vector", "gated"),
    "embedding_scale": (False, True),
    "embedding_norm": (False, False, True),
    "softcap": ("none", "none", "tanh", "sigmoid"),
    "island": ("none", "head", "stream"),
    "hidden": (12, 12, WIDTH),
    "vocab": (13, 13, WIDTH),
    "output": ("tensor", "tuple", "dict"),
    "dtype": (torch.float32, torch.float64, torch.bfloat16),
}


@dataclass(frozen=True, repr=False)
class Recipe:
    """One choice per option; the defaults are the plainest model, and `seed` fills its parameters.

    The text of a recipe makes it again: `Recipe(norm='rms', head='tied')`.
    """

    attention: str = "none"
    mlp: str = "none"
    norm: str = "none"
    order: str = "pre"
    layers: int | str = 1
    head: str = "none"
    bias: bool = False
    heads: int = 1
    groups: int = 1
    projection: str = "separate"
    mask: str = "none"
    qk_norm: bool = False
    score_cap: bool = False
    positions: str = "none"
    residual: str = "plain"
    embedding_scale: bool = False
    embedding_norm: bool = False
    softcap: str = "none"
    island: str = "none"
    hidden: int = 12
    vocab: int = 13
    output: str = "tensor"
    dtype: torch.dtype = torch.float32
    seed: int = 0

    @property
    def kv_heads(self) -> int:
        """How many heads of keys and values there are; queries share them in groups."""
        return max(1, self.heads // self.groups)

    @property
    def head_size(self) -> int:
        """The width of one head."""
        return WIDTH // self.heads

    def __repr__(self) -> str:
        named = [(f.name, getattr(self, f.name), f.default) for f in fields(self)]
        return f"Recipe({', '.join(f'{k}={v!r}' for k, v, plain in named if v != plain)})"

    def plainest(self, keep: Collection[str] = ()) -> Recipe:
        """The recipe without the options that its other options leave no work, but for `keep`."""
        idle: set[str] = set()
        if self.attention == "none":
            idle |= {"heads", "projection", "mask", "qk_norm", "score_cap"}
            idle |= {"positions"} if self.positions.startswith("rotary") else set()
        if self.attention in ("sdpa", "linear"):
            idle |= {"score_cap"}
        if "heads" in idle or self.heads == 1:
            idle |= {"groups"}
        if self.mlp == "none":
            idle |= {"hidden"}
        if self.attention == self.mlp == "none":
            idle |= {"order", "layers", "residual"}
            idle |= set() if self.norm in ("layer", "layer_hand") else {"bias"}
        if self.norm == "none":
            idle |= {"qk_norm", "embedding_norm"}
            idle |= {"order"} if self.order != "parallel" else set()
        plain: dict[str, Any] = {f.name: f.default for f in fields(self)}
        return replace(self, **{name: plain[name] for name in idle.difference(keep)})

    def build(self) -> nn.Module:
        """The model in eval mode, no parameter where an initialiser would leave it.

        Gains and biases come out around their value, weights with their scale; of each vector of
        four or more one entry is 0 and one has its sign turned.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            model = Decoder(self)
            with torch.no_grad():
                for parameter in model.parameters():
                    noise = torch.randn_like(parameter)
                    parameter.add_(0.3 * noise if parameter.dim() < 2 else 0.1 * noise)
                    if parameter.dim() == 1 and len(parameter) >= 4:
                        parameter[0].neg_()
                        parameter[1] = 0.0
        return model.to(self.dtype).eval()

    def inputs(self, batch: int, length: int, seed: int = 0) -> tuple[Tensor, ...]:
        """Ids, and a padding mask if the recipe has one; no row is padded throughout."""
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, self.vocab, (batch, length), generator=generator)
        if "padding" not in self.mask:
            return (ids,)
        kept = torch.randint(1, length + 1, (batch, 1), generator=generator)
        return ids, torch.arange(length)[None] < kept


class Block(nn.Module):
    """The branches of one layer, and how they read and write the stream."""

    def __init__(self, r: Recipe) -> None:
        super().__init__()
        self.order = r.order
        branches: list[nn.Module] = [Attention(r)] if r.attention != "none" else []
        if r.mlp != "none":
            branches.append(Experts(r) if r.mlp.startswith("experts") else Feed(r))
        self.branches = nn.ModuleList(branches)
        self.norms = nn.ModuleList(norm_of(r, WIDTH) for _ in branches)
        self.after = nn.ModuleList(norm_of(r, WIDTH) for _ in branches if r.order == "sandwich")
        self.residuals = nn.ModuleList(Residual(r) for _ in branches)

    def run(self, i: int, x: Tensor, mask: Tensor | None) -> Any:
        """What branch `i` writes."""
        branch = self.branches[i]
        return branch(x, mask) if isinstance(branch, Attention) else branch(x)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """The stream behind the layer."""
        shared = self.norms[0](x) if self.order == "parallel" and self.norms else None
        for i, residual in enumerate(self.residuals):
            if shared is not None:
                x = residual(x, self.run(i, shared, mask))
            elif self.order == "post":
                x = self.norms[i](residual(x, self.run(i, x, mask)))
            else:
                h = self.run(i, self.norms[i](x), mask)
                x = residual(x, self.after[i](h) if self.after else h)
        return x


class Decoder(nn.Module):
    """The model of a recipe: ids, and a padding mask if it has one, to logits."""

    def __init__(self, r: Recipe) -> None:
        super().__init__()
        self.r = r
        self.embed = nn.Embedding(r.vocab, WIDTH)
        self.pos = nn.Embedding(POSITIONS, WIDTH) if r.positions == "learned" else None
        self.embed_norm = norm_of(r, WIDTH) if r.embedding_norm else None
        made = [Block(r) for _ in range(2 if r.layers == 2 else 1)]
        self.blocks = nn.ModuleList(made * 2 if r.layers == "shared" else made)
        self.norm = norm_of(r, WIDTH)
        self.pool = nn.Linear(WIDTH, WIDTH) if r.head == "pooled" else None
        self.head = None
        if r.head != "none":
            self.head = nn.Linear(WIDTH, r.vocab, bias=r.head in ("biased", "pooled"))
            if r.head == "tied":
                self.head.weight = self.embed.weight

    def forward(self, ids: Tensor, keep: Tensor | None = None) -> Any:
        """The logits, or the stream where there is no head; in a tuple or a dict if so asked."""
        x = self.embedded(ids)
        mask = self.mask(ids, keep)
        for block in self.blocks:
            x = block(x, mask)
        hidden = self.norm(x)
        if self.pool is not None:
            hidden = torch.tanh(self.pool(hidden[:, 0]))
        logits = hidden if self.head is None else self.head(hidden)
        logits = logits.float() if self.r.island == "head" else logits
        if self.r.softcap == "tanh":
            logits = 2.0 * torch.tanh(logits / 2.0)
        elif self.r.softcap == "sigmoid":
            logits = 4 * torch.sigmoid(logits / 1.5)
        if self.r.output == "tensor":
            return logits
        return (logits, [x]) if self.r.output == "tuple" else {"logits": logits, "hidden": hidden}

    def embedded(self, ids: Tensor) -> Tensor:
        """Where the stream starts."""
        x = self.embed(ids)
        if self.r.embedding_scale:
            x = x * math.sqrt(WIDTH)
        places = torch.arange(ids.shape[1], device=ids.device)
        if self.pos is not None:
            x = x + self.pos(places)
        elif self.r.positions == "sinusoidal":
            angle = places[:, None] * 0.3 ** torch.arange(WIDTH // 2, device=ids.device)
            x = x + torch.cat((angle.sin(), angle.cos()), dim=-1).to(x)
        x = x if self.embed_norm is None else self.embed_norm(x)
        return x.float().mul(1.5).to(x.dtype) if self.r.island == "stream" else x

    def mask(self, ids: Tensor, keep: Tensor | None) -> Tensor | None:
        """Which keys each query sees; None for all of them."""
        mask = None
        if "causal" in self.r.mask:
            size = ids.shape[1]
            mask = torch.ones(size, size, dtype=torch.bool, device=ids.device).tril()
        if keep is not None:
            columns = keep[:, None, None, :]
            mask = columns if mask is None else mask & columns
        return mask
