"""Builds ``fastkd/_C`` (schemas, CPU kernels, build information) and, where nvcc is found, ``fastkd/_cuda``.

Both libraries use torch's stable ABI only, so one build serves every torch >= 2.10. The CPU kernels
(``cpu_kernel.cpp``) are compiled once for each instruction set; the set is chosen at run time.

Environment: FASTKD_CUDA=0/1 (off / required), TORCH_CUDA_ARCH_LIST, FASTKD_SANITIZE=1, CXX, CUDA_HOME.
"""

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from glob import glob
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
TORCH_TARGET = "0x020a000000000000"  # 2.10
SANITIZE = os.environ.get("FASTKD_SANITIZE") == "1"
X86 = platform.machine() in ("x86_64", "AMD64")
ISA_FLAGS = {"baseline": []}
if X86:
    ISA_FLAGS["avx2"] = ["-mavx2", "-mfma", "-mf16c", "-mbmi2"]
    ISA_FLAGS["avx512"] = [*ISA_FLAGS["avx2"], *(f"-mavx512{x}" for x in ("f", "bw", "dq", "vl"))]
    ISA_FLAGS["avx512"].append("-mprefer-vector-width=512")


def find_torch():
    """The folder of the torch whose headers we build on: importable, or of the environment outside pip's isolation."""
    spec = importlib.util.find_spec("torch")
    candidates = [Path(spec.origin).parent] if spec and spec.origin else []
    candidates += [Path(sysconfig.get_path(key)) / "torch" for key in ("platlib", "purelib")]
    return next((p for p in candidates if (p / "include/torch/csrc/stable/library.h").exists()), None)


def find_nvcc():
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    found = shutil.which("nvcc", path=f"{home}/bin" if home else None) or shutil.which("nvcc")
    wanted = os.environ.get("FASTKD_CUDA", "1" if found else "0") != "0"
    if wanted and not found:
        sys.exit("fastkd: FASTKD_CUDA=1 asks for CUDA kernels, but nvcc is not on PATH or in $CUDA_HOME/bin")
    return found if wanted else None


def cuda_architectures(nvcc):
    """-gencode flags of TORCH_CUDA_ARCH_LIST, or of the sensible list as far as this nvcc knows it."""
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    default = [a for a in ("8.0", "8.6", "8.9", "9.0a", "10.0") if f"compute_{a.replace('.', '').rstrip('a')}" in known]
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split() or [*default, default[-1] + "+PTX"]
    names = [(a.removesuffix("+PTX").replace(".", ""), a.endswith("+PTX")) for a in listed]
    return [f"-gencode=arch=compute_{n},code={'compute' if ptx else 'sm'}_{n}" for n, ptx in names]


class NinjaBuild(build_ext):
    """Writes one build.ninja for both libraries and runs it (parallel, incremental)."""

    def run(self):
        import pybind11
        from ninja import BIN_DIR
        from ninja.ninja_syntax import Writer

        torch, nvcc = find_torch(), find_nvcc()
        out = Path(self.build_temp).resolve()
        out.mkdir(parents=True, exist_ok=True)
        common = [f"-I{ROOT}/csrc", f"-isystem{torch}/include", f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"]
        cxx = ["-std=c++20", "-O3", "-g0", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-Wno-maybe-uninitialized"]
        cxx += ["-Wall", "-Wextra", "-Werror=return-type", "-Wno-psabi", *common]
        link = [f"-L{torch}/lib", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-Wl,--as-needed"]
        if SANITIZE:
            cxx += ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-omit-frame-pointer", "-fno-sanitize-recover=undefined"]
            link += ["-fsanitize=address,undefined"]
        with open(out / "build.ninja", "w") as file:
            ninja = Writer(file, width=1000)
            compiler = os.environ.get("CXX", "g++")
            ninja.rule("cxx", f"{compiler} -MMD -MF $out.d {' '.join(cxx)} $flags -c $in -o $out", depfile="$out.d", deps="gcc")
            ninja.rule("link", f"{compiler} -shared -o $out $in {' '.join(link)} $libs")
            python = [f"-isystem{p}" for p in (sysconfig.get_path("include"), pybind11.get_include())]
            objects = []
            for source in sorted(glob("csrc/*/schema.cpp") + glob("csrc/*/cpu.cpp") + glob("csrc/*/isa.cpp")):
                objects += ninja.build(str(out / source) + ".o", "cxx", str(ROOT / source))
            for source in sorted(glob("csrc/*/cpu_kernel.cpp")):
                for isa, flags in ISA_FLAGS.items():
                    variables = {"flags": [f"-DFASTKD_ISA={isa}", *flags]}
                    objects += ninja.build(f"{out / source}.{isa}.o", "cxx", str(ROOT / source), variables=variables)
            gencode = cuda_architectures(nvcc) if nvcc else []
            define = f'-DFASTKD_CUDA_ARCHITECTURES=\\"{" ".join(g.split("code=")[1] for g in gencode)}\\"'
            variables = {"flags": [*python, define, f'-DFASTKD_VERSION=\\"{self.distribution.get_version()}\\"']}
            objects += ninja.build(str(out / "csrc/module.cpp.o"), "cxx", str(ROOT / "csrc/module.cpp"), variables=variables)
            ninja.build(str(Path(self.get_ext_fullpath("fastkd._C")).resolve()), "link", objects)
            if nvcc:
                flags = ["-std=c++20", "-O3", "-lineinfo", "-Xptxas=-v", "-Xcompiler=-fPIC,-fvisibility=hidden", *common, *gencode]
                log = "> $out.ptxas 2>&1 || (cat $out.ptxas; false)"  # registers and spills of every kernel, read by CI
                ninja.rule("nvcc", f"{nvcc} -MD -MF $out.d {' '.join(flags)} -c $in -o $out {log}", depfile="$out.d", deps="gcc")
                cuda = [ninja.build(str(out / s) + ".o", "nvcc", str(ROOT / s))[0] for s in sorted(glob("csrc/*/cuda.cu"))]
                libs = {"libs": f"-L{Path(nvcc).resolve().parents[1]}/lib64 -lcudart_static -lrt -ldl -lpthread"}
                ninja.build(str(Path(self.get_ext_fullpath("fastkd._cuda")).resolve()), "link", cuda, variables=libs)
        subprocess.run([f"{BIN_DIR}/ninja", "-C", str(out), *(["-v"] if self.verbose > 1 else [])], check=True)


libraries = [Extension("fastkd._C", sources=[])]
if find_nvcc():
    libraries.append(Extension("fastkd._cuda", sources=[]))
setup(
    ext_modules=libraries,
    cmdclass={"build_ext": NinjaBuild},
    setup_requires=[] if find_torch() else ["torch>=2.10"],  # PEP 517: asked for only where no torch is at hand
)
