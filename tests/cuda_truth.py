"""Every case of cuda_cases.py once, forward and backward, against the truth: a worker for ``python -m benchmarks.watchdog``.

``python -m benchmarks.watchdog --output FILE --worker "python tests/cuda_truth.py"`` on a GPU, or with ``--device emulated``.
Places, draws, crops and tables have the bits of the CPU kernels; the rest is compared with float64 references.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

import cuda_cases
import torch
from cuda_cases import ONCE, RANDOM, Case, assert_identical
from torch import Tensor

from fastkd.reference import crop as crop_reference
from fastkd.reference import divergence as divergence_reference
from fastkd.reference import gmm as gmm_reference
from fastkd.reference import linear as linear_reference
from fastkd.reference import moments as moments_reference
from fastkd.reference import relation as relation_reference
from fastkd.reference import sparse as sparse_reference

sys.path.append(str(Path(__file__).parents[1]))  # benchmarks/ is of the source tree

from benchmarks.watchdog import serve

Tensors = tuple[Tensor, ...]
Kernels = Callable[[], AbstractContextManager[None]]  # in which calls go to the kernels under test


def assert_near(name: str, value: Tensor, truth: Tensor, plain: Tensor, unit: float | Tensor = 0.0) -> None:
    """At most twice as far from the truth as plain torch in float32, or some roundings of numbers of size ``unit``.

    As in the operators' tests, but with more of these roundings: a single sum in plain torch may be right by luck. ``truth`` is
    float64.
    """
    wide = value.dtype == torch.float64
    actual = value.detach().cpu().double()
    assert actual.shape == truth.shape, f"{name} has shape {tuple(actual.shape)}, must have {tuple(truth.shape)}"
    assert actual.isfinite().all(), f"{name} is not finite"
    eps = 2.0**-46 if wide else 2.0**-20
    info = torch.finfo(value.dtype)
    rounding = info.eps * truth.norm() + info.eps * info.smallest_normal * truth.numel() ** 0.5
    floor = eps * truth.abs().maximum(torch.as_tensor(unit, dtype=torch.float64)).norm() + rounding
    best = torch.zeros(()) if wide else (plain.double() - truth).norm()
    error = (actual - truth).norm()
    assert error <= 2 * best + floor, f"{name}: error {error:.3g}, plain torch {best:.3g}, rounding {floor:.3g}"


def _of_reference(
    inputs: Tensors, dtype: torch.dtype, formula: Callable[..., Tensor], upstream: float = 1.0
) -> tuple[Tensor, ...]:
    """Its value, and the gradients of the first two inputs."""
    sides = [x.to(dtype).requires_grad_() for x in inputs[:2]]
    value = formula(*sides)
    return (value.detach(), *torch.autograd.grad(upstream * value.sum(), sides))


def check_loss(case: Case, inputs: Tensors, results: Tensors) -> None:
    """Divergences: of a named function, or as :func:`cuda_cases._scaled_loss` has it."""
    options = dict(case.options)
    function, target = options.pop("function", None), inputs[2]
    kinds = {"js_div": "jensen_shannon", "soft_cross_entropy": "soft_cross_entropy"}
    known = {"kind": options.pop("direction", kinds.get(function, "forward")), **options}
    if "alpha" in known:
        known["kd_scale"] = known.pop("alpha")
        known["task_scale"] = 1.0 - known["kd_scale"]
    if function is not None:
        known["target"] = target
    formula = partial(divergence_reference.divergence, **known)
    upstream = 3.0 if function is None else 1.0
    truth, plain = (_of_reference(inputs, dtype, formula, upstream) for dtype in (torch.float64, torch.float32))
    temperature = options.get("temperature", 1.0)
    size = (
        max(float(x.detach().abs().max()) / temperature for x in inputs[:2]) ** 2
        if inputs[0].dtype == torch.float64
        else 1.0
    )
    rows = 1 if options.get("reduction") == "none" else len(target)
    units = (temperature**2 * size, *[upstream * max(temperature, 1.0) * size / rows] * 2)
    for name, value, right, other, unit in zip(
        ("loss", "student gradient", "teacher gradient"), results, truth, plain, units, strict=False
    ):
        assert_near(name, value, right, other, unit)


def check_sparse_loss(case: Case, inputs: Tensors, results: Tensors) -> None:
    """Sparse teachers: of a named function."""
    options = dict(case.options)
    function = options.pop("function")
    known = {"kind": options.pop("direction", "jensen_shannon" if "js" in function else "forward"), **options}
    if "alpha" in known:
        known["kd_scale"] = known.pop("alpha")
        known["task_scale"] = 1.0 - known["kd_scale"]
    student, indices, log_probs, target = inputs

    def reference(dtype: torch.dtype) -> list[Tensor]:
        x = student.detach().to(dtype).requires_grad_()
        loss = sparse_reference.sparse_divergence(x, indices, log_probs.to(dtype), target, temperature=2.0, **known)
        return [loss.detach(), *torch.autograd.grad(loss.sum(), x)]

    rows = 1 if options.get("reduction") == "none" else len(target)
    truth, plain = reference(torch.float64), reference(torch.float32)
    for name, *values, unit in zip(("loss", "gradient"), results, truth, plain, (4.0, 2.0 / rows), strict=True):
        assert_near(name, *values, unit)


def check_linear_loss(case: Case, inputs: Tensors, results: Tensors) -> None:
    """Heads: the loss, and the gradients of hidden states, weights, biases and logits."""
    options = dict(case.options)
    function = options.pop("function")
    bias, ready, softcap = options.pop("bias"), options.pop("ready"), options.pop("softcap", None)
    known = {"kind": options.pop("direction", "jensen_shannon" if "js" in function else "forward"), **options}
    if "alpha" in known:
        known["kd_scale"] = known.pop("alpha")
        known["task_scale"] = 1.0 - known["kd_scale"]
    *sides, target = inputs

    def reference(dtype: torch.dtype) -> list[Tensor]:
        leaves = tuple(x.detach().to(dtype).requires_grad_() for x in sides)
        arguments, more = cuda_cases.sides_of(leaves, bias, ready, softcap)
        loss = linear_reference.linear_divergence(*arguments, target=target, temperature=2.0, **more, **known)
        return [loss.detach(), *torch.autograd.grad(loss.sum(), leaves)]

    rows = 1 if options.get("reduction") == "none" else len(target)
    truth, plain = reference(torch.float64), reference(torch.float32)
    names = ("loss", *(f"gradient {i}" for i in range(len(sides))))
    for name, *values, unit in zip(names, results, truth, plain, (4.0, *[2.0 / rows] * len(sides)), strict=True):
        assert_near(name, *values, unit)


def check_stats(_case: Case, inputs: Tensors, results: Tensors) -> None:
    """argmax exactly, the others and the gradient of their sum nearly."""
    logits, names = inputs[0], ("max", "argmax", "mean", "logsumexp", "entropy")

    def stats(dtype: torch.dtype) -> list[Tensor]:
        x = logits.to(dtype).requires_grad_()
        values = divergence_reference.logit_stats(x)
        floats = [value for value in values if value.is_floating_point()]
        gradient = torch.autograd.grad(floats, x, [torch.ones_like(value) for value in floats])[0]
        return [*(value.detach() for value in values), gradient]

    for name, value, truth, plain in zip(
        (*names, "gradient"), results, stats(torch.float64), stats(torch.float32), strict=True
    ):
        if name == "argmax":
            assert torch.equal(value.cpu(), truth), "argmax differs"
        else:
            assert_near(name, value, truth, plain, float(logits.abs().max()) if name != "gradient" else 1.0)


def check_relation(_case: Case, inputs: Tensors, results: Tensors) -> None:
    """The loss, its terms and both gradients."""
    truth, plain = (
        _of_reference(inputs, dtype, relation_reference.relation_loss, 3.0) for dtype in (torch.float64, torch.float32)
    )
    loss, *terms, student, teacher = results
    for name, value, right, other in zip(
        ("loss", "student gradient", "teacher gradient"), (loss, student, teacher), truth, plain, strict=True
    ):
        assert_near(name, value, right, other)
    exact, rough = (
        relation_reference.relation_terms(*(x.to(d) for x in inputs)) for d in (torch.float64, torch.float32)
    )
    for name, value, right, other in zip(("distance term", "angle term"), terms, exact, rough, strict=True):
        assert_near(name, value, right, other)


def check_moments(_case: Case, inputs: Tensors, results: Tensors) -> None:
    """Both kinds of moments, and the gradient of their sum."""

    def moments(dtype: torch.dtype) -> list[Tensor]:
        x = inputs[0].to(dtype).requires_grad_()
        values = [value for per_sample in (False, True) for value in moments_reference.channel_moments(x, per_sample)]
        gradient = torch.autograd.grad(values, x, [torch.ones_like(value) for value in values])[0]
        return [*(value.detach() for value in values), gradient]

    names = ("mean", "var", "mean of samples", "var of samples", "gradient")
    for name, value, truth, plain in zip(names, results, moments(torch.float64), moments(torch.float32), strict=True):
        assert_near(name, value, truth, plain)


def check_mixture(case: Case, inputs: Tensors, results: Tensors) -> None:
    """All problems with the CPU kernels, some with the reference."""
    values, weight = inputs
    expected = case(*inputs)
    _close(results[:-2], expected[:-2])
    _close(results[-2:], expected[-2:], AT_VALUES)
    sample = sorted({0, len(values) // 2, len(values) - 1})
    for b in sample:
        fit = gmm_reference.fit(
            values[b].double().numpy(),
            weight[b].double().numpy() if case.options["weighted"] else None,
            max_iter=5,
            tol=0.0,
        )
        weights, means, variances = (torch.from_numpy(x) for x in fit.mixture)
        _close(tuple(x[b] for x in results[:3]), (weights, means, variances.sqrt()))


def check_select(case: Case, inputs: Tensors, results: Tensors) -> None:
    """As the CPU kernels."""
    _close(results, case(*inputs), AT_VALUES)


# The E-step of CUDA kernels has an exponential in float32; the posterior of a value is more sensitive than the parameters.
AT_PARAMETERS, AT_VALUES = 2e-6, 2e-5


def _close(actual: Tensors, expected: Tensors, tolerance: float = AT_PARAMETERS) -> None:
    """What is an integer has the same bits; a mask may differ for a value at the very threshold."""
    for a, b in zip(actual, expected, strict=True):
        a = a.cpu()
        if b.is_floating_point():
            torch.testing.assert_close(a.double(), b.double(), rtol=tolerance, atol=tolerance, equal_nan=True)
        elif b.dtype == torch.bool:
            assert (a != b).double().mean() < 1e-4, "another mask"
        else:
            assert torch.equal(a, b), f"{a} must be {b}"


def check_crop(case: Case, inputs: Tensors, results: Tensors) -> None:
    """The bits of the CPU's patches; their gradient, which sums patches, nearly."""
    assert_identical(results[:1], case(*inputs)[:1])
    images, offsets, flip = inputs
    if len(results) > 1:

        def gradient(dtype: torch.dtype) -> Tensor:
            x = images.to(dtype).requires_grad_()
            patches = crop_reference.crop(x, offsets, (case.options["size"],) * 2, flip)
            upstream = (images.new_tensor(0.0) + patches.detach().to(images.dtype) * 0.5 + 1).to(dtype)
            return torch.autograd.grad(patches, x, upstream)[0]

        assert_near("gradient", results[1], gradient(torch.float64), gradient(torch.float32))


