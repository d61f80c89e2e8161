"""What the Python models of all pipelines have in common. It lies beside each `model.py` in the version's folder.

They run in Triton's Python backend, in our server's environment or in NVIDIA's container, and import nothing of
modelathe.
"""

import json
from pathlib import Path

import triton_python_backend_utils as pb


class Refused(Exception):
    """A request that gets no answer; the text, one plain sentence, is what its client reads.

    The code is Triton's, which Python knows only once the model runs: INVALID_ARG unless given.
    """

    def __init__(self, text, code=None):
        super().__init__(text)
        self.code = code


def failure(error):
    """Return the response to a request that failed; what only the log may know stays there."""
    if not isinstance(error, Refused):
        pb.Logger.log_error(f"a request failed: {type(error).__name__}: {error}")
        error = Refused("this step of the pipeline failed; the server's log says why", pb.TritonError.INTERNAL)
    code = pb.TritonError.INVALID_ARG if error.code is None else error.code
    return pb.InferenceResponse(error=pb.TritonError(str(error), code))


def response(arrays):
    """Return the response with these arrays by name."""
    return pb.InferenceResponse([pb.Tensor(name, array) for name, array in arrays.items()])


def said(response):
    """Raise what another model said instead of an answer."""
    if response.has_error():
        raise Refused(response.error().message(), response.error().code())
    return response


class Step:
    """What Triton calls: `initialize` once, then `execute`. A step has these members.

    `start(folder, settings)` loads what lies in the version's folder; settings are the configuration's parameters.
    `answer(request)` returns the outputs by name, or raises `Refused`.
    """

    def initialize(self, args):
        """Start the step; raises TritonModelException with one sentence if it cannot."""
        parameters = json.loads(args["model_config"]).get("parameters", {})
        folder = Path(args["model_repository"]) / args["model_version"]
        try:
            self.start(folder, {key: entry["string_value"] for key, entry in parameters.items()})
        except Exception as error:
            pb.Logger.log_error(f"{folder}: {error}")
            raise pb.TritonModelException(f"this step of the pipeline does not start: {error}") from None

    def execute(self, requests):
        """Answer each request by itself, so that a bad one does not spoil its batch."""
        return [self._alone(request) for request in requests]

    def _alone(self, request):
        try:
            return response(self.answer(request))
        except Exception as error:
            return failure(error)
