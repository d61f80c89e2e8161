"""Plan: how many servers there are to be and when there are to be more, as `serve plan --json` printed it."""

import json
from pathlib import Path
from typing import Annotated

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from modelathe.errors import BadInput

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


@dataclass(frozen=True, config=ConfigDict(extra="ignore"))
class Plan:
    """The part of a plan that manifests hold.

    Args:
        replicas: servers at the planned rate.
        per_pod_rate: requests per second at which a server is as busy as it is to be; None: nothing scales.
        max_replicas: the most that there may be; twice the planned number unless stated.
        start_seconds: from a new pod to its first answer; None: not measured.
        machine: the machine that was planned with.
        model: whose requests were counted; None: those of all models that clients ask.
    """

    replicas: Annotated[int, Field(ge=1, le=100_000)] = 2
    per_pod_rate: Positive | None = None
    max_replicas: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    start_seconds: Positive | None = None
    machine: str | None = None
    model: str | None = None
    planned: bool = True

    @property
    def most(self) -> int:
        """The most servers that there may be."""
        return max(self.replicas, self.max_replicas or 2 * self.replicas)

    @property
    def start_limit(self) -> int:
        """Seconds after which a pod without an answer is given up: thrice what was measured, five minutes at least."""
        return max(300, round(3 * (self.start_seconds or 0)))


NONE = Plan(planned=False)
"""Two servers, so that one may fail; nobody planned them."""


def read(path: Path) -> Plan:
    """Return the plan in a file.

    Raises:
        BadInput: it is not there, or not what `serve plan --json` prints.
    """
    try:
        document = json.loads(path.read_text())
        if not isinstance(document, dict) or "replicas" not in document:
            raise ValueError("it has no replicas")
        return TypeAdapter(Plan).validate_python({**document, "planned": True})
    except OSError as error:
        raise BadInput(
            f"cannot be read: {error.strerror}", where=str(path), fix="serve plan --json > plan.json"
        ) from None
    except ValidationError as error:
        first = error.errors()[0]
        raise BadInput(
            f"{first['loc'][0]}: {first['msg']}", where=str(path), fix="serve plan --json > plan.json"
        ) from None
    except ValueError as error:
        raise BadInput(f"is no plan: {error}", where=str(path), fix="serve plan --json > plan.json") from None
