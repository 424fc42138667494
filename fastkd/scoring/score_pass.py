"""One pass of a teacher over a collection."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastkd import _checks
from fastkd._build_info import build_info
from fastkd.data.collection import Collection, Unreadable, check_collection
from fastkd.models.digests import weights_digest
from fastkd.patches import random_crop_flip
from fastkd.scores import Scorer
from fastkd.scoring.partial_scores import PartialScores, write_about
from fastkd.scoring.score_file import ScoreFile, open_scores
from fastkd.training.distributed import gather, on_first_rank, rank, world_size

__all__ = ["score_collection"]

CHUNK = 8192  # images, about as many, after which scores are written: seconds of a GPU, a minute of a CPU


def score_collection(
    scorer: Scorer,
    collection: Collection,
    output: str | Path,
    *,
    name: str,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    batch_size: int = 256,
    chunk: int | None = None,
    on_progress: Callable[[int, int], object] | None = None,
) -> ScoreFile:
    """Scores each image once, and writes the scores as it goes: killed, it goes on where it was.

    Under torchrun the ranks share out what is left; another number of them may go on. Scores are the same for any number,
    up to the kernels of different devices: batches are made of the same images, whoever scores them.

    Args:
        scorer: on the device where the teacher is to run. It is calibrated first, where it must be; on resuming it takes
            up the calibration of before.
        collection: images of the teacher's shape.
        output: the ``.npy``. Beside it lie a description, and files that are gone at the end.
        name: of the score, for the description.
        mean, std: of each channel, in units of x / 255: the normalisation of the teacher's images.
        batch_size: images at once.
        chunk: images after which scores are written, rounded up to whole batches; about 8192 by default.
        on_progress: on rank 0, called with the number of images that are done, and of all; now and then.

    Returns:
        The scores: those that are there, where they are of the same collection and teacher.

    Raises:
        ValueError: the file is of another collection, teacher or score; a score is NaN or infinite.
        FileExistsError: a file of that name is there that no scoring wrote.
    """
    if not isinstance(scorer, Scorer):
        raise TypeError(f"fastkd: scorer is {type(scorer).__name__}, must be a Scorer")
    check_collection("collection", collection)
    batch_size = _checks.check_count("batch_size", batch_size, 1)
    path = Path(output)
    if path.suffix != ".npy":
        raise ValueError(f"fastkd: output is {output}, must be the name of an .npy")
    chunk = CHUNK if chunk is None else _checks.check_count("chunk", chunk, 1)
    chunk = -(-chunk // batch_size) * batch_size
    partial = PartialScores(path, len(collection), chunk)
    about: dict[str, Any] = {
        "score": name,
        "items": len(collection),
        "collection": collection.fingerprint(),
        "sources": [list(source) for source in collection.sources],
        "teacher": weights_digest(scorer.teacher),
        "mean": _plain(mean),
        "std": _plain(std),
        "amp": None if scorer.amp is None else str(scorer.amp),
        "batch_size": batch_size,
        "chunk": chunk,
    }

    def begin() -> dict[str, Any]:
        made = partial.begin({**about, "calibration": None, "unreadable": [], "complete": False, **_versions()})
        if made["calibration"] is None and not made["complete"]:
            scorer.prepare(collection.shape, mean, std)
            made["calibration"] = scorer.state_dict()
            write_about(path, made)
        return made

    made = on_first_rank(begin)
    if not made["complete"]:
        scorer.load_state_dict(made["calibration"])
        left = on_first_rank(partial.pending)
        _score(
            scorer, collection, partial, np.array_split(left, world_size())[rank()], mean, std, batch_size, on_progress
        )
    gather(None)  # until each rank has done its own
    on_first_rank(lambda: partial.finish(made))
    return open_scores(path)


def _score(
    scorer: Scorer,
    collection: Collection,
    partial: PartialScores,
    chunks: np.ndarray[Any, np.dtype[np.int64]],
    mean: float | Sequence[float] | None,
    std: float | Sequence[float] | None,
    batch_size: int,
    on_progress: Callable[[int, int], object] | None,
) -> None:
    """These chunks, each written as soon as it is done."""
    device = next(scorer.teacher.parameters()).device
    items = len(collection)
    for first, last in _runs(chunks):
        found: list[Tensor] = []
        unreadable: list[Unreadable] = []
        start, stop = first * partial.chunk, min((last + 1) * partial.chunk, items)
        for block in collection.blocks(batch_size, start, stop):
            images = random_crop_flip(block.images.to(device, non_blocking=True), 0, None, 0.0, mean, std)
            found.append(scorer(images))
            unreadable += block.unreadable
            end = block.start + len(block.images)
            if end % partial.chunk == 0 or end == stop:
                number = (end - 1) // partial.chunk
                partial.write(number, _checked(found, number * partial.chunk, unreadable), unreadable)
                found, unreadable = [], []
                if on_progress is not None and rank() == 0:
                    on_progress(partial.done_items(), items)


def _checked(found: list[Tensor], start: int, unreadable: list[Unreadable]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Those of a chunk, on the host: the only time that the device is waited for."""
    scores = torch.cat(found).cpu().numpy()
    for item in unreadable:
        scores[item.index - start] = -np.inf
    wrong = ~np.isfinite(scores)
    wrong[[item.index - start for item in unreadable]] = False
    if wrong.any():
        first = int(wrong.argmax())
        raise ValueError(
            f"fastkd: the score of image {start + first} is {scores[first]}, must be finite: look at the teacher"
        )
    return scores


def _runs(chunks: np.ndarray[Any, np.dtype[np.int64]]) -> Iterator[tuple[int, int]]:
    """First and last of chunks that follow one another: they are read in one go."""
    if len(chunks) == 0:
        return
    bounds = [0, *(np.flatnonzero(np.diff(chunks) != 1) + 1).tolist(), len(chunks)]
    for low, high in pairwise(bounds):
        yield int(chunks[low]), int(chunks[high - 1])


def _plain(value: float | Sequence[float] | None) -> float | list[float] | None:
    return value if value is None or isinstance(value, (int, float)) else [float(x) for x in value]


def _versions() -> dict[str, str]:
    return {"fastkd": build_info()["version"], "torch": torch.__version__}
