"""State that is not made of plain, whole float32 tensors: it is kept, or refused with a way out that works."""

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from optimize.model import state
from optimize.model.errors import BadBundle, BadModel, BadWorkload
from optimize.predict.module import TorchPredictor
from optimize.step import bundle as bundles
from optimize.step.bundle import Bundle
from optimize.step.contract import fingerprint
from tests.optimize.brought import WIDTH, Net, agree, brought, through_a_bundle
from tests.optimize.conftest import Ended, Optimize


class Holding(Net):
    """Adds what its buffers and parameters come to, so that each of them shows in the answers."""

    def __init__(self, **held: torch.Tensor) -> None:
        super().__init__()
        for name, tensor in held.items():
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(name, tensor)
            else:
                self.register_buffer(name, tensor)
        self.held = tuple(held)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for name in self.held:
            x = x * getattr(self, name).to(x.dtype).reshape(-1, WIDTH).mean(0)
        return super().forward(x)


def angles(*shape: int) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.rand(*shape) + 0.5


def halves() -> dict[str, torch.Tensor]:
    both = angles(2, WIDTH)
    return {"cos": both[0], "sin": both[1]}


def overlapping() -> dict[str, torch.Tensor]:
    line = angles(WIDTH + 4)
    return {"first": line[:WIDTH], "second": line[4:], "third": nn.Parameter(line[2 : WIDTH + 2])}


def tied_slice() -> dict[str, torch.Tensor]:
    table = angles(40)
    return {"left": table[:WIDTH], "right": table[:WIDTH]}


HELD: dict[str, Callable[[], dict[str, torch.Tensor]]] = {
    "a slice": lambda: {"places": angles(512)[:WIDTH]},
    "expanded": lambda: {"mask": angles(3, WIDTH).expand(4, -1, -1)},
    "two halves": halves,
    "half overlapping": overlapping,
    "one slice twice": tied_slice,
    "a transposed view": lambda: {"table": angles(WIDTH, 3).t()},
    "a slice as a parameter": lambda: {"scale": nn.Parameter(angles(9, WIDTH)[3])},
    "an expanded parameter": lambda: {"scale": nn.Parameter(angles(1).expand(WIDTH))},
    "whole numbers as a parameter": lambda: {"index": nn.Parameter(torch.arange(WIDTH) % 3 + 1, requires_grad=False)},
    "float64": lambda: {"mean": angles(WIDTH).double()},
    "bfloat16": lambda: {"mean": angles(WIDTH).bfloat16()},
    "bool": lambda: {"keep": angles(WIDTH) > 0.6},
    "the imaginary part": lambda: {"phase": torch.polar(angles(WIDTH), angles(WIDTH)).conj().imag},
}


@pytest.mark.parametrize("kind", [kind for kind in HELD if kind != "nothing"])
def test_views_and_other_dtypes_are_kept_as_they_are(kind: str, tmp_path: Path) -> None:
    workload = brought(lambda: Holding(**HELD[kind]()))
    module = workload.build()
    bundles.save(Bundle(workload, module), tmp_path / "bundle")
    loaded = bundles.load(tmp_path / "bundle", workload).module
    for name, tensor in HELD[kind]().items():
        assert torch.equal(loaded.get_buffer(name) if name in loaded._buffers else loaded.get_parameter(name), tensor)
    assert fingerprint(loaded) == fingerprint(module)


def test_a_model_of_views_is_exported(tmp_path: Path) -> None:
    agree(through_a_bundle(brought(lambda: Holding(**overlapping(), **halves(), **HELD["expanded"]())), tmp_path)[1])


def test_what_is_one_tensor_stays_one_and_what_only_overlaps_does_not() -> None:
    module = brought(lambda: Holding(**tied_slice(), **overlapping())).build()
    with torch.no_grad():
        module.left.fill_(7)  # type: ignore[operator, union-attr]
        module.first.fill_(5)  # type: ignore[operator, union-attr]
    assert module.right.eq(7).all()  # type: ignore[operator, union-attr]
    assert not module.second.eq(5).any()  # type: ignore[operator, union-attr]
    assert len(state.tensors(module)) == len(module.state_dict()) - 1


class Extra(Net):
    """Remembers a scaling that is no tensor, as layers for FP8 do."""

    def __init__(self, recipe: Any) -> None:
        super().__init__()
        self.recipe = recipe

    def get_extra_state(self) -> Any:
        return self.recipe

    def set_extra_state(self, state: Any) -> None:
        self.recipe = state


