"""What a training does: its networks, how they are optimized, and one iteration.

A procedure does not know who runs it; :class:`fastkd.training.Trainer` does, and has all that trainings share: epochs,
mixed precision, several processes, averages of weights, evaluation, checkpoints, progress.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer

from fastkd.data.batch import Batches
from fastkd.methods.features import check_module
from fastkd.methods.given import Given

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from typing_extensions import Self

__all__ = ["Part", "Procedure", "Step"]


class Part:
    """Parameters that one optimizer trains, and what is otherwise for them than the settings of the training say.

    >>> Part(generator, optimizer="adam", learning_rate=1e-3, betas=(0.5, 0.999))

    Args:
        trained: a module, or parameters; those that require no gradient are left out.
        make_optimizer: parameters to an optimizer, where it is to be none of those that the settings name. Schedule and
            clipping follow the settings all the same.
        shared: whether all processes have the same parameters, so that gradients are averaged. Where not, each has its own for
            as long as an iteration, such as images that it optimizes: a checkpoint keeps those of rank 0.
        settings: in the place of those of :class:`fastkd.training.TrainingSettings`: optimizer, learning_rate, momentum,
            nesterov, betas, weight_decay, schedule, milestones, decay, patience, warmup_epochs, gradient_clip.
    """

    def __init__(
        self,
        trained: nn.Module | Iterable[nn.Parameter],
        *,
        make_optimizer: Callable[[list[nn.Parameter]], Optimizer] | None = None,
        shared: bool = True,
        **settings: Any,
    ) -> None:
        parameters = trained.parameters() if isinstance(trained, nn.Module) else trained
        self.parameters = [p for p in parameters if p.requires_grad]
        self.make_optimizer = make_optimizer
        self.shared = shared
        self.settings = settings


class Step(Protocol):
    """Where a training is, and how a procedure goes on."""

    epoch: int
    """Under way, from 0 on."""
    epochs: int
    """Of the training."""
    iteration: int
    """Of this epoch, from 0 on."""
    iterations: int
    """Of an epoch."""
    rank: int
    """Of this process, from 0 on."""
    world_size: int
    """Processes."""

    @property
    def batches_per_step(self) -> int:
        """Batches, of all processes, whose gradients make one step together: for steps that a procedure makes itself."""

    @property
    def progress(self) -> float:
        """Share of the epochs that are done, in [0, 1)."""

    def run(self, *arguments: Any, **more: Any) -> Any:
        """Calls the procedure: its ``forward``, by way of DistributedDataParallel where that shares its gradients out."""

    def update(self, loss: Tensor, *parts: str) -> None:
        """One step of these parts, of all if none is named, down the gradient of ``loss``, a scalar.

        Gradients are made for their parameters alone. Outside of autocast, scaled for float16, averaged over the processes,
        clipped, as the settings say.
        """

    def restart(self, *parts: str) -> None:
        """Lets the optimizers of these parts forget what they have gathered, momentum and averages of gradients, as their
        parameters have been drawn anew."""


class Procedure(nn.Module):
    """Base of procedures: :meth:`parts`, :meth:`network` and :meth:`iteration` are needed.

    Modules, parameters and buffers that it holds are its state, saved and taken up again; other state, in plain types, goes
    through ``get_extra_state`` and ``set_extra_state`` of torch's modules. Networks that are not trained, a teacher, are
    given to :meth:`freeze`. A buffer may differ between processes, such as what is known of the samples that each of them
    sees: each goes on with its own. Running statistics of batch norm are those of rank 0 from the end of an epoch on.
    """

    one_forward: ClassVar[bool] = False
    """Whether all that needs a gradient goes through ``forward``, once an iteration, and into one update: several processes
    then share the gradients while they are being made (DistributedDataParallel), not afterwards."""

    augments: ClassVar[bool] = False
    """Whether it crops and mirrors images itself, and is to be given them as they are."""
    batches: int = 1
    """Batches of images that an iteration takes, side by side in one."""
    views: int = 1
    """Views of each image that an iteration takes, 1 or more."""
    strong_views: int = 0
    """How many of them, the last ones, are to be strongly augmented."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen: dict[str, nn.Module] = {}
        """Networks that are not trained, by name: no part of the state, but they move with the procedure (``to``)."""

    @classmethod
    def build(cls, given: Given, **options: Any) -> Self:
        """The procedure for given networks and data; ``options`` are the other arguments of the class."""
        return cls(**{**given.wanted(cls), **options})

    def parts(self) -> Mapping[str, Part]:
        """What is trained, by name."""
        raise NotImplementedError

    def network(self) -> nn.Module:
        """What the training is for. Where there is a moving average of weights, it is of this."""
        raise NotImplementedError

    def iteration(self, batch: Batches, step: Step) -> Mapping[str, Tensor]:
        """Makes its updates, as many as it wants, and returns terms by name, scalars, to log. ``loss`` and names that end in
        ``loss`` or ``accuracy`` are shown as such.

        Args:
            batch: on the device of the procedure, as the source gives it: one, several by name, or none.
        """
        raise NotImplementedError

    def validation(self, batch: Batches, step: Step) -> Mapping[str, Tensor]:
        """Terms by name of a batch that is not trained on, to log, in evaluation mode and without gradients; ``loss`` is what
        the schedule "plateau" follows. Needed where a training validates."""
        raise NotImplementedError(f"fastkd: {type(self).__name__} has no validation(), must have one to be validated")

    def before_epoch(self, step: Step) -> None:
        """Called before the first iteration of each epoch; not again where a training goes on within one."""

    def after_epoch(self, step: Step) -> Mapping[str, Tensor | float]:
        """Called after the last iteration of each epoch, before the evaluation; what it returns is logged."""
        return {}

    def pictures(self, step: Step) -> Mapping[str, Figure]:
        """Figures by name of what the training makes, generated images for instance, drawn after some epochs where the trainer
        is asked to. A name is part of a file's: letters, digits, ``_``, ``.`` and ``-``.

        Called in evaluation mode, without gradients, on rank 0 alone: it must make no update, change no state, and not wait
        for other ranks. The random generators of torch, numpy and Python are seeded the same each time, and as before
        afterwards: from the same noise the images of all epochs can be compared. :mod:`fastkd.methods.pictures`, which
        needs matplotlib and is to be imported in here, draws some.
        """
        return {}

    def samples(self, count: int) -> Tensor | None:
        """So many of the images that it makes, ``[count, C, H, W]``, as the networks take them; None where it makes none."""
        return None

    def deployed(self, network: nn.Module) -> nn.Module:
        """What is evaluated and kept of :meth:`network`, or of its average."""
        return network

    def networks(self) -> dict[str, nn.Module]:
        """The modules that it consists of, by the names under which a checkpoint has their weights."""
        return dict(self.named_children())

    def described(self) -> str:
        """What must be the same for a training to go on, beside the shapes of its state."""
        return f"{type(self).__name__}({self.extra_repr()})"

    def freeze(self, name: str, network: nn.Module) -> nn.Module:
        """Takes a network that is not trained, in evaluation mode from now on. After those that are.

        Raises:
            TypeError: it is no module.
            ValueError: it shares parameters with what is trained.
        """
        check_module(name, network)
        theirs = {id(parameter) for parameter in network.parameters()}
        shared = [own for own, parameter in self.named_parameters() if id(parameter) in theirs]
        if shared:
            raise ValueError(
                f"fastkd: {name} shares {len(shared)} parameters with what is trained ({shared[0]}, ...), must be a network "
                f"of its own, as it is frozen: copy.deepcopy({name})"
            )
        self.frozen[name] = network.eval().requires_grad_(False)
        return network

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Procedure:
        """``to``, ``cuda``, ``double`` and their like move the frozen networks, too."""
        for network in self.frozen.values():
            network._apply(fn, recurse)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self
