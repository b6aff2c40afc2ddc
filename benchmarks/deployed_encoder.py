"""An exported W8A8 image encoder against float32 and against NNCF's INT8, on one runtime.

    python benchmarks/deployed_encoder.py --work-dir work_dirs/deployed [--model vit_b]

Random weights, one picture of noise. Each model is made once, in a process of its own, and kept in
the work directory (NNCF takes minutes); so is what was measured of it, so that a run that was
interrupted goes on with the rest: delete the directory to begin anew. Seconds are measured in
turns, so that a busy machine slows all alike; memory is the peak of the resident memory of a
process that loads one file and encodes one picture. NNCF quantizes the same float32 encoder: model
type transformer, mixed preset, `--subset` pictures. Where other jobs cannot be stopped, `--clock
cpu` with OMP_NUM_THREADS=1 measures processor time of one thread instead of the time on the clock.
ONEDNN_MAX_CPU_ISA=AVX2 makes OpenVINO multiply as on a processor that has nothing newer, where the
W8A8 encoder is exact with float32 products alone; add `--runtimes openvino` then, for it has no
bfloat16 either.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FLOAT, OURS, FAST, NNCF = "float32", "W8A8", "W8A8, fast", "NNCF INT8"
FLOAT_PRODUCTS = "W8A8, float32 products"
"""The file of W8A8, opened as on a processor whose int8 products saturate."""
FILES = {FLOAT: "float", OURS: "w8a8", FLOAT_PRODUCTS: "w8a8", FAST: "w8a8-fast", NNCF: "nncf"}
PRODUCTS = {OURS: "int8", FLOAT_PRODUCTS: "float32"}
TORCH = "torch"
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
MEASURED = "measured.json"
"""What was measured, in the work directory."""


def random_sam(name: str) -> Any:
    """A SAM with random weights, positions included."""
    import torch

    from ptq4sam.families import build_sam

    torch.manual_seed(0)
    sam = build_sam(name)
    for path, parameter in sam.image_encoder.named_parameters():
        if "pos" in path:
            torch.nn.init.normal_(parameter, std=0.1)
    return sam


def picture(side: int) -> Any:
    """Normalised noise [1, 3, side, side]."""
    import torch

    return torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(1))


def make_float(arguments: argparse.Namespace, folder: Path) -> None:
    """The float encoder as .onnx, .xml and .bin."""
    _write(random_sam(arguments.model), folder, FILES[FLOAT], quantized=False)


def make_ours(arguments: argparse.Namespace, folder: Path) -> None:
    """Our W8A8 encoder as .onnx, .xml and .bin."""
    _write(quantized_sam(arguments), folder, FILES[OURS], quantized=True)


def make_fast(arguments: argparse.Namespace, folder: Path) -> None:
    """The fast form of it, which OpenVINO alone has."""
    _write(quantized_sam(arguments), folder, FILES[FAST], quantized=True, fast=True)


def quantized_sam(arguments: argparse.Namespace) -> Any:
    """A SAM with random weights and a W8A8 encoder."""
    import torch

    from ptq4sam.model.calibration import observing_activations
    from ptq4sam.model.insertion import insert_quantizers
    from ptq4sam.operators.base import observe_weights, put_weights_on_grid
    from ptq4sam.quantization.scheme import Scheme

    # The time does not depend on the ranges: those of one picture, found at once, will do.
    scheme = Scheme.from_yaml(arguments.scheme).with_overrides(
        "a_qconfig.observer=MinMaxObserver", "w_qconfig.observer=MinMaxObserver"
    )
    sam = random_sam(arguments.model)
    quantized = insert_quantizers(sam, scheme)
    encoder = quantized.image_encoder
    with torch.inference_mode():
        with observing_activations(encoder):
            encoder(picture(sam.image_size))
        observe_weights(encoder)
    put_weights_on_grid(encoder)
    return quantized


def _write(sam: Any, folder: Path, name: str, quantized: bool, fast: bool = False) -> None:
    from ptq4sam.deploy.onnx.encoder import encoder_graph
    from ptq4sam.deploy.targets import onnxruntime, openvino

    dialect = openvino.FAST if fast else openvino.DIALECT
    encoder_graph(sam, dialect).write(folder / f"{name}.onnx", {})
    openvino.write_openvino(folder / f"{name}.onnx", quantized)
    (folder / f"{name}.onnx").unlink()
    if not fast:
        encoder_graph(sam, onnxruntime.DIALECT).write(folder / f"{name}.onnx", {})


def make_nncf(arguments: argparse.Namespace, folder: Path) -> None:
    """NNCF's INT8 encoder, of the float one in the work directory, as .xml and .bin."""
    import nncf
    import openvino

    model = openvino.Core().read_model(arguments.work_dir / f"{FILES[FLOAT]}.xml")
    image = picture(_image_size(arguments.model)).numpy()
    quantized = nncf.quantize(
        model,
        nncf.Dataset([image] * arguments.subset, lambda item: {"image": item}),
        model_type=nncf.ModelType.TRANSFORMER,
        preset=nncf.QuantizationPreset.MIXED,
        subset_size=arguments.subset,
    )
    openvino.save_model(quantized, folder / f"{FILES[NNCF]}.xml", compress_to_fp16=False)


