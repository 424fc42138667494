"""The operators where torch lacks one of the private names that their fast registration stands on."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.no_kernels

# Each as a statement that takes it away.
NAMES = {
    "single level function": "import torch.autograd.function as f; del f._SingleLevelFunction",
    "keyset": "del torch._C._after_autograd_keyset",
    "guard": "del torch._C._AutoDispatchBelowAutograd",
    "redispatch": "import torch._ops as o; del o.OpOverload.redispatch",
    "transforms": "del torch._C._are_functorch_transforms_active",
    "compiled autograd": "del torch.autograd.Function.__mro__[1]._compiled_autograd_key"
    if hasattr(__import__("torch").autograd.Function.__mro__[1], "_compiled_autograd_key")
    else "del torch.autograd.Function._compiled_autograd_key",
    "kept graph": "del torch._C._autograd._get_current_graph_task_keep_graph",
}

PROGRAM = """
import torch
import torch._dynamo, torch._functorch.autograd_function
{take_away}
try:
    import fastkd
except Exception as error:
    raise SystemExit(f"import: {{type(error).__name__}}: {{error}}")
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


def _run(take_away: str) -> list[str]:
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(take_away=take_away)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout.splitlines()


@pytest.fixture(scope="module")
def expected() -> list[str]:
    return _run("pass")


@pytest.mark.parametrize("name", NAMES)
def test_without(name: str, expected: list[str]) -> None:
    how, *results = _run(NAMES[name])
    assert expected[0] == "direct"
    if name == "kept graph":
        assert how == "direct"  # it spares a copy, no more
    else:
        assert how.startswith("torch.library.register_autograd, slower: torch ")
    assert results == expected[1:]
