"""Describe: every setting that a configuration holds is read back in words."""

import pytest

from serve.config import describe
from tests.serve.config.test_golden import CASES, built

SAID = {
    "cpu": {"instances": "1 on the CPU", "batching": "up to 32, of what waits already", "warm-up": "1, 32"},
    "cpu_openvino": {"runs in": "openvino"},
    "cpu_shared": {
        "instances": "2 on the CPU, holding 1 of memory, of weight 2",
        "batching": "up to 32, a request waits up to 500 µs for others",
        "cache": "answers that were given before come from memory",
    },
    "cpu_limited": {
        "queue": "64 requests, which go to the end after 250 ms",
        "priorities": "1 to 3, 3 unless asked",
        "NaN, infinity": "refused",
    },
    "cpu_unbatched": {"batching": "none: one request at a time"},
    "cpu_sequence": {
        "batching": "up to 32, of different sequences",
        "sequences": "end after 30 s without a request; 256 at a time in each instance, one more is refused",
        "state": "h_next → h",
    },
    "cuda": {"instances": "1 on each GPU", "copies": "through pinned memory"},
    "cuda_two_gpus": {"instances": "2 on each GPU 0, 1"},
    "cuda_tensorrt": {"batching": "up to 64, of what waits already; 8, 64 run at once"},
}


@pytest.mark.parametrize("name", CASES)
def test_a_configuration_in_words(name: str) -> None:
    said = dict(describe.lines(built(name)))
    assert {heading: said.get(heading) for heading in SAID[name]} == SAID[name]


def test_an_accelerator_in_words() -> None:
    said = dict(describe.lines(built("cuda_tensorrt")))["accelerator"]
    assert said.startswith("tensorrt: precision_mode=FP16, trt_cuda_graph_enable=1, trt_engine_cache_enable=1")