@pytest.mark.parametrize(
    "recipe",
    [
        {"amax": [1.0, 2.0], "format": "e4m3"},
        None,
        b"1234",
        torch.tensor([1, 2, 3], dtype=torch.uint8),
        [torch.ones(2)],
    ],
    ids=["dict", "None", "bytes", "tensor", "tensor in a list"],
)
def test_extra_state_comes_from_the_code_and_tensors_from_the_bundle(recipe: Any, tmp_path: Path) -> None:
    workload = brought(lambda: Extra(recipe))
    module = workload.build()
    bundles.save(Bundle(workload, module), tmp_path / "bundle")
    loaded: Any = bundles.load(tmp_path / "bundle", workload).module
    assert fingerprint(loaded) == fingerprint(module)
    assert type(loaded.recipe) is type(recipe)


@dataclass(slots=True)
class Scaling:
    amax: float
    seen: Any = None


class Histogram:
    def __init__(self, amax: float) -> None:
        self.amax, self.lock, self.itself = amax, threading.Lock(), self


KINDS: list[Callable[[float], Any]] = [
    lambda amax: {"amax": amax},
    Scaling,
    Histogram,
    lambda amax: deque([Scaling(1.0, {amax, "e4m3"})]),
    lambda amax: [np.float32(amax)],
    lambda amax: np.array([Histogram(amax)], object),
]


@pytest.mark.parametrize("kind", KINDS, ids=["dict", "slots", "object", "in a deque", "numpy", "array of objects"])
def test_extra_state_that_a_step_changed_is_refused_and_a_tensor_mends_it(
    kind: Callable[[float], Any], tmp_path: Path
) -> None:
    assert state.extras(Extra(kind(1.0))) == state.extras(Extra(kind(1.0)))
    workload = brought(lambda: Extra(kind(1.0)))
    module: Any = workload.build()
    module.recipe = kind(2.0)
    with pytest.raises(BadBundle, match="changed the extra state '_extra_state'") as raised:
        bundles.save(Bundle(workload, module), tmp_path / "bundle")
    assert "return a tensor" in raised.value.fix
    workload = brought(lambda: Extra(torch.ones(1)))
    module = workload.build()
    module.recipe = torch.full((1,), 2.0)
    bundles.save(Bundle(workload, module), tmp_path / "bundle")
    loaded: Any = bundles.load(tmp_path / "bundle", workload).module
    assert loaded.recipe.item() == 2


def in_16_bits() -> nn.Module:
    return Net().bfloat16()


