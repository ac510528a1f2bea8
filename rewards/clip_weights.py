"""A CLIP with vision transformer as open_clip saves it (github.com/mlfoundations/open_clip), for transformers.

The two differ in names, in the order of two projections' axes, and in that open_clip stacks query, key and value.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import Tensor

from rewards.towers import check_names

if TYPE_CHECKING:
    from transformers import CLIPConfig, CLIPModel

TOWERS = {"visual.transformer.resblocks.": "vision_model.", "transformer.resblocks.": "text_model."}
LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
SINGLE = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "visual.proj": "visual_projection.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "text_projection": "text_projection.weight",
    "logit_scale": "logit_scale",
}
TRANSPOSED = ("visual.proj", "text_projection")  # open_clip multiplies by them from the right


def load_open_clip(state: dict[str, Tensor], vision_heads: int, text_heads: int, source: str) -> CLIPModel:
    """The CLIPModel with exactly these weights.

    Raises: ValueError where weights are missing, too many or of another shape.
    """
    from transformers import CLIPModel

    config = clip_config(state, vision_heads, text_heads, source)
    model, report = CLIPModel.from_pretrained(
        None, config=config, state_dict=to_transformers(state), output_loading_info=True, ignore_mismatched_sizes=True
    )
    wanted = model.state_dict().keys()
    check_names(source, [*(wanted - report["missing_keys"]), *report["unexpected_keys"]], wanted)
    if report["mismatched_keys"]:
        told = ", ".join(f"{name} {list(found)} for {list(asked)}" for name, found, asked in report["mismatched_keys"])
        raise ValueError(f"weights of {source} have other shapes than the model: {told}")
    return model


def clip_config(state: dict[str, Tensor], vision_heads: int, text_heads: int, source: str) -> CLIPConfig:
    """The sizes of a model by the shapes of its weights; GELU, as all open_clip models but OpenAI's own have it.

    Raises: ValueError without the weights that tell them, and where the heads do not divide the widths.
    """
    from transformers import CLIPConfig

    width, _, patch, _ = _shape(state, "visual.conv1.weight", 4, source)
    positions, projection = (
        _shape(state, "visual.positional_embedding", 2, source)[0],
        _shape(state, "visual.proj", 2, source)[1],
    )
    vocabulary, text_width = _shape(state, "token_embedding.weight", 2, source)
    if width % vision_heads or text_width % text_heads:
        raise ValueError(f"{source}: widths {width} and {text_width} for {vision_heads} and {text_heads} heads")
    vision = {
        "hidden_size": width,
        "intermediate_size": _shape(state, "visual.transformer.resblocks.0.mlp.c_fc.weight", 2, source)[0],
        "num_hidden_layers": _layers(state, "visual.transformer.resblocks."),
        "num_attention_heads": vision_heads,
        "patch_size": patch,
        "image_size": patch * round((positions - 1) ** 0.5),
        "hidden_act": "gelu",
    }
    text = {
        "hidden_size": text_width,
        "intermediate_size": _shape(state, "transformer.resblocks.0.mlp.c_fc.weight", 2, source)[0],
        "num_hidden_layers": _layers(state, "transformer.resblocks."),
        "num_attention_heads": text_heads,
        "max_position_embeddings": _shape(state, "positional_embedding", 2, source)[0],
        "vocab_size": vocabulary,
        "bos_token_id": vocabulary - 2,  # the start and the end are the last two of open_clip's vocabulary
        "eos_token_id": vocabulary - 1,
        "pad_token_id": vocabulary - 1,
        "hidden_act": "gelu",
    }
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=projection)


def to_transformers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights by transformers' names; names that open_clip does not have stay as they are."""
    return dict(pair for name, value in state.items() for pair in _renamed(name, value))


def _renamed(name: str, value: Tensor) -> Iterator[tuple[str, Tensor]]:
    for prefix, tower in TOWERS.items():
        if name.startswith(prefix):
            number, _, rest = name.removeprefix(prefix).partition(".")
            yield from _of_layer(f"{tower}encoder.layers.{number}.", rest, value)
            return
    yield SINGLE.get(name, name), value.T.contiguous() if name in TRANSPOSED else value


def _of_layer(layer: str, rest: str, value: Tensor) -> Iterator[tuple[str, Tensor]]:
    module, _, kind = rest.rpartition(".")
    if rest in ("attn.in_proj_weight", "attn.in_proj_bias"):
        for letter, part in zip("qkv", value.chunk(3), strict=True):
            yield f"{layer}self_attn.{letter}_proj.{rest.rpartition('_')[2]}", part.clone()
    else:
        yield f"{layer}{LAYER.get(module, module)}.{kind}", value


def _layers(state: dict[str, Tensor], prefix: str) -> int:
    return len({name.removeprefix(prefix).partition(".")[0] for name in state if name.startswith(prefix)})


def _shape(state: dict[str, Tensor], name: str, axes: int, source: str) -> tuple[int, ...]:
    if name not in state or state[name].ndim != axes:
        raise ValueError(f"{source} is no CLIP with vision transformer as open_clip saves it: it lacks {name}")
    return tuple(state[name].shape)
