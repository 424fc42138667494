"""Parts of an alias table: the blocks of some items in the scale of all, and draws of which each part knows its own.

No operator of its own: ``alias_update_`` writes bins of given scores in a given scale, and what no operator gives is
done in integers by torch, bit for bit as csrc/alias/math.h has it. Tensors are on the CPU.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastkd.ops import alias as _ops
from fastkd.ops.alias import BLOCK_SIZE, Table

# csrc/alias/math.h
TOTAL_BITS = 52
LOG2_E = 1.44269504088896340736
LARGEST_T = 63.0
LARGEST_ITEMS = 2**43  # of which products with a number of blocks fit 63 bits
_EXP2 = (2977044488, 1031764554, 238392259, 41293032, 5763423, 617496, 92044)
_FRACTION_SCALE = 2.0**45
_STREAM = 1
_WORD = 2**32 - 1

_POWERS = (
    1 << 14
)  # items whose powers are made at a time: so few that they stay in the caches, and that torch wakes no threads
_BUILT = 64 * BLOCK_SIZE  # items that are built at a time
_COUNTED = 1 << 18  # items that are counted at a time
_DRAWN = 1 << 13  # draws made at a time
_DIGIT = 16  # bits of a key in each pass of the quartiles
_KEY = 64


class Scale(NamedTuple):
    """From scores to weights, the same for all parts: ``2^(exponent + (score - reference) kappa)``, rounded."""

    reference: float
    kappa: float
    exponent: int


# ---- scores to weights -------------------------------------------------------------------------------------------------


def _powers(scores: Tensor, reference: float, kappa: float) -> tuple[Tensor, Tensor, Tensor]:
    """``2^t`` of float64 scores as mantissa in units of 2^-32, ``floor(t) + 64``, and whether it is positive."""
    t = (scores - reference).clamp_(min=-1.7e308).mul_(kappa)
    positive = (t >= -64.0).logical_and_(scores > -torch.inf)
    fixed = t.clamp_(-64.0, LARGEST_T).mul_(_FRACTION_SCALE).round_().long().add_(64 << 45)  # halves to even
    fraction = (fixed >> 13).bitwise_and_(_WORD)
    r = fraction.mul(_EXP2[6]).bitwise_right_shift_(32).add_(_EXP2[5])
    for coefficient in _EXP2[4::-1]:
        r.mul_(fraction).bitwise_right_shift_(32).add_(coefficient)
    # the last product may have 64 bits
    r.mul_(fraction).bitwise_right_shift_(32).bitwise_and_(_WORD).add_(1 << 32)
    return r, fixed.bitwise_right_shift_(45), positive


def partition(scores: Tensor, reference: float, kappa: float) -> int:
    """The sum of ``floor(2^32 2^t) + 1`` over scores ``[n]`` that are at most the reference."""
    total = 0
    for chunk in scores.split(_POWERS):
        mantissa, exponent, positive = _powers(chunk.double(), reference, kappa)
        terms = mantissa.bitwise_right_shift_(exponent.neg_().add_(64).clamp_(max=63)).add_(1)
        total += int(terms.mul_(positive).sum())
    return total


def exponent_of(partition: int) -> int:
    """The largest that keeps the total of the weights below 2^52."""
    return TOTAL_BITS - 1 - max(0, (partition - 1).bit_length() - 32)


def sum_of_weights(scores: Tensor, scale: Scale, largest_t: int) -> int:
    """Of scores ``[n]``, whose ``t`` is below ``largest_t + 1``; ``scale.exponent + largest_t`` is at most 50."""
    left = max(0, scale.exponent + largest_t - 31)
    right = 32 + 64 - scale.exponent + left
    total = 0
    for chunk in scores.split(BLOCK_SIZE):  # of weights below 2^51 each
        mantissa, exponent, positive = _powers(chunk.double(), scale.reference, scale.kappa)
        halves = (mantissa << left).bitwise_right_shift_(exponent.neg_().add_(right - 1).clamp_(max=63))
        total += int(halves.add_(1).bitwise_right_shift_(1).mul_(positive).sum())
    return total


# ---- weights to bins ---------------------------------------------------------------------------------------------------


def build(scores: Tensor, scale: Scale) -> tuple[Tensor, Tensor]:
    """Bins int64 ``[n]`` and weights of blocks int64 ``[ceil(n / 4096)]`` of the scores of a part, ``[n]``."""
    bins = torch.empty(len(scores), dtype=torch.int64)
    block_weight = torch.empty(-(-len(scores) // BLOCK_SIZE), dtype=torch.int64)
    every = torch.arange(_BUILT)
    for start in range(0, len(scores), _BUILT):
        chunk = scores[start : start + _BUILT]
        items = every[: len(chunk)]
        empty = items & (BLOCK_SIZE - 1), torch.zeros(-(-len(chunk) // BLOCK_SIZE), dtype=torch.int64)
        built, weight = _updated(*empty, scale, items, chunk)
        bins[start : start + len(chunk)] = built
        block_weight[start // BLOCK_SIZE :][: len(weight)] = weight
    return bins, block_weight


def rebuilt(
    bins: Tensor, block_weight: Tensor, scale: Scale, shift: int, items: Tensor, scores: Tensor
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """The blocks that change where all weights are divided by ``2^shift`` and then ``items`` get new scores.

    ``scale`` is the new one. Yields some blocks, ascending, their new bins and weights; nothing is written.
    """
    order = items.argsort(stable=True)  # of equal items the last one counts
    items, scores = items[order], scores[order]
    of_change = items // BLOCK_SIZE
    blocks = torch.arange(len(block_weight)) if shift else of_change.unique()
    for begin in range(0, len(blocks), _BUILT // BLOCK_SIZE):
        some = blocks[begin : begin + _BUILT // BLOCK_SIZE]
        numbers = some.tolist()
        new_bins = torch.cat([bins[b * BLOCK_SIZE : (b + 1) * BLOCK_SIZE] for b in numbers])
        new_weight = block_weight[some]
        if shift:
            new_bins, new_weight = _divided(new_bins, new_weight, shift)
        first, last = torch.searchsorted(of_change, torch.tensor([numbers[0], numbers[-1] + 1])).tolist()
        if last > first:
            at = torch.searchsorted(some, of_change[first:last]) * BLOCK_SIZE + items[first:last] % BLOCK_SIZE
            new_bins, new_weight = _updated(new_bins, new_weight, scale, at, scores[first:last])
        yield numbers, new_bins, new_weight


def _updated(bins: Tensor, block_weight: Tensor, scale: Scale, items: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Whole blocks after new scores for some items, in this scale.

    ``alias_update_`` refuses to leave no weight, which some blocks of many may well have: one more block in front has
    the weight 1. It would move the scale to make room if the total became 2^52, then there is weight without that block.
    """
    for weight in (1, 0):
        table = _with_ballast(bins, block_weight, weight, scale)
        _ops.update(table, items + BLOCK_SIZE, scores)
        if table.scale[2].item() == scale.exponent:
            break
    return table.bins[BLOCK_SIZE:], table.block_weight[1:]


