"""The alias table in Python integers: slow, and equal to the kernels bit for bit. See csrc/alias/math.h for the maths."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import numpy.typing as npt

BLOCK_SIZE = 4096
TOTAL_BITS = 52
EXP2 = (2977044488, 1031764554, 238392259, 41293032, 5763423, 617496, 92044)
STREAM = 1
_MASK = 2**32 - 1


def philox(seed: int, stream: int, index: int) -> tuple[int, int, int, int]:
    """Philox4x32-10: four 32-bit words from a 64-bit seed, a stream number and a 64-bit index."""
    counter = [index & _MASK, index >> 32 & _MASK, stream, 0]
    key = [seed & _MASK, seed >> 32 & _MASK]
    for _ in range(10):
        low, high = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [high >> 32 ^ counter[1] ^ key[0], high & _MASK, low >> 32 ^ counter[3] ^ key[1], low & _MASK]
        key = [(key[0] + 0x9E3779B9) & _MASK, (key[1] + 0xBB67AE85) & _MASK]
    return counter[0], counter[1], counter[2], counter[3]


def exp2_fixed(score: float, reference: float, kappa: float) -> tuple[int, int] | None:
    """``2^t`` as (mantissa in units of 2^-32, floor(t)); None where it is zero."""
    if score == -math.inf:
        return None
    t = max(score - reference, -1.7e308) * kappa
    if t < -64.0:
        return None
    fixed = round(Fraction(t) * 2**45)  # Python rounds halves to even, as the hardware does
    fraction = fixed % 2**45 >> 13
    r = EXP2[6]
    for c in EXP2[5::-1]:
        r = (r * fraction >> 32) + c
    return (r * fraction >> 32) + 2**32, fixed >> 45


def weights(scores: npt.ArrayLike, inverse_temperature: float) -> tuple[list[int], int]:
    """Fixed-point weights of ``softmax(inverse_temperature * scores)`` and their exponent."""
    values = [float(u) for u in np.asarray(scores, dtype=np.float64)]
    reference, kappa = max(values), inverse_temperature * 1.44269504088896340736
    powers = [exp2_fixed(u, reference, kappa) for u in values]
    partition = sum((m >> -n) + 1 for m, n in (p for p in powers if p is not None))
    bits = max(0, (partition - 1).bit_length() - 32)
    exponent = TOTAL_BITS - 1 - bits
    result = []
    for power in powers:
        shift = 0 if power is None else 32 - exponent - power[1]
        if power is None or shift > 62:
            result.append(0)
        elif shift > 0:
            result.append((power[0] + (1 << (shift - 1))) >> shift)
        else:
            result.append(power[0] << -shift)
    return result, exponent


def pack(block: list[int]) -> list[tuple[int, int]]:
    """Bins (threshold, alias) of one block: the sweep of Huebschle-Schneider & Sanders (arXiv:1903.00227)."""
    n, capacity = len(block), sum(block)
    owned = [w * n for w in block]
    lights = [i for i in range(n) if owned[i] <= capacity]
    heavies = [i for i in range(n) if owned[i] > capacity]
    bins = [(capacity, i) for i in range(n)]
    while heavies:
        heavy = heavies[0]
        if owned[heavy] > capacity:
            light = lights.pop(0)
            bins[light] = (owned[light], heavy)
            owned[heavy] -= capacity - owned[light]
        else:
            heavies.pop(0)
            following = heavies[0] if heavies else heavy
            bins[heavy] = (owned[heavy], following)
            owned[following] -= capacity - owned[heavy]
    return bins


def build(
    scores: npt.ArrayLike, inverse_temperature: float
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Table, block weights and top table, as ``torch.ops.fastkd.alias_build`` returns them."""
    w, _ = weights(scores, inverse_temperature)
    blocks = [w[i : i + BLOCK_SIZE] for i in range(0, len(w), BLOCK_SIZE)]
    table = [threshold << 12 | alias for block in blocks for threshold, alias in pack(block)]
    sums = [sum(block) for block in blocks]
    return np.array(table, dtype=np.int64), np.array(sums, dtype=np.int64), np.array(pack(sums), dtype=np.int64)


def sample(scores: npt.ArrayLike, inverse_temperature: float, seed: int, index: int) -> int:
    """Draw number ``index`` of ``seed``."""
    w, _ = weights(scores, inverse_temperature)
    blocks = [w[i : i + BLOCK_SIZE] for i in range(0, len(w), BLOCK_SIZE)]
    words = philox(seed, STREAM, index)

    def choose(random: int, block: list[int]) -> int:
        bin_, fraction = divmod(random * len(block), 2**64)
        threshold, alias = pack(block)[bin_]
        return bin_ if fraction * sum(block) >> 64 < threshold else alias

    b = choose(words[0] | words[1] << 32, [sum(block) for block in blocks])
    return b * BLOCK_SIZE + choose(words[2] | words[3] << 32, blocks[b])


def inverse_temperature(scores: npt.ArrayLike, iqpr: float) -> float:
    """``ln(iqpr) / (Q3 - Q1)`` of the finite scores; 0 where the quartiles coincide."""
    values = np.asarray(scores, dtype=np.float64)
    lower, upper = np.quantile(values[np.isfinite(values)], [0.25, 0.75])
    return float(np.log(iqpr) / (upper - lower)) if upper > lower else 0.0
