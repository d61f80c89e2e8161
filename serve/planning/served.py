"""Served: what a model's configuration in the repository says to the scheduler, and what of it a plan leaves out."""

from collections.abc import Iterator

from tritonclient.grpc.model_config_pb2 import ModelConfig

from modelathe.errors import BadInput
from serve.simulate.configuration import Configuration, stated


def configuration(config: ModelConfig) -> Configuration:
    """Return the configuration of a model that is served alone.

    Raises:
        BadInput: it is an ensemble, or a model that remembers.
    """
    for kind in ("ensemble_scheduling", "sequence_batching"):
        if config.HasField(kind):
            raise BadInput(
                f"its {kind.replace('_', ' ')} is not simulated",
                where=config.name,
                fix="plan a model that is asked alone",
            )
    return stated(config)


def plain(configuration: Configuration) -> bool:
    """Return whether an instance that is free takes what waits, up to the largest batch, and nothing else happens."""
    if not configuration.dynamic:
        return configuration.prefetches
    return configuration.prefetches and not configuration.delay and configuration.sizes == (configuration.max_batch,)


def limited(configuration: Configuration) -> bool:
    """Return whether a request may be refused: the queue has a size, or waiting a limit."""
    return any(level.size or (level.timeout and not level.delayed) for level in configuration.levels)


def left_out(configuration: Configuration) -> Iterator[str]:
    """Yield what the configuration says and a balancer that looks at the load is simulated without."""
    if configuration.delay:
        yield f"a delay of {configuration.delay * 1e6:,.0f} µs is planned as none: see what `serve check` says of it"
    if configuration.preferred and configuration.preferred != (configuration.max_batch,):
        yield "preferred batch sizes are planned as none"
    if len(configuration.levels) > 1:
        yield "priorities are planned as one level"
    if limited(configuration):
        yield "limits of the queue are not simulated: requests wait instead of being refused"
