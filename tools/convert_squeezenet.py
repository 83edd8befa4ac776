"""Cut the SqueezeNet 1.1 weights that ship with the package out of the full network.

    python tools/convert_squeezenet.py squeezenet1_1.safetensors [--out src/spectralnorm/assets/squeezenet]

The source holds the authors' published Caffe weights as safetensors, (out, in, height, width), float32, named as in
``spectralnorm.metrics.squeezenet``. All of it is kept bit for bit, but for the classifying layer ``conv10``, which the
metrics do not use and which is two fifths of the file.
"""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path

from safetensors.torch import load, save_file

from spectralnorm.metrics.squeezenet import SqueezeNet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="the full network, with conv10")
    parser.add_argument("--out", type=Path, default=Path("src/spectralnorm/assets/squeezenet"))
    arguments = parser.parse_args()

    data = arguments.source.read_bytes()
    weights = {name: value for name, value in load(data).items() if not name.startswith("conv10.")}
    SqueezeNet().load_state_dict(weights)

    arguments.out.mkdir(parents=True, exist_ok=True)
    file = arguments.out / "squeezenet1_1_features.safetensors"
    save_file(weights, file, metadata={"cut_from_sha256": hashlib.sha256(data).hexdigest(), "left_out": "conv10"})
    print(f"{file}: {file.stat().st_size:,} bytes, sha256 {hashlib.sha256(file.read_bytes()).hexdigest()}")


if __name__ == "__main__":
    main()
