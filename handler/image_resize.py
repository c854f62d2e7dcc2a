"""The geometry of the model's input: how a photo is resized and cropped. Like
`handler.image_decode`, this module does not import torch."""

from typing import NamedTuple

from PIL import Image

# Left, top, right, bottom.
Box = tuple[float, float, float, float]


class Resizing(NamedTuple):
    """How a photo is resized: to a square of `side`, or with `crop` by its short side, and cropped
    to its middle of `image_size`. The geometry is that of Hugging Face, which resizes first."""

    image_size: int
    side: int
    crop: bool
    bicubic: bool

    def box(self, size: tuple[int, int]) -> Box:
        """The region of a photo of this size that is kept, in pixels of the photo."""
        sides = []
        for length in size:
            resized = self.side * length // min(size) if self.crop else self.side
            start = (resized - self.image_size) // 2
            end = start + self.image_size
            sides.append((start * length / resized, end * length / resized))
        (left, right), (top, bottom) = sides
        return left, top, right, bottom

    def apply(self, image: Image.Image) -> Image.Image:
        # Cropped before the resize, since a strip of 1 x 60,000 would grow to S x 60,000 S.
        filter = Image.Resampling.BICUBIC if self.bicubic else Image.Resampling.BILINEAR
        return image.resize((self.image_size,) * 2, filter, box=self.box(image.size))
