"""Scheduling: settings of the dynamic batcher that do otherwise than who writes them expects: rules of `lint`.

What the batcher does is read in Triton's source code, and `serve.simulate` does it as well.
"""

from collections.abc import Iterator

from tritonclient.grpc.model_config_pb2 import ModelInstanceGroup

from serve.config import releases
from serve.repository.finding import Finding, Subject
from serve.simulate.configuration import Configuration, stated

KEEPS_COUNT = "26.08"
"""The first release that may count its waiting instances rightly; that it is this one has not been seen yet."""
UNORDERED = "25.09"
"""The first release whose instances answer each in its own order."""


def _delays(subject: Subject, batching: Configuration) -> Iterator[Finding]:
    """With fixed shapes requests that come while a call runs do not wake the batcher, and miss the next batch."""
    if batching.delay and batching.fixed_shapes and batching.prefetches and batching.max_batch > 1:
        yield subject.warning(
            "with fixed dims a queue delay adds up to the time of one call: who comes during a call misses the next",
            "set max_queue_delay_microseconds to 0; under load batches form all the same",
        )


def _starves(subject: Subject, batching: Configuration) -> Iterator[Finding]:
    """Batches that are merged are counted as two waiting instances, until none seems to wait."""
    release = subject.image or releases.CARRIED
    several = batching.instances > 1 or any(
        group.kind == ModelInstanceGroup.KIND_GPU and not group.gpus for group in subject.config.instance_group
    )
    if batching.delay and not batching.prefetches and several and release < KEEPS_COUNT:
        yield subject.error(
            f"a queue policy and a queue delay with several instances: Triton {release} answers ever slower, until it "
            "is loaded again",
            "set max_queue_delay_microseconds to 0, or leave the queue's timeout, size and priorities out",
        )


def _stalls(subject: Subject, batching: Configuration) -> Iterator[Finding]:
    """Without batches formed ahead the batcher may look for an idle instance too early, and then sleeps."""
    if not batching.prefetches:
        yield subject.warning(
            "with a queue policy no batch is formed ahead: who comes during a call may wait for the next request, half "
            "a second at most",
            "leave the queue's timeout, size and priorities out",
        )


def _larger(subject: Subject, batching: Configuration) -> Iterator[Finding]:
    """A scheduled batch of the largest preferred size takes one more request."""
    largest = batching.sizes[-1]
    if batching.delay and largest < batching.max_batch:
        yield subject.warning(
            f"with a queue delay batches of the largest preferred size, {largest}, grow beyond it",
            f"add {batching.max_batch}, max_batch_size, to preferred_batch_size",
        )


def _ignored(subject: Subject, batching: Configuration) -> Iterator[Finding]:
    """A request's own timeout counts only where it is below a default that is not 0."""
    if any(level.override and not level.timeout for level in batching.levels):
        yield subject.warning(
            "allow_timeout_override without default_timeout_microseconds: the timeouts of requests are ignored",
            "set default_timeout_microseconds to the longest that a request may ask for, or leave the override out",
        )


def _unordered(subject: Subject, batching: Configuration) -> Iterator[Finding]:
    """Since 25.09 an answer gets its place when it is there, no longer when its request goes into a batch."""
    ordered = subject.config.dynamic_batching.preserve_ordering
    if ordered and batching.instances > 1 and (subject.image or releases.CARRIED) >= UNORDERED:
        yield subject.warning(
            f"preserve_ordering does not order the answers of several instances in Triton {subject.image}",
            "set count to 1, or leave preserve_ordering out and tell answers by their ids",
        )


RULES = (_delays, _starves, _stalls, _larger, _ignored, _unordered)


def findings(subject: Subject) -> Iterator[Finding]:
    """Yield what each rule finds in a model with a dynamic batcher that forms batches."""
    config = subject.config
    if config.HasField("dynamic_batching") and config.max_batch_size:
        batching = stated(config)
        for rule in RULES:
            yield from rule(subject, batching)
