"""One instance of a model in a Python-based Triton backend: what the backends of all runtimes have in common.

It lies beside each backend's `model.py` in the server's environment, which imports it from there.

The state of a sequence is remembered here, by its id, until it ends: the carried server hands a Python-based backend
the initial state with every request.
"""

import json
import re
import time
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb
from graph import idle_seconds, mismatch, refusal, remembered, unfed

NONFINITE = "modelathe.nonfinite"
"""The parameter that makes an instance refuse NaN and infinity."""
SLOTS = "modelathe.slots"
"""The parameter that says how many sequences an instance takes at a time."""


class NoSlot(Exception):
    """A sequence has no slot here: others have them all, or it has lost its own."""


class Instance:
    """What Triton calls: `initialize` once, then `execute`. The subclass of a runtime has these members.

    `load(path, config, processor, device)` loads the file and returns the graph's inputs and outputs, both as
    `mismatch` takes them; processor is CPU or GPU. `optional` then names the inputs that have a default in the graph.
    `run(names, feed)` returns the outputs of these names by name.
    `public_text(error)` is what a client may read of an exception: one sentence, without paths or code.
    `default_filename` is the file where config.pbtxt names none.
    """

    optional = ()

    def initialize(self, args):
        """Load the version's file; raises TritonModelException for anything that would answer wrongly."""
        config = json.loads(args["model_config"])
        # Those of modelathe 0.1 were called lathe.*.
        stated = config.get("parameters", {}).items()
        config["parameters"] = {re.sub(r"^lathe\.", "modelathe.", key): entry for key, entry in stated}
        reason = refusal(config, np.__version__)
        if reason:
            raise pb.TritonModelException(reason)
        path = Path(args["model_repository"]) / args["model_version"]
        path /= config.get("default_model_filename") or self.default_filename
        processor = args["model_instance_kind"].replace("KIND_", "")
        try:
            graph = self.load(str(path), config, processor, int(args["model_instance_device_id"] or 0))
        except pb.TritonModelException:
            raise
        except Exception as error:
            pb.Logger.log_error(f"{path}: {error}")
            raise pb.TritonModelException(f"{path.name} cannot be loaded: {self.public_text(error)}") from None
        reasons = [mismatch(config, kind, tensors) for kind, tensors in zip(("input", "output"), graph, strict=True)]
        reason = next(filter(None, [*reasons, unfed(config, graph[0], self.optional)]), None)
        if reason:
            raise pb.TritonModelException(reason)
        self.batching = config["max_batch_size"] > 0
        self.single = [name for name, (_, shape) in graph[0].items() if shape is not None and not len(shape)]
        self.finite_only = NONFINITE in config.get("parameters", {})
        self.slots = int(config.get("parameters", {}).get(SLOTS, {"string_value": 0})["string_value"])
        controls, self.states = remembered(config)
        self.memory, self.idle = {}, idle_seconds(config)
        self.inputs = [tensor["name"] for tensor in config["input"]] + controls + list(self.states.values())
        self.outputs = [tensor["name"] for tensor in config["output"]]

    def execute(self, requests):
        """Answer `requests`, in as few runs of the model as they can share; one answer each, in order."""
        answers, groups = [None] * len(requests), {}
        for place, request in enumerate(requests):
            try:
                self._admit(request)
                feed = self._feed(request)
            except Exception as error:
                answers[place] = self._refusal(request, error)
            else:
                # Requests with and without an optional input do not go together.
                alike = tuple(feed) if self.batching else place
                groups.setdefault(alike, []).append((place, request, feed))
        for group in groups.values():
            for (place, *_), answer in zip(group, self._answers(group), strict=True):
                answers[place] = answer
        return answers

    def _answers(self, asked):
        """Answer requests in one run. Where it fails, each half is run, so a bad one in N costs 2 log2 N runs more.

        `asked` has a tuple for each: something of the caller's, the request, and its arrays by name.
        """
        try:
            return self._run(asked)
        except Exception as error:
            if len(asked) == 1:
                return [self._refusal(asked[0][1], error)]
            pb.Logger.log_info(f"a batch of {len(asked)} requests failed, its halves are run: {error}")
            middle = len(asked) // 2
            return self._answers(asked[:middle]) + self._answers(asked[middle:])

    def _run(self, asked):
        """Run the model once and return one answer for each request; raises what the model raises."""
        feeds = [feed for _, _, feed in asked]
        wanted = [set(request.requested_output_names()) for _, request, _ in asked]
        names = [name for name in self.outputs if any(name in some for some in wanted)]
        if len(feeds) == 1:
            parts = [self.run([*names, *self.states], feeds[0])]
        else:
            batch = {name: np.concatenate([feed[name] for feed in feeds]) for name in feeds[0]}
            results = self.run([*names, *self.states], batch)
            ends = np.cumsum([len(next(iter(feed.values()))) for feed in feeds])
            if any(len(result) != ends[-1] for result in results.values()):
                # One output for the whole batch, no row for each sample: no half would be any better.
                return [answer for one in asked for answer in self._answers([one])]
            starts = [0, *ends[:-1]]
            parts = [
                {name: array[start:end] for name, array in results.items()}
                for start, end in zip(starts, ends, strict=True)
            ]
        answers = []
        for (_, request, _), some, part in zip(asked, wanted, parts, strict=True):
            self._remember(request, part)
            answers.append(self._response({name: part[name] for name in names if name in some}))
        return answers

    def _refusal(self, request, error):
        """Return the answer for a request that failed: one plain sentence, the rest stays in the server's log."""
        pb.Logger.log_error(f"a request failed: {error}")
        if request.flags() & pb.TRITONSERVER_REQUEST_FLAG_SEQUENCE_START:
            self.memory.pop(request.correlation_id(), None)  # the sequence has not begun
        code = pb.TritonError.INTERNAL
        if isinstance(error, NoSlot):
            code = pb.TritonError.UNAVAILABLE
        elif "INVALID_ARGUMENT" in str(error) or isinstance(error, ValueError):
            code = pb.TritonError.INVALID_ARG
        return pb.InferenceResponse(
            error=pb.TritonError(f"the model refused the request: {self.public_text(error)}", code)
        )

    def _feed(self, request):
        tensors = {name: pb.get_input_tensor_by_name(request, name) for name in self.inputs}
        feed = {name: tensor.as_numpy() for name, tensor in tensors.items() if tensor is not None}
        for name in feed.keys() & self.single:
            feed[name] = feed[name].reshape(())
        if self.finite_only:
            for name, array in feed.items():
                if array.dtype.kind == "f" and not np.isfinite(array).all():
                    raise ValueError(f"the input {name} holds NaN or infinity")
        if self.states and not request.flags() & pb.TRITONSERVER_REQUEST_FLAG_SEQUENCE_START:
            feed.update(self.memory.get(request.correlation_id(), (0, {}))[1])
        return feed

    def _admit(self, request):
        """Give a sequence that begins a slot; raises NoSlot where others have them all, or one that goes on has none.

        One that is over with its first request needs none.
        """
        flags, sequence, now = request.flags(), request.correlation_id(), time.monotonic()
        if not flags & pb.TRITONSERVER_REQUEST_FLAG_SEQUENCE_START:
            # It was refused when it began, or this process is a new one: its state would be the first again.
            if (self.states or self.slots) and sequence and sequence not in self.memory:
                raise NoSlot("this sequence has no slot here; begin it again")
            return
        if not self.slots or flags & pb.TRITONSERVER_REQUEST_FLAG_SEQUENCE_END:
            return
        self.memory.pop(sequence, None)
        if sum(now - last <= self.idle for last, _ in self.memory.values()) >= self.slots:
            raise NoSlot(f"all {self.slots} slots for sequences are taken; begin again when one has ended")
        self.memory[sequence] = now, {}

    def _remember(self, request, results):
        """Keep a sequence's state until its end: the server hands a Python backend the initial one each time."""
        if not (self.states or self.slots):
            return
        sequence, now = request.correlation_id(), time.monotonic()
        self.memory.pop(sequence, None)
        if sequence and not request.flags() & pb.TRITONSERVER_REQUEST_FLAG_SEQUENCE_END:
            self.memory[sequence] = now, {source: results[output].copy() for output, source in self.states.items()}
        # The server forgets a sequence without requests and tells nobody. The oldest are first.
        while self.memory and now - next(iter(self.memory.values()))[0] > 2 * self.idle:
            del self.memory[next(iter(self.memory))]

    def _response(self, arrays):
        return pb.InferenceResponse([pb.Tensor(name, np.atleast_1d(array)) for name, array in arrays.items()])