def _divided(bins: Tensor, block_weight: Tensor, shift: int) -> tuple[Tensor, Tensor]:
    """Whole blocks with all weights divided by ``2^shift``, rounded half up.

    An update divides so where a new weight would be ``2^shift`` times the largest that there may be, 2^50: one in the block
    in front. No weight is as large as 2^52, so that 53 bits leave nothing, as do more, which no score can ask for.
    """
    shift = min(shift, TOTAL_BITS + 1)
    table = _with_ballast(bins, block_weight, 1, Scale(0.0, 1.0, TOTAL_BITS - 2))
    _ops.update(table, torch.tensor([0]), torch.tensor([float(shift)], dtype=torch.float64))
    return table.bins[BLOCK_SIZE:], table.block_weight[1:]


def _with_ballast(bins: Tensor, block_weight: Tensor, weight: int, scale: Scale) -> Table:
    """A table whose first block has all of ``weight``, 0 or 1, on its item 0; the others are those given."""
    front = torch.zeros(BLOCK_SIZE, dtype=torch.int64)
    front[0] = weight * BLOCK_SIZE  # threshold 1, alias 0
    total = max(1, int(block_weight.sum()) + weight)
    return Table(
        torch.cat([front, bins]),
        torch.cat([block_weight.new_tensor([weight]), block_weight]),
        torch.empty(len(block_weight) + 1, 2, dtype=torch.int64),
        torch.tensor([scale.reference, scale.kappa, scale.exponent, total], dtype=torch.float64),
    )


def floor_of(t: float) -> int:
    """Of the largest t of new scores, once it is rounded to fixed point, which may be the next integer."""
    return int(t + 1 / _FRACTION_SCALE)


