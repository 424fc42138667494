"""What the tests of the trainer run in processes of their own, and how they start them."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import socket
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from training_cases import CLASSES, Batches, InterruptionError, Linear, make_settings, small, small_resnet, train

from fastkd._figures import canvas
from fastkd._seeding import seeded
from fastkd.data import NoBatches
from fastkd.methods import (
    DML,
    ONE,
    Cohort,
    FeatureTap,
    JointLogits,
    MultiBranch,
    Objective,
    Outputs,
    Part,
    Procedure,
    registry,
)
from fastkd.methods.method import cross_entropy
from fastkd.training import Trainer, checkpoint, figures, process_group

KILLED = make_settings(epochs=8, checkpoint_every=2, ema=0.9)
PATIENCE = 240  # seconds, of a busy machine
POINTS = ("while it is written", "before it is on the disk", "before it takes its place", "after that")


def start(work: Callable[..., None], *arguments: Any) -> Any:
    """A process that runs this. They are forked from one that has imported what they need, torch's
    optimizers torch._dynamo for instance, and done nothing else."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", "numpy.random", "training_processes"])
    process = context.Process(target=_alone, args=(work, *arguments))
    process.start()
    return process


def _alone(work: Callable[..., None], *arguments: Any) -> None:
    torch.set_num_threads(1)
    figures.save_curves = lambda lines, path, title: path.touch()  # type: ignore[assignment]
    work(*arguments)


def train_slowly(folder: Path, seed: int, pause: float = 0.02) -> None:
    """Goes on from a checkpoint, if there is one."""
    train("bss", folder, KILLED, seed=seed, resume="auto", on_step=lambda _: time.sleep(pause))


def kill_itself(folder: Path, seed: int, point: str, times: int) -> None:
    """The same, until it writes a checkpoint for the ``times``-th time: it is killed at some point of that."""
    left = times

    def now(which: str) -> bool:
        nonlocal left
        left -= which == point
        return left == 0 and which == point

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    save, fsync, replace = torch.save, os.fsync, os.replace

    def half(value: Any, file: Any) -> None:
        if now(POINTS[0]):
            file.write(os.urandom(20_000))
            file.flush()
            die()
        save(value, file)

    def synced(descriptor: int) -> None:
        if now(POINTS[1]):
            die()
        fsync(descriptor)

    def replaced(*paths: Any) -> None:
        if now(POINTS[2]):
            die()
        replace(*paths)
        if now(POINTS[3]):
            die()

    torch.save, os.fsync, os.replace = half, synced, replaced  # type: ignore[assignment]
    train("bss", folder, KILLED, seed=seed, resume="auto")


