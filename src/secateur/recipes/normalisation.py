"""How stored pixels become the input of a model."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from secateur.errors import DataError

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Normalisation:
    """What turns stored pixels into the model's input: `(pixel * scale - mean) / std`, per channel.

    Args:
        mean: one number per channel, on the scaled pixels.
        std: one number per channel, on the scaled pixels.
        scale: 1/255 maps pixels to 0..1; 1 leaves them as they are.

    >>> import torch
    >>> half = Normalisation((0.5,), (0.5,))
    >>> half(torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1)).flatten()
    tensor([-1.,  1.])
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    scale: float = 1 / 255

    def __call__(self, images: "Tensor", memory_format: "torch.memory_format | None" = None) -> "Tensor":
        """Images (n, c, h, w) of any dtype, as float32 of the same shape and on the same device."""
        import torch

        std = torch.tensor(self.std).view(-1, 1, 1)
        factor = (self.scale / std).to(images.device)
        offset = (torch.tensor(self.mean).view(-1, 1, 1) / std).to(images.device)
        return (
            images.to(torch.float32, memory_format=memory_format or torch.contiguous_format)
            .mul(factor)
            .sub_(offset)
        )

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `MEAN/STD`, one number per channel, or `imagenet`.

        Raises:
            DataError: it is neither.

        >>> Normalisation.parse("0.5/0.25")
        Normalisation(mean=(0.5,), std=(0.25,), scale=0.00392156862745098)
        """
        if text == "imagenet":
            return cls((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        try:
            mean, std = (tuple(float(number) for number in part.split(",")) for part in text.split("/"))
        except ValueError:
            mean, std = (), ()
        if not mean or len(mean) != len(std) or not all(s > 0 for s in std):
            raise DataError(
                f"normalisation {text!r}: expected one mean and one std above 0 for each channel, such as "
                f"0.5,0.5,0.5/0.2,0.2,0.2, or: imagenet"
            )
        return cls(mean, std)
