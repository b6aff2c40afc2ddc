"""Random weights that make comparisons real, and the reference models beside ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ptq4sam.families.sam_vit.sizes import SamVariant
from ptq4sam.skeletons import shapes_alone
from tests.reference_sams import build_reference, randomize_state


def prompt_cases(image_size: int, grid: int) -> dict[str, dict[str, Any]]:
    """Two prompts of every kind, in pixels of the input."""
    random = np.random.default_rng(1)
    points = random.uniform(0, image_size, (2, 3, 2))
    corners = np.sort(random.uniform(0, image_size, (2, 2, 2)), axis=1)
    boxes = corners.reshape(2, 4)
    masks = random.normal(0, 5, (2, 1, 4 * grid, 4 * grid))
    labels = np.array([[1, 0, 1], [0, 1, -1]])
    cases: dict[str, dict[str, Any]] = {
        "box": {"boxes": boxes},
        "points": {"points": points, "labels": labels},
        "one point": {"points": points[:, :1], "labels": labels[:, :1]},
        "mask": {"masks": masks},
        "box and points": {"boxes": boxes, "points": points, "labels": labels},
        "all": {"boxes": boxes, "points": points, "labels": labels, "masks": masks},
    }
    return {
        name: {key: torch.as_tensor(value, dtype=torch.float32) for key, value in case.items()}
        for name, case in cases.items()
    }


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference in units of the reference's largest magnitude."""
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.fixture(scope="session")
def random_state() -> Callable[..., dict[str, Tensor]]:
    return randomize_state


@pytest.fixture(scope="session")
def reference_sam() -> Callable[[SamVariant], nn.Module]:
    pytest.importorskip("segment_anything")
    return build_reference


@pytest.fixture(scope="session")
def prompts_of_every_kind() -> Callable[[int, int], dict[str, dict[str, Any]]]:
    return prompt_cases


@pytest.fixture(scope="session")
def error_of() -> Callable[[Tensor, Tensor], float]:
    return relative_error


@pytest.fixture(scope="session")
def sam_model_config() -> Callable[[SamVariant], Any]:
    """The transformers SamConfig of any size."""
    pytest.importorskip("transformers")
    return build_sam_config


def build_sam_config(variant: SamVariant) -> Any:
    from transformers import SamConfig

    sizes = {"image_size": variant.image_size, "patch_size": variant.patch_size}
    return SamConfig(
        vision_config={
            "hidden_size": variant.embed_dim,
            "num_hidden_layers": variant.depth,
            "num_attention_heads": variant.num_heads,
            "global_attn_indexes": list(variant.global_attn_indexes),
            "window_size": variant.window_size,
            "output_channels": variant.prompt_dim,
            "num_pos_feats": variant.prompt_dim // 2,
            **sizes,
        },
        prompt_encoder_config={"hidden_size": variant.prompt_dim, **sizes},
        mask_decoder_config={
            "hidden_size": variant.prompt_dim,
            "mlp_dim": variant.decoder_mlp_dim,
            "num_attention_heads": variant.decoder_heads,
            "num_hidden_layers": variant.decoder_depth,
            "iou_head_hidden_dim": variant.iou_hidden_dim,
        },
    )


@pytest.fixture(scope="session")
def sam_model(sam_model_config: Callable[[SamVariant], Any]) -> Callable[[SamVariant], Any]:
    """The transformers SamModel of any size with random weights."""
    from transformers import SamModel

    def build(variant: SamVariant) -> Any:
        with shapes_alone():
            model = SamModel(sam_model_config(variant))
        state = randomize_state(model.state_dict())
        tied = "shared_image_embedding.positional_embedding"
        state["prompt_encoder.shared_embedding.positional_embedding"] = state[tied]
        model.load_state_dict(state, assign=True)
        return model.eval()

    return build