MAKERS: dict[str, Callable[[argparse.Namespace, Path], None]] = {
    FLOAT: make_float,
    OURS: make_ours,
    FLOAT_PRODUCTS: make_ours,
    FAST: make_fast,
    NNCF: make_nncf,
}


def make(arguments: argparse.Namespace, kind: str) -> None:
    """Write a model's files; they appear in the work directory when all are whole."""
    with tempfile.TemporaryDirectory(prefix=".making.", dir=arguments.work_dir) as temporary:
        MAKERS[kind](arguments, Path(temporary))
        # The .xml says that a model is there: last.
        for path in sorted(Path(temporary).iterdir()):
            os.replace(path, arguments.work_dir / path.name)


def seconds(arguments: argparse.Namespace, runtime: str, precision: str) -> dict[str, float]:
    """Median seconds of each encoder, in turns, after one that does not count."""
    from ptq4sam.deploy.targets import TARGETS

    sessions = {
        kind: TARGETS[runtime].open(path, ["embedding"], precision, PRODUCTS.get(kind))
        for kind, path in files_of(arguments, runtime, precision).items()
    }
    inputs = {"image": picture(_image_size(arguments.model)).numpy()}
    clock = CLOCKS[arguments.clock]
    times: dict[str, list[float]] = {kind: [] for kind in sessions}
    for turn in range(arguments.rounds + 1):
        for kind, session in sessions.items():
            started = clock()
            session.run(inputs)
            if turn:
                times[kind].append(clock() - started)
    return {kind: statistics.median(measured) for kind, measured in times.items()}


def files_of(arguments: argparse.Namespace, runtime: str, precision: str) -> dict[str, Path]:
    """The files that a runtime can open, by model.

    NNCF and the fast form have none for ONNX Runtime, the exact one is so in float32 alone.
    """
    suffix = "onnx" if runtime == "onnxruntime" else "xml"
    paths = {kind: arguments.work_dir / f"{name}.{suffix}" for kind, name in FILES.items()}
    return {
        kind: path
        for kind, path in paths.items()
        if path.exists()
        and (kind not in PRODUCTS or precision == "f32")
        and (kind != FLOAT_PRODUCTS or runtime == "openvino")
    }


def peak_mib(arguments: argparse.Namespace, what: str, precision: str) -> float:
    """Peak of this process's memory after loading one encoder and encoding a picture, in MiB.

    `what` is a file, with "#float32" behind it for float32 products, or TORCH.
    """
    if what == TORCH:
        import torch

        sam = random_sam(arguments.model)
        with torch.inference_mode():
            sam.image_encoder(picture(sam.image_size))
    else:
        path, _, products = what.partition("#")
        _encode_without_torch(Path(path), precision, products)
    # Linux gives kilobytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def _encode_without_torch(path: Path, precision: str, products: str) -> None:
    """Encode noise with nothing but the runtime, as a program that only runs the file would."""
    import numpy as np

    if path.suffix == ".onnx":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.enable_cpu_mem_arena = False
        session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
        shape = session.get_inputs()[0].shape
        session.run(None, {"image": np.random.default_rng(0).normal(size=shape).astype(np.float32)})
        return
    import openvino

    from ptq4sam.deploy.targets.openvino import compile_for_cpu, with_float_products

    settings: dict[str, object] = {
        "INFERENCE_PRECISION_HINT": precision,
        "PERFORMANCE_HINT": "LATENCY",
    }
    if path.stem == FILES[OURS]:
        # As the session does that is timed: not every processor has kernels for such products.
        settings["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = 0
    core = openvino.Core()
    model = core.read_model(path)
    if products == "float32":
        model = with_float_products(model)
    compiled = compile_for_cpu(core, model, settings)
    shape = list(compiled.inputs[0].shape)
    compiled({"image": np.random.default_rng(0).normal(size=shape).astype(np.float32)})


def file_bytes(path: Path) -> int:
    """Bytes of an exported graph, both of its files in OpenVINO's format."""
    weights = path.with_suffix(".bin")
    more = weights.stat().st_size if path.suffix == ".xml" else 0
    return path.stat().st_size + more


class Measurements:
    """What was measured so far, kept in a file; what is missing is measured in a process."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._arguments = arguments
        self._path: Path = arguments.work_dir / MEASURED
        self._known: dict[str, Any] = (
            json.loads(self._path.read_text()) if self._path.exists() else {}
        )

    def seconds(self, runtime: str, precision: str) -> dict[str, float]:
        """`seconds` of a process of its own."""
        there = "+".join(files_of(self._arguments, runtime, precision))
        there += os.environ.get("ONEDNN_MAX_CPU_ISA", "")
        found: dict[str, float] = self._get(
            f"{self._arguments.clock} seconds {runtime} {precision} {there}",
            "seconds",
            f"{runtime}:{precision}",
        )
        return found

    def peak(self, what: str, precision: str = "f32") -> float:
        """`peak_mib` of a process of its own."""
        return float(
            self._get(f"peak {Path(what).name} {precision}", "peak", f"{what}:{precision}")
        )

    def _get(self, key: str, step: str, of: str) -> Any:
        if key not in self._known:
            self._known[key] = json.loads(in_process(self._arguments, step, of))
            partial = self._path.with_suffix(".partial")
            partial.write_text(json.dumps(self._known, indent=1))
            os.replace(partial, self._path)
        return self._known[key]


def in_process(arguments: argparse.Namespace, step: str, of: str) -> str:
    """What a step prints, done by this script in a process whose memory is its own."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    command = [sys.executable, __file__, "--model", arguments.model, "--step", step, of]
    command += ["--work-dir", str(arguments.work_dir), "--scheme", str(arguments.scheme)]
    command += ["--rounds", str(arguments.rounds), "--subset", str(arguments.subset)]
    command += ["--clock", arguments.clock]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": path}, check=True, stdout=subprocess.PIPE
    )
    # Packages may have told something before.
    lines = done.stdout.decode().splitlines()
    return lines[-1] if lines else ""


