"""A distillation from end to end: killed and resumed it ends alike; a full disk costs nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ptq4sam.distillation.training import CURVES, STATE
from ptq4sam.errors import ConfigError, ResourceError
from ptq4sam.threads import computing_with
from tests.distillation.conftest import SETTINGS, one_thread
from tests.distillation.killed_training import tiny_training
from tests.full_disks import no_bytes

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Folder and weights of a training that nothing stopped."""
    from ptq4sam.families import VARIANTS
    from ptq4sam.families.family import Weights
    from ptq4sam.families.tiny_vit.variants import variant
    from tests.distillation.conftest import TINY_TINY_VIT

    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch, one_thread():
        own = variant("tiny_tiny_vit", Weights("none"), TINY_TINY_VIT)
        patch.setitem(VARIANTS, "tiny_tiny_vit", own)
        yield folder, tiny_training(folder).run(workers=0)


def test_a_killed_training_ends_in_the_same_bits(
    whole: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    # The second phase begins behind step 3.
    command = [sys.executable, "-m", "tests.distillation.killed_training", str(tmp_path), "4"]
    killed = subprocess.run(command, cwd=ROOT, check=False)
    assert killed.returncode == -9
    require_same_end(whole, tmp_path, resumed_at=4)


def require_same_end(whole: tuple[Path, dict[str, Any]], folder: Path, resumed_at: int) -> None:
    """What a stopped training left ends as one that nothing stopped."""
    resumed = tiny_training(folder)
    assert resumed.resume()
    assert resumed.done == resumed_at
    found = resumed.run(workers=0)
    straight, expected = whole
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    assert (folder / CURVES).read_text() == (straight / CURVES).read_text()


def test_a_resumed_training_computes_with_the_threads_of_the_one_before(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    with computing_with(2):
        tiny_training(tmp_path).save()
    seen = []

    def progress(plan: Sequence[Any], _description: str) -> Iterator[Any]:
        for step in plan:
            seen.append(torch.get_num_threads())
            yield step

    with computing_with(1):
        resumed = tiny_training(tmp_path)
        assert resumed.resume()
        resumed.run(workers=0, progress=progress)
    assert set(seen) == {2}
    assert torch.get_num_threads() == before


def test_batches_do_not_depend_on_who_makes_them(
    whole: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    found = tiny_training(tmp_path).run(workers=1)
    assert all(torch.equal(found[name], value) for name, value in whole[1].items())


def test_two_processes_end_alike_and_the_first_one_writes(
    whole: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    script = str(ROOT / "tests/distillation/shared_training.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *launch, script, str(tmp_path)],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one, other = (load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1))
    assert all(torch.equal(one[name], other[name]) for name in one)
    # What normalisations have seen is of all views: about the same as in one process.
    name = "image_encoder.patch_embed.seq.0.bn.running_mean"
    torch.testing.assert_close(one[name], whole[1][name], rtol=0.2, atol=0.05)
    assert (tmp_path / "0" / STATE).exists()
    assert not (tmp_path / "1").exists()


def test_curves_have_a_value_for_each_term_and_step(whole: tuple[Path, dict[str, Any]]) -> None:
    content = json.loads((whole[0] / CURVES).read_text())
    assert (content["done"], content["steps"]) == (5, 5)
    assert {"loss", "embedding", "token", "mask", "truth", "iou"} <= content["curves"].keys()
    for points in content["curves"].values():
        assert [step for step, _ in points] == [1, 2, 3, 4, 5]


def test_a_phase_starts_from_the_average_of_the_one_before(tmp_path: Path) -> None:
    still = SETTINGS.with_overrides("phases.0.rate=0.01", "phases.1.final_rate=0")
    still = still.with_overrides("phases.1.rate=1e-12", "phases.1.steps=1")
    training = tiny_training(tmp_path, settings=still)
    seen = {}

    def progress(plan: Sequence[Any], _description: str) -> Iterator[Any]:
        for number, step in plan:
            if number == 1:
                student, average = training._student, training._trainer.average
                seen["last"] = {k: v.clone() for k, v in student.named_parameters()}
                seen["average"] = {k: v.clone() for k, v in average.items()}
            yield number, step

    found = training.run(workers=0, progress=progress)
    for name, last in seen["last"].items():
        before = seen["average"][name]
        torch.testing.assert_close(found[name], before, rtol=0, atol=1e-6)
        if name.endswith("proj.weight"):
            assert (last - before).abs().max() > 1e-4


def test_a_full_disk_leaves_the_last_complete_state(
    whole: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    training = tiny_training(tmp_path, save_every=0.0)

    def progress(plan: Sequence[Any], _description: str) -> Iterator[Any]:
        yield from plan[:2]
        with no_bytes():
            yield from plan[2:]

    with pytest.raises(ResourceError, match="the last complete state is kept"):
        training.run(workers=0, progress=progress)
    require_same_end(whole, tmp_path, resumed_at=2)


def test_a_state_of_another_training_is_refused(tmp_path: Path) -> None:
    training = tiny_training(tmp_path)
    assert not training.resume()
    training.save()
    with pytest.raises(ConfigError, match="numbers differ"):
        tiny_training(tmp_path, numbers="others").resume()
    (tmp_path / STATE).write_bytes(b"no state")
    with pytest.raises(ConfigError, match="cannot be read"):
        tiny_training(tmp_path).resume()