class Casting(Net):
    """Runs in whatever dtype its weights have."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.to(self.one.weight.dtype))


class Links(Net):
    """A graph convolution over a sparse matrix."""

    def __init__(self, dense: bool) -> None:
        super().__init__()
        links = torch.eye(WIDTH)
        self.register_buffer("links", links if dense else links.to_sparse())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x @ self.links)  # type: ignore[operator]


def quantized_by_torch() -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(Net(), {nn.Linear}, dtype=torch.qint8)  # type: ignore[no-untyped-call, no-any-return]


def from_state(script: nn.Module) -> nn.Module:
    net = Net()
    net.load_state_dict(script.state_dict())
    return net


def around(trace: Any) -> nn.Module:
    net = Net()
    net.two = trace(net.two, torch.rand(2, 16))
    return net


def lazy(called: bool) -> nn.Module:
    net = Net()
    net.two = nn.LazyLinear(4)  # type: ignore[assignment]
    if called:
        net(torch.rand(2, WIDTH))
    return net


def held_complex(dtype: torch.dtype) -> nn.Module:
    return Holding(turns=torch.polar(angles(WIDTH), angles(WIDTH)).to(dtype))


REFUSED = {
    "bfloat16": (in_16_bits, "parameters in bfloat16", "return model.float()", lambda: in_16_bits().float()),
    "float16": (lambda: Casting().half(), "parameters in float16", "model.float()", lambda: Casting().half().float()),
    "sparse": (lambda: Links(dense=False), "a sparse tensor, such as links", ".to_dense()", lambda: Links(dense=True)),
    "quantized": (quantized_by_torch, "is quantized already: one", "the float model", Net),
    "TorchScript": (
        lambda: torch.jit.script(Net()),  # type: ignore[no-untyped-call]
        "is TorchScript",
        "load_state_dict",
        lambda: from_state(torch.jit.script(Net())),  # type: ignore[no-untyped-call]
    ),
    "TorchScript in it": (lambda: around(torch.jit.trace), "is TorchScript at two", "its Python class", Net),
    "lazy": (
        lambda: lazy(False),
        "without a shape, such as two.weight",
        "call the model once",
        lambda: lazy(True),
    ),
    "meta": (lambda: Net().to("meta"), "on the device meta, such as one.weight", "load its weights", Net),
    "complex128": (
        lambda: held_complex(torch.complex128),
        "in complex128, which no bundle can hold, such as turns",
        ".to(torch.complex64)",
        lambda: held_complex(torch.complex64),
    ),
}


@pytest.mark.parametrize(("build", "what", "fix", "mended"), REFUSED.values(), ids=REFUSED)
@pytest.mark.filterwarnings("ignore")
def test_what_no_step_can_hold_is_refused_and_the_way_out_works(
    build: Callable[[], nn.Module], what: str, fix: str, mended: Callable[[], nn.Module], tmp_path: Path
) -> None:
    with pytest.raises(BadWorkload) as raised:
        brought(build).build()
    assert what in raised.value.what
    assert fix in raised.value.fix
    workload = brought(mended)
    bundles.save(Bundle(workload, workload.build()), tmp_path / "bundle")
    bundles.load(tmp_path / "bundle", workload)


@pytest.mark.parametrize(
    ("answer", "what", "fix", "mended"),
    [
        (lambda y: y.bfloat16(), "output 'y' is bfloat16", ".float()", lambda y: y.bfloat16().float()),
        (lambda y: y.to_sparse(), "output 'y' is sparse", ".to_dense()", lambda y: y.to_sparse().to_dense()),
        (torch.fft.fft, "output 'y' is complex64", "view_as_real", lambda y: torch.view_as_real(torch.fft.fft(y))),
    ],
    ids=["bfloat16", "sparse", "complex"],
)
def test_an_output_that_no_server_sends_is_named(answer: Any, what: str, fix: str, mended: Any) -> None:
    def predictor(then: Any) -> TorchPredictor:
        class Ends(Net):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return then(super().forward(x))  # type: ignore[no-any-return]

        return TorchPredictor(Ends(), ["y"])

    arrays = {"x": np.ones((2, WIDTH), np.float32)}
    with pytest.raises(BadModel, match=what) as raised:
        predictor(answer).predict(arrays)
    assert fix in raised.value.fix
    assert len(predictor(mended).predict(arrays)["y"]) == 2


def test_an_output_with_a_history_or_a_sign_to_come_is_an_array() -> None:
    class Odd(Net):
        def forward(self, x: torch.Tensor) -> Any:
            with torch.enable_grad():
                y = super().forward(x.requires_grad_())
                (slope,) = torch.autograd.grad(y.sum(), x)
            return y, slope, torch.polar(x, x).conj().imag

    found = TorchPredictor(Odd(), ["y", "slope", "imag"]).predict({"x": np.ones((2, WIDTH), np.float32)})
    assert [found[name].shape for name in ("y", "slope", "imag")] == [(2, 4), (2, WIDTH), (2, WIDTH)]


DOUBLE = """
import torch
from tests.optimize.brought import Net, brought
from tests.optimize.model.test_state import Casting


def double():
    return brought(lambda: Casting().double())


def mixed():
    net = Casting()
    net.register_parameter("scale", torch.nn.Parameter(torch.ones(1, dtype=torch.float64)))
    return brought(lambda: net)


def mended():
    return brought(lambda: Casting().double().float())
"""


@pytest.mark.usefixtures("each_step_faster")
def test_a_float64_model_is_exported_and_not_quantized(optimize: Optimize, tmp_path: Path) -> None:
    (tmp_path / "user.py").write_text(DOUBLE)

    def end(command: str, function: str) -> Ended:
        return optimize(command, f"{tmp_path / 'user.py'}:{function}", "--output", tmp_path / f"{command}-{function}")

    assert end("export", "double").code == 0
    ended = end("quantize", "double")
    assert ended.code == 4
    assert "has parameters in float64, and quantize.dynamic takes float32" in ended.err
    assert "fix: return model.float()" in ended.err
    assert end("quantize", "mended").code == end("quantize", "mixed").code == 0
