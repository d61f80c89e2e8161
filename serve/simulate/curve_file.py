"""The file of measured times: what `serve tune` writes of a model on one machine, and `serve plan` reads."""

import json
from dataclasses import asdict, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from modelathe.errors import BadInput
from serve.simulate.configuration import Configuration
from serve.simulate.service import Curve

Count = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Above = Annotated[float, Field(gt=0, allow_inf_nan=False)]


@dataclass(frozen=True, config=ConfigDict(extra="ignore"))
class Measured:
    """What was measured of one model on one machine; more keys may stand beside these in the file.

    Args:
        format: of the file.
        model: its name.
        cores: of the machine that the server had while it was measured, all instances together.
        calls: seconds of each measured call by its batch size.
        together: as in `Curve`.
        inside: as in `Curve`.
        outside: as in `Curve`.
        spread: as in `Curve`.
        race: as in `Curve`.
        handover: as in `Curve`.
        machine: the machine's name in a list of prices; empty where nobody said.
        start: seconds from the start of a server to its first answer; None where that was not measured.
        configuration: what the model was served with; None where that was not kept.
    """

    format: Literal[1]
    model: str
    cores: Count
    calls: Annotated[dict[Count, Annotated[list[Above], Field(min_length=1)]], Field(min_length=1)]
    together: Annotated[tuple[Above, ...], Field(min_length=1)] = (1.0,)
    inside: Seconds = 0.0
    outside: Seconds = 0.0
    spread: Annotated[list[Finite], Field(min_length=1)] = field(default_factory=lambda: [0.0])
    race: Annotated[float, Field(ge=0, le=1)] = 0.3
    handover: Seconds = 0.0
    machine: str = ""
    start: Seconds | None = None
    configuration: Configuration | None = None

    def curve(self) -> Curve:
        """Return the times of a call."""
        calls = {size: np.array(times) for size, times in self.calls.items()}
        spread = np.array(self.spread, np.float64)
        return Curve(calls, self.together, self.inside, self.outside, self.race, self.handover, spread)

    def document(self) -> dict[str, Any]:
        """Return the JSON form."""
        return asdict(self)


def read(path: Path) -> Measured:
    """Return what a file of measured times holds.

    Raises:
        BadInput: there is no such file, or it is none of these; it names the key.
    """
    fix = "measure the model again with: serve tune"
    try:
        return TypeAdapter(Measured).validate_python(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise BadInput("there is no such file", where=str(path), fix=fix) from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise BadInput("is not JSON", where=str(path), fix=fix) from None
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"]) or "the document"
        raise BadInput(
            f"holds no measured times of calls: {name}: {first['msg'].lower()}", where=str(path), fix=fix
        ) from None
