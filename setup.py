"""Builds ``fastkd/_C`` (schemas, CPU kernels, build information) and, where nvcc is found, ``fastkd/_cuda``.

Both use torch's stable ABI only: one build serves every torch >= 2.10. CPU kernels are compiled once for each instruction
set, chosen at run time. Environment: FASTKD_CUDA=0/1, TORCH_CUDA_ARCH_LIST, FASTKD_SANITIZE=1, CXX, CUDA_HOME.
"""

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
ISA_FLAGS = {"baseline": ""}
if "x86_64" in sysconfig.get_platform():
    ISA_FLAGS["avx2"] = "-mavx2 -mfma -mf16c -mbmi2"
    ISA_FLAGS["avx512"] = ISA_FLAGS["avx2"] + " -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512"
SANITIZER = "-fsanitize=address,undefined -fno-sanitize-recover=undefined" * (os.environ.get("FASTKD_SANITIZE") == "1")


def find_torch():
    """The folder of the torch whose headers we build on: importable, or in the environment around pip's isolation."""
    spec = importlib.util.find_spec("torch")
    candidates = [Path(spec.origin).parent] if spec and spec.origin else []
    candidates += [Path(sysconfig.get_path(key)) / "torch" for key in ("platlib", "purelib")]
    return next((p for p in candidates if (p / "include/torch/csrc/stable/library.h").exists()), None)


def find_nvcc():
    found = shutil.which("nvcc", path=os.environ.get("CUDA_HOME", "") + "/bin") or shutil.which("nvcc")
    if os.environ.get("FASTKD_CUDA") == "1" and not found:
        sys.exit("fastkd: FASTKD_CUDA=1 asks for CUDA kernels, but nvcc is not on PATH or in $CUDA_HOME/bin")
    return None if os.environ.get("FASTKD_CUDA") == "0" else found


def cuda_architectures(nvcc):
    """Architectures (8.0, 9.0a, 10.0+PTX) of TORCH_CUDA_ARCH_LIST, or of a sensible list as far as this nvcc knows it."""
    known = subprocess.check_output([nvcc, "--list-gpu-arch"], text=True)
    default = [a for a in ("8.0", "8.6", "8.9", "9.0a", "10.0") if f"compute_{a.replace('.', '').rstrip('a')}" in known]
    return os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split() or [*default[:-1], f"{default[-1]}+PTX"]


class NinjaBuild(build_ext):  # writes one build.ninja for both libraries and runs it: parallel, incremental
    def run(self):
        import ninja as ninja_package
        import pybind11
        from ninja.ninja_syntax import Writer

        torch, nvcc, compiler = find_torch(), find_nvcc(), os.environ.get("CXX", "g++")
        architectures = cuda_architectures(nvcc) if nvcc else []
        optimise = "-O1" if SANITIZER else "-O3"  # what sanitizers add takes twice as long to optimise further
        common = (
            f"-std=c++20 {optimise} -I{ROOT}/csrc -isystem {torch}/include -DTORCH_TARGET_VERSION=0x020a000000000000"
        )
        cxx = f"{common} -fPIC -fvisibility=hidden -fno-math-errno -fno-trapping-math -Wall -Wextra -Wno-psabi {SANITIZER}"
        cuda = f"{common} -DUSE_CUDA -Xptxas=-v -Xcompiler=-fPIC,-fvisibility=hidden "
        for a in (a.replace(".", "") for a in architectures):
            for kind in ("sm", "compute") if a.endswith("+PTX") else ("sm",):
                cuda += " -gencode=arch=compute_{0},code={1}_{0}".format(a.removesuffix("+PTX"), kind)
        macros = f'VERSION="{self.distribution.get_version()}"', f'CUDA_ARCHITECTURES="{" ".join(architectures)}"'
        includes = f"-isystem {sysconfig.get_path('include')} -isystem {pybind11.get_include()}"
        module = " -DFASTKD_".join([includes, *map(shlex.quote, macros)])
        elsewhere = not (self.inplace or self.editable_mode or Path(self.build_temp).parent == Path("build"))
        out = ROOT / (self.build_temp if elsewhere else "build/objects")  # a wheel takes those of an editable install
        out.mkdir(parents=True, exist_ok=True)
        with open(out / "build.ninja", "w") as file:
            ninja = Writer(file, width=1000)
            ninja.rule("cxx", f"{compiler} -MMD -MF $out.d {cxx} $flags -c $in -o $out", depfile="$out.d", deps="gcc")
            ninja.rule("link", f"$linker -shared -o $out $in -L{torch}/lib -Xlinker --no-as-needed -ltorch -ltorch_cpu")
            cuda += " -c $in -o $out > $out.ptxas 2>&1 || (cat $out.ptxas; false)"  # registers and spills, read by CI
            ninja.rule("nvcc", f"{nvcc} -MD -MF $out.d {cuda}", depfile="$out.d", deps="gcc")

            def build(rule, pattern, suffix="", flags=""):
                sources = [str(source.relative_to(ROOT)) for source in sorted(ROOT.glob(pattern))]
                paths = [(f"{source}{suffix}.o", rule, f"{ROOT}/{source}") for source in sources]
                return [ninja.build(*path, variables={"flags": flags})[0] for path in paths]

            host = [o for name in ("schema", "cpu", "isa") for o in build("cxx", f"csrc/*/{name}.cpp")]
            host += build("cxx", "csrc/module.cpp", flags=module)
            for isa, flags in ISA_FLAGS.items():  # gcc 12 finds its own intrinsics uninitialised
                flags = f"-DFASTKD_ISA={isa} {flags} -Wno-maybe-uninitialized"
                host += build("cxx", "csrc/*/cpu_kernel*.cpp", f".{isa}", flags)
            libraries = {"fastkd._C": (host, f"{compiler} {SANITIZER}")}
            if nvcc:
                libraries["fastkd._cuda"] = (build("nvcc", "csrc/*/cuda*.cu"), nvcc)
            for name, (objects, linker) in libraries.items():
                ninja.build(os.path.abspath(self.get_ext_fullpath(name)), "link", objects, variables={"linker": linker})
        beside = f"{ninja_package.BIN_DIR}:{Path(ninja_package.__file__).parents[1]}/bin"  # pip, pip --target
        subprocess.run([shutil.which("ninja", path=beside) or "ninja", "-C", str(out)], check=True)


setup(
    ext_modules=[Extension("fastkd._C", sources=[]), *([Extension("fastkd._cuda", sources=[])] if find_nvcc() else [])],
    cmdclass={"build_ext": NinjaBuild},
    # for pip, where no torch is at hand; `python setup.py` never fetches anything
    setup_requires=["torch>=2.10"] if "setuptools.build_meta" in sys.modules and not find_torch() else [],
)
