"""What the interpreter cannot see: whether the kernels compile for a GPU, and to what. No GPU is needed for that."""

import os
import re
import subprocess
import sys

import pytest

pytest.importorskip("triton", minversion="3.3")  # whose compiler is called as below

# In a process of its own: here the kernels are the interpreter's.
COMPILE = r"""
import re, sys
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from spectralnorm.linalg.cuda import image_kernels, other_kernels, quotient_kernels, return_kernel, storing

dtype = getattr(tl, sys.argv[1])
constants = dict.fromkeys(("DTYPE", "GRAD_DTYPE", "NARROW"), dtype)
constants |= {"IS_STIRRED": True, "IS_SPLIT": False, "HAS_NARROW": False, "REVISION": 0}
integers = {"maps", "blocks", "spans", "shifts", "table", "weights", "targets", "calls", "ends"}
others = {"eps": "fp32", "out": "*u8", "counters": "*i32", "step": "i32"}
for module in (image_kernels, other_kernels, quotient_kernels, return_kernel, storing):
    for name in module.__all__:
        if name.endswith("_kernel"):
            kernel = getattr(module, name)
            types = {
                arg: "constexpr" if arg in constants else "*i64" if arg in integers else others.get(arg, "*fp32")
                for arg in kernel.arg_names
            }
            source = triton.compiler.ASTSource(
                kernel,
                types,
                {(place,): constants[arg] for place, arg in enumerate(types) if arg in constants},
                {(place,): [["tt.divisibility", 16]] for place, arg in enumerate(types) if types[arg][0] == "*"},
            )
            ptx = triton.compile(source, target=GPUTarget("cuda", 80, 32), options={"num_warps": 4}).asm["ptx"]
            atomics = len(re.findall(r"\b(?:atom|red)\.", ptx))
            print(name, ptx.count("ld.global.v4"), ptx.count("st.global.v4"), atomics)
"""


def compiled(dtype: str, folder: object) -> dict[str, tuple[int, ...]]:
    """For each kernel its 128-bit loads and stores, and its atomic operations."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(folder)}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, dtype], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = re.findall(r"^(\w+_kernel) (\d+) (\d+) (\d+)$", done.stdout, re.MULTILINE)
    return {name: tuple(map(int, counts)) for name, *counts in lines}


@pytest.mark.slow
def test_kernels_compile_with_wide_loads_for_aligned_matrices_alone(tmp_path: object) -> None:
    counts = compiled("float32", tmp_path)
    assert len(counts) == 10
    wide_loads = {name: loads for name, (loads, *_) in counts.items()}
    # Per form of the product, and only in those for aligned matrices: four tiles summed over the slow side; over the
    # fast side four as well, and eight rows of the frame or the one leading vector.
    assert wide_loads["images_kernel"] == 4 + 4 + 8
    assert wide_loads["others_kernel"] == 4 + 4 + 1
    wide_stores = {name: stores for name, (_, stores, *_) in counts.items()}
    assert wide_stores["divide_kernel"] == wide_loads["divide_kernel"] == 8
    # What came from two uses is read.
    assert wide_loads["gradients_kernel"] == 2 * wide_stores["gradients_kernel"] == 8
    # Programs count themselves for their block and for their matrix. Nothing else is atomic: the order of sums, and
    # with it the result, would change from run to run.
    atomics = {name: number for name, (*_, number) in counts.items() if number > 0}
    assert atomics == {"images_kernel": 2, "others_kernel": 2}
