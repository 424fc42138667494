"""Small calls of every public function that has CUDA kernels, forward and backward; the tests of CUDA share them.

``python tests/cuda_cases.py`` runs them all on the GPU, for compute-sanitizer; cuda_truth.py compares each with the truth.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import fastkd
from fastkd import functional as F  # noqa: N812
from fastkd.ops import alias as alias_ops
from fastkd.ops import batch as batch_ops
from fastkd.ops import crop as crop_ops
from fastkd.ops import divergence as divergence_ops
from fastkd.ops import gmm as gmm_ops
from fastkd.ops import sparse as sparse_ops
from fastkd.ops.alias import Table

needs_cuda = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU here"),
]


@dataclass(frozen=True)
class Case:
    """``run(*make(device, seed))`` is all the work: the results, then the gradients."""

    name: str
    make: Callable[[torch.device, int], tuple[Tensor, ...]]
    run: Callable[..., tuple[Tensor, ...]]
    options: dict[str, Any] = field(default_factory=dict)

    def inputs(self, device: torch.device | str, seed: int = 0) -> tuple[Tensor, ...]:
        """Inputs that depend on the seed only, not on the device."""
        return self.make(torch.device(device), seed)

    def __call__(self, *inputs: Tensor, **more: Any) -> tuple[Tensor, ...]:
        return self.run(*inputs, **self.options, **more)


def _normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def _logits(rows: int, classes: int, dtype: torch.dtype) -> Callable[[torch.device, int], tuple[Tensor, ...]]:
    def make(device: torch.device, seed: int) -> tuple[Tensor, ...]:
        both = (_normal(2 * seed + i, rows, classes, dtype=dtype).mul_(3).to(device) for i in (0, 1))
        target = torch.randint(classes, (rows,), generator=torch.Generator().manual_seed(seed))
        target[rows // 2] = -100
        return (*both, target.to(device))

    return make


def _loss(student: Tensor, teacher: Tensor, target: Tensor, *, function: str, **options: Any) -> tuple[Tensor, ...]:
    """The loss, and the gradients of both sides."""
    student, teacher = student.detach().requires_grad_(), teacher.detach().requires_grad_()
    loss = getattr(F, function)(student, teacher, target=target, **options)
    return (loss.detach(), *torch.autograd.grad(loss.sum(), (student, teacher)))


def _sparse(
    rows: int, classes: int, dtype: torch.dtype, entries: int
) -> Callable[[torch.device, int], tuple[Tensor, ...]]:
    def make(device: torch.device, seed: int) -> tuple[Tensor, ...]:
        student, teacher, target = _logits(rows, classes, dtype)(torch.device("cpu"), seed)
        log_probs, indices = torch.log_softmax(teacher.double() / 2.0, -1).topk(entries)
        log_probs[0, entries // 2] = -torch.inf
        return tuple(x.to(device) for x in (student, indices, log_probs.float(), target))

    return make


def _sparse_loss(
    student: Tensor, indices: Tensor, log_probs: Tensor, target: Tensor, *, function: str, **options: Any
) -> tuple[Tensor, ...]:
    """The loss, and the student's gradient."""
    student = student.detach().requires_grad_()
    loss = getattr(F, function)(student, indices, log_probs, target=target, temperature=2.0, **options)
    return (loss.detach(), *torch.autograd.grad(loss.sum(), student))


