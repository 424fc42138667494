"""Several collections one after the other."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import replace

import torch
from torch import Tensor

from fastkd.data.array_collection import ArrayCollection
from fastkd.data.collection import Collection, Gathered, Source, Unreadable, check_collection, digest, put_rows
from fastkd.data.read_ahead import on_host

__all__ = ["ConcatCollection"]


class ConcatCollection(Collection):
    """Collections of one shape one after the other, each a source of its name.

    >>> ConcatCollection(faces=FolderCollection("faces", (3, 32, 32)), digits=ArrayCollection("digits.npy", (3, 32, 32)))

    What cannot be read is an error or left out as each of them says. One that has several sources gives them as
    ``name/source``.

    Args:
        parts: the collections by name, as a mapping, for names that are no identifiers.
        named: the collections by name.

    Raises:
        TypeError, ValueError: none, no collections, other shapes or devices than the first has, a name that is there twice.
    """

    def __init__(self, parts: Mapping[str, Collection] | None = None, /, **named: Collection) -> None:
        given = [*({} if parts is None else parts).items(), *named.items()]
        if not given:
            raise ValueError("fastkd: parts is empty, must be one collection or more, by name")
        self.parts = {name: check_collection(name, part) for name, part in given}
        if len(self.parts) < len(given):
            twice = next(name for name in named if name in (parts or {}))
            raise ValueError(f"fastkd: {twice} is given twice, must be given once")
        first = next(iter(self.parts.values()))
        for name, part in self.parts.items():
            if part.shape != first.shape:
                raise ValueError(
                    f"fastkd: {name} has images of {part.shape}, must be those of {next(iter(self.parts))}, {first.shape}"
                )
            if part.device != first.device:
                raise ValueError(f"fastkd: {name} is on {part.device}, must be on {first.device}")
        self.shape, self.device = first.shape, first.device
        self.workers = max(part.workers for part in self.parts.values())
        self._starts = [0]
        for part in self.parts.values():
            self._starts.append(self._starts[-1] + len(part))
        self.sources = tuple(self._sources())

    def __len__(self) -> int:
        return self._starts[-1]

    def __repr__(self) -> str:
        return f"ConcatCollection({', '.join(f'{name}={part}' for name, part in self.parts.items())})"

    def to(self, device: torch.device | str) -> ArrayCollection:
        """All images in the memory of a device, as one array with these sources."""
        return ArrayCollection.loaded(self, device)

    def fingerprint(self) -> str:
        names = (f"{source.name} {source.start} {source.stop}" for source in self.sources)
        return digest([f"concat {len(self)} {self.shape}", *names, *(p.fingerprint() for p in self.parts.values())])

    def _sources(self) -> Iterator[Source]:
        for (name, part), first in zip(self.parts.items(), self._starts, strict=False):
            for source in part.sources:
                whole = name if len(part.sources) == 1 else f"{name}/{source.name}"
                yield Source(whole, first + source.start, first + source.stop)

    def _ranges(self) -> Iterator[tuple[Collection, int, int]]:
        return zip(self.parts.values(), self._starts, self._starts[1:], strict=False)

    def _gather(self, index: Tensor) -> Gathered:
        index = index.cpu()
        split = [(index >= start) & (index < stop) for _, start, stop in self._ranges()]
        gathered = [
            part._gather(index[chosen] - start) if bool(chosen.any()) else None
            for (part, start, _), chosen in zip(self._ranges(), split, strict=True)
        ]
        return self._joined(split, gathered)

    _load = _gather

    def _stream(self, indices: Iterable[Tensor], prefetch: int) -> Generator[Gathered, None, None]:
        """Each part reads ahead by itself what of the index is its own."""
        queues: list[deque[Tensor]] = [deque() for _ in self.parts]
        splits: deque[list[Tensor]] = deque()
        taken = map(on_host, indices)

        def of_part(number: int) -> Iterator[Tensor]:
            while True:
                if not queues[number] and not take():
                    return
                yield queues[number].popleft()

        def take() -> bool:
            host = next(taken, None)
            if host is None:
                return False
            index = self._checked(host())
            splits.append([(index >= start) & (index < stop) for _, start, stop in self._ranges()])
            for queue, chosen, (_, start, _) in zip(queues, splits[-1], self._ranges(), strict=True):
                queue.append(index[chosen] - start)
            return True

        # those with processes first, as these are forked when the first is asked for, before the others' threads
        parts = list(self.parts.values())
        order = sorted(range(len(parts)), key=lambda number: parts[number].workers == 0)
        with ExitStack() as stack:
            streams = [
                stack.enter_context(closing(part.stream(of_part(number), prefetch)))
                for number, part in enumerate(parts)
            ]
            while True:
                gathered: list[Gathered | None] = [None] * len(streams)
                for number in order:
                    gathered[number] = next(streams[number], None)
                if gathered[0] is None:
                    return
                yield self._joined(splits.popleft(), gathered)

    def _joined(self, split: list[Tensor], gathered: list[Gathered | None]) -> Gathered:
        images = torch.empty(len(split[0]), *self.shape, dtype=torch.uint8, device=self.device)
        unreadable: list[Unreadable] = []
        for chosen, part, (_, start, _) in zip(split, gathered, self._ranges(), strict=True):
            if part is not None:
                put_rows(images, chosen, part.images)
                unreadable += (replace(item, index=item.index + start) for item in part.unreadable)
        return Gathered(images, tuple(unreadable))

    def _skips(self, index: int) -> bool:
        return any(start <= index < stop and part._skips(index - start) for part, start, stop in self._ranges())
