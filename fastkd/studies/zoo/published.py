"""Published figures of Sarfraz et al., "Knowledge Distillation Beyond Model Compression" (ICPR 2020; the slides).

Facts, to be shown beside our own: test accuracy in %, mean and standard deviation over 5 seeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from fastkd.studies.study import Published

__all__ = ["CLASS_IMBALANCE", "CLEAN", "CLEAN_CIFAR100", "LABEL_NOISE"]


Column = TypeVar("Column")


def _table(columns: Sequence[Column], text: str) -> dict[Column, dict[str, Published]]:
    """Columns of methods, of lines ``method mean std mean std ...``."""
    table: dict[Column, dict[str, Published]] = {column: {} for column in columns}
    for line in text.strip().splitlines():
        method, *numbers = line.split()
        pairs = zip(numbers[::2], numbers[1::2], strict=True)
        for column, (mean, std) in zip(columns, pairs, strict=True):
            table[column][method] = Published(float(mean), float(std))
    return table


# Table III: CIFAR-10, by student.
CLEAN = _table(
    ("resnet8", "resnet14", "resnet20", "resnet26", "wrn-10-2", "wrn-16-2", "wrn-28-2", "wrn-40-2"),
    """
    baseline 87.64 .25  91.44 .15  92.64 .18  93.32 .37  90.62 .15  93.95 .18  94.82 .10  95.01 .11
    hinton   88.80 .16  92.50 .19  93.25 .18  93.58 .10  91.72 .12  94.28 .09  94.97 .10  95.12 .10
    bss      89.18 .43  91.99 .20  92.92 .18  93.52 .08  92.32 .21  94.27 .18  94.72 .15  94.96 .20
    fitnet   88.89 .21  92.50 .10  93.27 .15  93.58 .10  91.65 .08  94.34 .11  94.94 .14  95.10 .14
    fsp      88.77 .41  92.18 .19  93.29 .30  93.73 .16  91.70 .26  94.31 .08  95.06 .19  95.15 .19
    at       86.07 .32  91.66 .16  92.96 .09  93.32 .14  90.99 .21  94.50 .18  95.32 .20  95.39 .15
    sp       86.62 .26  92.34 .19  93.28 .07  93.70 .23  91.27 .26  94.64 .17  95.25 .14  95.35 .11
    rkd-d    87.48 .21  91.87 .19  92.94 .30  93.56 .16  90.99 .17  94.42 .15  95.09 .08  95.31 .13
    rkd-a    87.32 .24  92.01 .14  93.30 .12  93.67 .13  90.98 .31  94.62 .14  95.23 .13  95.36 .27
    rkd-da   87.14 .19  92.05 .20  93.05 .20  93.73 .09  90.92 .16  94.52 .11  95.19 .12  95.41 .07
    one      89.54 .17  92.30 .23  93.27 .16  93.80 .13  87.75 1.92  92.80 .08  94.70 .18  95.11 .09
    dml      87.94 .15  92.20 .18  93.14 .06  93.45 .10  91.60 .28  94.38 .15  95.17 .10  95.33 .09
    """,
)

# Table IV: CIFAR-100.
CLEAN_CIFAR100 = _table(
    tuple(CLEAN),
    """
    baseline 71.78 .26  76.95 .43  77.92 .40  78.82 .24  67.99 .55  72.35 .36  74.93 .39  75.94 .12
    hinton   72.78 .36  78.18 .14  79.58 .22  79.73 .30  67.70 .54  74.12 .37  76.08 .36  77.07 .13
    bss      73.02 .07  76.96 .19  78.37 .27  78.66 .23  69.55 .38  73.04 .21  75.59 .24  76.55 .16
    fitnet   72.86 .28  78.48 .30  79.55 .18  79.83 .34  67.83 .47  72.82 2.40  76.31 .09  77.25 .15
    fsp      72.93 .24  78.34 .45  79.65 .18  79.62 .18  67.64 .19  73.86 .27  76.21 .14  77.09 .27
    at       71.99 .08  76.88 .20  78.35 .10  78.94 .34  67.45 .27  72.78 .32  75.51 .13  76.60 .13
    sp       73.18 .24  78.53 .29  79.76 .27  79.93 .29  66.77 .27  73.42 .37  76.52 .35  77.43 .14
    rkd-d    71.99 .23  77.02 .21  78.23 .26  78.80 .28  68.14 .34  72.52 .30  75.48 .33  76.34 .29
    rkd-a    71.95 .33  76.93 .35  78.51 .25  79.10 .18  68.10 .31  72.87 .23  75.50 .41  76.97 .17
    rkd-da   71.70 .19  77.14 .40  78.64 .21  79.16 .11  67.94 .37  72.88 .23  75.73 .32  76.91 .22
    one      73.30 .12  78.04 .07  79.24 .18  79.74 .27  57.38 2.11  69.78 .94  74.49 .54  76.89 .27
    dml      73.57 .09  78.07 .20  79.15 .22  79.32 .38  68.99 .23  74.44 .25  76.65 .17  77.65 .19
    """,
)

# CIFAR-10, by the share of labels that are wrong (symmetric noise); the column without noise is that of WRN-16-2.
LABEL_NOISE = _table(
    (0.2, 0.4, 0.6),
    """
    baseline 79.44 .29  64.47 1.06  47.84 1.81
    hinton   87.23 .26  76.32 .87  58.18 .35
    bss      80.28 .33  71.46 .20  47.69 .37
    fitnet   87.01 .27  76.73 .52  58.12 1.00
    fsp      87.14 .38  76.47 .24  58.07 .55
    at       79.59 .47  64.46 .88  46.44 .78
    sp       83.77 .61  70.32 .76  49.46 .57
    rkd-d    79.94 .59  64.05 .47  48.37 1.62
    rkd-a    80.26 .33  64.61 1.04  47.94 1.14
    rkd-da   80.45 .58  65.10 1.08  48.90 .52
    one      83.76 .40  68.64 .53  40.49 1.12
    dml      85.63 .33  76.33 .32  59.89 1.66
    """,
)

# Table VI: CIFAR-10, WRN-16-2, by gamma.
CLASS_IMBALANCE = _table(
    (0.2, 0.6, 1.0, 2.0),
    """
    baseline 78.05 .58  78.83 .41  80.09 .38  83.33 .24
    hinton   79.15 .28  80.08 .25  81.18 .51  83.69 .69
    bss      78.07 .20  79.22 .53  80.44 .24  82.15 .22
    fitnet   79.14 .28  80.07 .37  81.15 .32  83.55 .32
    fsp      79.26 .43  80.03 .50  81.12 .43  83.60 .25
    at       79.13 .40  80.51 .23  80.96 .18  84.13 .32
    sp       78.21 .73  79.44 .29  80.33 .50  83.08 .29
    rkd-d    79.12 .26  80.57 .45  81.48 .57  84.13 .42
    rkd-a    79.52 .51  80.54 .17  81.52 .36  84.33 .42
    rkd-da   79.43 .41  80.63 .20  81.50 .37  84.02 .21
    one      77.48 1.05  78.04 .86  79.48 .39  80.88 1.05
    dml      78.99 .33  80.34 .66  81.33 .31  84.06 .42
    """,
)