def table(arguments: argparse.Namespace, runtime: str, precision: str) -> list[str]:
    """Rows of one runtime: seconds, bytes and memory, and their ratios."""
    known, paths = Measurements(arguments), files_of(arguments, runtime, precision)
    measured, torch_peak = known.seconds(runtime, precision), known.peak(TORCH)
    sizes = {kind: file_bytes(path) for kind, path in paths.items()}
    lines = [
        f"{runtime}, {precision} for what is not integer; float32 in PyTorch: {torch_peak:.0f} MiB",
        "",
        "| encoder | seconds | float32 / it | MB | of float32 | peak MiB | of PyTorch |",
        "|---|---|---|---|---|---|---|",
    ]
    for kind, path in paths.items():
        what = f"{path}#float32" if kind == FLOAT_PRODUCTS else str(path)
        peak = known.peak(what, precision)
        cells = [
            kind,
            f"{measured[kind]:.2f}",
            f"{measured[FLOAT] / measured[kind]:.2f}",
            f"{sizes[kind] / 1e6:.1f}",
            f"{sizes[kind] / sizes[FLOAT]:.1%}",
            f"{peak:.0f}",
            f"{peak / torch_peak:.0%}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    if NNCF in measured:
        ratio = measured[NNCF] / measured[FAST]
        lines += ["", f"{FAST} against {NNCF}: {ratio:.2f} times as fast."]
    return [*lines, ""]


def _image_size(model: str) -> int:
    from ptq4sam.families import VARIANTS

    return VARIANTS[model].geometry.encoder_side


def _do_step(arguments: argparse.Namespace) -> None:
    """One step in this process; its outcome is the last line that is printed."""
    step, of = arguments.step
    if step == "make":
        make(arguments, of)
        return
    what, _, precision = of.rpartition(":")
    found = (
        seconds(arguments, what, precision)
        if step == "seconds"
        else peak_mib(arguments, what, precision)
    )
    sys.stdout.write("\n" + json.dumps(found) + "\n")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit_b")
    parser.add_argument("--work-dir", type=Path, default=ROOT / "work_dirs" / "deployed")
    parser.add_argument("--scheme", type=Path, default=ROOT / "exp" / "w8a8.yaml")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--subset", type=int, default=4, help="pictures that NNCF calibrates on")
    parser.add_argument("--without-nncf", action="store_true")
    parser.add_argument(
        "--runtimes", nargs="+", default=["openvino:f32", "openvino:bf16", "onnxruntime:f32"]
    )
    parser.add_argument("--only-make", action="store_true", help="write the files and stop")
    parser.add_argument("--step", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.work_dir.mkdir(parents=True, exist_ok=True)
    if arguments.step:
        _do_step(arguments)
        return
    for kind in FILES:
        wanted = kind != NNCF or not arguments.without_nncf
        if wanted and not (arguments.work_dir / f"{FILES[kind]}.xml").exists():
            in_process(arguments, "make", kind)
    if arguments.only_make:
        return
    sys.stdout.write(f"{arguments.model} image encoder, medians of {arguments.rounds}, ")
    sys.stdout.write(f"{arguments.clock} time\n\n")
    for name in arguments.runtimes:
        runtime, _, precision = name.partition(":")
        sys.stdout.write("\n".join(table(arguments, runtime, precision or "f32")) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
