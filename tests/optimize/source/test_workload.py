from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from optimize.model.errors import BadData, BadWorkload
from optimize.predict.module import TorchPredictor
from optimize.source.batch import Batch
from optimize.source.load import load_workload
from optimize.source.workload import Workload
from optimize.step.contract import fingerprint

UserFile = Callable[..., str]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("def workload", "import nothing_like_this\ndef workload"), "nothing_like_this"),
        (("def workload", "1 / 0\ndef workload"), "ZeroDivisionError"),
        (("    return Workload(", "    raise RuntimeError('no data today')\n    return Workload("), "no data today"),
        (("    return Workload(", "    return 3\n    return Workload("), "not a Workload"),
        (("def workload", "def other"), "no 'workload' in it"),
        (('name="small"', 'name="a/b"'), "cannot name a model"),
        (('outputs=("logits",)', "outputs=()"), "one distinct name"),
        (('outputs=("logits",)', 'outputs=("",)'), "one distinct name"),
        (("(BATCH, 1, 8, 8)", "(64, 1, 8, 8)"), "no batch axis"),
        (("def workload", "def workload(:\n"), "SyntaxError"),
    ],
)
def test_a_bad_file_is_one_line_with_the_place(user_file: UserFile, change: tuple[str, str], said: str) -> None:
    with pytest.raises(BadWorkload) as error:
        load_workload(user_file(change))
    assert said in error.value.what


def test_the_users_own_line_is_named(user_file: UserFile) -> None:
    source = user_file(("    return Workload(", "    raise RuntimeError('here')\n    return Workload("))
    wanted = source.rpartition(":")[0]
    lines = Path(wanted).read_text().splitlines()
    line = next(number for number, text in enumerate(lines, 1) if "RuntimeError('here')" in text)
    with pytest.raises(BadWorkload) as error:
        load_workload(source)
    assert error.value.where == f"{wanted}, line {line}"


def test_no_such_file_or_module() -> None:
    for source in ("no/such/file.py:workload", "no_such_package.module:workload"):
        with pytest.raises(BadWorkload):
            load_workload(source)


def test_a_missing_weight_is_named(user_file: UserFile) -> None:
    made = load_workload(user_file(("    torch.manual_seed(0)", "    open('no-such-weights.safetensors')")))
    with pytest.raises(BadWorkload, match="no-such-weights"):
        made.build()


def bad_batches(image: np.ndarray) -> dict[str, Batch | int]:
    holed = image.copy()
    holed[2, 0, 3, 3] = np.nan
    return {
        "NaN or infinite value in sample 2": Batch({"image": holed}),
        "is float64": Batch({"image": image.astype(np.float64)}),
        "has the shape": Batch({"image": image[:, :, :7]}),
        "has the inputs": Batch({"picture": image}),
        "not a Batch": 3,
    }


@pytest.mark.parametrize("said", bad_batches(np.zeros((4, 1, 8, 8), np.float32)))
def test_bad_data_names_the_batch(small: Workload, said: str) -> None:
    batch = bad_batches(np.zeros((4, 1, 8, 8), np.float32))[said]
    broken = replace(small, evaluation=lambda: [batch])
    with pytest.raises(BadData, match=said) as error:
        list(broken.batches("evaluation"))
    assert "evaluation batch 0" in error.value.where


def test_data_that_raises_or_is_absent(small: Workload) -> None:
    def broken() -> list[Batch]:
        raise OSError("the disk went away")

    with pytest.raises(BadWorkload, match="disk went away"):
        list(replace(small, evaluation=broken).batches("evaluation"))
    with pytest.raises(BadWorkload, match="no calibration data"):
        list(replace(small, calibration=None).batches("calibration"))
    with pytest.raises(BadData, match="no batch"):
        list(replace(small, evaluation=lambda: []).batches("evaluation"))


def test_build_gives_the_trained_model(small: Workload) -> None:
    batch = next(small.batches("evaluation"))
    first, second = (TorchPredictor(small.build(), small.outputs).predict(batch.inputs) for _ in range(2))
    assert np.array_equal(first["logits"], second["logits"])


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_parameters_of_16_bits_are_refused_with_the_way_out(kind: torch.dtype, small: Workload) -> None:
    short = replace(small, model=lambda: small.build().to(kind), students={"short": lambda: small.build().to(kind)})
    said = f"has parameters in {str(kind).removeprefix('torch.')}, such as conv.weight"
    with pytest.raises(BadWorkload, match=f"model {said}") as raised:
        short.build()
    assert "return model.float()" in raised.value.fix
    with pytest.raises(BadWorkload, match=said):
        short.build("short")
    assert replace(small, model=lambda: small.build().to(kind).float()).build().conv.weight.dtype == torch.float32


def test_a_digest_takes_numbers_of_any_type() -> None:
    found = {fingerprint(nn.Linear(2, 2).to(kind)) for kind in (torch.float64, torch.float16, torch.bfloat16)}
    assert len(found) == 3
