"""A step of a distillation: its loss by its terms, its average, and what it trains."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ptq4sam.distillation.prompts import Prompts
from ptq4sam.distillation.settings import Phase, Terms
from ptq4sam.distillation.students import finished_state, new_student, require_pair
from ptq4sam.distillation.trainer import Trainer, decode, encoder_input
from ptq4sam.distillation.views import Batch
from ptq4sam.errors import ConfigError
from ptq4sam.families import build_sam, variant_of
from ptq4sam.families.checkpoint import load_sam
from ptq4sam.sam.predictor import Predictor
from tests.distillation.conftest import SETTINGS, tiny_teacher, tiny_trainer


def test_the_loss_is_the_weighted_sum_of_its_terms(batch: Batch) -> None:
    trainer = tiny_trainer()
    terms = trainer.phase.terms
    loss, noted = trainer.loss(batch, torch.Generator().manual_seed(0))
    expected = noted["truth"] + sum(
        getattr(terms, name) * noted[name] for name in ("embedding", "token", "mask", "iou")
    )
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert 0 <= noted["mean IoU"] <= 1


def test_a_student_that_is_its_teacher_has_no_distance(batch: Batch) -> None:
    teacher = tiny_teacher()
    student = build_sam("tiny")
    student.load_state_dict(teacher.state_dict())
    trainer = Trainer(student, teacher, SETTINGS.phases[0], SETTINGS)
    noted = trainer.loss(batch, torch.Generator().manual_seed(0))[1]
    # With gradients and without, attention adds in another order.
    assert max(noted["embedding"], noted["token"], noted["mask"]) < 1e-5
    assert noted["mean IoU"] == pytest.approx(noted["teacher's mean IoU"], abs=1e-3)
    assert noted["truth"] > 0


@pytest.mark.parametrize("name", ["tiny:embed_dim=16", "tiny_tiny_vit"])
def test_a_student_nears_its_teachers_embeddings(name: str, batch: Batch) -> None:
    alone = Terms(token=0, mask=0, focal=0, dice=0, iou=0)
    phase = Phase(40, 2, rate=3e-3, warm_up=0, terms=alone)
    trainer = tiny_trainer(name, dataclasses.replace(SETTINGS, phases=(phase,)))
    losses = [trainer.train_step(batch)["loss"] for _ in range(12)]
    assert losses[-1] < 0.9 * losses[0]


def test_the_average_follows_the_weights(batch: Batch) -> None:
    trainer = tiny_trainer(settings=dataclasses.replace(SETTINGS, decay=0.5))
    name = "image_encoder.patch_embed.proj.weight"
    before = trainer.average[name].clone()
    trainer.train_step(batch)
    after = trainer.student.state_dict()[name]
    assert not torch.equal(after, before)
    share = 2 / 11  # of the first step
    expected = before + (1 - share) * (after - before)
    torch.testing.assert_close(trainer.average[name], expected)


def test_bfloat16_gives_about_the_same_terms(batch: Batch) -> None:
    exact, rough = (
        tiny_trainer(settings=dataclasses.replace(SETTINGS, precision=precision))
        for precision in ("float32", "bfloat16")
    )
    terms, rounded = exact.train_step(batch), rough.train_step(batch)
    assert rounded["embedding"] != terms["embedding"]
    assert rounded["embedding"] == pytest.approx(terms["embedding"], rel=0.02)
    assert {p.dtype for p in rough.student.parameters()} == {torch.float32}


def test_an_encoder_is_trained_alone(batch: Batch) -> None:
    trainer = tiny_trainer(settings=dataclasses.replace(SETTINGS, train="encoder"))
    before = {k: v.clone() for k, v in trainer.student.state_dict().items()}
    trainer.train_step(batch)
    changed = {
        k.split(".")[0]
        for k, v in trainer.student.state_dict().items()
        if not torch.equal(v, before[k])
    }
    assert changed == {"image_encoder"}


def test_decoding_is_the_predictors(batch: Batch) -> None:
    sam = tiny_teacher()
    image = batch.pictures[0].permute(1, 2, 0).numpy()
    boxes = torch.tensor([[4.0, 5, 30, 40], [10, 2, 50, 44]])
    square = torch.zeros(64, 64, 3, dtype=torch.uint8)
    square[: image.shape[0], : image.shape[1]] = batch.pictures[0].permute(1, 2, 0)
    predictor = Predictor(sam)
    embedding = predictor.embed(square.numpy())
    expected = predictor.predict(boxes=boxes, embedding=embedding, multimask=True)
    pixels = encoder_input(sam, [square.permute(2, 0, 1)])
    features = sam.embed(pixels)[0].expand(2, -1, -1, -1)
    points, labels = torch.zeros(2, 1, 2), torch.ones(2, 1)
    asked = Prompts(boxes, torch.tensor([True, True]), points, labels)
    found = decode(sam, features, asked, None)
    torch.testing.assert_close(found.masks[:, 1:], expected.low_res, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.ious[:, 1:], expected.iou_predictions, rtol=1e-4, atol=1e-4)
    assert found.tokens.shape == (2, 5, 32)


def test_an_encoder_of_half_the_square_gets_half_the_picture() -> None:
    sam = build_sam("tiny")
    sam.geometry = dataclasses.replace(sam.geometry, prompt_side=128)
    picture = torch.full((3, 128, 96), 200, dtype=torch.uint8)
    pixels = encoder_input(sam, [picture])
    assert pixels.shape == (1, 3, 64, 64)
    expected = sam.preprocess(torch.full((3, 64, 48), 200.0))
    torch.testing.assert_close(pixels[0], expected)


def test_a_student_begins_with_its_teachers_decoder() -> None:
    teacher = tiny_teacher()
    first, again = (new_student("tiny_tiny_vit", teacher, seed=3) for _ in range(2))
    for ours, theirs in zip(
        first.mask_decoder.parameters(), teacher.mask_decoder.parameters(), strict=True
    ):
        assert torch.equal(ours, theirs)
    assert any("running_mean" in name for name in first.state_dict())
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in first.state_dict().items())


@pytest.mark.parametrize("half", [False, True])
def test_what_is_written_loads_folded_and_gives_what_was_trained(
    batch: Batch, tmp_path: Path, half: bool
) -> None:
    trainer = tiny_trainer("tiny_tiny_vit")
    trainer.train_step(batch)
    student = trainer.student
    written = finished_state(student.state_dict(), half)
    assert {value.dtype for name, value in written.items() if name.endswith("bn.running_var")} == {
        torch.float32
    }
    halves = {name for name, value in written.items() if value.dtype == torch.float16}
    large = {name for name, value in written.items() if value.dim() > 1}
    assert halves == (large if half else set())
    save_file(written, tmp_path / "weights.safetensors")
    folded = load_sam("tiny_tiny_vit", tmp_path / "weights.safetensors")
    assert not any("running_mean" in name for name in folded.state_dict())
    pixels = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = student.eval().image_encoder(pixels)
        near = 1e-2 if half else 1e-4
        torch.testing.assert_close(folded.image_encoder(pixels), expected, rtol=1e-3, atol=near)


@pytest.mark.parametrize(
    ("student", "told"),
    [
        ("tiny:image_size=128", "prompts of student .* square of 128 .* teacher tiny in one of 64"),
        ("tiny:prompt_dim=64", "shape 64x8x8, those of teacher tiny 32x8x8"),
    ],
)
def test_a_pair_that_does_not_fit_is_refused(student: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        require_pair(build_sam(student), tiny_teacher())


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("tiny:embed_dims=16", "embed_dims: unknown key; did you mean 'embed_dim'"),
        ("tiny:embed_dim=wide", "'wide' given, a value like 32 is needed"),
        ("tiny:embed_dim=17", "write sizes that go together"),
        ("vit_nano_bimodal:embed_dim=80", "no sizes to choose"),
        ("small:embed_dim=16", "unknown SAM 'small'"),
    ],
)
def test_sizes_of_a_name_are_checked(name: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        variant_of(name)
    assert variant_of("tiny:embed_dim=16,depth=1").geometry == variant_of("tiny").geometry


def test_phases_without_a_term_are_refused() -> None:
    for iou in (0, 1):
        terms = Terms(focal=0, dice=0, iou=iou)
        by_teacher = dataclasses.replace(SETTINGS, phases=(Phase(terms=terms),))
        by_teacher.require_something_to_learn(has_teacher=True)
        with pytest.raises(ConfigError, match=r"phases\.0: .* compare with a teacher alone"):
            by_teacher.require_something_to_learn(has_teacher=False)
    nothing = Terms(embedding=0, token=0, mask=0, focal=0, dice=0)
    with pytest.raises(ConfigError, match=r"phases\.0\.terms: no term teaches masks"):
        dataclasses.replace(SETTINGS, phases=(Phase(terms=nothing),)).require_something_to_learn(
            has_teacher=True
        )


def test_rates_rise_and_end_at_the_final_one() -> None:
    phase = Phase(1000, rate=1e-3, final_rate=1e-4)
    rates = [phase.rate_at(step) for step in range(1001)]
    assert rates[0] < rates[100] < max(rates) <= 1e-3
    assert rates[1000] == pytest.approx(1e-4)
