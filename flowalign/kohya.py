"""LoRA files as kohya's trainers write them, and as ComfyUI and the other interfaces read them, family by family.

    MODULE.lora_down.weight, MODULE.lora_up.weight and MODULE.alpha:   dW = alpha / rank  up down

MODULE is the layer as the family's authors name it. Where they hold several of diffusers' layers as one, such as the
queries, keys and values, the products stand one below the other, which is exact and has the sum of the ranks:

    [s_q B_q A_q; s_k B_k A_k; s_v B_v A_v] = blockdiag(s_q B_q, s_k B_k, s_v B_v) [A_q; A_k; A_v]

UNets keep diffusers' own names, which ComfyUI and A1111 know for SD 1.5, 2.1 and XL alike. (kohya's XL trainer names
blocks as the original does, input_blocks_4_1; its own merging tools look for these.)
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from safetensors.torch import save
from torch import Tensor

from flowalign.lora_files import Factors

BLOCK = re.compile(r"(?<=blocks\.)(\d+)(?=\.)")  # the number of a block, # in the tables below


@dataclass(frozen=True)
class Place:
    """Where a layer stands: the module, and which of its parts, whose numbers of rows are as `heights`.

    modulation: its rows are shifts and scales by halves where there are two, and diffusers has the scales first.
    alone: without an alpha, as readers know none of this layer; its scale goes into lora_up.
    """

    module: str
    part: int = 0
    heights: tuple[int, ...] = (1,)
    modulation: bool = False
    alone: bool = False


@dataclass(frozen=True)
class Layout:
    """A family's layout.

    prefix: before a module's name. dots: whether names keep their dots; else they are underscores. places: by
    diffusers' names; None where names are diffusers' own. trainer, base: what kohya's trainers call theirs.
    """

    family: str
    prefix: str
    dots: bool
    trainer: str
    base: str
    network: str = "transformer"
    places: Mapping[str, Place] | None = field(default=None, repr=False)

    def place(self, module: str) -> Place:
        """Raises: ValueError for a layer that has no name in this layout."""
        if self.places is None:
            return Place(module)
        known = self.places.get(BLOCK.sub("#", module, count=1))
        if known is None:
            raise ValueError(
                f"{module} has no name in kohya's layout of {self.family}; export it with --format diffusers"
            )
        number = BLOCK.search(module)
        return known if number is None else replace(known, module=known.module.replace("#", number[1]))

    def key(self, module: str) -> str:
        """A module's name as it stands in the file."""
        return self.prefix + (module if self.dots else module.replace(".", "_"))


def _stacked(names: tuple[str, ...], module: str, heights: tuple[int, ...] = (1, 1, 1)) -> dict[str, Place]:
    return {name: Place(module, part, heights) for part, name in enumerate(names)}


def _places(ours: str, theirs: str, names: Mapping[str, str]) -> dict[str, Place]:
    return {ours + one: Place(theirs + other) for one, other in names.items()}


