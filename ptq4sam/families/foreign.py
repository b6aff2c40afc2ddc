"""Models that are taken for a SAM: named by tensors that no SAM has."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from ptq4sam.errors import CheckpointError
from ptq4sam.families.weight_file import SAVE_AGAIN


@dataclass(frozen=True)
class _Family:
    """A model by what its names have.

    Attributes:
        what: it is, for the message.
        pattern: found in one of its names at least, and in none of a SAM's.
        advice: what to do.
        is_encoder: it is told by its image encoder, which a family of ours may have.
    """

    what: str
    pattern: re.Pattern[str]
    advice: str
    is_encoder: bool


_HQ = "a SAM-HQ"
_OTHER = "it cannot be read here; give the weights of SAM, MobileSAM or TinySAM"

# The first that fits is named: a SAM-HQ of any encoder is one, whatever the encoder.
_FAMILIES = tuple(
    _Family(what, re.compile(pattern), advice, advice == _OTHER and what != _HQ)
    for what, pattern, advice in (
        (
            "a quantized model of ptq4sam",
            r"\.weight\.codes$|_quantizer\.scale$",
            "open it by ptq4sam.load, or by the commands that take a quantized model",
        ),
        (
            _HQ,
            r"\.(?:hf_token|hf_mlp|hq_token|hq_mask_mlp|compress_vit_feat|compress_vit_conv\d)\b",
            _OTHER,
        ),
        (
            "a SAM with LoRA",
            r"(?i)(?:^|[._])lora(?:[._]|$)|linear_[ab]_[qkv]\b|"
            r"(?:^|\.)w_[a-z]?[ab](?:s\.\d|_\d|_linear)",
            "merge the LoRA into the weights where it was trained (in peft merge_and_unload), and "
            f"save what comes out: {SAVE_AGAIN}",
        ),
        (
            "a SAM with adapters",
            r"(?i)(?:image_encoder|prompt_encoder|mask_decoder)\.(?:.*adapt|prompt_generator\.)",
            "adapters are layers that SAM does not have, and cannot be read here; give weights "
            "that were fine-tuned without them",
        ),
        (
            "a SAM 2",
            r"image_encoder\.trunk\.|\bsam_mask_decoder\.|\bmemory_(?:encoder|attention)\.|"
            r"maskmem_tpos_enc|no_memory_embedding|vision_encoder\.backbone\.",
            _OTHER,
        ),
    )
)


def refuse_foreign(names: Iterable[str], origin: str, encoders: bool = True) -> None:
    """Refuse models that have a SAM's names and others.

    Args:
        names: of all tensors, without prefixes where they are a SAM's: a wrapper has what name it
            will.
        origin: where they come from, for the message.
        encoders: refuse those too that are told by their image encoder.

    Raises:
        CheckpointError: they are of a family that is known; it is named.
    """
    names = list(names)
    for family in _FAMILIES:
        if family.is_encoder and not encoders:
            continue
        sign = next((name for name in names if family.pattern.search(name)), None)
        if sign is not None:
            raise CheckpointError(
                f"{origin}: this is {family.what}, for it has {sign}; {family.advice}"
            )
