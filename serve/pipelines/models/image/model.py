"""The first step of an image pipeline: `image`, one JPEG or PNG file for each sample, becomes the model's pixels.

In NVIDIA's container the library comes with: pip install pillow
"""

from io import BytesIO

import numpy as np
import triton_python_backend_utils as pb
from PIL import Image, ImageOps
from step import Refused, Step

MOST_PIXELS = 50_000_000
"""A small file can claim to be a huge image, and would take the server's memory."""
MODES = {"gray": "L", "rgb": "RGB"}


class TritonPythonModel(Step):
    """Decodes, turns upright, resizes and normalizes: (pixel / scale - mean) / std."""

    def start(self, _folder, settings):
        """Read what the model wants; `layout` is HW, CHW or HWC."""
        self.mode, self.size = MODES[settings["mode"]], (int(settings["width"]), int(settings["height"]))
        self.dtype, self.layout = settings["dtype"], settings["layout"]
        self.scale = float(settings["scale"])
        self.mean, self.std = (np.array(settings[key].split(","), np.float32) for key in ("mean", "std"))

    def answer(self, request):
        """Return `pixels` [batch, *layout] for the request's `image` [batch, 1]."""
        files = pb.get_input_tensor_by_name(request, "image").as_numpy().ravel()
        return {"pixels": np.stack([self._pixels(number, data) for number, data in enumerate(files, 1)])}

    def _pixels(self, number, data):
        pixels = np.asarray(self._decoded(number, data), np.float32)
        pixels = pixels.reshape(*pixels.shape[:2], -1) / self.scale
        pixels = ((pixels - self.mean) / self.std).astype(self.dtype)
        return {"HWC": pixels, "CHW": pixels.transpose(2, 0, 1), "HW": pixels[:, :, 0]}[self.layout]

    def _decoded(self, number, data):
        which = f"image {number} of the request"
        try:
            with Image.open(BytesIO(data), formats=("JPEG", "PNG")) as image:
                if image.width * image.height > MOST_PIXELS:
                    raise Refused(f"{which} has {image.width} x {image.height} pixels; {MOST_PIXELS} are the most")
                if image.mode.startswith(("I", "F")):
                    raise Refused(f"{which} has more than 8 bits a channel")
                # A camera held upright writes a lying image and says so beside it.
                upright = ImageOps.exif_transpose(image)
                return upright.convert(self.mode).resize(self.size, Image.Resampling.BILINEAR)
        except Refused:
            raise
        except Exception as error:  # Pillow's decoders have no common class for what they cannot read
            pb.Logger.log_info(f"{which}: {type(error).__name__}: {error}")
            raise Refused(f"{which} is not a JPEG or PNG file that can be read") from None
