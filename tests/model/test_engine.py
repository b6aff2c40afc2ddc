"""The engine: linear in depth, the same bits wherever activations live and however often killed."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ptq4sam.errors import CalibrationError, ConfigError, ResourceError
from ptq4sam.extensions import EXTENSIONS
from ptq4sam.methods import reconstruction
from ptq4sam.model import journal as journal_module
from ptq4sam.model.cache import ActivationCache
from ptq4sam.model.calibration import CalibrationItem
from ptq4sam.model.insertion import QuantizedSam, insert_quantizers, model_units
from ptq4sam.model.journal import Journal, run_fingerprint
from ptq4sam.model.plan import make_plan
from ptq4sam.model.quantize import calibrate, quantize_sam, reconstruct
from ptq4sam.numerics import products_of
from ptq4sam.quantization import fused
from ptq4sam.quantization.scheme import Scheme
from ptq4sam.sam.model import Sam
from tests.model import killed_run

MakeScheme = Callable[..., Scheme]
Items = list[CalibrationItem]

RECON = {"rounding_lr": 0.05}


def same(first: Sam, second: Sam) -> bool:
    ours, theirs = first.state_dict(), second.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


def test_every_unit_sees_every_picture_a_fixed_number_of_times(
    sam: Sam, items: Items, make_scheme: MakeScheme
) -> None:
    steps = 3
    scheme = make_scheme(4, steps=steps)
    quantized = insert_quantizers(sam, scheme)
    calibrate(quantized, items)
    calls: Counter[str] = Counter()
    for name, unit in model_units(quantized):
        unit.register_forward_pre_hook(lambda *_args, name=name: calls.update([name]))
    patch_calls: Counter[str] = Counter()
    quantized.image_encoder.patch_embed.register_forward_pre_hook(
        lambda *_args: patch_calls.update(["images"])
    )
    assert scheme.recon is not None
    reconstruct(quantized, items, scheme.recon)
    # Float target, error before and after, running on; and the steps, each on one picture.
    assert set(calls.values()) == {4 * len(items) + steps}
    assert patch_calls["images"] == len(items)


def test_activations_on_disk_give_the_same_bits(
    sam: Sam, items: Items, make_scheme: MakeScheme, tmp_path: Path
) -> None:
    scheme = make_scheme(4, steps=4, recon=RECON)
    in_memory = quantize_sam(sam, items, scheme)
    cache = ActivationCache(sam.device, budget=20_000, folder=tmp_path)
    assert same(in_memory, quantize_sam(sam, items, scheme, cache=cache))


def test_a_decoder_alone_starts_from_exact_embeddings(
    sam: Sam, items: Items, make_scheme: MakeScheme
) -> None:
    quantized = quantize_sam(sam, items, make_scheme(4, steps=3), quantize_encoder=False)
    before, after = sam.image_encoder.state_dict(), quantized.image_encoder.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("spoiled", ["", "blocks.0.attn"])
def test_a_unit_that_became_worse_falls_back(
    spoiled: str,
    sam: Sam,
    items: Items,
    make_scheme: MakeScheme,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    nearest = quantize_sam(sam, items, make_scheme(4))

    def spoil(
        name: str, _unit: nn.Module, rounding: list[nn.Module], *_rest: object, **_more: object
    ) -> list[float]:
        for quantizer in rounding:
            if spoiled in name:
                quantizer.alpha.data.neg_()  # type: ignore[union-attr,operator]
        return []

    monkeypatch.setattr(reconstruction, "_optimize", spoil)
    with caplog.at_level("INFO", logger="ptq4sam"):
        found = quantize_sam(sam, items, make_scheme(4, steps=3))
    assert same(nearest, found)
    units = len(model_units(found))
    worse = [record.message for record in caplog.records if "became worse" in record.message]
    assert len(worse) == (1 if spoiled else units)
    assert worse[0].startswith("image_encoder.blocks.0.attn ")
    # A single unit is no reason to worry whoever runs it.
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == (0 if spoiled else 1)
    assert spoiled or f"made {units} of {units} units worse" in warnings[0]


def test_a_diverging_unit_is_named(
    sam: Sam, items: Items, make_scheme: MakeScheme, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = reconstruction._step_error

    def spoil(*arguments: Any) -> torch.Tensor:
        return original(*arguments) * torch.nan

    monkeypatch.setattr(reconstruction, "_step_error", spoil)
    with pytest.raises(
        CalibrationError, match=r"image_encoder\.blocks\.0\.attn diverged at step 0"
    ):
        quantize_sam(sam, items, make_scheme(4, steps=10))


def test_a_picture_that_is_not_finite_is_named(
    sam: Sam, items: Items, make_scheme: MakeScheme
) -> None:
    scheme = make_scheme(4, steps=2)
    quantized = insert_quantizers(sam, scheme)
    calibrate(quantized, items)
    bad = dataclasses.replace(items[2], pixels=torch.full_like(items[2].pixels, torch.inf))
    assert scheme.recon is not None
    with pytest.raises(CalibrationError, match="picture 2 has pixels that are not finite"):
        reconstruct(quantized, [*items[:2], bad], scheme.recon)


def test_the_plan_counts_units_and_bytes(sam: Sam, items: Items, make_scheme: MakeScheme) -> None:
    scheme = make_scheme(4, steps=7)
    plan = make_plan(sam, items, scheme, quantize_encoder=True, budget=10)
    quantized = insert_quantizers(sam, scheme)
    assert [unit.name for unit in plan.units] == [name for name, _ in model_units(quantized)]
    # State and normalised input of both models, answer: 64 tokens of 32 floats each.
    assert plan.units[1].cached_bytes == 5 * 64 * 32 * 4 * len(items)
    assert plan.share(0) == 0
    assert plan.share(len(plan.units)) == 1
    assert "7 steps" in plan.lines()[0]
    assert "elsewhere" in plan.lines()[1]
    decoder = make_plan(sam, items, scheme, quantize_encoder=False, budget=10)
    assert all(unit.name.startswith("mask_decoder") for unit in decoder.units)


def fingerprint(sam: Sam, items: Items, scheme: Scheme, seed: int = 0) -> dict[str, str]:
    return run_fingerprint(sam, items, scheme, quantize_encoder=True, seed=seed)


def test_a_fingerprint_says_how_numbers_are_computed(
    sam: Sam, items: Items, make_scheme: MakeScheme, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheme = make_scheme(4)
    monkeypatch.setattr(fused._compiler, "_usable", {"cpu": False})
    found = fingerprint(sam, items, scheme)
    assert (found["device"], found["kernels"]) == ("cpu", "one by one")
    assert found["float32 products"] == "ieee"
    monkeypatch.setattr(fused._compiler, "_usable", {"cpu": True})
    with products_of("high"):
        other = fingerprint(sam, items, scheme)
    assert other["kernels"] == "compiled"
    different = {name for name in found if found[name] != other[name]}
    assert different == {"kernels", "float32 products"}


def test_another_run_is_not_resumed(
    sam: Sam, items: Items, make_scheme: MakeScheme, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheme = make_scheme(4, steps=2)
    Journal(tmp_path / "j", fingerprint(sam, items, scheme), resume=False)
    changes = {
        "seed": fingerprint(sam, items, scheme, seed=1),
        "scheme": fingerprint(sam, items, make_scheme(5, steps=2)),
        "calibration data": fingerprint(sam, items[:3], scheme),
    }
    with monkeypatch.context() as environment:
        (tmp_path / "mine.py").touch()
        environment.setenv(EXTENSIONS, str(tmp_path / "mine.py"))
        changes["extensions"] = fingerprint(sam, items, scheme)
    for what, other in changes.items():
        with pytest.raises(ConfigError, match=f"{what} differ"):
            Journal(tmp_path / "j", other, resume=True)
    Journal(tmp_path / "j", fingerprint(sam, items, scheme), resume=True)


def test_another_order_of_methods_is_another_run(
    sam: Sam, items: Items, make_scheme: MakeScheme, tmp_path: Path
) -> None:
    """Each method works on what those before it left."""
    one, other = (
        fingerprint(sam, items, make_scheme(4, methods=names))
        for names in (["key-centring", "aqer", "mac"], ["mac", "aqer", "key-centring"])
    )
    Journal(tmp_path / "j", one, resume=False)
    told = r"scheme there: methods.key-centring, .*, asked now: methods.mac"
    with pytest.raises(ConfigError, match=told):
        Journal(tmp_path / "j", other, resume=True)
    without = fingerprint(sam, items, make_scheme(4, methods=["aqer", "mac"]))
    with pytest.raises(ConfigError, match=r"there: methods.key-centring: {}, asked now: .*None"):
        Journal(tmp_path / "j", without, resume=True)


def test_a_forgotten_resume_loses_nothing(
    sam: Sam, items: Items, make_scheme: MakeScheme, tmp_path: Path
) -> None:
    scheme = make_scheme(4, steps=2)
    identity = fingerprint(sam, items, scheme)
    first = Journal(tmp_path / "j", identity, resume=False)
    whole = quantize_sam(sam, items, scheme, journal=first)
    finished = sorted(path.name for path in (tmp_path / "j").iterdir())
    for _ in range(2):
        Journal(tmp_path / "j", identity, resume=False)
        assert [path.name for path in (tmp_path / "j").iterdir()] == ["journal.json"]
    before = tmp_path / "j.before1"
    assert sorted(path.name for path in before.iterdir()) == finished
    again = Journal(before, identity, resume=True)
    assert same(whole, quantize_sam(sam, items, scheme, journal=again))


def test_a_full_disk_keeps_what_was_finished(
    sam: Sam, items: Items, make_scheme: MakeScheme, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheme = make_scheme(4, steps=2, recon=RECON)
    identity = fingerprint(sam, items, scheme)
    whole = quantize_sam(sam, items, scheme)
    save_file, calls = journal_module.save_file, []

    def fills(state: dict[str, torch.Tensor], path: Path) -> None:
        calls.append(path)
        if len(calls) > 4:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save_file(state, path)

    monkeypatch.setattr(journal_module, "save_file", fills)
    journal = Journal(tmp_path / "j", identity, resume=False)
    with pytest.raises(ResourceError, match="then resume"):
        quantize_sam(sam, items, scheme, journal=journal)
    monkeypatch.setattr(journal_module, "save_file", save_file)
    journal = Journal(tmp_path / "j", identity, resume=True)
    assert same(whole, quantize_sam(sam, items, scheme, journal=journal))


@pytest.fixture(scope="module")
def not_killed() -> QuantizedSam:
    return killed_run.quantized(None)


@pytest.mark.parametrize("seed", range(5))
def test_a_killed_run_ends_in_the_same_bits(
    tmp_path: Path, seed: int, not_killed: QuantizedSam
) -> None:
    """SIGKILL at a random place of a run in a process of its own, then resume it here."""
    place = int(
        torch.randint(1, killed_run.EVENTS, (), generator=torch.Generator().manual_seed(seed))
    )
    command = [sys.executable, "-m", "tests.model.killed_run", str(tmp_path / "j"), str(place)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert same(not_killed, killed_run.quantized(tmp_path / "j"))
