"""Hugging Face SamModel directories: their tensor names and their configuration.

Only files are read; the transformers package is not needed. SamModel normalises the decoder's
tokens with eps 1e-6 where the official code has 1e-5, so its outputs differ by about 1e-5.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ptq4sam.errors import CheckpointError
from ptq4sam.families.sam_vit.sizes import SIZES, SamVariant
from ptq4sam.families.weight_file import read_file

_POSITIONS = "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"
_TIED_POSITIONS = (
    "shared_image_embedding.positional_embedding",
    "prompt_encoder.shared_embedding.positional_embedding",
)

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_LISTED = 5

# Every name starts with one of these; the longest that fits is replaced.
_PREFIXES = {
    "vision_encoder.pos_embed": "image_encoder.pos_embed",
    "vision_encoder.patch_embed.projection.": "image_encoder.patch_embed.proj.",
    "vision_encoder.layers.": "image_encoder.blocks.",
    "vision_encoder.neck.conv1.": "image_encoder.neck.0.",
    "vision_encoder.neck.layer_norm1.": "image_encoder.neck.1.",
    "vision_encoder.neck.conv2.": "image_encoder.neck.2.",
    "vision_encoder.neck.layer_norm2.": "image_encoder.neck.3.",
    "prompt_encoder.mask_embed.conv1.": "prompt_encoder.mask_downscaling.0.",
    "prompt_encoder.mask_embed.layer_norm1.": "prompt_encoder.mask_downscaling.1.",
    "prompt_encoder.mask_embed.conv2.": "prompt_encoder.mask_downscaling.3.",
    "prompt_encoder.mask_embed.layer_norm2.": "prompt_encoder.mask_downscaling.4.",
    "prompt_encoder.mask_embed.conv3.": "prompt_encoder.mask_downscaling.6.",
    "prompt_encoder.point_embed.": "prompt_encoder.point_embeddings.",
    "prompt_encoder.not_a_point_embed.": "prompt_encoder.not_a_point_embed.",
    "prompt_encoder.no_mask_embed.": "prompt_encoder.no_mask_embed.",
    "mask_decoder.upscale_conv1.": "mask_decoder.output_upscaling.0.",
    "mask_decoder.upscale_layer_norm.": "mask_decoder.output_upscaling.1.",
    "mask_decoder.upscale_conv2.": "mask_decoder.output_upscaling.3.",
    "mask_decoder.transformer.layer_norm_final_attn.": "mask_decoder.transformer.norm_final_attn.",
    "mask_decoder.": "mask_decoder.",
}

# What a configuration that leaves a field out means by it (SamVisionConfig's own defaults).
_VISION_DEFAULTS: dict[str, Any] = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "global_attn_indexes": [2, 5, 8, 11],
    "image_size": 1024,
    "patch_size": 16,
    "window_size": 14,
    "output_channels": 256,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "qkv_bias": True,
    "use_abs_pos": True,
    "use_rel_pos": True,
}
_DECODER_DEFAULTS: dict[str, Any] = {
    "num_attention_heads": 8,
    "num_hidden_layers": 2,
    "attention_downsample_rate": 2,
    "hidden_act": "relu",
}


def is_huggingface(state: Mapping[str, Tensor]) -> bool:
    """Whether tensors are named as SamModel names them."""
    return any(name.startswith("vision_encoder.") for name in state)


def convert_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give a SamModel's tensors their official names; the tensors stay.

    SamModel holds the position matrix under two tied names, and files carry either or both. Names
    that are not SamModel's are kept, so that a strict check reports them as they are in the file.

    Raises:
        CheckpointError: the two position matrices differ.
    """
    converted = {
        _official_name(name): tensor
        for name, tensor in state.items()
        if name not in _TIED_POSITIONS
    }
    positions = [state[name] for name in _TIED_POSITIONS if name in state]
    if len(positions) == 2 and not positions[0].equal(positions[1]):
        raise CheckpointError(
            f"{_TIED_POSITIONS[0]} and {_TIED_POSITIONS[1]} must be equal, but differ: "
            "SAM has one position matrix; save the SamModel again"
        )
    if positions:
        converted[_POSITIONS] = positions[0]
    return converted


def read_directory(name: str, directory: Path) -> dict[str, Tensor]:
    """Read the SamModel that `save_pretrained` wrote, under its names.

    Args:
        name: the variant that was asked for.
        directory: holds config.json and model.safetensors (pytorch_model.bin of earlier versions),
            or shards and their index; where it has preprocessor_config.json, `pixel_mean` and
            `pixel_std` are added from there.

    Raises:
        CheckpointError: a file is missing or damaged, or the configuration is another model's.
    """
    _check_config(name, directory)
    state: dict[str, Tensor] = _constants(directory)
    for file in _weight_files(directory):
        if not file.is_file():
            raise CheckpointError(
                f"{directory}: {file.name} is missing; save the SamModel (save_pretrained) or "
                "download it again"
            )
        content = read_file(file)
        if not isinstance(content, Mapping):
            raise CheckpointError(f"{file}: holds no tensors by name; download it again")
        state |= content
    return state


