"""What can go wrong in the serve room::

Refused (3)
└── CanaryRefused    a version is not like the one that it is to replace
BadInput (4)
└── BadRepository    the model repository, or a file in it, cannot be used
    └── ModelRefused     the server says so of a model
MachineError (5)
├── NotInstalled     the server's own environment is missing or broken
├── PortTaken        another program listens on a port that was asked for
└── ServerFailed     tritonserver died, refused an order, or did not become ready in time
    ├── NoAnswer        it answers nothing any more
    └── StillLoading    it has not refused the model, but is not done with it
"""

from modelathe.errors import BadInput, MachineError, Refused


class CanaryRefused(Refused):
    """A version is not like the one that it is to replace."""


class BadRepository(BadInput):
    """The model repository, or a file in it, cannot be used."""


class ModelRefused(BadRepository):
    """The server does not load a model; `what` holds its own words."""


class NotInstalled(MachineError):
    """The server's own environment is missing or broken."""


class PortTaken(MachineError):
    """Another program listens on a port that was asked for."""


class ServerFailed(MachineError):
    """The server died, refused an order, has no memory for a model, or did not become ready in time."""


class NoAnswer(ServerFailed):
    """The server was asked for something and gave no answer; what became of it is not known."""


class StillLoading(ServerFailed):
    """The server was asked to load or unload a model, and was not done in time; it goes on with it."""