def start_ranks(work: Callable[..., None], *arguments: Any, ranks: int = 2) -> None:
    """Runs ``work(rank, *arguments)`` in as many processes, as torchrun would, to their end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [start(_as_rank, work, rank, ranks, port, arguments) for rank in range(ranks)]
    for process in processes:
        process.join(PATIENCE)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert codes == [0] * ranks, f"exit codes of the ranks: {codes}; None ran for more than {PATIENCE} s"


def _as_rank(work: Callable[..., None], rank: int, ranks: int, port: int, arguments: tuple[Any, ...]) -> None:
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    work(rank, *arguments)


CASES: dict[str, dict[str, Any]] = {
    "hinton": {"ema": 0.9},
    "fitnet": {"optimizer": "adamw", "learning_rate": 0.01},
    "at": {"epochs": 2},
    "sp": {"epochs": 2},
    "rkd-da": {"epochs": 2},
    "crd": {"epochs": 2},
    "sskd": {"epochs": 2},
    "bss": {"epochs": 4, "ema": 0.5},  # the last epoch has no attack
    "dml": {"gradient_clip": 1.0, "accumulate": 4},
    "one": {"epochs": 2},
}


def train_in_two(rank: int, root: Path) -> None:
    """Trains each of the cases, once as a whole and once in parts, and writes the weights of this rank."""
    with process_group("cpu") as process:
        assert (process.rank, process.world_size, process.device) == (rank, 2, torch.device("cpu"))
        for method, changes in CASES.items():
            settings = make_settings(**changes)
            make = small_resnet if method == "one" else small
            for name, stops in (("whole", (None,)), ("parts", (9, None))):
                folder = root / method / name
                for i, stop in enumerate(stops):
                    options = {"seed": i, "stop_at": stop, "resume": i > 0, "make": make}
                    trainer = train(method, folder, settings, batches=Batches(rank=rank), **options)
                torch.save(trainer.procedure.state_dict(), folder / f"rank{rank}.pt")
                torch.save(trainer.deployed.state_dict(), folder / f"deployed{rank}.pt")


def gradients_in_two(rank: int, folder: Path, accumulate: int) -> None:
    """One step on half of a batch each, in so many parts, without momentum: its weights."""
    ((images, target, _),) = Batches(1, 24).epoch(0)

    class Half:
        def __len__(self) -> int:
            return accumulate

        def epoch(self, epoch: int, /, start: int = 0) -> Any:
            every = range(rank, 2 * accumulate, 2)
            return iter([(images[i :: 2 * accumulate], target[i :: 2 * accumulate]) for i in every])

    settings = make_settings(
        accumulate=accumulate, epochs=1, momentum=0.0, nesterov=False, weight_decay=0.0, learning_rate=1.0
    )
    with process_group("cpu"):
        group = weakref.ref(dist.group.WORLD)
        trainer = train("hinton", folder, settings, batches=Half(), make=Linear)
        torch.save(trainer.deployed.state_dict(), folder / f"rank{rank}.pt")
    assert group() is None  # though the trainer is still there: if it held the group, its end might hang


def errors_in_two(rank: int, folder: Path) -> None:
    """What is wrong on rank 0 is an error on all: a folder in use, then a disk that is full."""

    def full(path: Path, state: Any) -> None:
        raise OSError(28, "No space left on device", path.name)

    with process_group("cpu"):
        try:
            train("hinton", folder, make_settings(), batches=Batches(rank=rank))
        except FileExistsError as error:
            (folder / f"said{rank}").write_text(str(error))
        checkpoint.write = full
        try:
            train("hinton", folder / "full", make_settings(), batches=Batches(rank=rank))
        except OSError as error:
            (folder / f"full{rank}").write_text(str(error))


def static_graphs_in_two(rank: int, folder: Path) -> None:
    """Gradients of this rank under DistributedDataParallel(static_graph=True), of networks that learn together."""

    def cohort() -> nn.Module:
        return Cohort([Linear(seed) for seed in range(2)])

    def branches() -> nn.Module:
        with seeded(0):
            heads = [nn.Sequential(nn.Flatten(), nn.Linear(2 * 36, CLASSES)) for _ in range(2)]
            return MultiBranch(nn.Conv2d(1, 2, 3), heads, 2)

    batches = Batches(3, rank=rank)
    with process_group("cpu"):
        for name, student, method in (("cohort", cohort, DML()), ("branches", branches, ONE(branches=2))):
            networks = {"alone": student(), "tapped": FeatureTap(student()), "objective": Objective(method, student())}
            for kind, network in networks.items():
                wrapped, gradients = nn.parallel.DistributedDataParallel(network, static_graph=True), []
                for images, target, _ in batches.epoch(0):
                    wrapped.zero_grad()
                    if kind == "objective":
                        loss = wrapped(images, target)[0].total
                    else:
                        result = wrapped(images)
                        logits = result.logits if kind == "tapped" else result
                        assert isinstance(logits, JointLogits)
                        loss = method(Outputs(logits), None, target).total
                    loss.backward()
                    gradients.append(torch.cat([p.grad.flatten() for p in wrapped.parameters()]))
                torch.save(torch.stack(gradients), folder / f"{name}-{kind}{rank}.pt")
                del wrapped


def read_in_two(rank: int, folder: Path) -> None:
    """Each rank reads what the training wrote, rank 0 slowly."""
    save = torch.save

    def slow(value: Any, file: Any, **options: Any) -> None:
        time.sleep(0.0 if options else 0.3)  # torch pickles what it gathers by this, too
        save(value, file, **options)

    torch.save = slow  # type: ignore[assignment]
    with process_group("cpu"):
        train("hinton", folder, make_settings(epochs=1, checkpoint_every=0), batches=Batches(rank=rank))
        torch.load(folder / "model.pt", weights_only=True)
        (folder / f"read{rank}").touch()


def adversarial(seed: int = 0, *, ranks: int | None = None, make: Callable[[int], nn.Module] = small) -> Any:
    """The example: a student of the seed, without data from a teacher that is always the same.

    Args:
        ranks: every process makes the noise of all and takes its part, that of one of so many.
    """
    kind = load_example("adversarial").Adversarial

    class Shared(kind):  # type: ignore[misc,valid-type]
        def noise(self, step: Any) -> Any:
            whole = torch.randn(12, self.latent, generator=self.stream)
            return whole[step.rank :: step.world_size]

    with seeded(seed):
        procedure = (kind if ranks is None else Shared)(
            *(make(100 * seed), small(77, (8, 8)), Batches().of(0)[0], 12),
            latent=8,
            student_steps=2,
            balance=1.0 if ranks is None else 0.0,  # of the mean over a batch, which is not that over all processes
        )
    procedure.stream = torch.Generator().manual_seed(5)
    return procedure


def load_example(name: str) -> Any:
    """A module of ``examples``."""
    path = Path(__file__).resolve().parents[1] / "examples" / f"{name}.py"
    registry.load_plugin(path)
    return sys.modules[f"fastkd_plugin_{name}"]


def until_killed(folder: Path, settings: Any, seed: int, steps: int) -> None:
    """Goes on from a checkpoint, if there is one, and kills itself after so many steps, the checkpoint of the last not
    written."""
    left = steps

    def on_step(_: int) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    procedure = adversarial(seed)
    Trainer(procedure, NoBatches(9), settings, folder=folder, show="off", on_step=on_step).fit(resume="auto")


def adversarial_in_two(rank: int, folder: Path, settings: Any, find_unused_parameters: bool) -> None:
    """The example, half of the noise in each process."""
    with process_group("cpu"):
        procedure = adversarial(7 * rank, ranks=2, make=Linear)  # of other weights, but those of rank 0 count
        options = {"folder": folder / "two", "show": "off", "find_unused_parameters": find_unused_parameters}
        Trainer(procedure, NoBatches(5), settings, **options).fit()
        torch.save(procedure.state_dict(), folder / f"rank{rank}.pt")


class Seen(Procedure):
    """Counts on each rank, in a buffer of its own place, the images of its batches."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.learner = small(seed)
        self.register_buffer("seen", torch.zeros(2))

    def parts(self) -> dict[str, Part]:
        return {"learner": Part(self.learner)}

    def network(self) -> nn.Module:
        return self.learner

    def iteration(self, batch: Any, step: Any) -> dict[str, Any]:
        self.seen[step.rank] += 1
        loss = cross_entropy(self.learner(batch.images), batch.target)
        step.update(loss)
        return {"loss": loss}


