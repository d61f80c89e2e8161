from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from loadtest.tensors import BATCH, Dim, TensorSpec
from optimize.endpoint import output_specs
from optimize.export.onnx import export
from optimize.workload import Workload
from serve import model_config
from serve.target import Target

TOKENS = Dim("tokens", 1, 8, 32)


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.tags = nn.Embedding(50, 8), nn.Linear(8, 5)

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        tags = self.tags(self.words(ids))
        return tags, tags.mean(1)


def test_an_output_keeps_the_dims_that_change_size(small: Workload, tmp_path: Path) -> None:
    inputs = (TensorSpec("ids", "int64", (BATCH, TOKENS), values=(0, 49)),)
    tagger = replace(small, name="tagger", model=Tagger, inputs=inputs, outputs=("tags", "topic"))
    graph = export(Tagger().eval(), inputs, tagger.outputs, tmp_path / "model.onnx")
    answers = {"tags": np.zeros((2, 8, 5), np.float32), "topic": np.zeros((2, 5), np.float32)}
    specs = output_specs(tagger, graph, answers)
    assert [spec.dims for spec in specs] == [(BATCH, TOKENS, 5), (BATCH, 5)]
    config = model_config.build("tagger", inputs, specs, Target(), [1])
    assert [list(output.dims) for output in config.output] == [[-1, 5], [5]]
