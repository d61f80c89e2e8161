import pytest

from modelathe.errors import BadInput
from modelathe.tensors import BATCH, Dim, TensorSpec
from serve.config import model_config
from serve.config.errors import BadRepository
from serve.config.target import Target

TOKENS = Dim("tokens", 1, 32, 128)
IDS = TensorSpec("input_ids", "int64", (BATCH, TOKENS), values=(0, 30521))
EMBEDDING = TensorSpec("embedding_out", "float32", (BATCH, 384))


def build(inputs=(IDS,), outputs=(EMBEDDING,), target=None):
    return model_config.build("encoder", inputs, outputs, target or Target(cores=4), [3])


def test_standard_fields() -> None:
    config = build()
    assert (config.name, config.backend, config.max_batch_size) == ("encoder", "onnxruntime", 32)
    assert list(config.input[0].dims) == [-1]
    assert list(config.output[0].dims) == [384]
    assert list(config.version_policy.specific.versions) == [3]
    assert config.HasField("dynamic_batching")
    # A queue limit makes the dynamic batcher of Triton 24.10 miss wake-ups.
    assert not config.dynamic_batching.HasField("default_queue_policy")
    assert [(group.count, group.kind) for group in config.instance_group] == [(1, 2)]  # KIND_CPU
    assert config.parameters["intra_op_thread_count"].string_value == "4"
    assert config.parameters["session.force_spinning_stop"].string_value == "1"
    assert not config.runtime


def test_warm_up_covers_both_ends_of_the_batch_with_valid_values() -> None:
    samples = build().model_warmup
    assert [sample.batch_size for sample in samples] == [1, 32]
    assert all(list(sample.inputs["input_ids"].dims) == [32] for sample in samples)
    assert all(sample.inputs["input_ids"].zero_data for sample in samples)


@pytest.mark.parametrize(
    ("maximum", "batch", "expected"), [(64, (1, 32), 32), (64, (1, 256), 64), (8, (1, 32), 8), (1, (1,), 1)]
)
def test_largest_batch(maximum: int, batch: tuple[int, ...], expected: int) -> None:
    axis = Dim("batch", 1, 1, maximum)
    config = build(
        [TensorSpec("x", "float32", (axis, 4))], [TensorSpec("y", "float32", (axis, 3))], Target(batch=batch)
    )
    assert config.max_batch_size == expected


def test_text_round_trip() -> None:
    config = build()
    assert model_config.parse(model_config.text(config)) == config


def test_unbatched_model_says_so_in_the_text() -> None:
    config = build([TensorSpec("x", "float32", (4,))], [TensorSpec("y", "float32", (Dim("n", 1, 2, 4),))])
    written = model_config.text(config)
    assert "max_batch_size: 0" in written
    assert model_config.parse(written) == config
    assert not config.HasField("dynamic_batching")
    assert list(config.output[0].dims) == [-1]


def test_one_number_per_sample_is_carried_as_one_element() -> None:
    config = build([IDS], [TensorSpec("label", "int64", (BATCH,))])
    assert list(config.output[0].dims) == [1]
    assert config.output[0].HasField("reshape")
    assert list(config.output[0].reshape.shape) == []
    assert model_config.parse(model_config.text(config)) == config


def test_a_single_number_of_an_unbatched_model_has_one_dim() -> None:
    config = build([TensorSpec("x", "float32", ())], [TensorSpec("total", "float32", ())])
    assert (list(config.input[0].dims), list(config.output[0].dims)) == ([1], [1])
    # Triton takes no empty reshape without a batch.
    assert not config.output[0].HasField("reshape")


def test_half_batched_model_is_refused_by_name() -> None:
    with pytest.raises(BadInput, match="table lack"):
        build([IDS, TensorSpec("table", "float32", (3, 3))])


def test_cuda_target_asks_for_the_gpu() -> None:
    assert build(target=Target(device="cuda")).instance_group[0].kind == 1  # KIND_GPU


def test_text_that_is_no_configuration() -> None:
    with pytest.raises(BadRepository, match="not a Triton model configuration"):
        model_config.parse("nme: 'x'")
