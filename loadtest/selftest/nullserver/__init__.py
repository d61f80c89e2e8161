"""Null server: a V2 server in a process of its own that answers at once, or after staged times, and computes nothing.

What a load generator reaches against it is the generator's own ceiling (`loadtest selftest`). With a service time it is
a queue whose truth can be calculated: requests wait in order of arrival for one of `instances`, each of which holds a
request for exactly `service` seconds, and each `each`-th one `stall` seconds longer.
"""

import json
import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loadtest.selftest.nullserver.model import MODEL
from modelathe import interpreter
from modelathe.errors import MachineError, UsageError
from modelathe.tensors import BATCH, TensorSpec

INPUTS = (TensorSpec("x", "float32", (BATCH, 16)),)
OUTPUTS = (TensorSpec("y", "float32", (BATCH, 4)),)


@dataclass(frozen=True)
class NullServer:
    """A null server that runs: its addresses, its model's name, and its process."""

    http: str
    grpc: str
    model: str
    pid: int

    def url(self, scheme: str) -> str:
        """Return its address for `http` or `grpc`."""
        return self.http if scheme == "http" else self.grpc

    def cpu(self) -> float:
        """Return the CPU seconds that its process has used."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def running(
    service: float = 0.0,
    stall: float = 0.0,
    each: int = 0,
    instances: int = 1,
    inputs: Sequence[TensorSpec] = INPUTS,
    outputs: Sequence[TensorSpec] = OUTPUTS,
) -> Iterator[NullServer]:
    """Run a null server on two free ports of the loopback address; it ends with the block, or with this process.

    Args:
        service: seconds that an instance holds a request; 0 answers at once.
        stall: seconds that it holds each `each`-th request (counted over both protocols, the probing ones too) longer.
        each: 0 never stalls.
        instances: how many requests are held at the same time.
        inputs: what its model `null` takes; the values are not looked at.
        outputs: what the model answers with, always the same values.

    Raises:
        MachineError: it did not start.
    """
    if min(service, stall, each) < 0 or instances < 1:
        raise UsageError("a null server with negative times or no instance", fix="give times of 0 or more")
    settings: dict[str, Any] = {"service": service, "stall": stall, "each": each, "instances": instances}
    settings |= {"inputs": [spec.document() for spec in inputs], "outputs": [spec.document() for spec in outputs]}
    process = subprocess.Popen(
        interpreter.command("loadtest.selftest.nullserver", json.dumps(settings)),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=interpreter.variables(),
        start_new_session=True,  # Ctrl-C is for the one who asks; the end of its standard input ends the server
    )
    with process:
        try:
            yield _started(process)
        finally:
            process.kill()


def _started(process: "subprocess.Popen[bytes]") -> NullServer:
    assert process.stdout
    line = process.stdout.readline()
    if not line:
        raise MachineError("the null server did not start", fix="its own words stand above")
    ports = json.loads(line)
    return NullServer(f"http://127.0.0.1:{ports['http']}", f"grpc://127.0.0.1:{ports['grpc']}", MODEL, process.pid)
