"""The last step of an image pipeline: the model's `logits` [batch, classes] become a label and its score."""

import numpy as np
import triton_python_backend_utils as pb
from step import Refused, Step


class TritonPythonModel(Step):
    """Answers with the class of the largest logit, by its line in `labels.txt` or its index, and its softmax."""

    def start(self, folder, settings):
        """Read the labels."""
        path = folder / "labels.txt"
        self.labels = path.read_text(encoding="utf-8").splitlines() if path.exists() else []

    def answer(self, request):
        """Return `label`, strings [batch, 1], and `score`, float32 [batch, 1], from 0 to 1."""
        logits = pb.get_input_tensor_by_name(request, "logits").as_numpy().astype(np.float64)
        if not np.isfinite(logits).all():
            raise Refused("the model's answer is not finite", pb.TritonError.INTERNAL)
        best = logits.argmax(1)
        score = 1 / np.exp(logits - logits.max(1, keepdims=True)).sum(1)
        names = [self.labels[index] if index < len(self.labels) else str(index) for index in best]
        return {
            "label": np.array([name.encode() for name in names], object)[:, None],
            "score": score.astype(np.float32)[:, None],
        }