def _weight_files(directory: Path) -> list[Path]:
    for name in _WEIGHTS:
        index = directory / f"{name}.index.json"
        if index.is_file():
            weight_map = _read_json(index).get("weight_map")
            if not isinstance(weight_map, dict):
                raise CheckpointError(f"{index}: no weight_map; save or download the model again")
            # Only the file name: an index must not lead out of its directory.
            return sorted({directory / Path(str(shard)).name for shard in weight_map.values()})
        if (directory / name).is_file():
            return [directory / name]
    return [directory / _WEIGHTS[0]]


def _constants(directory: Path) -> dict[str, Tensor]:
    """What a SamImageProcessor normalises by, for values of 0 to 255."""
    path = directory / "preprocessor_config.json"
    if not path.is_file():
        return {}
    config = _read_json(path)
    try:
        scale = (
            float(config.get("rescale_factor", 1 / 255)) if config.get("do_rescale", True) else 1
        )
        normalizes = config.get("do_normalize", True)
        none = {"image_mean": [0.0] * 3, "image_std": [1.0] * 3}
        given = config if normalizes else none
        mean, std = (torch.tensor(given.get(name, ()), device="cpu") for name in none)
        found = {"pixel_mean": mean / scale, "pixel_std": std / scale}
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(
            f"{path}: not what SamImageProcessor writes ({_first_line(error)}); download it again"
        ) from error
    return {name: values for name, values in found.items() if len(values)}


def _official_name(name: str) -> str:
    fitting = [prefix for prefix in _PREFIXES if name.startswith(prefix)]
    if not fitting:
        return name
    prefix = max(fitting, key=len)
    name = _PREFIXES[prefix] + name.removeprefix(prefix)
    if ".transformer.layers." in name or name.startswith("image_encoder.blocks."):
        name = name.replace(".layer_norm", ".norm")
    # The three-layer heads: proj_in, layers.0, proj_out.
    head, found, rest = name.partition(".proj_in.")
    if found:
        return f"{head}.layers.0.{rest}"
    head, found, rest = name.partition(".proj_out.")
    if found:
        return f"{head}.layers.2.{rest}"
    if "output_hypernetworks_mlps." in name or "iou_prediction_head." in name:
        return name.replace(".layers.0.", ".layers.1.")
    return name


def _check_config(name: str, directory: Path) -> None:
    path = directory / "config.json"
    if not path.is_file():
        raise CheckpointError(
            f"{directory}: config.json is missing, found {_listing(directory)}; give a Hugging "
            "Face SamModel directory or a file of weights"
        )
    config = _read_json(path)
    if config.get("model_type") != "sam":
        raise CheckpointError(
            f"{path}: asked for {name}, but the model_type is {config.get('model_type')!r}; "
            "give a model of type 'sam'"
        )
    found = _fields(config, "vision_config", _VISION_DEFAULTS)
    found |= _fields(config, "mask_decoder_config", _DECODER_DEFAULTS)
    # Of any size of pictures: the position embedding tells.
    variants = {
        other: _expected_fields(replace(size, image_size=found["vision_config.image_size"]))
        for other, size in SIZES.items()
    }
    wanted = variants[name]
    different = [field for field in wanted if found[field] != wanted[field]]
    if not different:
        return
    others = [other for other, fields in variants.items() if fields == found]
    if others:
        raise CheckpointError(f"{path}: asked for {name}, but this is {others[0]}; ask for that")
    field = different[0]
    raise CheckpointError(
        f"{path}: asked for {name}, whose {field} is {wanted[field]}, but found {found[field]}; "
        f"this configuration is none of {', '.join(SIZES)}"
    )


def _listing(directory: Path) -> str:
    names = sorted(entry.name for entry in directory.iterdir())
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more if names else "nothing"


def _fields(config: Mapping[str, Any], part: str, defaults: Mapping[str, Any]) -> dict[str, Any]:
    given = config.get(part) or {}
    return {f"{part}.{field}": given.get(field, default) for field, default in defaults.items()}


def _expected_fields(variant: SamVariant) -> dict[str, Any]:
    vision = _VISION_DEFAULTS | {
        "hidden_size": variant.embed_dim,
        "num_hidden_layers": variant.depth,
        "num_attention_heads": variant.num_heads,
        "global_attn_indexes": list(variant.global_attn_indexes),
        "image_size": variant.image_size,
        "patch_size": variant.patch_size,
        "window_size": variant.window_size,
        "output_channels": variant.prompt_dim,
    }
    decoder = _DECODER_DEFAULTS | {
        "num_attention_heads": variant.decoder_heads,
        "num_hidden_layers": variant.decoder_depth,
    }
    return _fields({"vision_config": vision}, "vision_config", vision) | _fields(
        {"mask_decoder_config": decoder}, "mask_decoder_config", decoder
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: not readable as JSON ({_first_line(error)}); download it again"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: a JSON object was expected; download it again")
    return content


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
