"""The first step of a text pipeline: `text`, UTF-8 strings [batch, 1], becomes the token tensors of the model."""

from step import Step
from tokens import Tokens


class TritonPythonModel(Step):
    """Tokenizes each request by itself and pads it to its bucket; requests of one length share the model's batches."""

    def start(self, folder, settings):
        """Load the tokenizer."""
        self.tokens = Tokens(folder, settings)

    def answer(self, request):
        """Return ids, mask and types, as far as the model takes them, each [batch, tokens]."""
        return self.tokens.padded(self.tokens.encode(request))
