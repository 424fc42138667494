"""The hot paths of the kernels: what machine_code.py looks for in their machine code."""

from __future__ import annotations

from typing import NamedTuple

from sass import name_matches


class HotPath(NamedTuple):
    """What a thread does for `elements` elements, in the case that counts.

    `ways`: "path LDG.128=8 STG.128=4" is the way from the kernel's entry to its exit that loads and stores 128 bits so
    often, "loop ..." a way around a loop, "4*loop ..." four times; several come one after the other. LDG.E.128 is an LDG.128.
    """

    title: str
    kernel: str  # a shell pattern on its name, as `make inspect` prints it
    threads: int  # of a block
    elements: int
    bytes: float  # that must move through device memory for an element (benchmarks/README.md, floors)
    ways: tuple[str, ...]
    shared: int = 0  # dynamic shared memory of a block

    def matches(self, name: str) -> bool:
        return name_matches(name, self.kernel)


_SIZE = {"bf16": 2, "fp32": 4}
_NAME = {"bf16": "BFloat16", "fp32": "float"}
_PACK = {"bf16": 8, "fp32": 4}
_DTYPES = ("bf16", "fp32")


def _divergences() -> list[HotPath]:
    """Rows on chip: a thread has 32 elements of student and teacher."""
    paths = []
    families = {"KL": (0, True), "KL, labels and weights": (0, False), "reverse KL": (1, True), "JSD": (2, True)}
    for title, (family, plain) in families.items():
        for dtype in _DTYPES:
            packs, exponentials = 32 // _PACK[dtype], 64
            way = f"path LDG.128={2 * packs} STG.128={packs} MUFU.EX2={exponentials}"
            kernel = f"resident_rows<{_NAME[dtype]},*Family){family},{str(plain).lower()},*"
            floor = 3 * _SIZE[dtype]
            paths.append(HotPath(f"{title}, 1000 classes, {dtype}", kernel + "LaneGroup<32u>>", 128, 32, floor, (way,)))
            threads, barriers = (128, 4) if family == 2 else (256, 3)
            if plain and family != 1:
                way += f" UCGABAR_WAIT={barriers}"
                paths.append(
                    HotPath(f"{title}, 32000 classes, {dtype}", kernel + "ClusterGroup>", threads, 32, floor, (way,))
                )
    for dtype in _DTYPES:
        packs = (
            32 // _PACK[dtype]
        )  # a cross-entropy at T = 1 beside a divergence at another: read again, exponentials of its own
        way = f"path LDG.128={3 * packs} STG.128={packs} MUFU.EX2=128"
        kernel = f"resident_rows<{_NAME[dtype]},*Family)0,false,*LaneGroup<32u>>"
        paths.append(HotPath(f"KD loss, T = 4, 1000 classes, {dtype}", kernel, 128, 32, 3 * _SIZE[dtype], (way,)))
    return paths


def _sweeps() -> list[HotPath]:
    """Rows that are read once for each sweep, in chunks of packs."""
    paths = []
    for dtype in _DTYPES:
        size, pack, name = _SIZE[dtype], _PACK[dtype], _NAME[dtype]
        chunk = f"loop LDG.128=8 MUFU.EX2={8 * pack}"  # of one side, or half of it of each of two
        paths += [
            HotPath(
                f"KL without gradient, 128256 classes, {dtype}",
                f"streaming_rows<{name},false,*ClusterGroup>",
                512,
                4 * pack,
                2 * size,
                (f"{chunk} DADD=3 STG=0",),
            ),
            HotPath(f"logit_stats, {dtype}", f"stats_rows<{name},*ClusterGroup>", 256, 8 * pack, size, (chunk,)),
            HotPath(
                f"logit_stats, backward, {dtype}",
                f"stats_backward_rows<{name},*ClusterGroup>",
                256,
                8 * pack,
                2 * size,
                (f"{chunk} STG=0", f"{chunk} STG.128=8"),
            ),
            HotPath(
                f"backward, scaled, {dtype}",
                f"scale_pieces<{name}>",
                256,
                pack,
                2 * size,
                ("loop LDG.128=1 STG.128=1",),
            ),
        ]
    return paths


def _shards() -> list[HotPath]:
    """A rank's part of each row: the sums, then, from logits that are read again, the gradient."""
    return [
        HotPath(
            f"KL over ranks, {kernel}, {dtype}",
            f"shard_{kernel}<{_NAME[dtype]},false>",
            512,
            4 * _PACK[dtype],
            size * _SIZE[dtype],
            (f"loop LDG.128=8 MUFU.EX2={8 * _PACK[dtype]} {more}",),
        )
        for dtype in _DTYPES
        for kernel, size, more in (("sums", 2, "DADD=3 STG=0"), ("gradients", 3, "STG.128=4"))
    ]