def state_in_two(rank: int, folder: Path) -> None:
    settings = make_settings(checkpoint_every=2)
    with process_group("cpu"):
        for name, stops in (("whole", (None,)), ("parts", (3, 8, None))):
            for i, stop in enumerate(stops):
                procedure = Seen(i)

                def on_step(step: int, stop: Any = stop) -> None:
                    if step == stop:
                        raise InterruptionError

                trainer = Trainer(
                    procedure, Batches(rank=rank), settings, folder=folder / name, show="off", on_step=on_step
                )
                with contextlib.suppress(InterruptionError):
                    trainer.fit(resume="auto")
            torch.save(procedure.state_dict(), folder / f"{name}{rank}.pt")


class Drawn(Seen):
    """With a picture called after the rank, or none that is one."""

    wrong = False

    def pictures(self, step: Any) -> Any:
        return {f"rank{step.rank}": None if self.wrong else canvas(1.0, 1.0)}


def draw_in_two(rank: int, folder: Path) -> None:
    with process_group("cpu"):
        options: Any = {"show": "off", "pictures_every": 2}
        Trainer(Drawn(0), Batches(rank=rank), make_settings(), folder=folder / "run", **options).fit()
        wrong = Drawn(0)
        wrong.wrong = True
        try:
            Trainer(wrong, Batches(rank=rank), make_settings(), folder=folder / "wrong", **options).fit()
        except TypeError as error:
            (folder / f"refused{rank}").write_text(str(error))
