"""Processes: the backend processes of a running tritonserver, and which of them have died.

Triton's Python backend runs each instance of a model in a process of its own, a child of the server. Triton 24.10 asks
for a child's end only when it unloads the model, so one that died by itself stays a zombie until then.
"""

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tritonclient.grpc.model_config_pb2 import ModelConfig, ModelInstanceGroup

from loadtest.load.processes import children

STUB = b"triton_python_backend_stub"
BACKENDS = ("onnxruntime", "openvino", "python")
"""Backends whose instances are processes."""


@dataclass(frozen=True)
class Processes:
    """What a look found: `living` has the model of each process by its id, `dead` the ids of those that died."""

    living: dict[int, str]
    dead: frozenset[int]


def scan(server: int) -> Processes:
    """Return the backend processes of the tritonserver with the process id `server`; none where it is gone."""
    living, dead = {}, set()
    for pid in children(server):
        with suppress(OSError):  # it ended between two looks
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if words == [b""]:  # it has no command line from the moment at which it ends
                dead.add(pid)
            elif words[0].endswith(STUB):
                # Its first argument is REPOSITORY/MODEL/VERSION/FILE.
                living[pid] = Path(os.fsdecode(words[1])).parts[-3]
    return Processes(living, frozenset(dead))


def wanted(config: ModelConfig, versions: int) -> int:
    """Return how many processes a model has at least when it is served with `versions` versions at a time."""
    if config.backend not in BACKENDS or config.platform == "ensemble":
        return 0
    counts = [(group.count or 1) * max(1, len(group.gpus)) for group in config.instance_group if _countable(group)]
    return versions * (sum(counts) or 1)


def _countable(group: ModelInstanceGroup) -> bool:
    """Whether the group's instances can be counted; one on every GPU there is cannot, and it has at least one."""
    return group.kind != ModelInstanceGroup.KIND_GPU or bool(group.gpus)
