"""Processes: this one's place among those that torchrun started, and what they agree on while they train together.

Outside torchrun there is one process, and nothing here does anything.

Gradients are averaged over the samples of all processes in one reduction a batch. A wrapper such as DDP would put
itself between an objective and the user's module, weigh a short last batch like a full one, and leave the others
waiting when one process fails.
"""

import functools
import json
import logging
import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from modelathe.errors import ModelatheError

if TYPE_CHECKING:
    from lightning_fabric import Fabric

LONGEST_WAIT = timedelta(days=7)
"""The others wait while the first process measures; when a process dies, torchrun ends the rest."""


def size() -> int:
    """Return how many processes torchrun started; 1 without it."""
    return int(os.environ["WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def rank() -> int:
    """Return this process's number; the one with 0 leads."""
    return int(os.environ["RANK"]) if size() > 1 else 0


def device() -> torch.device:
    """Return where this process trains: its own GPU where there is one, else the CPU."""
    if size() > 1:
        return torch.device(fabric().device)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@functools.cache
def fabric() -> "Fabric":
    """Return the connection of these processes: gloo between CPUs, nccl between GPUs."""
    from lightning_fabric import Fabric
    from lightning_fabric.strategies import DDPStrategy

    # It would tell the terminal how the processes found each other.
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    made = Fabric(
        accelerator="cuda" if torch.cuda.is_available() else "cpu",
        devices=int(os.environ["LOCAL_WORLD_SIZE"]),
        num_nodes=int(os.environ["GROUP_WORLD_SIZE"]),
        strategy=DDPStrategy(timeout=LONGEST_WAIT),
    )
    made.launch()
    return made


def tell(message: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return on every process what the first one tells; what the others pass is not looked at."""
    told: dict[str, Any] | None = json.loads(fabric().broadcast(json.dumps(message)))
    return told


class _Agreed(Exception):
    """Marks, as its cause, an error that all processes have met together."""


def meet(error: ModelatheError | None = None) -> None:
    """Wait for all processes; when one comes with an error, raise the error of the first such on all of them.

    Every exchange of numbers begins with it. So a process that failed anywhere meets the others at the next exchange,
    and none takes part in an exchange that another has left out.
    """
    if size() == 1:
        return
    first = int(fabric().all_reduce(torch.tensor(rank() if error else size()), reduce_op="min"))
    if first == size():
        return
    told = fabric().broadcast(json.dumps(error and error.document()), src=first)
    raise (error if error and rank() == first else _error(json.loads(told))) from _Agreed()


@contextmanager
def agreeing() -> Iterator[None]:
    """Raise an error that one process meets in this block on all of them, in the words of the first."""
    if size() == 1:
        yield
        return
    try:
        yield
    except ModelatheError as error:
        if not isinstance(error.__cause__, _Agreed):
            meet(error)
        raise
    except Exception as error:
        what = f"process {rank()} met {type(error).__name__}: {error}"
        if rank():
            traceback.print_exc()
        with suppress(ModelatheError):
            meet(ModelatheError(what, fix="see the traceback that this process printed"))
        raise
    meet()


def same(digest: str) -> bool:
    """Say whether all processes hold the same digest, hexadecimal digits."""
    if size() == 1:
        return True
    meet()
    mine = torch.tensor([int(digest[:12], 16)])
    low, high = (fabric().all_reduce(mine.clone(), reduce_op=way) for way in ("min", "max"))
    return bool((low == high).all())


def align(module: nn.Module) -> None:
    """Give every process the parameters and buffers of the first."""
    if size() > 1:
        meet()
        with torch.no_grad():
            for tensor in (*module.parameters(), *module.buffers()):
                torch.distributed.broadcast(tensor, src=0)


def average(module: nn.Module, loss: float, samples: int) -> float | None:
    """Average the gradients and the loss over all processes' samples, in place; return the loss.

    None when no process had a sample. A parameter that no process has a gradient for keeps None.
    """
    if size() == 1:
        return loss if samples else None
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    used = [float(parameter.grad is not None) for parameter in parameters]
    place = gradients[0].device
    weighed = [gradient.float().reshape(-1) * samples for gradient in gradients]
    summed = fabric().all_reduce(
        torch.cat([*weighed, torch.tensor([*used, loss * samples, samples], device=place)]), reduce_op="sum"
    )
    *flat, seen, rest = summed.split([*(gradient.numel() for gradient in gradients), len(used), 2])
    total = float(rest[1])
    if not total:
        return None
    for parameter, values, anywhere in zip(parameters, flat, seen.tolist(), strict=True):
        if anywhere:
            parameter.grad = (values / total).view_as(parameter).to(parameter.dtype)
    return float(rest[0]) / total


def average_buffers(module: nn.Module) -> None:
    """Average the floating point buffers, such as BatchNorm's running statistics, over all processes."""
    if size() > 1:
        for buffer in module.buffers():
            if buffer.is_floating_point():
                fabric().all_reduce(buffer, reduce_op="mean")


def _error(document: dict[str, Any]) -> ModelatheError:
    kinds = [ModelatheError]
    for kind in kinds:
        kinds += kind.__subclasses__()
    kind = next((kind for kind in kinds if kind.__name__ == document["kind"]), ModelatheError)
    return kind(document["what"], where=document["where"], fix=document["fix"])
