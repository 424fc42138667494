"""Builds ``fastkd/_C`` (schemas, CPU kernels, build information) and, where nvcc is found, ``fastkd/_cuda``.

Both use torch's stable ABI only: one build serves every torch >= 2.10. CPU kernels are compiled once for each instruction
set, chosen at run time. A wheel has CUDA kernels for every GPU that we name, an editable build for the GPUs that are here:
without one it leaves them out. Environment:

FASTKD_CUDA           1 asks for CUDA kernels whatever GPU is here, 0 forbids them
TORCH_CUDA_ARCH_LIST  names the GPUs, as "8.0 9.0a 10.0+PTX", and so asks for CUDA kernels where there is nvcc
CUDA_HOME, CXX        where nvcc is, if not on PATH; the compiler, g++ by default
FASTKD_SANITIZE       1 builds for AddressSanitizer and UndefinedBehaviorSanitizer
FASTKD_OBJECTS        where the object files are kept, build/objects by default
"""

import importlib.util
import os
import re
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
OLDEST_GPU = 8.0
GPUS = ("8.0", "8.6", "8.9", "9.0a", "10.0")  # of a wheel, as far as nvcc knows them; PTX of the last for newer ones
ASK_TORCH = (
    "import torch; [print('%d.%d' % torch.cuda.get_device_capability(i)) for i in range(torch.cuda.device_count())]"
)


def find_torch():
    """The folder of the torch whose headers we build on: importable, or in the environment around pip's isolation."""
    spec = importlib.util.find_spec("torch")
    candidates = [Path(spec.origin).parent] if spec and spec.origin else []
    candidates += [Path(sysconfig.get_path(key)) / "torch" for key in ("platlib", "purelib")]
    return next((p for p in candidates if (p / "include/torch/csrc/stable/library.h").exists()), None)


def find_nvcc():
    wanted = os.environ.get("FASTKD_CUDA", "")
    if wanted not in ("", "0", "1"):
        sys.exit(f"fastkd: FASTKD_CUDA is {wanted!r}, must be 0 (no CUDA kernels) or 1 (CUDA kernels), or not be set")
    found = shutil.which("nvcc", path=os.environ.get("CUDA_HOME", "") + "/bin") or shutil.which("nvcc")
    if wanted == "1" and not found:
        sys.exit("fastkd: FASTKD_CUDA=1 asks for CUDA kernels, but nvcc is not on PATH or in $CUDA_HOME/bin")
    return None if wanted == "0" else found


def gpus_here():
    """Compute capabilities of the GPUs of this machine: of nvidia-smi, or of torch where that is not there."""
    commands = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"], [sys.executable, "-c", ASK_TORCH]
    for command in commands:
        try:
            said = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
        except (OSError, subprocess.TimeoutExpired):
            continue
        if found := re.findall(r"^\s*(\d+\.\d+)\s*$", said, re.MULTILINE):
            return sorted(set(found), key=float)
    return []


def cuda_architectures(nvcc, editable):
    """What to build CUDA kernels for, as 8.0, 9.0a or 10.0+PTX; nothing leaves them out."""
    named = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    for name in named:
        if not re.fullmatch(r"\d+\.\d+[af]?(\+PTX)?", name):
            sys.exit(f"fastkd: TORCH_CUDA_ARCH_LIST has {name!r}, must have numbers, as in 8.0 9.0a 10.0+PTX")
    if named:
        return named
    known = subprocess.check_output([nvcc, "--list-gpu-arch"], text=True).split()
    default = [name for name in GPUS if f"compute_{name.replace('.', '').rstrip('a')}" in known]
    if not default:
        sys.exit(f"fastkd: {nvcc} knows no GPU of {GPUS[0]} or newer; FASTKD_CUDA=0 builds without CUDA kernels")
    here = [gpu for gpu in gpus_here() if float(gpu) >= OLDEST_GPU] if editable else []
    # Hopper's own instructions are in 9.0a; PTX is for a GPU that this nvcc does not know
    chosen = ["9.0a" if gpu == "9.0" else gpu for gpu in here if f"compute_{gpu.replace('.', '')}" in known]
    if len(chosen) < len(here):
        chosen.append(f"{default[-1].rstrip('a')}+PTX")
    if chosen or (editable and os.environ.get("FASTKD_CUDA") != "1"):
        return chosen
    return [*default[:-1], f"{default[-1]}+PTX"]


