"""Train the classifier that the metrics see garments through, on Fashion-MNIST's 60,000 training images.

    python tools/train_classifier.py FOLDER_WITH_THE_FOUR_IDX_GZ_FILES [--out src/spectralnorm/assets/classifier]

Writes ``classifier.safetensors``: the weights in half precision, and in the metadata how they were made and how many of
the 10,000 test images they name right. The test images are looked at once, after training, so nothing was chosen by
them. The same seed on the same machine gives the same weights.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from spectralnorm.gan.data.idx import read_idx
from spectralnorm.metrics.classifier import GarmentClassifier

BATCH_SIZE = 128
LEARNING_RATE = 4e-3
WEIGHT_DECAY = 0.02
MAX_SHIFT = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder with the four original .gz files")
    parser.add_argument("--out", type=Path, default=Path("src/spectralnorm/assets/classifier"))
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    images, labels = read_images(arguments.source, "train")
    classifier = train(images, labels, epochs=arguments.epochs, seed=arguments.seed)
    state = classifier.state_dict()
    # What is measured is what is shipped: the rounded weights.
    weights = {name: value.half().contiguous() for name, value in state.items() if value.is_floating_point()}
    classifier.load_state_dict(weights, strict=False)
    correct = accuracy(classifier, *read_images(arguments.source, "t10k"))

    arguments.out.mkdir(parents=True, exist_ok=True)
    file = arguments.out / "classifier.safetensors"
    metadata = {
        "trained_on": "Fashion-MNIST, 60,000 training images, zero-padded to 32 x 32",
        "test_accuracy": f"{correct:.4f}",
        "epochs": str(arguments.epochs),
        "seed": str(arguments.seed),
        "torch": torch.__version__,
    }
    save_file(weights, file, metadata=metadata)
    print(f"{file}: {file.stat().st_size:,} bytes, {correct:.2%} of the test images right")


def read_images(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    """Images uint8 (n, 1, 32, 32) and labels int64 (n,)."""
    images = torch.tensor(read_idx(folder / f"{part}-images-idx3-ubyte.gz"))
    labels = torch.tensor(read_idx(folder / f"{part}-labels-idx1-ubyte.gz"))
    return F.pad(images, (2, 2, 2, 2))[:, None], labels.long()


def train(images: Tensor, labels: Tensor, *, epochs: int, seed: int) -> GarmentClassifier:
    torch.manual_seed(seed)
    classifier = GarmentClassifier().to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    optimizer = torch.optim.AdamW(classifier.parameters(), weight_decay=WEIGHT_DECAY)
    num_batches = len(images) // BATCH_SIZE
    for epoch in range(epochs):
        began, total_loss = time.perf_counter(), 0.0
        order = torch.randperm(len(images))
        for index in range(num_batches):
            chosen = order[index * BATCH_SIZE : (index + 1) * BATCH_SIZE]
            optimizer.param_groups[0]["lr"] = learning_rate((epoch + index / num_batches) / epochs)
            _, logits = classifier(augment(images[chosen]))
            loss = F.cross_entropy(logits, labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total_loss += loss.item()
        seconds = time.perf_counter() - began
        print(f"epoch {epoch + 1}/{epochs}  loss {total_loss / num_batches:.4f}  {seconds:.0f} s", flush=True)
    return classifier


def learning_rate(progress: float) -> float:
    """Warm up over the first fifth, then fall along a cosine; ``progress`` runs from 0 to 1."""
    if progress < 0.2:
        return LEARNING_RATE * progress / 0.2
    return LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * (progress - 0.2) / 0.8))


def augment(images: Tensor) -> Tensor:
    """Mirror half of the images, and move each by up to two pixels either way; float32."""
    num, _, _, size = images.shape
    # The margin is black, so what leaves on one side enters black on the other.
    down, right = torch.randint(-MAX_SHIFT, MAX_SHIFT + 1, (2, num, 1))
    rows = (torch.arange(size) + down) % size
    columns = (torch.arange(size) + right) % size
    columns = torch.where(torch.rand(num, 1) < 0.5, columns.flip(1), columns)
    moved = images[torch.arange(num)[:, None, None], 0, rows[:, :, None], columns[:, None, :]]
    return moved[:, None].float().contiguous(memory_format=torch.channels_last)


@torch.inference_mode()
def accuracy(classifier: GarmentClassifier, images: Tensor, labels: Tensor) -> float:
    classifier.eval()
    predicted = torch.cat([classifier(batch.float())[1].argmax(1) for batch in images.split(500)])
    return float((predicted == labels).double().mean())


if __name__ == "__main__":
    main()
