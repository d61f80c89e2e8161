"""The last step of an image pipeline: the model's answer `classes` [batch, classes] becomes a label and a score."""

import numpy as np
import triton_python_backend_utils as pb
from step import Refused, Step


class TritonPythonModel(Step):
    """Answers with the most probable class, by its line in `labels.txt` or its index, and its probability."""

    def start(self, folder, settings):
        """Read the labels, and whether the model says logits or probabilities."""
        self.logits = settings["scores"] == "logits"
        path = folder / "labels.txt"
        self.labels = path.read_text(encoding="utf-8").splitlines() if path.exists() else []

    def answer(self, request):
        """Return `label`, strings [batch, 1], and `score`, float32 [batch, 1], from 0 to 1."""
        classes = pb.get_input_tensor_by_name(request, "classes").as_numpy().astype(np.float64)
        if not np.isfinite(classes).all():
            raise Refused("the model's answer is not finite", pb.TritonError.INTERNAL)
        best, most = classes.argmax(1), classes.max(1, keepdims=True)
        score = 1 / np.exp(classes - most).sum(1) if self.logits else most[:, 0]
        names = [self.labels[index] if index < len(self.labels) else str(index) for index in best]
        return {
            "label": np.array([name.encode() for name in names], object)[:, None],
            "score": score.astype(np.float32)[:, None],
        }
