"""Teacher and student: whether they go together, and how a student begins and ends."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ptq4sam.errors import ConfigError
from ptq4sam.families import variant_of
from ptq4sam.sam.model import Sam

_log = logging.getLogger(__name__)

_POSITIONS = 0.02
"""Deviation of position embeddings, which are made as zeros."""


def require_pair(student: Sam, teacher: Sam) -> None:
    """Refuse a teacher whose answers the student's cannot be compared with.

    Raises:
        ConfigError: prompts lie in different squares, or embeddings have different shapes.
    """
    ours, theirs = student.geometry, teacher.geometry
    frames = [(g.prompt_side, g.resizing) for g in (ours, theirs)]
    if frames[0] != frames[1]:
        raise ConfigError(
            f"prompts of student {student.name} lie in a square of {frames[0][0]} pixels by "
            f"{frames[0][1]}, those of teacher {teacher.name} in one of {frames[1][0]} by "
            f"{frames[1][1]}: choose two SAMs of one frame"
        )
    if ours.features[0] != theirs.features[0]:
        shapes = ["x".join(map(str, g.features[0])) for g in (ours, theirs)]
        raise ConfigError(
            f"embeddings of student {student.name} have the shape {shapes[0]}, those of teacher "
            f"{teacher.name} {shapes[1]}: choose a student whose sizes give the teacher's shape"
        )


def new_student(name: str, teacher: Sam | None, seed: int) -> Sam:
    """A student with random weights, ready to be trained.

    Its prompt encoder and mask decoder are the teacher's where they have the same sizes.

    Args:
        name: of the SAM.
        teacher: that it will learn from.
        seed: of its weights.

    Raises:
        ConfigError: there is no such SAM.
    """
    variant = variant_of(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        student = variant.build_unfolded() if variant.build_unfolded else variant.build(None)
        for parameter in student.parameters():
            if parameter.dim() == 4 and parameter.shape[0] == 1:
                nn.init.normal_(parameter, std=_POSITIONS)
    if teacher is not None:
        _copy(teacher.prompt_encoder, student.prompt_encoder, "prompt encoder")
        _copy(teacher.mask_decoder, student.mask_decoder, "mask decoder")
    return student


def _copy(source: nn.Module, target: nn.Module, what: str) -> None:
    theirs, ours = source.state_dict(), target.state_dict()
    same = theirs.keys() == ours.keys() and all(theirs[k].shape == ours[k].shape for k in ours)
    if same:
        target.load_state_dict(theirs)
    else:
        _log.info("the student's %s has other sizes than the teacher's: it begins at random", what)


def finished_state(state: Mapping[str, Tensor], half: bool = False) -> dict[str, Tensor]:
    """Weights of a trained student as files have them, batch normalisations as published files do.

    Args:
        state: of the student.
        half: float16 for all but what a channel has one number of, statistics above all.
    """
    return {
        name: value.detach().cpu().to(_written_as(value, half)).contiguous()
        for name, value in state.items()
    }


def _written_as(value: Tensor, half: bool) -> torch.dtype:
    if not value.is_floating_point():
        return value.dtype
    return torch.float16 if half and value.dim() > 1 else torch.float32
