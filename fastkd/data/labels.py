"""Wrong labels and unequal classes, made on purpose: what a method does with them is an experiment of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fastkd._checks import check_between, check_count, check_dtype, check_number, index_of
from fastkd._seeding import mixed_generator
from fastkd.data.images import check_labels

__all__ = [
    "CIFAR10_CONFUSIONS",
    "asymmetric_noise",
    "imbalanced",
    "instance_noise",
    "power_law_counts",
    "symmetric_noise",
]

_MOST_CLASSES = 2**24  # of which a list of sizes is made
_SUM_OFF = 1e-3  # by which probabilities may miss 1: more than the rounding of float32

# truck -> automobile, bird -> airplane, deer -> horse, cat <-> dog: Patrini et al., "Making Deep Neural Networks Robust
# to Label Noise" (CVPR 2017), section 5
CIFAR10_CONFUSIONS: Mapping[int, int] = {9: 1, 2: 0, 4: 7, 3: 5, 5: 3}


def symmetric_noise(target: Tensor, rate: float, num_classes: int, seed: int) -> tuple[Tensor, Tensor]:
    """Labels of which ``round(rate N)`` are replaced by one of the other classes, each as likely.

    Some papers draw the new label from all classes, so that a tenth of the replaced ones of CIFAR-10 stay right: their
    rate r is ours at ``r (K - 1) / K``.

    Args:
        target: int64 ``[N]``, in [0, num_classes).
        rate: share of the labels to change, in [0, 1].
        num_classes: K >= 2.
        seed: of the choice.

    Returns:
        noisy: int64 ``[N]``.
        changed: bool ``[N]``, where noisy and target differ.
    """
    rate, num_classes = _check(target, rate, num_classes)
    generator = mixed_generator("symmetric noise", seed)
    changed = torch.zeros(len(target), dtype=torch.bool, device="cpu")
    changed[torch.randperm(len(target), generator=generator, device="cpu")[: round(rate * len(target))]] = True
    step = torch.randint(1, num_classes, (len(target),), generator=generator, device="cpu")
    return _changed(target, changed, (target.cpu() + step) % num_classes)


def asymmetric_noise(
    target: Tensor, rate: float, num_classes: int, seed: int, mapping: Mapping[int, int] | None = None
) -> tuple[Tensor, Tensor]:
    """Labels confused with one other class each: ``round(rate n_c)`` of the n_c labels of each class c of the mapping.

    With :data:`CIFAR10_CONFUSIONS` half of the classes are never changed, so that half of the rate is wrong in all.

    Args:
        target: int64 ``[N]``, in [0, num_classes).
        rate: share of the labels of a class to change, in [0, 1].
        num_classes: K >= 2.
        seed: of the choice.
        mapping: from a class to the one it is taken for; classes that are not in it keep their labels. The next class for
            each, and the first for the last, if None, as is done for CIFAR-100.

    Returns:
        noisy: int64 ``[N]``.
        changed: bool ``[N]``, where noisy and target differ.
    """
    rate, num_classes = _check(target, rate, num_classes)
    if mapping is None:
        mapping = {label: (label + 1) % num_classes for label in range(num_classes)}
    if not isinstance(mapping, Mapping):
        raise TypeError(f"fastkd: mapping is {type(mapping).__name__}, must be a mapping of classes to classes")
    pairs: list[tuple[int, int]] = []
    for source, other in mapping.items():
        a, b = index_of(source), index_of(other)
        if a is None or b is None or not (0 <= a < num_classes and 0 <= b < num_classes) or a == b:
            raise ValueError(
                f"fastkd: mapping has {source}: {other}, must have two different classes in [0, {num_classes})"
            )
        pairs.append((a, b))
    generator = mixed_generator("asymmetric noise", seed)
    labels = target.cpu()
    changed = torch.zeros(len(labels), dtype=torch.bool, device="cpu")
    confused = labels.clone()
    for source, other in sorted(pairs):
        members = (labels == source).nonzero().flatten()
        shuffled = members[torch.randperm(len(members), generator=generator, device="cpu")]
        changed[shuffled[: round(rate * len(members))]] = True
        confused[members] = other
    return _changed(target, changed, confused)


def instance_noise(target: Tensor, probabilities: Tensor, rate: float, seed: int) -> tuple[Tensor, Tensor]:
    """Labels that depend on the image: ``round(rate N)`` are replaced, as a weak classifier errs.

    Which ones are drawn without replacement, an image with odds in proportion to ``p(most likely other class) / p(true
    class)``; the new label is drawn from the classifier's probabilities of the other classes. So noise lies where classes
    look alike, as that of people does. It is unlike the noise of Xia et al., "Part-dependent Label Noise" (NeurIPS 2020),
    whose flip rates follow from random projections of the pixels.

    Draws are by the Gumbel-max trick, and top-k for those without replacement (Kool et al., "Stochastic Beams and Where to
    Find Them", ICML 2019): ``log odds - log(-log u)``, the largest of them.

    Args:
        target: int64 ``[N]``, in [0, K).
        probabilities: float32 or float64 ``[N, K]``, K >= 2, of a classifier that has not seen the labels of these images,
            as of :func:`fastkd.data.weak_classifier.weak_classifier`; each row sums to 1. They may be 0 and 1.
        rate: share of the labels to change, in [0, 1].
        seed: of the choice.

    Returns:
        noisy: int64 ``[N]``.
        changed: bool ``[N]``, where noisy and target differ.

    Raises:
        TypeError, ValueError: other dtypes and shapes, a label or a rate out of range, rows that are no probabilities.
    """
    check_dtype("probabilities", probabilities, (torch.float32, torch.float64))
    if probabilities.dim() != 2 or probabilities.shape[1] < 2:
        raise ValueError(
            f"fastkd: probabilities has shape {tuple(probabilities.shape)}, must be [N, K] of two classes or more"
        )
    rate, num_classes = _check(target, rate, probabilities.shape[1])
    if len(probabilities) != len(target):
        raise ValueError(
            f"fastkd: probabilities has shape {tuple(probabilities.shape)}, must be ({len(target)}, {num_classes}), "
            "a row a label"
        )
    rows = probabilities.detach().cpu().double()
    wrong = ~((rows >= 0).all(1) & ((rows.sum(1) - 1).abs() <= _SUM_OFF))
    if bool(wrong.any()):
        first = int(wrong.nonzero()[0])
        raise ValueError(
            f"fastkd: probabilities[{first}] sums to {float(rows[first].sum()):g} and has {float(rows[first].min()):g} as "
            "its least, must sum to 1 and be 0 or more"
        )
    generator = mixed_generator("instance noise", seed)
    labels = target.cpu()[:, None]
    # finite for 0, too, so that chance decides between images of the same odds, and between classes that none is like
    logits = rows.clamp(min=torch.finfo(torch.float64).tiny).log()
    true = logits.gather(1, labels)[:, 0]
    others = logits.scatter(1, labels, -torch.inf)
    keys = others.amax(1) - true + _gumbel((len(rows),), generator)
    changed = torch.zeros(len(rows), dtype=torch.bool, device="cpu")
    changed[keys.argsort(descending=True, stable=True)[: round(rate * len(rows))]] = True
    return _changed(target, changed, (others + _gumbel(rows.shape, generator)).argmax(1))


def power_law_counts(num_classes: int, gamma: float, largest: int, smallest: int) -> list[int]:
    """Sizes of unequal classes, ascending: ``n_c = a / (b + c^-gamma)``, c = 1 ... C, rounded.

    a and b are such that the first class has ``smallest`` samples and the last one ``largest``. The smaller gamma, the
    fewer samples those between them have. The study of Sarfraz et al., "Knowledge Distillation Beyond Model Compression",
    takes CIFAR-10 at gamma .2, .6, 1 and 2 and gives gamma only; the law is that of Hendrycks et al., "Using Pre-Training
    Can Improve Model Robustness and Uncertainty" (ICML 2019), and ``largest=5000, smallest=250`` our reading.

    Args:
        num_classes: C >= 2, or 1 where largest and smallest are equal.
        gamma: >= 1e-6.
        largest, smallest: 1 <= smallest <= largest.

    Raises:
        TypeError, ValueError: other numbers than these.
    """
    num_classes, gamma = check_count("num_classes", num_classes, below=_MOST_CLASSES), check_number("gamma", gamma)
    largest, smallest = check_count("largest", largest, below=2**63), check_count("smallest", smallest)
    if not 1e-6 <= gamma < float("inf"):  # below, no digit is left of what the classes differ by
        raise ValueError(f"fastkd: gamma is {gamma}, must be 1e-6 or more, and finite")
    if not 1 <= smallest <= largest:
        raise ValueError(f"fastkd: smallest is {smallest}, must be in [1, {largest}], at most largest")
    if num_classes < 1 or (num_classes == 1 and smallest != largest):
        raise ValueError(
            f"fastkd: num_classes is {num_classes}, must be at least {1 if smallest == largest else 2} "
            f"for sizes from {smallest} to {largest}"
        )
    if smallest == largest:
        return [smallest] * num_classes
    last = num_classes**-gamma
    b = (smallest - largest * last) / (largest - smallest)
    a = smallest * (b + 1.0)
    between = [round(a / (b + c**-gamma)) for c in range(2, num_classes)]
    return [smallest, *between, largest]


def imbalanced(target: Tensor, counts: Sequence[int], seed: int) -> Tensor:
    """Indices of ``counts[c]`` samples of each class c: int64, ascending, on the device of target.

    Args:
        target: int64 ``[N]``, in [0, len(counts)).
        counts: of each class, for instance :func:`power_law_counts`.
        seed: of the choice.

    Raises:
        TypeError, ValueError: a class of fewer samples than asked for, a negative count, counts that are no ints.
    """
    try:
        counts = [check_count(f"counts[{label}]", count) for label, count in enumerate(counts)]
    except TypeError as error:
        if str(error).startswith("fastkd: "):
            raise
        raise TypeError(f"fastkd: counts is {type(counts).__name__}, must be a sequence of ints, one a class") from None
    _check(target, 0.0, max(2, len(counts)))
    check_labels(target, len(counts))
    generator = mixed_generator("imbalanced", seed)
    labels = target.cpu()
    kept = torch.zeros(len(labels), dtype=torch.bool, device="cpu")
    for label, count in enumerate(counts):
        members = (labels == label).nonzero().flatten()
        if not 0 <= count <= len(members):
            raise ValueError(
                f"fastkd: counts[{label}] is {count}, must be in [0, {len(members)}]: the samples of class {label}"
            )
        kept[members[torch.randperm(len(members), generator=generator, device="cpu")[:count]]] = True
    return kept.nonzero().flatten().to(target.device)


def _check(target: Tensor, rate: float, num_classes: int) -> tuple[float, int]:
    """The numbers as Python's."""
    check_dtype("target", target, (torch.int64,))
    if target.dim() != 1:
        raise ValueError(f"fastkd: target has shape {tuple(target.shape)}, must be [N]")
    rate, num_classes = check_between("rate", rate, 0.0, 1.0), check_count("num_classes", num_classes, 2, 2**63)
    check_labels(target, num_classes)
    return rate, num_classes


def _gumbel(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """``-log(-log u)``, float64, finite."""
    uniform = torch.rand(tuple(shape), generator=generator, dtype=torch.float64, device="cpu")
    return -(-uniform.clamp(min=torch.finfo(torch.float64).tiny).log()).log()


def _changed(target: Tensor, changed: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    return torch.where(changed, new, target.cpu()).to(target.device), changed.to(target.device)