def shift_for(exponent: int, largest_t: int, added: Callable[[int], int], changes: int, total: int, items: int) -> int:
    """The shift by which an update divides all weights, to make room; ``added(exponent)`` sums the new ones."""
    least = max(0, exponent + largest_t - (TOTAL_BITS - 2))
    new = added(exponent - least)
    more = 0
    while True:
        shift = least + more
        old = (total + (1 << shift >> 1) >> shift) + (items if shift else 0) if shift < 64 else items
        if old + (new >> more) + (changes if more else 0) < 1 << TOTAL_BITS:
            return shift
        more += 1


def top_of(block_weight: Tensor) -> Tensor:
    """The table over the blocks of all parts, int64 ``[blocks, 2]``: threshold and alias, as ``alias_build`` makes it."""
    weights: list[int] = block_weight.tolist()
    n, total = len(weights), sum(weights)
    thresholds = [weight * n for weight in weights]
    aliases = list(range(n))
    lights = iter([b for b in range(n) if thresholds[b] <= total])
    heavies = [b for b in range(n) if thresholds[b] > total]
    light = next(lights, None)
    for heavy, following in zip(heavies, heavies[1:] + heavies[-1:], strict=True):
        rest = thresholds[heavy]
        while rest > total and light is not None:
            aliases[light] = heavy
            rest -= total - thresholds[light]
            light = next(lights, None)
        thresholds[heavy], aliases[heavy] = rest, following
        if following != heavy:
            thresholds[following] += rest - total
    return torch.tensor([thresholds, aliases], dtype=torch.int64).T.contiguous()


# ---- draws -------------------------------------------------------------------------------------------------------------


def draw(
    bins: Tensor,
    blocks: tuple[int, int],
    block_weight: Tensor,
    top: Tensor,
    total: int,
    items: int,
    seed: int,
    start: int,
    count: int,
    shares: tuple[int, int],
) -> tuple[Tensor, Tensor, Tensor]:
    """The draws ``start, start + 1, ...`` (``count`` of them) of ``seed`` from a table of which this has a part.

    Args:
        bins: of the items of this part.
        blocks: the first block of this part, and the first of the next one.
        block_weight, top, total, items: of all parts; the total is that of the weights.
        shares: ``rank, world``: of every ``world`` draws, number ``rank`` is told the block.

    Returns:
        Positions of the draws that fall into this part, their items, counted within it, and the blocks of the draws
        ``rank, rank + world, ...``: int64 ``[m]``, ``[m]`` and ``[ceil((count - rank) / world)]``.
    """
    rank, world = shares
    begin, end = blocks
    positions, drawn, told = [], [], []
    for first in range(0, count, _DRAWN):
        index = torch.arange(first, min(first + _DRAWN, count))
        words = _philox(seed, index + start)
        block = _choose(words[1], words[0], top, total)
        told.append(block[(rank - first) % world :: world])
        own = ((block >= begin) & (block < end)).nonzero().squeeze(1)
        positions.append(own + first)
        block = block[own]
        before = (block - begin) * BLOCK_SIZE
        sizes = (items - block * BLOCK_SIZE).clamp_(max=BLOCK_SIZE)
        drawn.append(before + _choose_inner(words[3][own], words[2][own], sizes, block_weight[block], bins, before))
    empty = torch.empty(0, dtype=torch.int64)
    return tuple(torch.cat([empty, *found]) for found in (positions, drawn, told))  # type: ignore[return-value]


