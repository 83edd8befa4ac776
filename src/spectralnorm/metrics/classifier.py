"""A small network that knows the ten garments of Fashion-MNIST; trained by ``tools/train_classifier.py``."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["GarmentClassifier"]


class GarmentClassifier(nn.Module):
    """Maps gray 32 x 32 images to 128 features, the mean over space of its last convolution, and ten logits.

    Small on purpose: its weights ship with the package, in half precision, and it judges 5,000 images in a few
    seconds on a laptop.
    """

    image_size = 32
    """Pixels; Fashion-MNIST's 28 with two black ones on each side."""
    channels = 1
    num_features = 128

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *_layer(1, 32, kernel_size=5, stride=2),
            *_layer(32, 64, stride=2),
            *_layer(64, 96),
            *_layer(96, self.num_features, stride=2),
        )
        self.head = nn.Linear(self.num_features, 10)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Compute features and logits.

        Args:
            images: (n, 1, 32, 32), 0 to 255.

        Returns:
            Features (n, 128) and logits (n, 10).
        """
        features = self.body(images / 127.5 - 1).mean(dim=(2, 3))
        # Dropout acts in training only.
        return features, self.head(F.dropout(features, 0.2, self.training))


def _layer(num_inputs: int, num_outputs: int, *, kernel_size: int = 3, stride: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(num_inputs, num_outputs, kernel_size, stride, kernel_size // 2, bias=False)
    return [convolution, nn.BatchNorm2d(num_outputs), nn.ReLU()]
