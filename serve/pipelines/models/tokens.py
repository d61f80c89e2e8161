"""Tokens: texts become rows of ids of one length. It lies beside `model.py` in the version's folder.

In NVIDIA's container the library comes with: pip install tokenizers
"""

import numpy as np
import triton_python_backend_utils as pb
from step import Refused
from tokenizers import Tokenizer

PADDING = ("[PAD]", "<pad>")


class Tokens:
    """A tokenizer and the lengths that its rows may have.

    Args:
        folder: where `tokenizer.json` is.
        settings: `ids`, `mask` and `types` are the tensors to make, the last two where the model takes them; `dtype` is
            theirs, `buckets` are the lengths, ascending; the last is where a text is cut.
    """

    def __init__(self, folder, settings):
        self.names = {role: settings[role] for role in ("ids", "mask", "types") if role in settings}
        self.dtype, self.buckets = settings["dtype"], [int(size) for size in settings["buckets"].split(",")]
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        padding, truncation = self.tokenizer.padding or {}, self.tokenizer.truncation or {}
        found = (self.tokenizer.token_to_id(token) for token in PADDING)
        self.padding = {
            "direction": padding.get("direction", "right"),
            "pad_id": padding.get("pad_id", next((number for number in found if number is not None), 0)),
            "pad_type_id": padding.get("pad_type_id", 0),
        }
        marks = self.tokenizer.num_special_tokens_to_add(False)
        if marks >= self.buckets[-1]:
            raise ValueError(f"{self.buckets[-1]} tokens leave no room for a text beside {marks} special ones")
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(self.buckets[-1], direction=truncation.get("direction", "right"))

    def encode(self, request):
        """Return an encoding for each text of the request's `text`, strings [batch, 1]; refuses what is not UTF-8."""
        texts = []
        for number, data in enumerate(pb.get_input_tensor_by_name(request, "text").as_numpy().ravel(), 1):
            try:
                texts.append(data.decode())
            except UnicodeDecodeError:
                raise Refused(f"text {number} of the request is not UTF-8") from None
        return self.tokenizer.encode_batch(texts)

    def padded(self, encodings):
        """Return the tensors by name, each [batch, tokens]: the shortest of the buckets that holds all of them."""
        longest = max(len(encoding) for encoding in encodings)
        length = next(size for size in self.buckets if size >= longest)
        for encoding in encodings:
            encoding.pad(length, **self.padding)
        made = {
            "ids": [encoding.ids for encoding in encodings],
            "mask": [encoding.attention_mask for encoding in encodings],
            "types": [encoding.type_ids for encoding in encodings],
        }
        return {name: np.array(made[role], self.dtype) for role, name in self.names.items()}
