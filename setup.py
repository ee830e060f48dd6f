"""Builds csrc/ into deltatc/_ops.so: torch operators in a plain library, for any Python version."""

import shutil
from pathlib import Path

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

if shutil.which("g++") is None:
    raise SystemExit("deltatc: g++ is not on the PATH; install a C++17 compiler (Debian: apt-get install g++)")

ROOT = Path(__file__).parent
SOURCES = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*.cpp"))
HEADERS = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*") if path.suffix in (".h", ".inc"))

setup(
    name="deltatc",
    version="0.1.0",
    description="Delta transcoders: what did finetuning change inside a language model?",
    packages=["deltatc"],
    python_requires=">=3.10",
    entry_points={"console_scripts": ["deltatc = deltatc.cli:main"]},
    ext_modules=[
        CppExtension(
            "deltatc._ops",
            SOURCES,
            depends=HEADERS,
            # Nothing newer than torch 2.11's stable interface is used: one source for 2.11 and later.
            define_macros=[("TORCH_TARGET_VERSION", "0x020b000000000000ULL")],
            extra_compile_args=["-O3", "-std=c++17", "-ffp-contract=fast"],
            py_limited_api=True,
        )
    ],
    cmdclass={"build_ext": BuildExtension.with_options(no_python_abi_suffix=True)},
)
