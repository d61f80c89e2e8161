"""The score `taylor`: what the loss would lose without a channel, as Molchanov et al. (arXiv 1906.10771) have it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from modelathe.tensors import BATCH, TensorSpec
from optimize.methods import apply as step
from optimize.methods.prune import importance
from optimize.methods.prune.channels import Channels
from optimize.source.batch import Batch
from optimize.source.workload import Workload
from optimize.step.contract import Context
from serve.config.target import Target

SPEC = TensorSpec("x", "float32", (BATCH, 12))


class Frozen(nn.Module):
    """Its first layer is not trained."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(12, 16), nn.Linear(16, 16), nn.Linear(16, 4)
        self.a.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(self.b(self.a(x).relu()).relu())


@pytest.fixture
def workload() -> Workload:
    def batches() -> list[Batch]:
        rng = np.random.default_rng(0)
        return [Batch({"x": SPEC.generate(rng, 8)}, np.arange(8) % 4) for _ in range(3)]

    return Workload(
        *("frozen", Frozen, (SPEC,), ("y",), batches, lambda *_: {}, None, batches),
        loss=lambda outputs, targets: functional.cross_entropy(outputs["y"], targets),
    )


def context(workload: Workload, scratch: Path) -> Context:
    return Context(workload, workload.build(), Target(cores=1), 0, scratch, lambda text, fraction: None)


@pytest.mark.parametrize("cuts", [1, 3])
def test_frozen_layers_are_ranked_and_stay_frozen(cuts: int, workload: Workload, tmp_path: Path) -> None:
    made = step.apply(Channels(score="taylor", cuts=cuts), workload.build(), context(workload, tmp_path))
    assert made.a.out_features == made.b.out_features == 8
    assert [name for name, parameter in made.named_parameters() if not parameter.requires_grad] == [
        "a.weight",
        "a.bias",
    ]


def test_the_contribution_of_a_channel_is_the_square_of_the_sum_over_its_weights(
    workload: Workload, tmp_path: Path
) -> None:
    module = workload.build()
    salient = importance.saliency("taylor", module, context(workload, tmp_path))
    out, read = torch.zeros(16), torch.zeros(16)
    module.requires_grad_(True)
    for batch in workload.batches("training"):
        module.zero_grad()
        functional.cross_entropy(
            module(torch.from_numpy(batch.inputs["x"])), torch.from_numpy(batch.targets)
        ).backward()
        # All weights that make a channel, its bias too; and all that read it.
        out += ((module.b.weight * module.b.weight.grad).sum(1) + module.b.bias * module.b.bias.grad).square()
        read += (module.c.weight * module.c.weight.grad).sum(0).square()
    (made,), (reading,) = salient(module.b, "out"), salient(module.c, "in")
    assert torch.allclose(made, out.detach(), rtol=1e-4)
    assert torch.allclose(reading, read.detach(), rtol=1e-4)


def test_it_predicts_what_the_loss_loses_where_contributions_cancel(workload: Workload, tmp_path: Path) -> None:
    """Weights of a unit that pull the loss in both directions matter less than each of them alone."""
    module = workload.build()
    with torch.no_grad():
        # The output of unit 0 is constant and large, but what reads it adds the same to every class.
        module.b.weight[0], module.b.bias[0] = 0, 5
        module.c.weight[:, 0] = 3
    salient = importance.saliency("taylor", module, context(workload, tmp_path))
    (scores,) = salient(module.c, "in")
    assert scores[0] < 1e-6 * scores.max(), "removing it changes no probability"