def _sparse() -> list[HotPath]:
    """Four packs in the sweep over the tail, whose map of entries is in shared memory, and in that of the gradient."""
    paths = []
    # with 16 bits the code of the tail also takes the exponentials that only a new maximum needs
    for dtype, of_tail, of_gradient in (("bf16", 34, 32), ("fp32", 16, 16)):
        paths.append(
            HotPath(
                f"sparse KL, 128256 classes, {dtype}",
                f"sparse_rows<{_NAME[dtype]}>",
                256,
                4 * _PACK[dtype],
                2 * _SIZE[dtype],
                (
                    f"loop LDG.128=4 LDS=4 STG=0 DADD=1 MUFU.EX2={of_tail}",
                    f"loop LDG.128=4 STG.128=4 MUFU.EX2={of_gradient}",
                ),
                shared=17 << 10,
            )
        )
    return paths


def _moments() -> list[HotPath]:
    """A chunk of a row, or of the pixels of a pack of channels."""
    paths = []
    for dtype in _DTYPES:
        size, pack, name = _SIZE[dtype], _PACK[dtype], _NAME[dtype]
        for place, kernel, packs, more in (
            ("rows", f"of_rows<{name},*ClusterGroup>", 4, f" DMUL=2 FMUL={2 * pack}"),
            ("columns", f"of_columns<{name},{pack}>", 5, ""),
        ):
            paths += [
                HotPath(
                    f"moments of {place}, {dtype}",
                    f"moments_{kernel}",
                    256,
                    packs * pack,
                    size,
                    (f"loop LDG.128={packs}{more}",),
                ),
                HotPath(
                    f"moments of {place}, backward, {dtype}",
                    f"gradient_{kernel}",
                    256,
                    packs * pack,
                    2 * size,
                    (f"loop LDG.128={packs} STG.128={packs}",),
                ),
            ]
    return paths


_OTHERS = [
    HotPath(
        "crop, 3 channels, bf16", "crop_kernel<unsignedshort,unsignedshort>", 256, 24, 4, ("loop LDG.128=6 STG.128=3",)
    ),
    HotPath(
        "crop, 3 channels, fp32", "crop_kernel<unsignedint,unsignedint>", 256, 12, 8, ("loop LDG.128=6 STG.128=3",)
    ),
    HotPath(
        "crop, 3 channels, uint8 to fp32", "crop_kernel<unsignedchar,float>", 256, 12, 5, ("loop LDG.64=8 STG.128=3",)
    ),
    HotPath(
        "crop, 3 channels, uint8 to bf16",
        "crop_kernel<unsignedchar,BFloat16>",
        256,
        24,
        3,
        ("loop LDG.64=8 STG.128=3",),
    ),
    # an image of 3x32x32: eight boxes of 192 elements are added, two each time around, and the sums written, 16 bytes each time
    HotPath(
        "crop, backward, 8 patches of 8x8, bf16",
        "crop_backward_kernel<BFloat16,6>",
        64,
        96,
        3,
        ("4*loop LDG.U16=12 STG=0", "3*loop STG.128=4"),
        shared=31 << 10,
    ),
    HotPath(
        "crop, backward, 8 patches of 8x8, fp32",
        "crop_backward_kernel<float,6>",
        64,
        96,
        6,
        ("4*loop LDG=12 STG=0", "6*loop STG.128=4"),
        shared=31 << 10,
    ),
    HotPath("draw_batch, uint8 to fp32", "draw_batch_kernel<float>", 256, 12, 5, ("loop LDG.64=6 STG.128=3",)),
    HotPath("alias table, quartiles, fp32", "count_digits_kernel<float>", 256, 16, 4, ("loop LDG.128=4",)),
    HotPath("alias table, extent, fp32", "extent_kernel<float>", 256, 16, 4, ("loop LDG.128=4",)),
    HotPath("alias table, partition, fp32", "partition_kernel<float>", 256, 16, 4, ("loop LDG.128=4",)),
    HotPath("alias table, blocks, fp32", "blocks_kernel<float>", 512, 8, 12, ("loop LDG.128=2 STG.64=8",)),
    HotPath("alias draw", "sample_kernel", 256, 1, 40, ("loop STG.64=1 LDG.128=1",)),
    HotPath(
        "sample_teacher, maximum, fp32",
        "draw_rows<float>",
        256,
        16,
        4,
        ("loop LDG=16 SHFL=0 STG=0 DSETP=16",),
        shared=8 << 10,
    ),
    HotPath(  # read again, from the L2 cache
        "sample_teacher, weights, fp32",
        "draw_rows<float>",
        256,
        1,
        0,
        ("loop LDG=1 SHFL=0 STG=0 DADD=1",),
        shared=8 << 10,
    ),
    HotPath("mixture, a value and iteration", "fit_problems<*LaneGroup<4u>,false>", 128, 16, 0, ("loop MUFU.RCP=16",)),
    HotPath("relation, a pair and feature", "squares_of_pairs", 256, 64, 0, ("loop DFMA=64 LDS.64=64",)),
    HotPath("relation, a pair and third point", "triangles_of_pairs<true,true>", 256, 1, 0, ("loop LDS.128=8",)),
]

HOT_PATHS = (*_divergences(), *_sweeps(), *_shards(), *_sparse(), *_moments(), *_OTHERS)
