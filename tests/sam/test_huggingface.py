"""Hugging Face SamModel directories. Parity of what they compute is in test_parity.py."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ptq4sam.errors import CheckpointError
from ptq4sam.families import build_sam
from ptq4sam.families.checkpoint import load_sam
from ptq4sam.families.sam_vit.huggingface import convert_names
from ptq4sam.families.sam_vit.sizes import SIZES, SamVariant
from ptq4sam.skeletons import shapes_alone

TIED = "prompt_encoder.shared_embedding.positional_embedding"
SHARED = "shared_image_embedding.positional_embedding"
MATRIX = "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"


@pytest.fixture(scope="module")
def nano(sam_model: Callable[[SamVariant], Any]) -> Any:
    return sam_model(SIZES["vit_nano"])


@pytest.fixture
def directory(nano: Any, tmp_path: Path) -> Path:
    nano.save_pretrained(tmp_path)
    return tmp_path


def edit_config(directory: Path, part: str | None, **changes: Any) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text())
    (config if part is None else config[part]).update(changes)
    path.write_text(json.dumps(config))


def edit_tensors(directory: Path, edit: Callable[[dict[str, Tensor]], None]) -> None:
    path = directory / "model.safetensors"
    state = {key: tensor.clone() for key, tensor in load_file(path).items()}
    edit(state)
    save_file(state, path)


def refusal(name: str, path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_sam(name, path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", list(SIZES))
def test_every_name_and_shape_is_converted(
    name: str, sam_model_config: Callable[[SamVariant], Any]
) -> None:
    from transformers import SamModel

    with shapes_alone():
        theirs = SamModel(sam_model_config(SIZES[name])).state_dict()
        ours = build_sam(name).state_dict()
    del theirs[TIED]  # meta tensors cannot be compared with their twins
    converted = convert_names(theirs)
    assert {key: tensor.shape for key, tensor in converted.items()} == {
        key: tensor.shape for key, tensor in ours.items()
    }
    # Every tensor arrives once.
    assert len({id(tensor) for tensor in converted.values()}) == len(theirs)


def test_a_directory_loads(directory: Path, nano: Any) -> None:
    sam = load_sam("vit_nano", directory)
    theirs = nano.state_dict()
    layer, head = "layers.0.layer_norm1.bias", "mask_decoder.iou_prediction_head."
    pairs = {
        MATRIX: SHARED,
        "image_encoder.blocks.0.norm1.bias": f"vision_encoder.{layer}",
        "mask_decoder.transformer.layers.0.norm1.bias": f"mask_decoder.transformer.{layer}",
        f"{head}layers.0.weight": f"{head}proj_in.weight",
        f"{head}layers.1.weight": f"{head}layers.0.weight",
        f"{head}layers.2.weight": f"{head}proj_out.weight",
    }
    for ours, name in pairs.items():
        assert sam.state_dict()[ours].equal(theirs[name]), ours


def test_shards_load(nano: Any, tmp_path: Path) -> None:
    nano.save_pretrained(tmp_path, max_shard_size="2MB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    sam = load_sam("vit_nano", tmp_path)
    weight = nano.state_dict()["vision_encoder.layers.3.attn.qkv.weight"]
    assert sam.state_dict()["image_encoder.blocks.3.attn.qkv.weight"].equal(weight)
    next(iter(tmp_path.glob("*-00002-*.safetensors"))).unlink()
    assert "00002" in refusal("vit_nano", tmp_path)


def test_an_index_cannot_lead_out_of_its_directory(nano: Any, tmp_path: Path) -> None:
    inside = tmp_path / "model"
    nano.save_pretrained(inside)
    (inside / "model.safetensors").rename(tmp_path / "outside.safetensors")
    index = {"weight_map": {"a": "../outside.safetensors"}}
    (inside / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "outside.safetensors is missing" in refusal("vit_nano", inside)


def test_the_file_alone_loads(directory: Path, nano: Any) -> None:
    sam = load_sam("vit_nano", directory / "model.safetensors")
    assert sam.state_dict()[MATRIX].equal(nano.state_dict()[SHARED])


def test_weights_as_earlier_versions_wrote_them_load(directory: Path, nano: Any) -> None:
    (directory / "model.safetensors").unlink()
    torch.save(nano.state_dict(), directory / "pytorch_model.bin")
    assert load_sam("vit_nano", directory).state_dict()[MATRIX].equal(nano.state_dict()[SHARED])


def test_either_position_matrix_will_do(directory: Path, nano: Any) -> None:
    matrix = nano.state_dict()[SHARED]

    def rename(state: dict[str, Tensor]) -> None:
        state.pop(SHARED, None)
        state[TIED] = matrix.clone()

    edit_tensors(directory, rename)
    assert load_sam("vit_nano", directory).state_dict()[MATRIX].equal(matrix)


def test_differing_position_matrices_are_refused(directory: Path, nano: Any) -> None:
    matrix = nano.state_dict()[SHARED]

    def add(state: dict[str, Tensor]) -> None:
        state |= {SHARED: matrix.clone(), TIED: matrix + 1}

    edit_tensors(directory, add)
    assert "differ" in refusal("vit_nano", directory)


@pytest.mark.parametrize(
    ("missing", "unknown"), [("vision_encoder.neck.conv1.weight", None), (None, "extra.weight")]
)
def test_tensors_are_checked_both_ways(
    directory: Path, missing: str | None, unknown: str | None
) -> None:
    def edit(state: dict[str, Tensor]) -> None:
        if missing:
            del state[missing]
        if unknown:
            state[unknown] = torch.zeros(1)

    edit_tensors(directory, edit)
    message = refusal("vit_nano", directory)
    assert "misses image_encoder.neck.0.weight" in message if missing else True
    assert "does not know extra.weight" in message if unknown else True


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [
        ("vision_config", "window_size", 7),
        ("vision_config", "global_attn_indexes", [0]),
        ("vision_config", "num_attention_heads", 4),
        ("vision_config", "hidden_act", "relu"),
        ("vision_config", "use_rel_pos", False),
        ("mask_decoder_config", "num_attention_heads", 2),
    ],
)
def test_another_configuration_is_refused(
    directory: Path, part: str, field: str, value: Any
) -> None:
    edit_config(directory, part, **{field: value})
    message = refusal("vit_nano", directory)
    assert f"{part}.{field}" in message
    assert str(value) in message


@pytest.mark.parametrize("model_type", ["sam2", None])
def test_another_type_is_refused(directory: Path, model_type: str | None) -> None:
    edit_config(directory, None, model_type=model_type)
    assert repr(model_type) in refusal("vit_nano", directory)


def test_another_variant_is_named(directory: Path) -> None:
    assert "asked for vit_b, but this is vit_nano" in refusal("vit_b", directory)


def test_a_configuration_of_defaults_is_vit_b(directory: Path) -> None:
    (directory / "config.json").write_text(json.dumps({"model_type": "sam", "vision_config": {}}))
    assert "this is vit_b" in refusal("vit_nano", directory)


def test_missing_and_damaged_files_are_told(directory: Path) -> None:
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "damaged" in refusal("vit_nano", directory)
    weights.unlink()
    assert "model.safetensors is missing" in refusal("vit_nano", directory)
    for content in ("{", "[]"):
        (directory / "config.json").write_text(content)
        assert "JSON" in refusal("vit_nano", directory)
    (directory / "config.json").unlink()
    assert "config.json is missing" in refusal("vit_nano", directory)
