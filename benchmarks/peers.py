"""The peers of compress.py: each one's own recommended recipe, applied to the trained model or to its FP32 ONNX."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from modelathe.tensors import Arrays
from optimize.graph import graph
from optimize.methods.export.onnx import export
from optimize.source.workload import Workload
from optimize.train.fit import label_loss, tensors

OLIVE = Path(".venv-peers/bin/python")
"""An environment with olive-ai; `make bench-compress` makes it."""
MODELOPT = Path(".venv-modelopt/bin/python")
"""An environment with NVIDIA's ModelOpt; `make bench-tensorrt` makes it."""
SAMPLES = 256


def calibration(workload: Workload) -> Iterator[Arrays]:
    """Yield up to `SAMPLES` calibration samples, one at a time."""
    seen = 0
    for batch in workload.batches("calibration"):
        for row in range(len(next(iter(batch.inputs.values())))):
            if seen == SAMPLES:
                return
            yield {name: array[row : row + 1] for name, array in batch.inputs.items()}
            seen += 1


def onnxruntime_dynamic(fp32: Path, folder: Path) -> Path:
    """onnxruntime.quantization as its documentation says for transformers: pre-process, then dynamic, per channel."""
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared, made = folder / "prepared.onnx", folder / "model.onnx"
    with graph.quiet():
        # The symbolic shape inference fails on what today's exporter writes.
        quant_pre_process(str(fp32), str(prepared), skip_symbolic_shape=True)
        quantize_dynamic(str(prepared), str(made), per_channel=True, weight_type=QuantType.QInt8)
    return made


def onnxruntime_static(fp32: Path, workload: Workload, folder: Path) -> Path:
    """onnxruntime.quantization as its documentation says for convolutional nets: pre-process, then static Q/DQ."""
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    from optimize.methods.quantize import calibrate

    prepared, made = folder / "prepared.onnx", folder / "model.onnx"
    with graph.quiet():
        quant_pre_process(str(fp32), str(prepared), skip_symbolic_shape=True)
        quantize_static(
            str(prepared),
            str(made),
            calibrate.reader(calibration(workload)),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
    return made


def olive_transformer(fp32: Path, folder: Path) -> Path:
    """Olive as its BERT examples say: transformer optimization, then dynamic quantization per channel."""
    passes = {
        "fuse": {"type": "OrtTransformersOptimization", "model_type": "bert"},
        # Behind the fused operators shape inference knows no types; its error message names this option.
        "quantize": {"type": "OnnxDynamicQuantization", "per_channel": True, "extra_options": {"DefaultTensorType": 1}},
    }
    config = {
        "input_model": {"type": "ONNXModel", "model_path": str(fp32)},
        "passes": passes,
        "output_dir": str(folder / "olive"),
        "cache_dir": str(folder / "cache"),
        "log_severity_level": 4,
    }
    written = folder / "olive.json"
    written.write_text(json.dumps(config))
    program = "import sys; from olive.workflows import run; run(sys.argv[1])"
    subprocess.run(
        [OLIVE, "-c", program, written],
        check=True,
        capture_output=True,
        timeout=600,
        env={"OLIVE_DISABLE_TELEMETRY": "1", "HOME": str(folder), "PATH": "/usr/bin:/bin"},
    )
    return folder / "olive" / "model.onnx"


def modelopt(fp32: Path, workload: Workload, folder: Path, mode: str) -> Path:
    """ModelOpt's ONNX quantization as its guide says, with Q/DQ for TensorRT and float16 around them.

    Ranges are the largest values: with its default for INT8, entropy, it fails on a transformer.

    Raises:
        subprocess.CalledProcessError: it failed; what it said is in `stderr`.
    """
    samples = list(calibration(workload))
    data, made = folder / "calibration.npz", folder / f"modelopt-{mode}.onnx"
    np.savez(data, **{name: np.concatenate([sample[name] for sample in samples]) for name in samples[0]})
    program = (
        "import sys; import numpy as np; from modelopt.onnx.quantization import quantize; "
        "source, data, made, mode = sys.argv[1:]; "
        "quantize(source, quantize_mode=mode, calibration_data=dict(np.load(data)), calibration_method='max', "
        "calibration_eps=['cpu'], output_path=made)"
    )
    subprocess.run([MODELOPT, "-c", program, fp32, data, made, mode], check=True, capture_output=True, text=True)
    return made


def nncf_openvino(fp32: Path, workload: Workload, folder: Path, *, transformer: bool) -> Path:
    """NNCF over an OpenVINO model, as OpenVINO's documentation says, saved in OpenVINO's own format."""
    import nncf
    import openvino

    with graph.quiet():
        model = openvino.convert_model(str(fp32))
        made = nncf.quantize(
            model,
            nncf.Dataset(list(calibration(workload))),
            subset_size=SAMPLES,
            model_type=nncf.ModelType.TRANSFORMER if transformer else None,
        )
    openvino.save_model(made, folder / "model.xml")
    return folder / "model.xml"


def torch_pruning(workload: Workload, folder: Path, *, ratio: float, epochs: int, keep: Any = None) -> Path:
    """torch-pruning alone: group norm, the same ratio in every layer, then fine-tuning on the labels.

    Args:
        workload: one with a loss, where `epochs` is not 0.
        folder: takes the ONNX file.
        ratio: share of the channels that goes.
        epochs: of fine-tuning, AdamW at 2e-3 falling along a cosine.
        keep: `keep(model)` returns further options of its pruner: layers to leave, heads.
    """
    import torch_pruning as tp

    model = workload.build()
    example = {name: torch.from_numpy(array[:2]) for name, array in workload.first().items()}
    pruner = tp.pruner.BasePruner(
        model,
        example,
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=ratio,
        **(keep(model) if keep else {}),
    )
    pruner.step()
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(epochs, 1))
    model.train()
    for _ in range(epochs):
        for inputs, targets in tensors(workload):
            value = label_loss(workload, {workload.outputs[0]: model(**inputs)}, targets)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
        schedule.step()
    return export(model.eval(), workload.inputs, workload.outputs, folder / "model.onnx")
