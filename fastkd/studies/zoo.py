"""The study of Sarfraz et al., "Knowledge Distillation Beyond Model Compression" (ICPR 2020): methods x settings x seeds.

Settings are clean data, symmetric label noise and unequal classes; a teacher learns the same labels and images first.
Every run has a folder of its own, and is not run again where its result is there.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from itertools import islice
from multiprocessing import active_children, get_context, parent_process
from pathlib import Path
from typing import NamedTuple

import torch

from fastkd._names import unknown_name
from fastkd.methods import registry as methods
from fastkd.studies import published
from fastkd.studies.distillation import Distillation, Networks, Result, read_result, run, train_teacher
from fastkd.studies.published import Published
from fastkd.training import Process

__all__ = ["SETTINGS", "Accuracies", "Run", "Setting", "grid", "known", "run_all"]

# setting -> method, or teacher -> seed -> test accuracy
Accuracies = dict[str, dict[str, dict[int, float]]]


TEACHERS = "teachers"  # the folder of theirs


class Setting(NamedTuple):
    """One column of the study."""

    label_noise: float = 0.0
    imbalance: float = 0.0

    @property
    def name(self) -> str:
        """As the command line has it: clean, noise-0.4, imbalance-0.2."""
        if self.label_noise:
            return f"noise-{self.label_noise:g}"
        return f"imbalance-{self.imbalance:g}" if self.imbalance else "clean"

    def published(self, data: str, student: str) -> tuple[str, dict[str, Published]]:
        """Of what the paper's figures are, and those by method: of this student on clean data, else of WRN-16-2; on CIFAR-10
        but for clean CIFAR-100."""
        if self.label_noise:
            return "CIFAR-10, wrn-16-2", published.LABEL_NOISE.get(self.label_noise, {})
        if self.imbalance:
            return "CIFAR-10, wrn-16-2", published.CLASS_IMBALANCE.get(self.imbalance, {})
        if data == "cifar100":
            return f"CIFAR-100, {student}", published.CLEAN_CIFAR100.get(student, {})
        return f"CIFAR-10, {student}", published.CLEAN.get(student, {})


SETTINGS = {
    setting.name: setting
    for setting in (
        Setting(),
        *(Setting(label_noise=rate) for rate in published.LABEL_NOISE),
        *(Setting(imbalance=gamma) for gamma in published.CLASS_IMBALANCE),
    )
}


@dataclass(frozen=True)
class Run:
    """One method under one setting with one seed."""

    method: str
    setting: str
    seed: int
    distillation: Distillation

    def folder(self, root: Path) -> Path:
        """Its own, below that of the study."""
        return root / self.setting / f"{self.method}-{self.seed}-{self.distillation.digest()}"


def grid(base: Networks, names: Iterable[str], settings: Iterable[str], seeds: int) -> list[Run]:
    """All runs, those of one teacher one after the other.

    Args:
        base: what is common to them; its seed, noise and imbalance are replaced.
        names: of methods.
        settings: names of ``SETTINGS``.
        seeds: 0, ..., seeds - 1.

    Raises:
        ValueError: an unknown name, answered with the nearest right ones.
    """
    names, settings = list(dict.fromkeys(names)), list(dict.fromkeys(settings))
    for what, chosen in (("methods", names), ("settings", settings)):
        if not chosen:
            raise ValueError(f"fastkd: {what} is empty, must be one name or more")
    for name in names:
        if name not in methods.NAMES:
            raise unknown_name("method", name, methods.NAMES)
    for name in settings:
        if name not in SETTINGS:
            raise unknown_name("setting", name, SETTINGS)
    return [
        Run(method, setting, seed, _distillation(base, method, SETTINGS[setting], seed))
        for setting in settings
        for seed in range(seeds)
        for method in names
    ]


def _distillation(base: Networks, method: str, setting: Setting, seed: int) -> Distillation:
    data = replace(base.data, label_noise=setting.label_noise, imbalance=setting.imbalance)
    common = {f.name: getattr(base, f.name) for f in fields(Networks)}
    return Distillation(**{**common, "data": data, "training": replace(base.training, seed=seed)}, method=method)


def known(runs: Iterable[Run], folder: Path) -> Iterator[tuple[Run, Result]]:
    """Those whose result is there."""
    for one in runs:
        done = read_result(one.distillation, one.folder(folder))
        if done is not None:
            yield one, done


def run_all(runs: list[Run], folder: Path, device: torch.device, jobs: int) -> Iterator[tuple[Run, Result | Exception]]:
    """Runs what has no result yet; an interruption loses nothing, as the next call goes on.

    Args:
        folder: of the study; teachers are shared by the runs in it.
        jobs: processes side by side. On a CPU the threads are shared out among them: small networks gain more by two
            processes than by two threads.

    Yields:
        Each run and its result, those that were there first; or why it failed, which does not keep the others from running.
    """
    there = dict(known(runs, folder))
    yield from there.items()
    missing = [one for one in runs if one not in there]
    # first the teachers, so that no two processes train the same one; where one fails, so do its students
    teachers = {one.distillation.of_teacher().digest(): one for one in missing if methods.needs_teacher(one.method)}
    with _pool(min(jobs, len(missing)), device) as pool:
        for _ in _results(_train_teacher, list(teachers.values()), folder, device, jobs, pool):
            pass
        yield from _results(_run, missing, folder, device, jobs, pool)


Work = Callable[[Run, Path, torch.device], Result]


def _results(
    work: Work, runs: list[Run], folder: Path, device: torch.device, jobs: int, pool: ProcessPoolExecutor | None
) -> Iterator[tuple[Run, Result | Exception]]:
    """As they come."""
    if pool is None:
        for one in runs:
            try:
                yield one, work(one, folder, device)
            except Exception as error:
                yield one, error
        return
    waiting = iter(runs)
    pending: dict[Future[Result], Run] = {}
    while True:
        # no more than can run: a pool cannot take back what it has handed out
        for one in islice(waiting, jobs - len(pending)):
            pending[pool.submit(work, one, folder, device)] = one
        if not pending:
            return
        for future in wait(pending, return_when=FIRST_COMPLETED).done:
            why = future.exception()
            if isinstance(why, BrokenExecutor):  # a process was killed: there is nobody left to go on
                raise why
            yield pending.pop(future), why if isinstance(why, Exception) else future.result()


@contextmanager
def _pool(jobs: int, device: torch.device) -> Iterator[ProcessPoolExecutor | None]:
    """None for one job: it is done in this process. Left by an exception, its processes end at once: checkpoints allow it."""
    if jobs <= 1:
        yield None
        return
    threads = max(1, torch.get_num_threads() // jobs) if device.type == "cpu" else torch.get_num_threads()
    others = set(active_children())
    pool = ProcessPoolExecutor(jobs, get_context("spawn"), _begin, (threads,))
    try:
        yield pool
    except BaseException:
        for process in set(active_children()) - others:
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(threads: int) -> None:
    """In a new process of the pool."""
    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all of them; the first process ends the others
    parent = parent_process()
    assert parent is not None

    def end_with_parent() -> None:  # which may be killed: nobody would take the result, or tell it to end
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _run(one: Run, folder: Path, device: torch.device) -> Result:
    process = Process(0, 1, device)
    return run(one.distillation, one.folder(folder), process, teachers=folder / TEACHERS, show="off")


def _train_teacher(one: Run, folder: Path, device: torch.device) -> Result:
    return train_teacher(one.distillation, folder / TEACHERS, Process(0, 1, device), show="off")
