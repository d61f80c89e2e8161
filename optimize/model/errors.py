"""What can go wrong in the optimize room::

UsageError (2)
└── BadRecipe        a recipe with an unknown key, a wrong value or steps out of order
Refused (3)
└── GateRefused      a gate said no
BadInput (4)
├── BadWorkload      the user's file raises, is missing, or lacks what a step needs
├── BadModel         the model does not take its inputs, or returns something else than it declared
├── BadData          a batch with a wrong name, dtype or shape, or with NaN
├── BadBundle        a bundle that is incomplete, changed or of another format
├── BadGraph         an ONNX file that cannot be loaded or run, or an export that cannot be mended
└── NoEffect         a step that found nothing to change
MachineError (5)
├── BusyMachine      the machine is so busy that nothing can be measured on it
└── MissingExtra     an optional package of modelathe's is not installed
"""

from modelathe.errors import BadInput, MachineError, Refused, UsageError


def first_line(error: BaseException) -> str:
    """Return the first line of what another's error says; empty where it says nothing."""
    return (str(error).strip().splitlines() or [""])[0]


class BadRecipe(UsageError):
    """A recipe with an unknown key, a wrong value or steps out of order."""


class GateRefused(Refused):
    """A gate said no; the result stays in the run's folder and nothing was published."""


class BadWorkload(BadInput):
    """The user's file raises, is missing, or lacks what a step needs."""


class BadModel(BadInput):
    """The model does not take its inputs, or returns something else than the workload declares."""


class BadData(BadInput):
    """A batch with a wrong name, dtype or shape, or with values that are not finite."""


class BadBundle(BadInput):
    """A bundle that is incomplete, was changed, or is of another format."""


class BadGraph(BadInput):
    """An ONNX file that cannot be loaded or run, or an export that cannot be mended."""


class NoEffect(BadInput):
    """A step that found nothing to change; the message lists what it could have matched."""


class BusyMachine(MachineError):
    """The machine is so busy that a model counts as slower or faster than itself, or a load test's client is late."""


class MissingExtra(MachineError):
    """An optional package of modelathe's is not installed; `fix` is the line that installs it."""