SELF = ("attn.to_q", "attn.to_k", "attn.to_v")
ADDED = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
SD3_PLACES = (
    _stacked(tuple(f"transformer_blocks.#.{name}" for name in SELF), "joint_blocks.#.x_block.attn.qkv")
    | _stacked(tuple(f"transformer_blocks.#.{name}" for name in ADDED), "joint_blocks.#.context_block.attn.qkv")
    | _stacked(tuple(f"transformer_blocks.#.attn2.to_{one}" for one in "qkv"), "joint_blocks.#.x_block.attn2.qkv")
    | _places(
        "transformer_blocks.#.",
        "joint_blocks.#.",
        {
            "attn.to_out.0": "x_block.attn.proj",
            "attn2.to_out.0": "x_block.attn2.proj",
            "attn.to_add_out": "context_block.attn.proj",
            "ff.net.0.proj": "x_block.mlp.fc1",
            "ff.net.2": "x_block.mlp.fc2",
            "ff_context.net.0.proj": "context_block.mlp.fc1",
            "ff_context.net.2": "context_block.mlp.fc2",
            "norm1.linear": "x_block.adaLN_modulation.1",
        },
    )
    | {
        "transformer_blocks.#.norm1_context.linear": Place(
            "joint_blocks.#.context_block.adaLN_modulation.1", modulation=True
        ),
        "norm_out.linear": Place("final_layer.adaLN_modulation.1", modulation=True),
    }
    | _places("", "", {"proj_out": "final_layer.linear", "context_embedder": "context_embedder"})
    | _places("time_text_embed.timestep_embedder.", "t_embedder.mlp.", {"linear_1": "0", "linear_2": "2"})
    | _places("time_text_embed.text_embedder.", "y_embedder.mlp.", {"linear_1": "0", "linear_2": "2"})
)
FLUX_PLACES = (
    _stacked(tuple(f"transformer_blocks.#.{name}" for name in SELF), "double_blocks.#.img_attn.qkv")
    | _stacked(tuple(f"transformer_blocks.#.{name}" for name in ADDED), "double_blocks.#.txt_attn.qkv")
    | _stacked(
        tuple(f"single_transformer_blocks.#.{name}" for name in (*SELF, "proj_mlp")),
        "single_blocks.#.linear1",
        (1, 1, 1, 4),
    )
    | _places(
        "transformer_blocks.#.",
        "double_blocks.#.",
        {
            "attn.to_out.0": "img_attn.proj",
            "attn.to_add_out": "txt_attn.proj",
            "ff.net.0.proj": "img_mlp.0",
            "ff.net.2": "img_mlp.2",
            "ff_context.net.0.proj": "txt_mlp.0",
            "ff_context.net.2": "txt_mlp.2",
            "norm1.linear": "img_mod.lin",
            "norm1_context.linear": "txt_mod.lin",
        },
    )
    | _places(
        "single_transformer_blocks.#.", "single_blocks.#.", {"proj_out": "linear2", "norm.linear": "modulation.lin"}
    )
    | _places("", "", {"x_embedder": "img_in", "context_embedder": "txt_in"})
    | {
        "norm_out.linear": Place("final_layer.adaLN_modulation.1", modulation=True, alone=True),
        "proj_out": Place("final_layer.linear", alone=True),
    }
    | _places("time_text_embed.timestep_embedder.", "time_in.", {"linear_1": "in_layer", "linear_2": "out_layer"})
    | _places("time_text_embed.text_embedder.", "vector_in.", {"linear_1": "in_layer", "linear_2": "out_layer"})
    | _places("time_text_embed.guidance_embedder.", "guidance_in.", {"linear_1": "in_layer", "linear_2": "out_layer"})
)
OUTER = {
    "condition_embedder.time_proj": "time_projection.1",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "proj_out": "head.head",
}
WAN_PLACES = (
    _places("blocks.#.attn1.", "blocks.#.self_attn.", {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "o"})
    | _places("blocks.#.attn2.", "blocks.#.cross_attn.", {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "o"})
    | _places("blocks.#.attn2.", "blocks.#.cross_attn.", {"add_k_proj": "k_img", "add_v_proj": "v_img"})
    | _places("blocks.#.ffn.", "blocks.#.ffn.", {"net.0.proj": "0", "net.2": "2"})
    | {ours: Place(theirs, alone=True) for ours, theirs in OUTER.items()}
)

UNDERSCORES, DOTS = "lora_unet_", "diffusion_model."
SD = Layout("Stable Diffusion 1.5 and 2.1", UNDERSCORES, False, "networks.lora", "", "unet")
XL = Layout("Stable Diffusion XL", UNDERSCORES, False, "networks.lora", "sdxl_base_v1-0", "unet")
WAN = Layout("Wan", DOTS, True, "networks.lora_wan", "wan", places=WAN_PLACES)
LAYOUTS = {  # by diffusers' class of the pipeline
    "StableDiffusionPipeline": SD,
    "LatentConsistencyModelPipeline": SD,
    "StableDiffusionXLPipeline": XL,
    "StableDiffusion3Pipeline": Layout("SD3", UNDERSCORES, False, "networks.lora_sd3", "sd3", places=SD3_PLACES),
    "FluxPipeline": Layout("FLUX.1", UNDERSCORES, False, "networks.lora_flux", "flux1", places=FLUX_PLACES),
    "QwenImagePipeline": Layout("Qwen-Image", UNDERSCORES, False, "networks.lora_qwen_image", "qwen_image"),
    "ZImagePipeline": Layout("Z-Image", DOTS, True, "networks.lora_zimage", "z_image"),
    "WanPipeline": WAN,
    "WanImageToVideoPipeline": WAN,
}


