"""Weights that hooks and parametrizations compute, and modules that Python does not copy: each works or is named."""

import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from optimize.graph import graph
from optimize.judge.macs import total
from optimize.model.copies import computes, copied, folded
from optimize.model.errors import BadModel
from optimize.predict.module import answering
from optimize.step import bundle as bundles
from tests.optimize.brought import ROW, WIDTH, Net, agree, brought, through_a_bundle
from tests.optimize.conftest import Optimize


class Standard(nn.Module):
    """A parametrization of a user's own: weight standardization."""

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return (weight - weight.mean(1, keepdim=True)) / weight.std(1, keepdim=True)


def old_weight_norm() -> nn.Module:
    net = Net()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net.one = nn.utils.weight_norm(net.one)
    return net


def old_spectral_norm() -> nn.Module:
    net = Net()
    net.one = nn.utils.spectral_norm(net.one)
    return net


def pruning_masks() -> nn.Module:
    net = Net()
    prune.l1_unstructured(net.one, "weight", 0.5)  # type: ignore[no-untyped-call]
    prune.random_unstructured(net.two, "bias", 0.5)  # type: ignore[no-untyped-call]
    return net


def parametrized(registered: Callable[[nn.Module], object]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        net = Net()
        registered(net.one)
        return net

    return build


def recurrent() -> nn.Module:
    class Recurrent(Net):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = parametrizations.weight_norm(nn.LSTM(3, 4, batch_first=True), "weight_hh_l0")

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.lstm(x.unflatten(1, (4, 3)))[0][:, -1]

    return Recurrent()


spectral = parametrized(parametrizations.spectral_norm)
COMPUTED = {
    "weight_norm, the older": old_weight_norm,
    "spectral_norm, the older": old_spectral_norm,
    "masks": pruning_masks,
    "weight_norm": parametrized(parametrizations.weight_norm),
    "spectral_norm": spectral,
    "two at once": parametrized(lambda layer: parametrizations.spectral_norm(parametrizations.weight_norm(layer))),
    "one of the user's": parametrized(lambda layer: parametrize.register_parametrization(layer, "weight", Standard())),
    "of a recurrent layer": recurrent,
}


@pytest.mark.parametrize("build", COMPUTED.values(), ids=COMPUTED)
def test_computed_weights_are_plain_in_the_graph_and_stay_computed_in_torch(
    build: Callable[[], nn.Module], tmp_path: Path
) -> None:
    made, answers = through_a_bundle(brought(build), tmp_path)
    agree(answers)
    assert made.module.state_dict().keys() == build().state_dict().keys(), "a training goes on with what the user has"
    assert made.graph is not None
    model = graph.load(made.graph)
    products = [node for node in model.graph if node.op_type in ("Gemm", "MatMul", "LSTM")]
    assert all(node.inputs[1] is not None and node.inputs[1].is_initializer() for node in products)
    assert any(node.op_type != "LSTM" for node in products) == (build is not recurrent)
    assert total(made.module, [ROW]) == total(folded(made.module), [ROW]) != 0


@pytest.mark.usefixtures("each_step_faster")
@pytest.mark.parametrize("build", ["old_weight_norm", "pruning_masks", "spectral"])
def test_a_model_with_computed_weights_is_pruned_and_its_bundle_read_again(
    build: str, optimize: Optimize, tmp_path: Path
) -> None:
    (tmp_path / "user.py").write_text(
        "from tests.optimize.model import test_copies\nfrom tests.optimize.brought import brought\n\n\n"
        f"def workload():\n    return brought(test_copies.{build})\n"
    )
    ended = optimize("prune", f"{tmp_path / 'user.py'}:workload", "--output", tmp_path / "made", "--ratio", "0.25")
    assert ended.code == 0, ended.err
    made = bundles.load(tmp_path / "made").module
    assert made.state_dict()["one.weight"].shape == (12, WIDTH)
    assert not computes(made)


def test_folding_a_copy_leaves_the_module_as_it_was() -> None:
    x = torch.rand(3, WIDTH)
    for build in COMPUTED.values():
        module = build().eval()
        with answering():
            before = module(x)
            torch.testing.assert_close(folded(module)(x), before)
            torch.testing.assert_close(module(x), before, rtol=0, atol=0)
        assert folded(module) is not module
    plain = Net()
    assert folded(plain) is plain


class Keeping(Net):
    """Keeps something on itself that Python's own copying cannot take."""

    def __init__(self, kept: Any) -> None:
        super().__init__()
        self.kept = kept


class Counter:
    """A counter as several threads share it, with a table of its own."""

    def __init__(self) -> None:
        self.lock, self.table = threading.RLock(), torch.ones(3)


def result_on_self() -> nn.Module:
    net = Keeping([])
    net.one.register_forward_hook(lambda layer, args, made: net.kept.append({"features": made}))
    net(torch.rand(2, WIDTH))
    return net


KEPT = {
    "a lock": lambda: Keeping(threading.Lock()),
    "an open file": lambda: Keeping({"log": [sys.__stderr__]}),
    "a lock in an object": lambda: Keeping(Counter()),
    "a generator": lambda: Keeping(number for number in range(3)),
    "a result": result_on_self,
}


@pytest.mark.parametrize("build", KEPT.values(), ids=KEPT)
def test_what_python_cannot_copy_is_shared_and_tensors_are_not(build: Callable[[], nn.Module]) -> None:
    module = build().eval()
    copy = copied(module)
    x = torch.rand(3, WIDTH)
    with answering():
        before = module(x)
        assert torch.equal(copy(x), before)
        for parameter in copy.parameters():
            parameter.fill_(0.5)
        assert torch.equal(module(x), before)
    if isinstance(module.kept, Counter) and isinstance(copy.kept, Counter):
        assert copy.kept.lock is module.kept.lock
        assert copy.kept.table is not module.kept.table


def test_a_module_with_a_lock_goes_the_whole_way(tmp_path: Path) -> None:
    agree(through_a_bundle(brought(lambda: Keeping(threading.Lock())), tmp_path)[1])


def test_a_class_that_refuses_to_be_copied_is_named_and_its_own_copying_mends_it() -> None:
    class Single(nn.Linear):
        def __deepcopy__(self, memo: object) -> nn.Module:
            raise TypeError("there is one of me")

    class Mended(Single):
        def __deepcopy__(self, memo: object) -> nn.Module:
            made = Mended(self.in_features, self.out_features)
            made.load_state_dict(self.state_dict())
            return made

    net = Net()
    net.two = Single(16, 4)
    with pytest.raises(BadModel, match=r"Net: its 'two' cannot be copied: TypeError: there is one of me") as raised:
        brought(lambda: net).build()
    assert "__deepcopy__" in raised.value.fix
    net.two = Mended(16, 4)
    assert torch.equal(brought(lambda: net).build().two.weight, net.two.weight)  # type: ignore[union-attr, arg-type]


@pytest.mark.parametrize("around", [torch.compile, nn.DataParallel, lambda net: nn.DataParallel(torch.compile(net))])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_is_put_around_a_module_is_taken_off(around: Callable[[nn.Module], nn.Module]) -> None:
    net = Net()
    assert brought(lambda: around(net)).build().state_dict().keys() == net.state_dict().keys()
