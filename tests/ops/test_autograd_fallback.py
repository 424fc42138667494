"""The operators where torch lacks one of the private names that their fast registration stands on."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.no_kernels

# Where each is, and its name there.
NAMES = {
    "nothing": ("torch", "pi"),  # which nobody misses
    "single level function": ("torch.autograd.function", "_SingleLevelFunction"),
    "keyset": ("torch._C", "_after_autograd_keyset"),
    "guard": ("torch._C", "_AutoDispatchBelowAutograd"),
    "redispatch": ("torch._ops.OpOverload", "redispatch"),
    "transforms": ("torch._C", "_are_functorch_transforms_active"),
    "levels": ("torch._functorch.autograd_function", "enable_single_level_autograd_function"),
    "tangents": ("torch.autograd.forward_ad", "_current_level"),
    "kept graph": ("torch._C._autograd", "_get_current_graph_task_keep_graph"),
    "hooks": ("torch._C._autograd", "_top_saved_tensors_default_hooks"),
}

# For each name a child that has not loaded fastkd yet; torch is loaded once.
PROGRAM = """
import json, os, sys
import torch
import torch._dynamo, torch._functorch.autograd_function

def run(owner, name):
    kept = getattr(owner, name)
    delattr(owner, name)
    import fastkd
    setattr(owner, name, kept)  # torch uses it itself
    from fastkd import functional as F

    said = [fastkd.build_info()["autograd"]]
    for dtype in (torch.float64, torch.float32, torch.float16):
        s, t = torch.linspace(-2, 3, 66, dtype=torch.float64).sin().mul(3).to(dtype).view(2, 3, 11).unbind()
        s, t = s.clone().requires_grad_(), t.clone().requires_grad_()
        losses = {
            "kl": F.kl_div(s, t, 2.0), "js": F.js_div(s, t), "kd": F.kd_loss(s, t, torch.tensor([1, 2, 3])),
            "sparse": F.sparse_kl_div(s, torch.tensor([[0, 4]] * 3), torch.full((3, 2), -1.0)),
            "relation": F.relation_loss(s, t), "stats": fastkd.logit_stats(s).entropy.sum(),
            "moments": fastkd.channel_moments(s).var.sum(),
            "crop": fastkd.crop_patches(s.view(1, 3, 1, 11), torch.zeros(1, 2, 2, dtype=torch.int64), (1, 4)).sum(),
        }
        for loss_name, loss in losses.items():
            inputs = (s,) if loss_name in ("sparse", "stats", "moments", "crop") else (s, t)
            kept = torch.autograd.grad(3 * loss, inputs, retain_graph=True)
            for a, b in zip(kept, torch.autograd.grad(3 * loss, inputs), strict=True):
                assert torch.equal(a, b), loss_name
            said.append(f"{loss_name} {dtype} {[float(g.double().abs().sum()) for g in kept]}")
    try:
        (g,) = torch.autograd.grad(F.kl_div(s, t), s, create_graph=True)
        g.sum().backward()
    except RuntimeError as error:
        said.append(f"twice: {str(error)[:60]}")
    compiled = torch.compile(lambda x: F.kl_div(x, t.detach(), 2.0), backend="aot_eager", fullgraph=True)
    return [*said, str(float(compiled(s)))]

for key, (owner, name) in json.loads(sys.argv[1]).items():
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            print(json.dumps([key, run(eval(owner), name)]), flush=True)
            status = 0
        finally:
            if status:
                sys.excepthook(*sys.exc_info())
            os._exit(status)
    if os.waitpid(child, 0)[1] != 0:
        sys.exit(f"failed without {owner}.{name}")
"""


def test_without_one_of_them() -> None:
    command = [sys.executable, "-c", PROGRAM, json.dumps(NAMES)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    said = dict(json.loads(line) for line in done.stdout.splitlines())
    assert list(said) == list(NAMES)
    expected = said["nothing"]
    for name, (how, *results) in said.items():
        if name in ("nothing", "kept graph", "hooks"):  # the last two spare a copy, no more
            assert how == "direct", name
        else:
            assert how.startswith("torch.library.register_autograd, slower: torch "), name
        assert results == expected[1:], name
