"""Largest batch and threads from a measured curve."""

from serve.config import settings
from serve.config.curve import fill
from serve.config.settings import Settings

GPU = {1: 1.0, 8: 1.2, 32: 2.0, 64: 3.9, 128: 7.9}


def test_a_gpu_takes_the_smallest_batch_that_is_nearly_best() -> None:
    # 64 brings 2.6 % more than 32, which is not worth twice the time. Batches gain much, and still nothing waits.
    assert fill(Settings(), GPU, "cuda") == Settings(max_batch=32)


def test_where_batching_brings_little_batches_stay_small() -> None:
    assert fill(Settings(), {1: 1.0, 8: 6.0, 32: 25.0}, "cuda") == Settings(max_batch=8)


def test_a_small_model_gets_one_thread() -> None:
    assert fill(Settings(), {1: 0.99, 32: 20.0}, "cpu") == Settings(threads=1)
    assert fill(Settings(), {1: 1.0, 32: 20.0}, "cpu") == Settings()
    # A batch of 8 that is so short has a shorter call of batch 1.
    assert fill(Settings(), {8: 0.9}, "cpu") == Settings(threads=1)
    # Threads of the CPU are nothing to a graph on a GPU.
    assert fill(Settings(), {1: 0.1}, "cuda").threads is None


def test_what_was_asked_for_stays() -> None:
    asked = Settings(max_batch=16, queue_delay_us=7, instances=2, threads=2)
    assert fill(asked, GPU, "cuda") == asked
    assert fill(asked, {1: 0.1}, "cpu") == asked


def test_no_delay_can_be_asked_for() -> None:
    asked = settings.gather(None, ["queue_delay_us=0"], {})
    assert asked.document() == {"queue_delay_us": 0}
    assert fill(settings.read(asked.document(), "lineage"), GPU, "cuda").queue_delay_us == 0