def _heads(
    rows: int, student: int, teacher: int, classes: int, dtype: torch.dtype, *, bias: bool, ready: bool
) -> Callable[[torch.device, int], tuple[Tensor, ...]]:
    """Hidden states, weight and bias of each side, and a target that leaves out two rows. ``ready``: the teacher's logits."""

    def make(device: torch.device, seed: int) -> tuple[Tensor, ...]:
        numbers = iter(range(10 * seed, 10 * seed + 10))

        def side(features: int) -> list[Tensor]:
            hidden, weight = (_normal(next(numbers), n, features, dtype=torch.float64) for n in (rows, classes))
            return [hidden, weight * 2 * features**-0.5, *([_normal(next(numbers), classes).double()] if bias else [])]

        theirs = [2 * _normal(next(numbers), rows, classes)] if ready else side(teacher)
        target = torch.randint(classes, (rows,), generator=torch.Generator().manual_seed(seed))
        target[[0, rows // 2]] = -100
        return (*(x.to(device, dtype) for x in (*side(student), *theirs)), target.to(device))

    return make


def sides_of(
    tensors: tuple[Tensor, ...], bias: bool, ready: bool, softcap: float | None
) -> tuple[tuple[Any, ...], dict[str, Tensor]]:
    """The arguments of a linear loss from what :func:`_heads` makes, without the target."""
    hidden, *rest = tensors
    student = fastkd.LinearHead(rest.pop(0), rest.pop(0) if bias else None, softcap=softcap)
    if ready:
        return (hidden, student, None, None), {"teacher_logits": rest[0]}
    return (hidden, student, rest[0], fastkd.LinearHead(rest[1], rest[2] if bias else None, softcap=softcap)), {}


def _linear_loss(
    *tensors: Tensor, function: str, bias: bool, ready: bool, softcap: float | None = None, **options: Any
) -> tuple[Tensor, ...]:
    """The loss, and the gradients of all tensors of both sides, in several chunks of fixed shapes."""
    *sides, target = tensors
    leaves = tuple(x.detach().requires_grad_() for x in sides)
    arguments, more = sides_of(leaves, bias, ready, softcap)
    budget = 4 * len(target) * len(leaves[1])
    loss = getattr(F, function)(
        *arguments, **more, target=target, temperature=2.0, skip_ignored=False, memory_budget=budget, **options
    )
    return (loss.detach(), *torch.autograd.grad(loss.sum(), leaves))


def _sample_teacher(logits: Tensor, seed: Tensor) -> tuple[Tensor, ...]:
    return sparse_ops.sample_teacher(logits, seed, 37, 1.5)


def _teacher(rows: int, classes: int, dtype: torch.dtype) -> Callable[[torch.device, int], tuple[Tensor, ...]]:
    def make(device: torch.device, seed: int) -> tuple[Tensor, ...]:
        return _normal(seed, rows, classes, dtype=dtype).mul_(3).to(device), torch.tensor([7 + seed], device=device)

    return make


def _scaled_loss(student: Tensor, teacher: Tensor, _target: Tensor) -> tuple[Tensor, ...]:
    """An incoming gradient other than 1 is multiplied in by a launch of its own."""
    student = student.detach().requires_grad_()
    loss = divergence_ops.divergence(student, teacher)[0]
    return (loss.detach(), *torch.autograd.grad(3.0 * loss, student))


def _stats(logits: Tensor, *_: Tensor, temperature: float = 1.0) -> tuple[Tensor, ...]:
    logits = logits.detach().requires_grad_()
    stats = F.logit_stats(logits, temperature)
    floats = [value for value in stats if value.is_floating_point()]
    gradient = torch.autograd.grad(floats, logits, [torch.ones_like(value) for value in floats])
    return (*(value.detach() for value in stats), *gradient)


def _images(
    batch: int, side: int, dtype: torch.dtype, memory_format: torch.memory_format = torch.contiguous_format
) -> Callable[[torch.device, int], tuple[Tensor, ...]]:
    def make(device: torch.device, seed: int) -> tuple[Tensor, ...]:
        images = _normal(seed, batch, 3, side, side)
        images = (images * 50 + 128).clamp(0, 255).to(dtype) if dtype == torch.uint8 else images.to(dtype)
        generator = torch.Generator().manual_seed(seed)
        offsets = torch.randint(-3, side, (batch, 4, 2), generator=generator)  # some reach outside
        flip = torch.rand(batch, 4, generator=generator) < 0.5
        return images.contiguous(memory_format=memory_format).to(device), offsets.to(device), flip.to(device)

    return make


def _with_gradient(crop: Callable[[Tensor], Tensor], images: Tensor) -> tuple[Tensor, ...]:
    if not images.is_floating_point():
        return (crop(images),)
    images = images.detach().requires_grad_()
    patches = crop(images)
    upstream = patches.detach() * 0.5 + 1
    return (patches.detach(), *torch.autograd.grad(patches, images, upstream))


def _crop(images: Tensor, offsets: Tensor, flip: Tensor, *, size: int) -> tuple[Tensor, ...]:
    return _with_gradient(lambda x: fastkd.crop_patches(x, offsets, size, flip), images)


def _key(device: torch.device, seed: int) -> tuple[Tensor, ...]:
    return (torch.tensor([7 + seed], device=device),)


def _crop_offsets(seed: Tensor) -> tuple[Tensor, ...]:
    return crop_ops.crop_offsets(seed, 33, 5, (-4, 9), (0, 1000), 0.5)


def _random_patches(images: Tensor, *_: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, ...]:
    return _with_gradient(lambda x: fastkd.random_patches(x, 5, 3, generator, padding=2)[0], images)


def _random_crop_flip(images: Tensor, *_: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, ...]:
    return _with_gradient(
        lambda x: fastkd.random_crop_flip(x, mean=[0.4, 0.5, 0.6], std=0.25, generator=generator), images
    )


_COLLECTION = 5000  # images
_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@cache
def _table(device: torch.device) -> fastkd.AliasTable:
    return fastkd.AliasTable(_normal(0, _COLLECTION), 2.0, seed=1).to(device)


def _collection(device: torch.device, seed: int) -> tuple[Tensor, ...]:
    """The tensors of a table and of its stream, a seed for the crops, images."""
    table, (images, *_) = _table(device), _images(_COLLECTION, 8, torch.uint8)(device, seed)
    stream = torch.tensor([seed, 2**40 + seed], device=device)
    return (*(tensor.clone() for tensor in table._table), stream, torch.tensor([seed], device=device), images)


def _draw_batch_of(*tensors: Tensor, dtype: torch.dtype, count: int = 70) -> tuple[Tensor, ...]:
    *table, stream, crop_seed, images = tensors
    scale = [0.01, 0.02, 0.03]
    return batch_ops.draw_batch(
        Table(*table), stream, crop_seed, images, count, (9, 7), 2, 0.5, center=[90.0] * 3, scale=scale, dtype=dtype
    )


def _draw_batch(*tensors: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, ...]:
    images = tensors[-1]
    if generator is None:  # the stream of the table would go on, whatever the seed
        on_gpu = images.device.type == "cuda"
        generator = torch.cuda.default_generators[images.device.index or 0] if on_gpu else torch.default_generator
    return fastkd.draw_batch(_table(images.device), images, 70, mean=0.5, std=0.25, generator=generator)


def _moved_table(scores: Tensor) -> tuple[Tensor, ...]:
    """Made on the CPU, as a collection's is that was read from a file."""
    return (fastkd.AliasTable(scores.cpu(), 2.0, seed=1).to(scores.device).sample(1000),)


def _scores(items: int, dtype: torch.dtype) -> Callable[[torch.device, int], tuple[Tensor, ...]]:
    """Scores, changes of some of them (several of one item, too), and a stream."""

    def make(device: torch.device, seed: int) -> tuple[Tensor, ...]:
        scores, fresh = _normal(2 * seed, items, dtype=dtype), _normal(2 * seed + 1, items // 3 + 1, dtype=dtype)
        indices = torch.randint(items, fresh.shape, generator=torch.Generator().manual_seed(seed))
        stream = torch.tensor([seed, 2**40 + seed])
        return tuple(t.to(device) for t in (scores, indices, fresh, stream))

    return make


def _alias(scores: Tensor, indices: Tensor, fresh: Tensor, stream: Tensor) -> tuple[Tensor, ...]:
    """Everything but the floats, which are those of the CPU, too."""
    slope = alias_ops.inverse_temperature(scores, 5.0)
    table = alias_ops.build(scores, slope)
    drawn, weights = alias_ops.sample(table, stream, 1000), alias_ops.weights(table)
    alias_ops.update(table, indices, fresh)
    return (slope, drawn, weights, *table, alias_ops.weights(table), alias_ops.sample(table, stream, 1000, 5, 3))


def _losses(problems: int, n: int, dtype: torch.dtype) -> Callable[[torch.device, int], tuple[Tensor, ...]]:
    """Values of two components, some of them NaN, and weights."""

    def make(device: torch.device, seed: int) -> tuple[Tensor, ...]:
        values, far = (_normal(2 * seed + i, problems, n) for i in (0, 1))
        values = values.abs() + (far > 0.5) * 3
        values[problems // 2, n // 2] = torch.nan
        return values.to(dtype).to(device), far.abs().to(device)

    return make


def _mixture(values: Tensor, weight: Tensor, *, weighted: bool) -> tuple[Tensor, ...]:
    mixtures = gmm_ops.gmm_fit(values, sample_weight=weight if weighted else None, max_iter=5, tol=0.0)
    return (*mixtures, *gmm_ops.gmm_posterior(values, mixtures))


def _select(values: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
    return fastkd.select_clean(values)


def _features(
    points: int, features: int, teacher_features: int, dtype: torch.dtype
) -> Callable[[torch.device, int], tuple[Tensor, ...]]:
    """Two points of the student's are the same."""

    def make(device: torch.device, seed: int) -> tuple[Tensor, ...]:
        student, teacher = _normal(2 * seed, points, features), _normal(2 * seed + 1, points, teacher_features)
        student[points // 2] = student[0]
        return student.to(dtype).to(device), teacher.to(dtype).to(device)

    return make


def _relation(student: Tensor, teacher: Tensor) -> tuple[Tensor, ...]:
    student, teacher = student.detach().requires_grad_(), teacher.detach().requires_grad_()
    loss, terms = F.relation_loss(student, teacher, return_terms=True)
    return (loss.detach(), *terms.values(), *torch.autograd.grad(3.0 * loss, (student, teacher)))


# one point, tiles of 8 and 32 that are not full, features that several blocks share
_RELATIONS = (
    (1, 3, 2, torch.float32),
    (41, 17, 20, torch.bfloat16),
    (64, 128, 300, torch.float32),
    (129, 33, 64, torch.float64),
    (70, 1000, 5, torch.float16),
)


def _maps(
    shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool
) -> Callable[[torch.device, int], tuple[Tensor, ...]]:
    """Far from 0, each channel elsewhere."""

    def make(device: torch.device, seed: int) -> tuple[Tensor, ...]:
        maps = _normal(seed, *shape) + torch.arange(shape[1]).view(-1, *(1,) * (len(shape) - 2))
        maps = maps.to(dtype)
        return ((maps.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else maps).to(device),)

    return make


def _moments(x: Tensor) -> tuple[Tensor, ...]:
    x = x.detach().requires_grad_()
    results = [value for per_sample in (False, True) for value in F.channel_moments(x, per_sample=per_sample)]
    gradient = torch.autograd.grad(results, x, [torch.ones_like(value) for value in results])
    return (*(value.detach() for value in results), *gradient)


# rows of a lane, of four, of a warp, of a block, cut into parts; columns of packs, of single channels, of few pixels and many
_MAPS = (
    ((9, 5, 2, 2), torch.float32),
    ((5, 70, 7, 7), torch.bfloat16),
    ((3, 24, 900), torch.bfloat16),
    ((3, 5, 5000), torch.float32),
    ((1, 2, 1 << 20), torch.float16),
    ((130, 48), torch.float32),
    ((4100, 41), torch.bfloat16),
    ((2, 6, 3, 5, 7), torch.float64),
)


# from problems that lanes share to one that a cluster of blocks shares
_MIXTURES = (
    (4300, 40, torch.float32),
    (4300, 101, torch.bfloat16),
    (5, 33, torch.float16),
    (600, 1000, torch.float32),
    (3, 1271, torch.float64),
    (1, 50_000, torch.float32),
)


# from rows that fit a warp to rows that fill several blocks, most of them not aligned; rows of one element
_SHAPES = (
    (256, 100, torch.float32),
    (33, 4099, torch.bfloat16),
    (5, 50257, torch.float16),
    (2, 128257, torch.bfloat16),
    (3, 1, torch.float32),
    (7, 129, torch.float64),
    (3, 1271, torch.float64),
)
_LOSSES: dict[str, dict[str, Any]] = {
    "kl_div": {"function": "kl_div", "temperature": 4.0},
    "kl_div reverse": {"function": "kl_div", "direction": "reverse"},
    "js_div": {"function": "js_div", "beta": 0.3},
    "soft_cross_entropy": {"function": "soft_cross_entropy", "temperature": 2.0},
    "kd_loss": {"function": "kd_loss", "temperature": 4.0, "alpha": 0.7},
    "kl_div rows": {"function": "kl_div", "reduction": "none"},
}

_SPARSE: dict[str, dict[str, Any]] = {
    "sparse_kl_div": {"function": "sparse_kl_div"},
    "sparse_kl_div renormalize": {"function": "sparse_kl_div", "tail": "renormalize", "reduction": "none"},
    "sparse_kl_div reverse drop": {"function": "sparse_kl_div", "tail": "drop", "direction": "reverse"},
    "sparse_js_div": {"function": "sparse_js_div", "beta": 0.3},
    "sparse_kd_loss": {"function": "sparse_kd_loss", "alpha": 0.7},
}
_LINEAR: dict[str, dict[str, Any]] = {
    "linear_kl_div": {"function": "linear_kl_div", "bias": False, "ready": False},
    "linear_kl_div bias, rows": {"function": "linear_kl_div", "bias": True, "ready": False, "reduction": "none"},
    "linear_kl_div reverse": {"function": "linear_kl_div", "bias": False, "ready": False, "direction": "reverse"},
    "linear_js_div softcap": {"function": "linear_js_div", "bias": True, "ready": False, "beta": 0.3, "softcap": 5.0},
    "linear_kd_loss bias": {"function": "linear_kd_loss", "bias": True, "ready": False, "alpha": 0.7},
    "linear_kd_loss of teacher_logits": {"function": "linear_kd_loss", "bias": True, "ready": True, "alpha": 0.7},
}
# rows, features of both sides, classes
_LINEAR_SHAPES = (
    (23, 16, 24, 131, torch.float32),
    (70, 64, 96, 1271, torch.bfloat16),
    (9, 48, 40, 5003, torch.float16),
)
_SPARSE_SHAPES = ((9, 41, torch.float32, 5), (3, 5003, torch.bfloat16, 64), (2, 140_001, torch.float16, 9))


def _name(name: str, shape: tuple[Any, ...]) -> str:
    return f"{name} {'x'.join(str(part).removeprefix('torch.') for part in shape)}"


DETERMINED = [
    *(
        Case(_name(name, shape), _logits(*shape), _loss, options)
        for name, options in _LOSSES.items()
        for shape in _SHAPES
    ),
    *(
        Case(_name(name, shape), _sparse(*shape), _sparse_loss, options)
        for name, options in _SPARSE.items()
        for shape in _SPARSE_SHAPES
    ),
    *(
        Case(
            _name(name, shape),
            _heads(*shape, bias=options["bias"], ready=options["ready"]),
            _linear_loss,
            options,
        )
        for name, options in _LINEAR.items()
        for shape in _LINEAR_SHAPES
    ),
    *(Case(_name("sample_teacher", shape), _teacher(*shape), _sample_teacher) for shape in _SHAPES),
    Case("divergence_backward_", _logits(33, 401, torch.float32), _scaled_loss),
    *(Case(_name("logit_stats", shape), _logits(*shape), _stats) for shape in _SHAPES),
    *(Case(_name("gmm_fit", shape), _losses(*shape), _mixture, {"weighted": False}) for shape in _MIXTURES),
    *(Case(_name("gmm_fit weighted", shape), _losses(*shape), _mixture, {"weighted": True}) for shape in _MIXTURES),
    *(Case(_name("select_clean", shape), _losses(*shape), _select) for shape in _MIXTURES),
    *(Case(_name("relation_loss", shape), _features(*shape), _relation) for shape in _RELATIONS),
    *(
        Case(
            f"channel_moments {'channels_last ' * last}{'x'.join(map(str, shape))}x{str(dtype)[6:]}",
            _maps(shape, dtype, last),
            _moments,
        )
        for last in (False, True)
        for shape, dtype in _MAPS
    ),
    Case("crop_offsets", _key, _crop_offsets),
    Case("crop_patches", _images(7, 16, torch.float32), _crop, {"size": 5}),
    Case("crop_patches bfloat16", _images(7, 33, torch.bfloat16), _crop, {"size": 8}),
    Case("crop_patches float16", _images(7, 20, torch.float16), _crop, {"size": 7}),
    Case("crop_patches float64", _images(7, 16, torch.float64), _crop, {"size": 5}),
    Case("crop_patches channels_last", _images(7, 16, torch.float32, torch.channels_last), _crop, {"size": 5}),
    Case("crop_patches uint8", _images(7, 16, torch.uint8), _crop, {"size": 8}),
    *(Case(_name("draw_batch", (dtype,)), _collection, _draw_batch_of, {"dtype": dtype}) for dtype in _FLOATS),
]
ALIAS = [
    Case(f"alias {items} {short}", _scores(items, dtype), _alias)
    for items, dtype, short in (
        (1, torch.float32, "float32"),
        (41, torch.bfloat16, "bfloat16"),
        (4097, torch.float64, "float64"),
        (300_001, torch.float32, "float32"),
        (20_000, torch.float16, "float16"),
    )
]
DETERMINED += ALIAS
RANDOM = [
    Case("random_patches", _images(7, 16, torch.float32), _random_patches),
    Case("random_crop_flip", _images(7, 16, torch.float32), _random_crop_flip),
    Case("random_crop_flip uint8", _images(7, 16, torch.uint8), _random_crop_flip),
    Case("draw_batch", _collection, _draw_batch),
]
CASES = DETERMINED + RANDOM
# whose copies from the host wait for the device
ONCE = [*CASES, Case("AliasTable.to", lambda device, seed: (_normal(seed, 10_000).to(device),), _moved_table)]

parametrized = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
parametrized_determined = pytest.mark.parametrize("case", DETERMINED, ids=lambda case: case.name)


def assert_identical(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """Bit for bit, on whatever device."""
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.cpu(), b.cpu(), rtol=0, atol=0, equal_nan=True)


def run_all(device: torch.device) -> None:
    """Every case once."""
    for case in ONCE:
        case(*case.inputs(device))
        print(case.name, flush=True)
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    run_all(torch.device("cuda"))