def layout_of(pipeline: str) -> Layout:
    """The layout for a diffusers class of pipelines. Raises: ValueError where the family has none."""
    if pipeline not in LAYOUTS:
        known = ", ".join(dict.fromkeys(one.family for one in LAYOUTS.values()))
        raise ValueError(
            f"kohya's layout has no names for a {pipeline}, it has for {known}; take --format diffusers or merged"
        )
    return LAYOUTS[pipeline]


def kohya_tensors(
    layout: Layout, factors: Mapping[str, Factors], dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """The tensors of a file by their keys; alphas in float32.

    Args:
        factors: by "NETWORK.MODULE", as `read_lora` gives them. dtype: of the factors; None for their own, or float32
            where several layers became one.

    Raises: ValueError for a layer without a name in this layout.
    """
    parts = dict[str, dict[int, tuple[Place, Factors]]]()
    for name, one in factors.items():
        network, _, module = name.partition(".")
        if network != layout.network:
            raise ValueError(f"a LoRA of the {network} has no names in kohya's layout of {layout.family}")
        place = layout.place(module)
        parts.setdefault(place.module, {})[place.part] = place, _turned(place, one)
    made = dict[str, Tensor]()
    for module, held in sorted(parts.items()):
        place, first = next(iter(held.values()))
        alone = len(place.heights) == 1
        whole = first if alone else joined({part: one for part, (_, one) in held.items()}, place.heights)
        key, whole = layout.key(module), _unscaled(whole) if place.alone else whole
        made[f"{key}.lora_down.weight"] = whole.down.to(dtype or whole.down.dtype).contiguous()
        made[f"{key}.lora_up.weight"] = whole.up.to(dtype or whole.up.dtype).contiguous()
        if not place.alone:
            made[f"{key}.alpha"] = torch.tensor(whole.scale * whole.rank)
    return made


def _turned(place: Place, one: Factors) -> Factors:
    """With scales and shifts in the authors' order."""
    if not (place.modulation and len(one.up) == 2 * one.down.shape[1]):
        return one
    scales, shifts = one.up.chunk(2)
    return Factors(one.down, torch.cat([shifts, scales]), one.scale)


def _unscaled(one: Factors) -> Factors:
    return Factors(one.down, (one.scale * one.up.double()).to(one.up.dtype))


def joined(parts: Mapping[int, Factors], heights: tuple[int, ...]) -> Factors:
    """Layers side by side as one: exact. A part that is not there is not changed.

    Args:
        parts: by their place, from 0 on. heights: of all parts, as they are to one another.
    """
    (unit,) = {len(one.up) // heights[part] for part, one in parts.items()}
    scales = {one.scale for one in parts.values()}
    common = scales.pop() if len(scales) == 1 else 1.0
    up, row, column = torch.zeros(unit * sum(heights), sum(one.rank for one in parts.values())), 0, 0
    for part, height in enumerate(heights):
        one = parts.get(part)
        if one is not None:
            own = one.up.double() * (one.scale / common)
            up[row : row + len(own), column : column + one.rank] = own.float()
            column += one.rank
        row += height * unit
    downs = [parts[part].down.float() for part in sorted(parts)]
    return Factors(torch.cat(downs), up, common)


def kohya_bytes(
    layout: Layout, factors: Mapping[str, Factors], notes: Mapping[str, str], dtype: torch.dtype | None = None
) -> bytes:
    """A file with what tools look for in its header. notes: further entries, such as ss_output_name."""
    ranks = [one.rank for one in factors.values()]
    alphas = [one.scale * one.rank for one in factors.values()]
    told = {
        "format": "pt",
        "ss_network_module": layout.trainer,
        "ss_network_dim": str(max(ranks, key=ranks.count)),
        "ss_network_alpha": f"{max(alphas, key=alphas.count):g}",
        **({"ss_base_model_version": layout.base} if layout.base else {}),
    }
    return save(kohya_tensors(layout, factors, dtype), told | dict(notes))
