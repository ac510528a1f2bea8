"""The network of MPS (github.com/Kwai-Kolors/MPS) on transformers' CLIP, and its weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from rewards.towers import check_names, read_weights, refusal

if TYPE_CHECKING:
    from transformers import CLIPConfig

PREFIXES = {"cross_model.layers.": "layers.", "model.": "clip."}
BLOCKS = {".0.fn.": ".cross.", ".1.fn.": ".own."}
UNUSED = ("model.text_model.embeddings.position_ids", "model.vision_model.embeddings.position_ids")
FREQUENCIES = "layers.{}.own.rotary_emb.inv_freq"  # constants, of which only the precision is of interest
SIZES = ("layers.0.cross.to_q.weight", "layers.0.cross.to_kv.weight", "layers.0.cross.ff.0.weight")


@dataclass(frozen=True)
class Texts:
    """Projected states of all tokens, that of the end token, and which tokens a picture may look at."""

    states: Float[Tensor, "b n d"]
    ends: Float[Tensor, "b d"]
    keep: Bool[Tensor, "b n"]


class Tower(nn.Module):
    """transformers' CLIP, with layers that let its picture tokens attend to the text.

    dim: of a head. inner: of the feed-forward layers. angles: the precision of the rotary embedding's angles.
    """

    def __init__(self, config: CLIPConfig, layers: int, dim: int, heads: int, inner: int, angles: torch.dtype) -> None:
        from transformers import CLIPModel

        super().__init__()
        self.clip: Any = CLIPModel(config)
        width = int(config.projection_dim)
        self.layers = nn.ModuleList([Layer(width, dim, heads, inner, angles) for _ in range(layers)])

    def forward(self, pixels: Float[Tensor, "b 3 k k"], texts: Texts) -> Float[Tensor, " b"]:
        """Scores of prepared pictures; as in the authors' code, the tokens do not pass CLIP's last norm."""
        given = pixels.to(self.clip.visual_projection.weight.dtype)
        tokens = self.clip.visual_projection(self.clip.vision_model(pixel_values=given).last_hidden_state)
        for layer in self.layers:
            tokens = layer(tokens, texts)
        return self.clip.logit_scale.exp() * F.cosine_similarity(tokens[:, 0].to(texts.ends), texts.ends, dim=1)

    def text_states(self, ids: Int[Tensor, "b n"]) -> tuple[Float[Tensor, "b n d"], Float[Tensor, "b d"]]:
        """Projected states of all tokens, padding too, and of the first end token."""
        read = self.clip.text_model(input_ids=ids)
        return self.clip.text_projection(read.last_hidden_state), self.clip.text_projection(read.pooler_output)


class Layer(nn.Module):
    """x + A(x, text), then x + B(x, x): attention and feed-forward side by side, one key and value for all heads."""

    def __init__(self, width: int, dim: int, heads: int, inner: int, angles: torch.dtype) -> None:
        super().__init__()
        self.cross, self.own = CrossBlock(width, dim, heads, inner), OwnBlock(width, dim, heads, inner, angles)

    def forward(self, x: Float[Tensor, "b m d"], texts: Texts) -> Float[Tensor, "b m d"]:
        x = x + self.cross(x, texts)
        return x + self.own(x)


class CrossBlock(nn.Module):
    """Attention of picture tokens to text tokens, plus a SwiGLU of the picture tokens."""

    def __init__(self, width: int, dim: int, heads: int, inner: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)  # its bias is zero in the authors' code, and is in their checkpoint
        self.to_q = nn.Linear(width, heads * dim, bias=False)
        self.to_kv = nn.Linear(width, 2 * dim, bias=False)
        self.to_out = nn.Linear(heads * dim, width, bias=False)
        up, down = nn.Linear(width, 2 * inner, bias=False), nn.Linear(inner, width, bias=False)
        self.ff = nn.ModuleDict({"0": up, "2": down})

    def forward(self, x: Float[Tensor, "b m d"], texts: Texts) -> Float[Tensor, "b m d"]:
        x = self.norm(x)
        key, value = self.to_kv(texts.states).chunk(2, dim=2)
        read = attend(_heads(self.to_q(x), key.shape[2]), key, value, texts.keep[:, None, None])
        return self.to_out(read) + self.ff["2"](swiglu(self.ff["0"](x)))


class OwnBlock(nn.Module):
    """Attention among picture tokens with rotary positions (arXiv:2104.09864), plus a SwiGLU; one input projection."""

    def __init__(self, width: int, dim: int, heads: int, inner: int, angles: torch.dtype) -> None:
        super().__init__()
        self.precision = angles
        self.sizes = (heads * dim, dim, dim, 2 * inner)
        self.norm = nn.LayerNorm(width)
        self.fused_attn_ff_proj = nn.Linear(width, sum(self.sizes), bias=False)
        self.attn_out = nn.Linear(heads * dim, width, bias=False)
        self.ff_out = nn.ModuleDict({"1": nn.Linear(inner, width, bias=False)})

    def forward(self, x: Float[Tensor, "b m d"]) -> Float[Tensor, "b m d"]:
        query, key, value, gated = self.fused_attn_ff_proj(self.norm(x)).split(self.sizes, dim=2)
        angles = rotary_angles(x.shape[1], key.shape[2], self.precision).to(x.device)
        read = attend(rotated(_heads(query, key.shape[2]), angles), rotated(key, angles), value)
        return self.attn_out(read) + self.ff_out["1"](swiglu(gated))


def rotary_angles(count: int, dim: int, precision: torch.dtype) -> Float[Tensor, "m half"]:
    """position * 10000^(-2i / dim), factors and product rounded to a precision as in the authors' module; float32."""
    frequency = (1 / 10000 ** (torch.arange(0, dim, 2) / dim)).to(precision).float()
    return torch.outer(torch.arange(count).to(precision).float(), frequency).to(precision).float()


