"""Builds csrc/ into deltatc/_ops.so: torch operators in a plain library, for any Python version.

Where nvcc is on the PATH (or in $CUDA_HOME/bin), the CUDA kernels are compiled too, GPU or not, with the runtime linked
in statically; DELTATC_CUDA=0 leaves them out. Without nvcc everything works on the CPU.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

if shutil.which("g++") is None:
    raise SystemExit("deltatc: g++ is not on the PATH; install a C++17 compiler (Debian: apt-get install g++)")

ROOT = Path(__file__).parent
# Native code for the A100 and the H100 and H200; PTX, which the driver compiles at first use, for everything later.
ARCHITECTURES = {"sm_80": "compute_80", "sm_90a": "compute_90a", "compute_80": "compute_80"}


def find_nvcc():
    """Path of nvcc, or None."""
    if os.environ.get("DELTATC_CUDA") == "0":
        return None
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    return shutil.which("nvcc", path=os.pathsep.join([*(f"{home}/bin" for home in homes), os.environ["PATH"]]))


class Build(BuildExtension):
    """Compiles csrc/cuda/*.cu first, and links the objects into the one extension."""

    def build_extensions(self):
        nvcc = find_nvcc()
        if nvcc is not None:
            (extension,) = self.extensions
            release = re.search(r"release ([\d.]+)", subprocess.check_output([nvcc, "--version"], text=True))[1]
            extension.sources += CUDA_BINDINGS
            extension.define_macros.append(("DELTATC_CUDA", "+".join([release, *ARCHITECTURES])))
            toolkit = runtime_folder(nvcc)
            extension.include_dirs.append(str(toolkit / "include"))
            extension.library_dirs += [str(toolkit / "lib64"), str(toolkit / "lib")]
            extension.libraries += ["cudart_static", "dl", "rt", "pthread"]
            extension.extra_objects += [compile_cuda(nvcc, path, Path(self.build_temp)) for path in cuda_sources()]
        super().build_extensions()


def runtime_folder(nvcc):
    """Folder of the CUDA toolkit, as nvcc itself says: nvcc on the PATH may be a link or a script."""
    said = subprocess.run([nvcc, "--dryrun", "-x", "cu", "/dev/null"], capture_output=True, text=True).stderr
    top = re.search(r"^#\$ TOP=(.*)$", said, re.MULTILINE)
    return Path(top[1]) if top else Path(nvcc).resolve().parent.parent


def cuda_sources():
    return sorted((ROOT / "csrc/cuda").glob("*.cu"))


def compile_cuda(nvcc, source, folder):
    """Compile one .cu for every architecture, unless the object is newer than it and all headers; return the object."""
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{source.stem}.cuda.o"
    read = [source, ROOT / "setup.py", *(ROOT / "csrc/cuda").glob("*.h")]
    if not target.exists() or target.stat().st_mtime < max(path.stat().st_mtime for path in read):
        targets = [f"-gencode=arch={virtual},code={name}" for name, virtual in ARCHITECTURES.items()]
        command = [nvcc, "-c", "-O3", "-std=c++17", "-Xcompiler=-fPIC", "--cudart=static", *targets]
        print(f"nvcc {source.name}", flush=True)
        subprocess.run([*command, str(source), "-o", str(target)], check=True)
    return str(target)


SOURCES = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*.cpp"))
CUDA_BINDINGS = [source for source in SOURCES if source.startswith("csrc/cuda/")]
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
            [source for source in SOURCES if source not in CUDA_BINDINGS],
            depends=HEADERS + [str(path.relative_to(ROOT)) for path in cuda_sources()],
            # Nothing newer than torch 2.11's stable interface is used: one source for 2.11 and later.
            define_macros=[("TORCH_TARGET_VERSION", "0x020b000000000000ULL")],
            extra_compile_args=["-O3", "-std=c++17", "-ffp-contract=fast"],
            py_limited_api=True,
        )
    ],
    cmdclass={"build_ext": Build.with_options(no_python_abi_suffix=True)},
)
