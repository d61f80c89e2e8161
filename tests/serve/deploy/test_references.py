"""Names, amounts, images and sources: what nothing can take is refused before anything is written."""

from typing import Any

import pytest

from modelathe.errors import UsageError
from serve.deploy import references, write


@pytest.mark.parametrize(
    ("read", "text"),
    [
        (references.image, "nvcr.io/nvidia/tritonserver:26.07-py3"),
        (references.image, f"nvcr.io/nvidia/tritonserver:25.01-py3@sha256:{'a' * 64}"),
        (references.image, "x@sha256:abc"),
        (references.source, "oci://registry.example/models:1"),
        (references.source, "pvc://Models"),
        (references.source, "pvc://models/../secret"),
        (references.source, "models"),
        (references.source, ""),
        (write.checked, "Model"),
        (write.checked, "a" * 41),
        (write.checked, "9a"),
        (write.memory, "1Gi"),
        (write.memory, "0.5Gi"),
        (write.memory, "4G"),
    ],
)
def test_a_value_that_nothing_can_take_is_refused(read: Any, text: str) -> None:
    with pytest.raises(UsageError) as failed:
        read(text)
    assert failed.value.fix


@pytest.mark.parametrize(
    ("text", "made"), [("model_repository", "model-repository"), ("9 Lives", "m-9-lives"), ("x" * 60, "x" * 40)]
)
def test_names(text: str, made: str) -> None:
    assert write.label(text) == write.checked(made) == made
    with pytest.raises(UsageError):
        write.label("___")