def attend(
    query: Float[Tensor, "b h m k"],
    key: Float[Tensor, "b n k"],
    value: Float[Tensor, "b n k"],
    keep: Bool[Tensor, "b 1 1 n"] | None = None,
) -> Float[Tensor, "b m h_k"]:
    """Multi-query attention (arXiv:1911.02150): softmax(q k / sqrt(dim)) v with one key and value for all heads."""
    shape = (-1, query.shape[1], -1, -1)
    read = F.scaled_dot_product_attention(query, key[:, None].expand(shape), value[:, None].expand(shape), keep)
    return read.transpose(1, 2).flatten(2)


def rotated(x: Float[Tensor, "*b m k"], angles: Float[Tensor, "m half"]) -> Float[Tensor, "*b m k"]:
    """Channels i and i + k/2 turned by angle i of their position."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def swiglu(x: Float[Tensor, "b m two_inner"]) -> Float[Tensor, "b m inner"]:
    """first * silu(second), halves of the channels (arXiv:2002.05202)."""
    value, gate = x.chunk(2, dim=2)
    return value * F.silu(gate)


def _heads(x: Float[Tensor, "b m h_k"], dim: int) -> Float[Tensor, "b h m k"]:
    return x.unflatten(2, (-1, dim)).transpose(1, 2)


class Inert:
    """What a pickle's classes and functions are read as: it keeps what it is given, and does nothing."""

    def __init__(self, *args: Any) -> None:
        self.__dict__["given"] = args


def read_module(path: Path) -> dict[str, Tensor]:
    """Weights by name, also of a torch file that holds a whole module; nothing that the file names is imported or run.

    torch.load(weights_only=True) reads the pickle, and each name that it does not know stands for an `Inert` object.

    Raises: ValueError as `read_weights` does.
    """
    if path.suffix == ".safetensors":
        return read_weights(path)
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # an older format, or none: what is wrong is told by read_weights
        names = []
    if not names:
        return read_weights(path)
    stand_ins: list[Any] = [(type("Inert", (Inert,), {}), name) for name in names]
    try:
        with torch.serialization.safe_globals(stand_ins):
            held = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler's own kinds
        raise ValueError(f"{path} cannot be read as a module's weights: {refusal(error)}") from error
    if not isinstance(held, Inert):
        raise ValueError(f"{path} holds neither a module nor tensors by name alone, as weights of MPS do")
    return dict(module_tensors(held, ""))


def module_tensors(held: Inert, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """What the state dict of a pickled module would hold."""
    state = held.__dict__
    silent = state.get("_non_persistent_buffers_set", ())
    for kind in ("_parameters", "_buffers"):
        for name, value in state.get(kind, {}).items():
            if isinstance(value, Tensor) and name not in silent:
                yield prefix + name, value.detach()
    for name, child in state.get("_modules", {}).items():
        if child is not None:
            yield from module_tensors(child, f"{prefix}{name}.")


def load_tower(weights: dict[str, Tensor], config: CLIPConfig, source: str) -> Tower:
    """The tower with these weights.

    Raises: ValueError that names what is missing, does not belong, or has another shape.
    """
    state = renamed(weights)
    tower = build_tower(state, config, source)
    tower.load_state_dict({name: state[name] for name in tower.state_dict()})
    return tower


def build_tower(state: dict[str, Tensor], config: CLIPConfig, source: str) -> Tower:
    """A tower of the sizes that renamed weights have, without them; raises as `load_tower` does."""
    lacking = [name for name in (*SIZES, FREQUENCIES.format(0)) if name not in state]
    if lacking:
        raise ValueError(f"{source} holds no weights of MPS: it lacks {', '.join(lacking)}")
    queries, double, double_inner = (len(state[name]) for name in SIZES)
    layers = len({name.split(".")[1] for name in state if name.startswith("layers.")})
    dim = double // 2
    tower = Tower(config, layers, dim, queries // dim, double_inner // 2, state[FREQUENCIES.format(0)].dtype)
    wanted = tower.state_dict()
    check_names(source, state, [*wanted, *(FREQUENCIES.format(layer) for layer in range(layers))])
    wrong = sorted(name for name in wanted if state[name].shape != wanted[name].shape)
    if wrong:
        raise ValueError(
            f"{len(wrong)} weights of {source} have another shape than the model's: {', '.join(wrong[:3])}"
        )
    return tower


def renamed(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The authors' names, with imscore's "mps." before them or not, as the tower's."""
    bare = {name.removeprefix("mps."): value for name, value in weights.items()}
    return {_renamed(name): value for name, value in bare.items() if name not in UNUSED}


def _renamed(name: str) -> str:
    for old, new in PREFIXES.items():
        if name.startswith(old):
            name = new + name.removeprefix(old)
            break
    for old, new in BLOCKS.items():
        name = name.replace(old, new)
    return name
