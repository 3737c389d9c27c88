"""Miniature stand-ins for MNIST and Fashion-MNIST, in their own files: a few images of noise per class.

python tests/generated_mnist.py out/generated
"""

import argparse
import struct
import sys
from pathlib import Path

import torch
from torch import Tensor


def write_mnist(root: Path, folder: str, images_per_class: int) -> dict[str, Tensor]:
    """Write ``<folder>/raw`` below ``root``, training and as many test images; return them by the files' splits."""
    raw = root / folder / "raw"
    raw.mkdir(parents=True)
    images = {}
    for number, split in enumerate(("train", "t10k")):
        generator = torch.Generator().manual_seed(number)
        images[split] = torch.randint(0, 256, (10 * images_per_class, 28, 28), generator=generator)
        _write_idx(raw / f"{split}-images-idx3-ubyte", images[split])
        _write_idx(raw / f"{split}-labels-idx1-ubyte", torch.arange(10).repeat(images_per_class))
    return images


def _write_idx(path: Path, values: Tensor) -> None:
    """Write unsigned bytes in the idx format: type 8, the number of dimensions, their sizes, the bytes."""
    sizes = struct.pack(f">{values.ndim}I", *values.shape)
    path.write_bytes(bytes([0, 0, 8, values.ndim]) + sizes + values.to(torch.uint8).numpy().tobytes())


def main() -> None:
    """Write both data sets into the folder that is named on the command line."""
    parser = argparse.ArgumentParser(description="Write generated images in the formats of MNIST and Fashion-MNIST.")
    parser.add_argument("root", type=Path, help="Folder to write into; configs/smoke_mnist.yaml reads out/generated.")
    parser.add_argument("--images_per_class", type=int, default=8, help="Images per class, training and test each.")
    given = parser.parse_args()
    try:
        for folder in ("MNIST", "FashionMNIST"):
            write_mnist(given.root, folder, given.images_per_class)
    except FileExistsError as error:
        parser.error(f"{error.filename} is there already; delete it or name another folder")
    sys.stdout.write(f"{given.root.resolve()}\n")


if __name__ == "__main__":
    main()
