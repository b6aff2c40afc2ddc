"""An exported W8A8 image encoder against float32 and against NNCF's INT8, on one runtime.

    python benchmarks/deployed_encoder.py --work-dir work_dirs/deployed [--model vit_b]

Random weights, one picture of noise. Each model is made once and kept in the work directory (NNCF
takes minutes), and measured in a process of its own: seconds in turns, so that a busy machine slows
all alike, and the peak of the resident memory of a process that loads the files and encodes a
picture. NNCF quantizes the same float32 encoder: model type transformer, mixed preset, `--subset`
pictures.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FLOAT, OURS, NNCF = "float32", "W8A8", "NNCF INT8"
FILES = {FLOAT: "float", OURS: "w8a8", NNCF: "nncf"}


def random_sam(name: str):  # type: ignore[no-untyped-def]
    """A SAM with random weights, positions included."""
    import torch

    from ptq4sam.sam.registry import build_sam

    torch.manual_seed(0)
    sam = build_sam(name)
    for path, parameter in sam.image_encoder.named_parameters():
        if "pos" in path:
            torch.nn.init.normal_(parameter, std=0.1)
    return sam


def picture(side: int):  # type: ignore[no-untyped-def]
    """Normalised noise [1, 3, side, side]."""
    import torch

    return torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(1))


def make(arguments: argparse.Namespace) -> None:
    """Write the files that are not there yet."""
    import torch

    from ptq4sam.deploy.onnx.encoder import encoder_graph
    from ptq4sam.deploy.openvino import write_openvino
    from ptq4sam.model.calibration import observing_activations
    from ptq4sam.model.insertion import insert_quantizers
    from ptq4sam.model.layers import observe_weights, put_weights_on_grid
    from ptq4sam.quantization.scheme import Scheme

    folder: Path = arguments.work_dir
    folder.mkdir(parents=True, exist_ok=True)
    sam = random_sam(arguments.model)

    def write(encoder: torch.nn.Module, name: str) -> None:
        for signed, path in ((False, folder / f"{name}.onnx"), (True, folder / "signed.onnx")):
            encoder_graph(encoder, signed).write(path, {})
        quantized = encoder is not sam.image_encoder
        write_openvino(folder / "signed.onnx", folder / f"{name}.xml", quantized=quantized)
        (folder / "signed.onnx").unlink()

    if not (folder / "float.xml").exists():
        write(sam.image_encoder, "float")
    if not (folder / "w8a8.xml").exists():
        # The time does not depend on the ranges: those of one picture, found at once, will do.
        scheme = Scheme.from_yaml(arguments.scheme).with_overrides(
            "a_qconfig.observer=MinMaxObserver", "w_qconfig.observer=MinMaxObserver"
        )
        quantized = insert_quantizers(sam, scheme)
        encoder = quantized.image_encoder
        with torch.inference_mode():
            with observing_activations(encoder):
                encoder(picture(sam.image_size))
            observe_weights(encoder)
        put_weights_on_grid(encoder)
        write(encoder, "w8a8")
    if not arguments.without_nncf and not (folder / "nncf.xml").exists():
        _make_nncf(folder, picture(sam.image_size).numpy(), arguments.subset)


def _make_nncf(folder: Path, image, subset: int) -> None:  # type: ignore[no-untyped-def]
    import nncf
    import openvino

    model = openvino.Core().read_model(folder / "float.xml")
    data = nncf.Dataset([image] * subset, lambda item: {"image": item})
    quantized = nncf.quantize(
        model,
        data,
        model_type=nncf.ModelType.TRANSFORMER,
        preset=nncf.QuantizationPreset.MIXED,
        subset_size=subset,
    )
    openvino.save_model(quantized, folder / "nncf.xml", compress_to_fp16=False)


def seconds(arguments: argparse.Namespace, runtime: str, precision: str) -> dict[str, float]:
    """Median seconds of each encoder, in turns, after one that does not count."""
    from ptq4sam.deploy.runtimes import open_session
    from ptq4sam.sam.registry import VARIANTS

    suffix = "onnx" if runtime == "onnxruntime" else "xml"
    paths = {kind: arguments.work_dir / f"{name}.{suffix}" for kind, name in FILES.items()}
    sessions = {
        kind: open_session(runtime, path, ["embedding"], precision)
        for kind, path in paths.items()
        if path.exists()
    }
    inputs = {"image": picture(VARIANTS[arguments.model].image_size).numpy()}
    times: dict[str, list[float]] = {kind: [] for kind in sessions}
    for turn in range(arguments.rounds + 1):
        for kind, session in sessions.items():
            started = time.perf_counter()
            session.run(inputs)
            if turn:
                times[kind].append(time.perf_counter() - started)
    return {kind: statistics.median(measured) for kind, measured in times.items()}


def peak_mib(arguments: argparse.Namespace) -> float:
    """Peak of this process's memory after loading one encoder and encoding a picture, in MiB."""
    if arguments.measure == "torch":
        import torch

        sam = random_sam(arguments.model)
        with torch.inference_mode():
            sam.image_encoder(picture(sam.image_size))
    else:
        _encode_without_torch(Path(arguments.measure), arguments.precision)
    # Linux gives kilobytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def _encode_without_torch(path: Path, precision: str) -> None:
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

    settings = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
    compiled = openvino.Core().compile_model(path, "CPU", settings)
    shape = list(compiled.inputs[0].shape)
    compiled({"image": np.random.default_rng(0).normal(size=shape).astype(np.float32)})


