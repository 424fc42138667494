"""The operators where torch lacks one of the private names that their fast registration stands on."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.no_kernels

# Where each is, and its name there.
NAMES = {
    "single level function": ("torch.autograd.function", "_SingleLevelFunction"),
    "keyset": ("torch._C", "_after_autograd_keyset"),
    "guard": ("torch._C", "_AutoDispatchBelowAutograd"),
    "redispatch": ("torch._ops.OpOverload", "redispatch"),
    "transforms": ("torch._C", "_are_functorch_transforms_active"),
    "levels": ("torch._functorch.autograd_function", "enable_single_level_autograd_function"),
    "tangents": ("torch.autograd.forward_ad", "_current_level"),
    "kept graph": ("torch._C._autograd", "_get_current_graph_task_keep_graph"),
}

PROGRAM = """
import torch
import torch._dynamo, torch._functorch.autograd_function
kept = getattr({owner}, "{name}")
delattr({owner}, "{name}")
import fastkd
setattr({owner}, "{name}", kept)  # torch uses it itself
from fastkd import functional as F

print(fastkd.build_info()["autograd"])
reference = {{}}
for dtype in (torch.float64, torch.float32, torch.float16):
    s, t = torch.linspace(-2, 3, 66, dtype=torch.float64).sin().mul(3).to(dtype).view(2, 3, 11).unbind()
    s, t = s.clone().requires_grad_(), t.clone().requires_grad_()
    losses = {{
        "kl": F.kl_div(s, t, 2.0), "js": F.js_div(s, t), "kd": F.kd_loss(s, t, torch.tensor([1, 2, 3])),
        "relation": F.relation_loss(s, t), "stats": fastkd.logit_stats(s).entropy.sum(),
        "crop": fastkd.crop_patches(s.view(1, 3, 1, 11), torch.zeros(1, 2, 2, dtype=torch.int64), (1, 4)).sum(),
    }}
    for name, loss in losses.items():
        inputs = (s,) if name in ("stats", "crop") else (s, t)
        kept = torch.autograd.grad(3 * loss, inputs, retain_graph=True)
        for a, b in zip(kept, torch.autograd.grad(3 * loss, inputs), strict=True):
            assert torch.equal(a, b), name
        print(name, dtype, [float(g.double().abs().sum()) for g in kept])
try:
    (g,) = torch.autograd.grad(F.kl_div(s, t), s, create_graph=True)
    g.sum().backward()
except RuntimeError as error:
    print("twice:", str(error)[:60])
print(float(torch.compile(lambda x: F.kl_div(x, t.detach(), 2.0), backend="aot_eager", fullgraph=True)(s)))
"""


def _run(owner: str, name: str) -> list[str]:
    program = PROGRAM.format(owner=owner, name=name)
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout.splitlines()


@pytest.fixture(scope="module")
def expected() -> list[str]:
    return _run("torch", "pi")  # which nobody misses


@pytest.mark.parametrize("name", NAMES)
def test_without(name: str, expected: list[str]) -> None:
    how, *results = _run(*NAMES[name])
    assert expected[0] == "direct"
    if name == "kept graph":
        assert how == "direct"  # it spares a copy, no more
    else:
        assert how.startswith("torch.library.register_autograd, slower: torch ")
    assert results == expected[1:]
