"""The build: what it reports, how an instruction set is chosen, what a CUDA tensor is told without CUDA kernels."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import fastkd
from fastkd import _C, _library


def _run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


def test_build_info() -> None:
    info = fastkd.build_info()
    assert info["version"] == fastkd.__version__
    assert info["torch"] == torch.__version__
    assert info["torch_target"] == "2.10"
    assert info["cpu_instruction_set"] in ("baseline", "avx2", "avx512")
    assert info["cuda_loaded"] or "cuda_why_not" in info
    if not info["cuda_loaded"]:
        assert info["cuda_operators"] == []


def test_every_operator_has_a_cpu_kernel_and_a_fake() -> None:
    assert {name.split("_")[0] for name in _library.OPERATORS} >= {"alias", "divergence", "logit"}
    for name in _library.OPERATORS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastkd::{name}", "CPU"), name
        assert torch._library.simple_registry.singleton.find(f"fastkd::{name}").fake_impl.kernel is not None, name


@pytest.mark.parametrize("name", _library.OPERATORS)
def test_tensors_of_two_devices_are_refused(name: str) -> None:
    """A meta tensor among real ones leads to the fake, whose results would be uninitialised memory."""
    op = getattr(torch.ops.fastkd, name).default
    examples = {"Tensor": torch.zeros(2, 2), "int": 1, "float": 1.0, "bool": True, "List[float]": []}
    examples |= {f"Optional[{kind}]": value for kind, value in examples.items()}
    arguments = [
        torch.float32 if a.name == "dtype" else examples[str(a.type)]
        for a in op._schema.arguments
        if a.name != "numbers"
    ]
    tensors = [i for i, a in enumerate(arguments) if isinstance(a, torch.Tensor)]
    if len(tensors) > 1:
        arguments[tensors[-1]] = torch.zeros(2, 2, device="meta")
        with pytest.raises(ValueError, match=r"is on meta, must be where .* is, on cpu"):
            op(*arguments)


def test_environment_chooses_the_instruction_set() -> None:
    result = _run("import fastkd; print(fastkd.build_info()['cpu_instruction_set'])", FASTKD_ISA="baseline")
    assert result.stdout.strip() == "baseline"


def test_unknown_instruction_set() -> None:
    with pytest.raises(RuntimeError, match="instruction set is 'sse9', must be one of baseline, avx2, avx512"):
        _C.set_instruction_set("sse9")


@pytest.mark.parametrize(
    ("architectures", "runs_on", "not_on"),
    [
        ("8.0", ["8.0", "8.6", "8.9"], ["7.5", "9.0", "10.0", "12.0"]),
        ("8.6", ["8.6", "8.9"], ["8.0", "9.0"]),
        ("8.0 8.6", ["8.0", "8.6", "8.9"], ["7.5", "9.0"]),
        ("9.0", ["9.0"], ["8.9", "10.0"]),
        ("9.0a", ["9.0"], ["8.0", "10.0"]),
        ("10.0a", ["10.0"], ["10.3", "11.0"]),
        ("10.0f", ["10.0", "10.3"], ["11.0", "12.0"]),
        ("10.0", ["10.0", "10.3"], ["9.0", "11.0", "12.0"]),
        ("10.0+PTX", ["10.0", "10.3", "11.0", "12.0", "12.1"], ["9.0", "8.0"]),
        ("8.9+PTX", ["8.9", "9.0", "12.0"], ["8.6", "8.0"]),
        ("9.0a+PTX", ["9.0"], ["10.0", "12.0"]),
        ("8.0 8.6 8.9 9.0a 10.0+PTX", ["8.0", "8.6", "8.7", "8.9", "9.0", "10.0", "12.1"], ["7.5", "7.0", "6.1"]),
        ("12.0", ["12.0", "12.1"], ["8.0", "10.3"]),
    ],
)
def test_which_gpus_a_build_runs_on(architectures: str, runs_on: list[str], not_on: list[str]) -> None:
    for capability in runs_on + not_on:
        major, minor = map(int, capability.split("."))
        refusal = _C.cuda_refusal("this GPU", major, minor, architectures)
        assert bool(refusal) == (capability in not_on), capability


def test_a_gpu_without_code_is_told_how_to_rebuild() -> None:
    refusal = _C.cuda_refusal("Tesla T4", 7, 5, "8.0 9.0a")
    assert refusal.startswith(
        "the CUDA kernels of this fastkd were built for 8.0 9.0a, which Tesla T4, of compute capability 7.5"
    )
    assert "`TORCH_CUDA_ARCH_LIST=7.5 pip install --force-reinstall --no-deps .`" in refusal
    assert "TORCH_CUDA_ARCH_LIST=9.0a pip" in _C.cuda_refusal("NVIDIA H100", 9, 0, "8.0")
    built = fastkd.build_info()["cuda_architectures"]
    assert _C.cuda_refusal("Tesla T4", 7, 5) == _C.cuda_refusal("Tesla T4", 7, 5, built)


@pytest.mark.skipif(_library.CUDA_LOADED, reason="the CUDA kernels are loaded here")
def test_cuda_tensors_are_told_how_to_rebuild() -> None:
    cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    with pytest.raises(RuntimeError, match=r"fastkd.logit_stats has no CUDA kernel here: .*FASTKD_CUDA=1 pip install"):
        torch.ops.fastkd.logit_stats.default.redispatch(cuda, torch.zeros(1, 2), 1.0)
