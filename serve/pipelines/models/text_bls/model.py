"""A text pipeline in one model, by business logic scripting: it tokenizes `text` itself and calls the model.

The texts of all requests that share a batch here go to the model in one call, whatever their lengths.
"""

import triton_python_backend_utils as pb
from step import Step, failure, response, said
from tokens import Tokens


class TritonPythonModel(Step):
    """Tokenizes the requests of a batch, pads them to one length and answers them by one call of the model."""

    def start(self, folder, settings):
        """Load the tokenizer; the model may be loaded later."""
        self.tokens, self.model = Tokens(folder, settings), settings["model"]
        self.outputs = settings["outputs"].split(",")

    def execute(self, requests):
        """Return one response for each request, in order."""
        answers, encoded = {}, {}
        for place, request in enumerate(requests):
            try:
                encoded[place] = self.tokens.encode(request)
            except Exception as error:
                answers[place] = failure(error)
        answers.update(self._together(encoded))
        return [answers[place] for place in range(len(requests))]

    def _together(self, encoded):
        """Return the responses by place. Where the model refuses, each half is asked, so a bad text spoils no other."""
        if not encoded:
            return {}
        try:
            results = self._call([one for encodings in encoded.values() for one in encodings])
        except Exception as error:
            if len(encoded) == 1:
                return dict.fromkeys(encoded, failure(error))
            pairs, middle = list(encoded.items()), len(encoded) // 2
            return self._together(dict(pairs[:middle])) | self._together(dict(pairs[middle:]))
        answers, start = {}, 0
        for place, encodings in encoded.items():
            end = start + len(encodings)
            answers[place] = response({name: array[start:end] for name, array in results.items()})
            start = end
        return answers

    def _call(self, encodings):
        inputs = [pb.Tensor(name, array) for name, array in self.tokens.padded(encodings).items()]
        request = pb.InferenceRequest(
            model_name=self.model,
            inputs=inputs,
            requested_output_names=self.outputs,
            # The answer is cut up on the CPU, wherever the model runs.
            preferred_memory=pb.PreferredMemory(pb.TRITONSERVER_MEMORY_CPU, 0),
        )
        answer = said(request.exec())
        return {name: pb.get_output_tensor_by_name(answer, name).as_numpy() for name in self.outputs}