def _philox(seed: int, index: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 as in csrc/common/philox.h: four words of 32 bits for each index."""
    c0, c1 = index & _WORD, (index >> 32).bitwise_and_(_WORD)
    c2, c3 = torch.full_like(index, _STREAM), torch.zeros_like(index)
    k0, k1 = seed & _WORD, seed >> 32 & _WORD
    for _ in range(10):
        # products of 64 bits, whose sign counts for nothing
        product0, product1 = c0.mul_(0xD2511F53), c2.mul_(0xCD9E8D57)
        high0 = (product0 >> 32).bitwise_and_(_WORD)
        high1 = (product1 >> 32).bitwise_and_(_WORD)
        c0, c1 = high1.bitwise_xor_(c1).bitwise_xor_(k0), product1.bitwise_and_(_WORD)
        c2, c3 = high0.bitwise_xor_(c3).bitwise_xor_(k1), product0.bitwise_and_(_WORD)
        k0, k1 = k0 + 0x9E3779B9 & _WORD, k1 + 0xBB67AE85 & _WORD
    return c0, c1, c2, c3


def _bin(high: Tensor, low: Tensor, bound: int | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A uniform integer below ``bound`` < 2^31 from 64 random bits, and both halves of the fraction that is left."""
    low = low * bound
    high = (high * bound).add_(low >> 32)
    return high >> 32, high.bitwise_and_(_WORD), low.bitwise_and_(_WORD)


def _multiply_high(high: Tensor, low: Tensor, value: int | Tensor) -> Tensor:
    """``floor((high 2^32 + low) value / 2^64)``, for a value below 2^52."""
    value_high, value_low = value >> 32, value & _WORD
    middle = high * value_low  # of 64 bits
    rest = (low * value_low >> 32).bitwise_and_(_WORD).add_(low * value_high).add_(middle & _WORD)
    carried = (middle >> 32).bitwise_and_(_WORD).add_(rest >> 32)
    return carried.add_(high * value_high)


def _choose(high: Tensor, low: Tensor, top: Tensor, total: int) -> Tensor:
    at, high, low = _bin(high, low, len(top))
    entry = top[at]
    return torch.where(_multiply_high(high, low, total) < entry[:, 0], at, entry[:, 1])


def _choose_inner(high: Tensor, low: Tensor, sizes: Tensor, weight: Tensor, bins: Tensor, before: Tensor) -> Tensor:
    at, high, low = _bin(high, low, sizes)
    word = bins[before + at]
    return torch.where(_multiply_high(high, low, weight) < word >> 12, at, word & (BLOCK_SIZE - 1))


# ---- quartiles ---------------------------------------------------------------------------------------------------------


def quartiles(scores: Tensor, sum_of_parts: Callable[[Tensor], Tensor]) -> tuple[float, float]:
    """First and third quartile of the scores of all parts that are not -inf, as ``alias_inverse_temperature`` has them.

    By digits of keys in the order of the scores: each pass counts, in all parts, one digit of those keys that begin with
    the digits found so far. What parts exchange is counts: int64, at most ``[4, 65536]``, four times.

    Args:
        scores: those of this part, without NaN and +inf; in some part is one that is finite.
        sum_of_parts: the sum of a tensor of all parts, on each.
    """
    found = [0] * 4
    ranks: list[int] = []
    lower = upper = 0.0
    for shift in range(_KEY - _DIGIT, -1, -_DIGIT):
        prefixes = sorted(set(found))
        counts = sum_of_parts(_digits(scores, shift, prefixes))
        if not ranks:
            count = int(counts.sum())
            lower, upper = 0.25 * (count - 1), 0.75 * (count - 1)
            below = [int(lower), int(upper)]
            ranks = [min(b + more, count - 1) for b in below for more in (0, 1)]
        sums = counts.cumsum(1)
        for r in range(4):
            of_prefix = sums[prefixes.index(found[r])]
            digit = int(torch.searchsorted(of_prefix, ranks[r], right=True))
            ranks[r] -= int(of_prefix[digit - 1]) if digit else 0
            found[r] = found[r] << _DIGIT | digit
    values = [_value(key) for key in found]
    return _interpolate(values[:2], lower), _interpolate(values[2:], upper)


def _digits(scores: Tensor, shift: int, prefixes: Sequence[int]) -> Tensor:
    """How many keys have each digit, of those that follow each of the prefixes: int64 ``[prefixes, 2^16]``."""
    digits = 1 << _DIGIT
    counts = torch.zeros(len(prefixes), digits, dtype=torch.int64)
    for chunk in scores.split(_COUNTED):
        bits = chunk[chunk > -torch.inf].double().view(torch.int64)
        keys = torch.where(bits < 0, ~bits, bits ^ -(2**63))
        above = keys >> shift + _DIGIT if shift + _DIGIT < _KEY else None
        for counted, prefix in zip(counts, prefixes, strict=True):
            # a key's digits from above are signed here, those of the prefix are not
            follow = keys if above is None else keys[above == _signed(prefix, _KEY - shift - _DIGIT)]
            counted += torch.bincount((follow >> shift) & digits - 1, minlength=digits)
    return counts


def _signed(value: int, bits: int) -> int:
    return value - (1 << bits) if value >> bits - 1 else value


def _value(key: int) -> float:
    bits = key ^ 1 << 63 if key >> 63 else ~key & 2**64 - 1
    return float(struct.unpack("<d", struct.pack("<Q", bits))[0])


def _interpolate(around: Sequence[float], position: float) -> float:
    fraction, distance = position - int(position), around[1] - around[0]
    return around[0] + (distance - 0.25 * distance if fraction > 0.5 else fraction * distance)