def check_bits(case: Case, inputs: Tensors, results: Tensors) -> None:
    """The CPU's, all of them."""
    assert_identical(results, case(*inputs))


CHECKS: dict[Callable[..., Tensors], Callable[[Case, Tensors, Tensors], None]] = {
    cuda_cases._loss: check_loss,
    cuda_cases._scaled_loss: check_loss,
    cuda_cases._sparse_loss: check_sparse_loss,
    cuda_cases._linear_loss: check_linear_loss,
    cuda_cases._stats: check_stats,
    cuda_cases._relation: check_relation,
    cuda_cases._moments: check_moments,
    cuda_cases._mixture: check_mixture,
    cuda_cases._select: check_select,
    cuda_cases._crop: check_crop,
    cuda_cases._crop_offsets: check_bits,
    cuda_cases._sample_teacher: check_bits,
    cuda_cases._draw_batch_of: check_bits,
    cuda_cases._alias: check_bits,
    cuda_cases._moved_table: check_bits,
}


def check(case: Case, device: torch.device, kernels: Kernels) -> None:
    """Runs the case on the device and raises an AssertionError where a result is wrong."""
    inputs = case.inputs(device)
    if case in RANDOM:  # a generator of a GPU has other numbers than that of the CPU
        runs = []
        for _ in range(2):
            with kernels():
                runs.append(case(*inputs, generator=torch.Generator(device).manual_seed(5)))
        _synchronize(device)
        assert_identical(*runs)
        assert all(x.isfinite().all() for x in runs[0] if x.is_floating_point()), "not finite"
        return
    with kernels():
        results = case(*inputs)
    _synchronize(device)
    CHECKS[case.run](case, case.inputs("cpu"), results)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main(arguments: Sequence[str] | None = None) -> None:
    """Serves the cases."""
    parser = argparse.ArgumentParser(prog="cuda_truth.py", description=__doc__)
    parser.add_argument(
        "--device", default="cuda", help="cuda, or emulated: the kernels on the host (default %(default)s)"
    )
    name = parser.parse_args(arguments).device
    kernels: Kernels = nullcontext
    if name == "emulated":
        import emulated

        kernels = partial(emulated.emulated, 0)
    device = torch.device("cpu" if name == "emulated" else name)
    serve({case.name: partial(check, case, device, kernels) for case in ONCE})


if __name__ == "__main__":
    main()