def peak_apart(arguments: argparse.Namespace, what: str, precision: str = "f32") -> float:
    """`peak_mib` in a process of its own."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    command = [sys.executable, __file__, "--model", arguments.model, "--measure", what]
    command += ["--precision", precision]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": path}, check=True, stdout=subprocess.PIPE
    )
    return float(json.loads(done.stdout))


def file_bytes(path: Path) -> int:
    """Bytes of an exported graph, both of its files in OpenVINO's format."""
    weights = path.with_suffix(".bin")
    more = weights.stat().st_size if path.suffix == ".xml" else 0
    return path.stat().st_size + more


def table(arguments: argparse.Namespace, runtime: str, precision: str) -> list[str]:
    """Rows of one runtime: seconds, bytes and memory, and their ratios."""
    suffix = "onnx" if runtime == "onnxruntime" else "xml"
    measured = seconds(arguments, runtime, precision)
    torch_peak = peak_apart(arguments, "torch")
    lines = [
        f"{runtime}, {precision} for what is not integer; float32 in PyTorch: {torch_peak:.0f} MiB",
        "",
        "| encoder | seconds | float32 / it | MB | of float32 | peak MiB | of PyTorch |",
        "|---|---|---|---|---|---|---|",
    ]
    sizes = {kind: file_bytes(arguments.work_dir / f"{FILES[kind]}.{suffix}") for kind in measured}
    for kind, median in measured.items():
        path = arguments.work_dir / f"{FILES[kind]}.{suffix}"
        peak = peak_apart(arguments, str(path), precision)
        cells = [
            kind,
            f"{median:.2f}",
            f"{measured[FLOAT] / median:.2f}",
            f"{sizes[kind] / 1e6:.1f}",
            f"{sizes[kind] / sizes[FLOAT]:.1%}",
            f"{peak:.0f}",
            f"{peak / torch_peak:.0%}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    if NNCF in measured:
        lines += [
            "",
            f"{OURS} against {NNCF}: {measured[NNCF] / measured[OURS]:.2f} times as fast.",
        ]
    return [*lines, ""]


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit_b")
    parser.add_argument("--work-dir", type=Path, default=ROOT / "work_dirs" / "deployed")
    parser.add_argument("--scheme", type=Path, default=ROOT / "exp" / "w8a8.yaml")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--subset", type=int, default=4, help="pictures that NNCF calibrates on")
    parser.add_argument("--without-nncf", action="store_true")
    parser.add_argument(
        "--runtimes", nargs="+", default=["openvino:f32", "openvino:bf16", "onnxruntime:f32"]
    )
    parser.add_argument("--only-make", action="store_true", help="write the files and stop")
    parser.add_argument("--measure", help="print the peak memory of this file, or of torch")
    parser.add_argument("--precision", default="f32")
    arguments = parser.parse_args()
    if arguments.measure:
        sys.stdout.write(json.dumps(peak_mib(arguments)))
        return
    make(arguments)
    if arguments.only_make:
        return
    sys.stdout.write(f"{arguments.model} image encoder, medians of {arguments.rounds}\n\n")
    for name in arguments.runtimes:
        runtime, _, precision = name.partition(":")
        sys.stdout.write("\n".join(table(arguments, runtime, precision or "f32")) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
