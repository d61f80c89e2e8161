"""What each of several processes trains on: shares of one order of the data, or a clear no. torchrun is not needed."""

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from optimize.model.errors import BadData
from optimize.source.batch import Batch
from optimize.source.workload import Workload
from optimize.step.contract import Context
from optimize.train import fit as train
from optimize.train import processes
from serve.config.target import Target
from tests.optimize.small import IMAGES, LABELS

SIZE, COUNT, EPOCHS = 2, 1024, 2
DATA = TensorDataset(torch.from_numpy(IMAGES[:COUNT]), torch.from_numpy(LABELS[:COUNT]), torch.arange(COUNT))


def by_loader() -> Iterator[list[int]]:
    for *_, index in DataLoader(DATA, batch_size=32, shuffle=True):
        yield index.tolist()


def by_numpy() -> Iterator[list[int]]:
    for part in np.array_split(np.random.permutation(COUNT), 31):
        yield part.tolist()


def by_python() -> Iterator[list[int]]:
    order = random.sample(range(COUNT), COUNT)
    yield from (order[start : start + 32] for start in range(0, COUNT, 32))


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Let this process be one of two, which agree with whatever it says."""

    def be(rank: int) -> None:
        monkeypatch.setattr(processes, "size", lambda: SIZE)
        monkeypatch.setattr(processes, "rank", lambda: rank)
        monkeypatch.setattr(processes, "device", lambda: torch.device("cpu"))
        monkeypatch.setattr(processes, "meet", lambda error=None: None)
        monkeypatch.setattr(processes, "same", lambda digest: True)
        monkeypatch.setattr(processes, "tell", lambda message: message)
        monkeypatch.setattr(processes, "align", lambda module: None)
        monkeypatch.setattr(processes, "average_buffers", lambda module: None)
        monkeypatch.setattr(processes, "average", lambda module, loss, samples: loss if samples else None)

    return be


def trained_on(small: Workload, order: Callable[[], Iterator[list[int]]], rank: int) -> list[list[int]]:
    """Return the samples that one process trains on, by epoch; its model draws random numbers of its own."""
    epochs: list[list[int]] = []

    def training() -> Iterator[Batch]:
        epochs.append([])
        for index in order():
            yield Batch({"image": IMAGES[index]}, np.array(index))

    def objective(module: torch.nn.Module, inputs: train.Tensors, targets: torch.Tensor) -> torch.Tensor:
        epochs[-1] += targets.tolist()
        torch.rand(1 + rank)
        return module.out.bias.sum()  # type: ignore[operator, union-attr]

    workload = replace(small, training=training)
    context = Context(workload, workload.build(), Target(cores=1), 3, Path(), lambda text, fraction: None)
    train.fit(workload.build(), context, objective, name="test", epochs=EPOCHS, learning_rate=1e-3)
    return epochs


@pytest.mark.parametrize("order", [by_loader, by_numpy, by_python])
def test_two_processes_see_a_whole_epoch(
    order: Callable[[], Iterator[list[int]]], small: Workload, alone: Callable[[int], None]
) -> None:
    shares = []
    for rank in range(SIZE):
        alone(rank)
        shares.append(trained_on(small, order, rank))
    for first, second in zip(*shares, strict=True):
        assert sorted(first + second) == list(range(COUNT))
    assert shares[0][0] != shares[0][1], "every epoch in an order of its own"


def test_an_order_that_the_processes_do_not_share_is_refused(
    small: Workload, alone: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    alone(0)
    monkeypatch.setattr(processes, "same", lambda digest: told.append(digest))

    def by_nobody() -> Iterator[list[int]]:
        yield np.random.default_rng().permutation(COUNT).tolist()

    for order in (by_nobody, by_nobody, by_loader, by_loader):
        with pytest.raises(BadData, match=r"training\(\) gave the processes different batches"):
            trained_on(small, order, 0)
    assert told[0] != told[1]
    assert told[2] == told[3]
