"""Cache: for which models Triton's response cache answers rightly.

Triton 24.10 knows a request again by the model, its version, and the names and bytes of its inputs. Neither their
shapes nor which outputs are asked for is looked at, nor what a model remembers.
"""

from tritonclient.grpc.model_config_pb2 import ModelConfig

FIX = (
    "leave the cache out; it is for one output, and inputs with one dim that changes: "
    "the batch, or with max_batch = 1 another"
)


def refusal(config: ModelConfig) -> str | None:
    """Return why the cache may answer for a model with another request's answer, or None."""
    if not config.response_cache.enable:
        return None
    batched = config.max_batch_size > 1
    loose = [tensor.name for tensor in config.input if batched + sum(dim < 0 for dim in tensor.dims) > 1]
    reasons = {
        "a model that remembers answers the same request differently": config.HasField("sequence_batching"),
        f"requests of other shapes may have the same bytes in {', '.join(loose)}": loose,
        "it would answer a request for one output with another": len(config.output) > 1,
        "it keeps one response of many": config.model_transaction_policy.decoupled,
    }
    return next((f"cache: {reason}" for reason, holds in reasons.items() if holds), None)