class NinjaBuild(build_ext):  # writes one build.ninja for both libraries and runs it: parallel, incremental
    def run(self):
        import ninja as ninja_package
        import pybind11
        from ninja.ninja_syntax import Writer

        torch, nvcc, compiler = find_torch(), find_nvcc(), os.environ.get("CXX", "g++")
        editable = bool(self.inplace or self.editable_mode)
        architectures = cuda_architectures(nvcc, editable) if nvcc else []
        if nvcc and not architectures:
            print("fastkd: no GPU here, so no CUDA kernels; FASTKD_CUDA=1 builds them", flush=True)
        if not architectures:
            self.extensions = [extension for extension in self.extensions if extension.name != "fastkd._cuda"]
        optimise = "-O1" if SANITIZER else "-O3"  # what sanitizers add takes twice as long to optimise further
        # ninja runs in ROOT and sources are named from there: the same objects serve the tree and its sdist, unpacked anywhere
        common = f"-std=c++20 {optimise} -Icsrc -isystem {torch}/include -DTORCH_TARGET_VERSION=0x020a000000000000"
        cxx = f"{common} -fPIC -fvisibility=hidden -fno-math-errno -fno-trapping-math -Wall -Wextra -Wno-psabi {SANITIZER}"
        cuda = f"{common} -DUSE_CUDA -Xptxas=-v -Xcompiler=-fPIC,-fvisibility=hidden "
        for a in (a.replace(".", "") for a in architectures):
            for kind in ("sm", "compute") if a.endswith("+PTX") else ("sm",):
                cuda += " -gencode=arch=compute_{0},code={1}_{0}".format(a.removesuffix("+PTX"), kind)
        macros = f'VERSION="{self.distribution.get_version()}"', f'CUDA_ARCHITECTURES="{" ".join(architectures)}"'
        cuda += f" -DFASTKD_{shlex.quote(macros[1])}"
        includes = f"-isystem {sysconfig.get_path('include')} -isystem {pybind11.get_include()}"
        module = " -DFASTKD_".join([includes, *map(shlex.quote, macros)])
        elsewhere = not (editable or Path(self.build_temp).parent == Path("build"))
        kept = os.environ.get("FASTKD_OBJECTS") or "build/objects"  # a wheel takes those of an editable install
        out = ROOT / (self.build_temp if elsewhere else kept)
        out.mkdir(parents=True, exist_ok=True)
        with open(out / "build.ninja", "w") as file:
            ninja = Writer(file, width=1000)
            ninja.variable("builddir", str(out))

            def rule(name, command, **more):  # shown as [12/54] csrc/gmm/cpu_kernel.cpp avx2
                ninja.rule(name, command, description="$what", **more)

            rule("cxx", f"{compiler} -MMD -MF $out.d {cxx} $flags -c $in -o $out", depfile="$out.d", deps="gcc")
            rule("link", f"$linker -shared -o $out $in -L{torch}/lib -Xlinker --no-as-needed -ltorch -ltorch_cpu")
            cuda += " -c $in -o $out > $out.ptxas 2>&1 || (cat $out.ptxas; false)"  # registers and spills, read by CI
            rule("nvcc", f"{nvcc} -MD -MF $out.d {cuda}", depfile="$out.d", deps="gcc")

            def build(rule, pattern, variant="", flags=""):
                objects = []
                for source in (str(source.relative_to(ROOT)) for source in sorted(ROOT.glob(pattern))):
                    variables = {"flags": flags, "what": f"{source} {variant}".strip()}
                    path = out / ".".join(filter(None, (source, variant, "o")))
                    objects += ninja.build(str(path), rule, source, variables=variables)
                return objects

            host = [o for name in ("schema", "cpu", "isa") for o in build("cxx", f"csrc/*/{name}.cpp")]
            host += build("cxx", "csrc/module.cpp", flags=module)
            for isa, flags in ISA_FLAGS.items():  # gcc 12 finds its own intrinsics uninitialised
                flags = f"-DFASTKD_ISA={isa} {flags} -Wno-maybe-uninitialized"
                host += build("cxx", "csrc/*/cpu_kernel*.cpp", isa, flags)
            libraries = {"fastkd._C": (host, f"{compiler} {SANITIZER}")}
            if architectures:
                libraries["fastkd._cuda"] = (build("nvcc", "csrc/*/cuda*.cu"), nvcc)
            made = {name: Path(os.path.abspath(self.get_ext_fullpath(name))) for name in libraries}
            for name, (objects, linker) in libraries.items():
                ninja.build(str(made[name]), "link", objects, variables={"linker": linker, "what": made[name].name})
        # any CUDA library in the package is loaded: one of an older build, or of another Python, would be a stranger
        for stranger in set(made["fastkd._C"].parent.glob("_cuda*.so")) - set(made.values()):
            stranger.unlink()
        beside = f"{ninja_package.BIN_DIR}:{Path(ninja_package.__file__).parents[1]}/bin"  # pip, pip --target
        program = shutil.which("ninja", path=beside) or "ninja"
        if subprocess.run([program, "-f", str(out / "build.ninja")], cwd=ROOT).returncode:
            sys.exit("fastkd: a compiler failed; what it said is above")


if __name__ == "__main__":  # not where a test imports this file
    setup(
        # _cuda is dropped where no CUDA kernels are built
        ext_modules=[Extension("fastkd._C", sources=[]), Extension("fastkd._cuda", sources=[])],
        cmdclass={"build_ext": NinjaBuild},
        # for pip, where no torch is at hand; `python setup.py` never fetches anything
        setup_requires=["torch>=2.10"] if "setuptools.build_meta" in sys.modules and not find_torch() else [],
    )
