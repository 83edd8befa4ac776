"""What certificates of the discriminators with a known Lipschitz constant cost, and what they say.

    python benchmarks/certify.py                       # all of them; StyleGAN2 at 256 px takes minutes
    python benchmarks/certify.py resnet-32 mlp-32      # these
    python benchmarks/certify.py --out                 # and the result page

Every weight is divided by a guaranteed bound of its norm (strict normalization), fresh from its initialization, and the
constant that is asked for is 1. Times are of the whole `certify`, by wall clock and by the process's CPU time. Peak
memory is what the process ever held, so each network has a process of its own.
"""

import argparse
import json
import resource
import subprocess
import sys
import time

import torch
from hardware import hardware, write_result

import spectralnorm as sn
from spectralnorm.gan.models import ARCHITECTURES

CASES = {
    "mlp-32": ("mlp", 32, 64),
    "dcgan-32": ("dcgan", 32, 64),
    "sncnn-32": ("sncnn", 32, 64),
    "sndcgan-32": ("sndcgan", 32, 64),
    "resnet-32": ("resnet", 32, 64),
    "resnet-64": ("resnet", 64, 64),
    "stylegan2-64": ("stylegan2", 64, 64),
    "stylegan2-256": ("stylegan2", 256, 64),
}
"""Architecture, image size, width."""


def measured(name):
    """What one certificate cost and says."""
    architecture, size, width = CASES[name]
    torch.manual_seed(0)
    discriminator = ARCHITECTURES[architecture].discriminator(image_size=size, channels=3, width=width, lipschitz=1.0)
    discriminator = sn.add_spectral_norm(discriminator, strict=True).eval()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    wall, processor = time.perf_counter(), time.process_time()
    certificate = sn.certify(discriminator, (3, size, size))
    return {
        "name": name,
        "parameters": sum(parameter.numel() for parameter in discriminator.parameters()),
        "wall": time.perf_counter() - wall,
        "processor": time.process_time() - processor,
        "before": before / 2**20,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "lower": certificate.lower_bound,
        "upper": certificate.upper_bound,
    }


def line(found):
    return (
        f"| {found['name']} | {found['parameters'] / 1e6:.1f} | {found['wall']:.1f} | {found['processor']:.1f} | "
        f"{found['peak']:.2f} | {found['lower']:.4f} | {found['upper']:.6f} |"
    )


HEAD = "| network | parameters / 10^6 | s | CPU s | peak GiB | at least | at most |\n|---|---|---|---|---|---|---|"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[*CASES, []], help="networks; none: all")
    parser.add_argument("--out", action="store_true", help="write the result page")
    parser.add_argument("--child", choices=CASES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measured(options.child)))
        return
    print(hardware(), HEAD, sep="\n\n")
    lines = []
    for name in options.names or CASES:
        child = subprocess.run(
            [sys.executable, __file__, "--child", name], stdout=subprocess.PIPE, text=True, check=True
        )
        found = json.loads(child.stdout.splitlines()[-1])
        if not found["lower"] <= found["upper"]:
            raise AssertionError(f"{name}: the lower bound is above the upper one: {found}")
        lines.append(line(found))
        print(lines[-1], flush=True)
    if options.out:
        command = " ".join(["python benchmarks/certify.py", *options.names, "--out"])
        text = (
            f"# Certificates\n\n{hardware()}\n\n`{command}`: strict "
            "discriminators with `lipschitz=1`, freshly initialized, width 64, three channels; the whole of `certify`, "
            "with its search for a lower bound.\n\n" + "\n".join([HEAD, *lines]) + "\n"
        )
        print(write_result("certify", text))


if __name__ == "__main__":
    main()
