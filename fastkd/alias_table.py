"""Weighted sampling with replacement from millions of items: ``softmax(lambda u)`` over the scores of a collection.

The sampler of "Distillation from heterogeneous unlabeled collections" (Begon & Geurts, section 2.1): each image is
drawn with probability proportional to ``exp(lambda u_i)``, and lambda is set through the inter-quartile sampling
probability ratio, ``lambda = ln(IQPR) / (Q3(u) - Q1(u))``.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from multiprocessing.context import get_spawning_popen
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastkd import statistics
from fastkd._checks import check_count, check_dtype, check_flag, check_number, check_size, check_state, check_tensor
from fastkd._locks import Lock
from fastkd._seeding import check_generator, draw_seed, mixed_seed, seed_of
from fastkd._table_content import Content, Numbering, keep_last
from fastkd.ops import alias as _ops
from fastkd.ops._numbers import number_tensor

__all__ = ["AliasTable"]

Drawn = TypeVar("Drawn")


class AliasTable:
    """O(1) draws from ``softmax(inverse_temperature * scores)``, built in O(N), 8 bytes an item.

    Probabilities are held in fixed point: integers that sum to less than 2^52, so that they are the same on every
    device and for any number of threads, and the distribution differs from the fp64 softmax by less than 1.3e-6 in total
    variation for up to 2^31 items (about 1e-9 for millions). Items of score ``-inf`` are never drawn.

    Draw number ``i`` of a seed is a function of (seed, i): results do not depend on threads, on the device, on ranks,
    or on whether n draws come in one call or in many. A table takes ``8 N + 24 ceil(N / 4096) + 32`` bytes: 8,005,859,416
    for 1e9 items.

    Threads may share a table: each draw has numbers of its own, and none meets an update half done. Not so under
    torch.compile, whose programs hold no locks, and on CUDA streams that do not wait for one another.

    On a GPU nothing waits for the device: building (with a seed; without, one is drawn on the host), drawing and updating
    can be captured in a CUDA graph. What the CPU
    refuses by the values of scores or lambda (below) cannot raise there: every draw of such a table is -2^63, which is an
    error for whatever it indexes, ``probabilities()`` are NaN, and ``weights()`` 0 after a build.

    Args:
        scores: ``[N]``, float32, float64, bfloat16 or float16; higher is drawn more often. Detached.
        inverse_temperature: lambda >= 0, a number or a float tensor ``[]``; 0 is uniform. Give this or ``iqpr``; with
            neither it is 1, the plain softmax of the scores.
        iqpr: the ratio, >= 1, of the probabilities of the items at the third and at the first quartile of the scores.
            1 is uniform. Where the quartiles coincide no lambda can give it: the table is then uniform (lambda = 0).
        seed: of the table's own stream of draws, any int, modulo 2^64; by default drawn from torch's default generator
            of the CPU. With several ranks, give them all the same.
        keep_scores: keeps a copy of the scores, which :meth:`update` keeps up to date, so that lambda can be changed later:
            :meth:`set_inverse_temperature`, :meth:`set_iqpr`, schedules of samplers.

    Raises:
        TypeError: scores of another dtype, an inverse_temperature that is neither a number nor a float tensor, an iqpr
        that is no number, a seed that is no int, a keep_scores that is neither True nor False.
        ValueError, RuntimeError: no item, scores that are NaN or +inf or all -inf, lambda < 0, iqpr < 1.
    """

    _lock: Lock | None = None  # made at first use: a traced program cannot make one

    def __init__(
        self,
        scores: Tensor,
        inverse_temperature: float | Tensor | None = None,
        *,
        iqpr: float | None = None,
        seed: int | None = None,
        keep_scores: bool = False,
    ) -> None:
        check_dtype("scores", scores)
        keep_scores = check_flag("keep_scores", keep_scores)
        if inverse_temperature is not None and iqpr is not None:
            raise ValueError(
                f"fastkd: inverse_temperature is {inverse_temperature} and iqpr is {iqpr}, must be given one at a time"
            )
        seed = None if seed is None else seed_of(seed)
        if iqpr is not None:
            self.inverse_temperature = _ops.inverse_temperature(scores, check_number("iqpr", iqpr))
        else:
            self.inverse_temperature = _lambda(
                1.0 if inverse_temperature is None else inverse_temperature, scores.device
            )
        self._table = _ops.build(scores, self.inverse_temperature)
        self._content = Content()
        if keep_scores:
            self._content.scores = scores.detach().clone()
        self._stream = new_stream(seed, scores.device)
        self._numbering = Numbering()

    @classmethod
    def from_weights(cls, weights: Tensor, *, seed: int | None = None) -> AliasTable:
        """A table that draws item i with probability ``weights[i] / weights.sum()``; weights ``[N]``, >= 0, float."""
        check_dtype("weights", weights)
        if weights.dim() != 1:
            raise ValueError(f"fastkd: weights has shape {tuple(weights.shape)}, must be [N]")
        # (a traced or captured program cannot branch on values: there the build finds the NaN of their logarithm)
        if not _is_recorded(weights) and not (
            bool((weights >= 0).all()) and bool((weights < math.inf).all()) and bool((weights > 0).any())
        ):
            raise ValueError("fastkd: weights must be finite and at least 0, and not all 0")
        return cls(weights.detach().double().log(), 1.0, seed=seed)

    def __getstate__(self) -> dict[str, Any]:
        """Of copies and pickles: the stream as numbers, no lock, and weights that no update changes any more.

        A process that is being spawned reads the weights where they are, in shared memory, as it does any tensor.
        """
        self._check_known("copied or pickled")
        with self._alone():
            state = {**vars(self), "_stream": self._stream.tolist(), "_numbering": self._numbering.copy()}
            state["_content"] = self._content.copy()
            if get_spawning_popen() is None:
                state["_table"] = _ops.Table(*(t.clone() for t in self._table))
                state["inverse_temperature"] = self.inverse_temperature.clone()
                state["_content"].move(torch.clone)
        state.pop("_lock", None)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        with torch.inference_mode(False):
            self._stream = torch.tensor(state["_stream"], dtype=torch.int64, device=self.device)

    def __len__(self) -> int:
        return self._table.bins.shape[0]

    @property
    def device(self) -> torch.device:
        """The device of the table and of its draws."""
        return self._table.bins.device

    @property
    def keeps_scores(self) -> bool:
        """Whether lambda can be changed."""
        return self._content.scores is not None

    @property
    def changed(self) -> bool:
        """Whether items were updated, so that a state needs their weights or scores."""
        return self._content.updated or self._content.rescored

    @property
    def version(self) -> int:
        """How often the weights were changed: updates and other lambdas, but for those in programs of torch.compile."""
        return self._content.version

    @property
    def nbytes(self) -> int:
        """Bytes that the table holds, without scores that it keeps."""
        return sum(t.numel() * t.element_size() for t in self._table)

    def to(self, device: torch.device | str) -> AliasTable:
        """The same table, at the same place of its stream, on another device; draws there are the same numbers.

        The stream is a copy and goes on by itself. The weights are copied to another device; on the same one they are
        shared, so that an update of either table, or another lambda, is one of both; copies by ``copy.deepcopy`` share nothing.
        """
        if torch.device(device).type != "meta":
            self._check_known("moved to another device")
        moved = AliasTable.__new__(AliasTable)
        with self._alone():
            moved._table = _ops.Table(*(t.to(device) for t in self._table))
            with torch.inference_mode(False):
                moved._stream = self._stream.clone().to(device)
            moved.inverse_temperature = self.inverse_temperature.to(device)
            moved._numbering = self._numbering.copy()
            if moved.device == self.device:
                moved._lock = self._lock  # which guards the weights, too
                moved._content = self._content
            else:
                moved._content = self._content.copy()
                moved._content.move(lambda t: t.to(device))
        return moved

    def __repr__(self) -> str:
        number = "unknown" if self.device.type == "meta" else f"{float(self.inverse_temperature):.6g}"
        return f"AliasTable({len(self)} items, inverse_temperature={number}, {self.device})"

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """``n`` item indices, int64 ``[n]``, on the table's device.

        Without a generator, the next ``n`` draws of the table's own stream. With one, a seed is taken from it, and the
        draws are the first ``n`` of that seed; the own stream stays where it is. Draw in the main process: each
        DataLoader worker has a stream of its own, which begins at the same place (use :meth:`sample_at`, or a sampler).
        """
        n = check_size("n", n)
        return self._draw(n, self._stream_from(generator), lambda stream: _ops.sample(self._table, stream, n))

    def _stream_from(self, generator: torch.Generator | None) -> Tensor | None:
        """That of a seed from the generator; None without one. Not for who holds the table: the generator may be waited for."""
        check_generator(generator)
        if generator is None:
            return None
        return _stream_of(draw_seed(0, 2**62, generator.device, generator), self.device)

    def _draw(self, n: int, other: Tensor | None, draws: Callable[[Tensor], Drawn]) -> Drawn:
        """``draws`` of the own stream, n further on afterwards, or of the other one."""
        with self._alone():
            if other is not None:
                return draws(other)
            drawn = draws(self._stream)
            self._stream[1:].add_(n)
            return drawn

    def _check_known(self, what: str) -> None:
        if self.device.type == "meta":
            raise ValueError(f"fastkd: this AliasTable is on meta, must be where its numbers are to be {what}")

    def _alone(self) -> AbstractContextManager[None]:
        """No other thread draws from, updates or reads this table meanwhile; but a traced program cannot hold a lock."""
        if torch.compiler.is_compiling():
            return nullcontext()
        return self._lock or self.__dict__.setdefault("_lock", Lock())

    def sample_at(self, seed: int, start: int, n: int, stride: int = 1) -> Tensor:
        """The draws number ``start, start + stride, ...`` (``n`` of them) of ``seed``, int64 ``[n]``; changes no state.

        ``seed`` is any int, modulo 2^64; ``start`` in [0, 2^63); ``n`` >= 0; ``stride`` >= 1.
        """
        n, stride = check_size("n", n), check_count("stride", stride, 1, 2**63)
        start = check_count("start", start, 0, 2**63)
        return self._draw_at(new_stream(seed, self.device), start, n, stride)

    def _draw_at(self, stream: Tensor, start: int, n: int, stride: int) -> Tensor:
        with self._alone():
            return _ops.sample(self._table, stream, n, start, stride)

    def _new_seed(self, rank: int | None) -> int:
        """The default seed of the next sampler on this table: the table's own for the first, another for each other."""
        with self._alone():
            seed, number = int(self._stream[0]), self._numbering.next(rank)
        return mixed_seed("sampler", seed, number) if number else seed

    def update(self, indices: Tensor, scores: Tensor) -> None:
        """Gives some items new scores, rebuilding only their blocks of 4096 (and the small table over blocks).

        Lambda is not changed, and the weights stay in the units of the build, or coarser ones where new scores need
        room: the distribution is within ``N / weights().sum()`` of the softmax in total variation. That is as good as
        a fresh build unless the total weight falls far: where the items that held nearly all of it leave, a warning says
        so (on the CPU), and a new table should be built. Of equal indices the last one counts. On a GPU a new table takes less
        time than an update of very many items (benchmarks/README.md).

        Args:
            indices: int64 ``[n]``, items in ``[0, N)``.
            scores: float ``[n]``, their new scores; ``-inf`` takes an item out.

        Raises:
            TypeError: indices that are not int64, scores that are no floats.
            RuntimeError: an index out of range, NaN or +inf, no item left, or scores so far above the old largest that
                they cannot be put in scale; the table is then unchanged. On a GPU all later draws are -2^63 instead.
        """
        check_dtype("indices", indices, (torch.int64,))
        check_dtype("scores", scores)
        total = math.inf
        with self._alone():
            kept = self._content.scores
            if kept is not None:
                scores = scores.detach().to(kept.dtype)
            _ops.update(self._table, indices, scores)
            if kept is not None:
                keep_last(kept, indices, scores)
            self._content.changed(updated=True)
            if self.device.type == "cpu" and not torch.compiler.is_compiling():
                total = self._table.scale[3].item()
        if len(self) > 1e-6 * total:
            warnings.warn(
                f"fastkd: after this update the table's weights sum to {total:.0f} for {len(self)} items, too few for "
                "exact probabilities; build a new AliasTable from the scores",
                stacklevel=2,
            )

    def set_inverse_temperature(self, inverse_temperature: float | Tensor) -> None:
        """Another lambda for the scores as they are now: a fresh build in the same place, O(N); the stream stays where it is.

        All that share the weights see it: samplers, and tables of ``to`` on the same device. Not for programs of torch.compile.

        Raises:
            ValueError: the table was built without ``keep_scores=True``; as of construction, and the table is then unchanged.
        """
        number = _lambda(inverse_temperature, self.device)
        self._rebuild(lambda scores: number)

    def set_iqpr(self, iqpr: float) -> None:
        """As :meth:`set_inverse_temperature`, with the lambda of this ratio for the scores as they are now."""
        iqpr = check_number("iqpr", iqpr)
        self._rebuild(lambda scores: _ops.inverse_temperature(scores, iqpr))

    def _rebuild(self, number_of: Callable[[Tensor], Tensor]) -> None:
        with self._alone():
            scores = self._content.scores
            if scores is None:
                raise ValueError(
                    "fastkd: keep_scores is False, must be True for another lambda: AliasTable(scores, keep_scores=True)"
                )
            number = number_of(scores)
            self._put(_ops.build(scores, number), number)
            self._content.changed(updated=False)
            self._content.epoch = None

    def _put(self, table: _ops.Table, number: Tensor) -> None:
        """Other weights in the place of these, for all that share them."""
        with torch.inference_mode():  # in which tables may have been made
            for own, its in zip((*self._table, self.inverse_temperature), (*table, number), strict=True):
                own.copy_(its)

    def weights(self) -> Tensor:
        """The exact integer weights that the draws follow: int64 ``[N]``; probability = weight / sum."""
        with self._alone():
            return _ops.weights(self._table)

    def probabilities(self) -> Tensor:
        """The probability of each item: float64 ``[N]``."""
        weights = self.weights()
        return weights.double() / weights.sum()

    def effective_sample_size(self) -> Tensor:
        """:func:`fastkd.statistics.effective_sample_size` of the weights: float64 ``[]``, from 1 to N."""
        return statistics.effective_sample_size(self.weights())

    def underflowed(self, scores: Tensor) -> Tensor:
        """Items of finite score, of those the table was built from, that are never drawn: bool ``[N]``.

        Their weight rounded to 0: below about 2^-52 of all weights together.
        """
        return statistics.underflowed(scores, self.weights())

    def state_dict(self, *, weights: bool = False) -> dict[str, Any]:
        """Seed and position of the own stream, lambda, and a fingerprint of the table; not the table, which the scores give.

        Args:
            weights: adds what the first scores do not give: 8 bytes an item after updates, and the scores, if they are kept.
        """
        self._check_known("saved or loaded")
        with self._alone():
            seed, position = self._stream.tolist()
            state = {
                "seed": seed,
                "next_index": position,
                "inverse_temperature": float(self.inverse_temperature),
                "items": len(self),
                "total_weight": int(self._table.block_weight.sum()),
            }
            content = self._content
            if content.epoch is not None:
                state["epoch"] = content.epoch
            if check_flag("weights", weights):
                if content.updated:
                    state["table"] = {name: t.cpu().clone() for name, t in self._table._asdict().items()}
                if content.rescored and content.scores is not None:
                    state["scores"] = content.scores.cpu().clone()
        return state

    def load_state_dict(self, state: dict[str, Any], *, stream: bool = True) -> None:
        """Continues the stream of ``state``.

        The table must be the one it was saved from: built from the same scores, and either of the same lambda or with
        ``keep_scores=True``; and updated alike, where the state is without weights.

        Args:
            stream: False leaves the own stream where it is: the weights alone.

        Raises:
            TypeError, ValueError: what is no such state, or that of another table; this one is then unchanged.
        """
        check_state(state, ("seed", "next_index", "items", "total_weight", "inverse_temperature"), "an AliasTable")
        seed, position = (
            seed_of(state["seed"], "state['seed']"),
            check_count("state['next_index']", state["next_index"], 0, 2**63),
        )
        epoch = None if state.get("epoch") is None else check_count("state['epoch']", state["epoch"], 0)
        saved = torch.tensor([seed, position], dtype=torch.int64, device="cpu")
        with self._alone():
            own, scores, content = self.state_dict(), state.get("scores"), self._content
            if scores is not None:
                scores = self._restored("scores", scores, content.scores)
            table = self._loaded(state, scores)
            if table is not None:
                own["total_weight"] = int(table.block_weight.sum())
                own["inverse_temperature"] = state["inverse_temperature"]
            for key in ("items", "total_weight", "inverse_temperature"):
                if state[key] != own[key]:
                    raise ValueError(
                        f"fastkd: state['{key}'] is {state[key]}, but this table has {own[key]}; rebuild the table from "
                        "the scores it was saved with, and repeat its updates"
                    )
            if scores is not None and content.scores is not None:
                content.scores.copy_(scores)
                content.rescored = True
            if table is not None:
                self._put(table, number_tensor(float(state["inverse_temperature"]), self.device))
                content.changed(updated="table" in state)
            content.epoch = epoch
            if check_flag("stream", stream):
                self._stream.copy_(saved)

    def _loaded(self, state: dict[str, Any], scores: Tensor | None) -> _ops.Table | None:
        """The weights of a state; None if they are to be those that are there."""
        if state["items"] != len(self):
            return None
        if "table" in state:
            its = check_state(state["table"], _ops.Table._fields, "an AliasTable")
            return _ops.Table(*(self._restored(name, its[name], own) for name, own in self._table._asdict().items()))
        scores = self._content.scores if scores is None else scores
        number = state["inverse_temperature"]
        if scores is None or (number == float(self.inverse_temperature) and "scores" not in state):
            return None
        return _ops.build(scores, number_tensor(check_number("state['inverse_temperature']", number), self.device))

    def _restored(self, name: str, value: object, own: Tensor | None) -> Tensor:
        if own is None:
            raise ValueError(f"fastkd: state has {name}, but this table was built without keep_scores=True")
        its = check_dtype(f"state's {name}", value, (own.dtype,))
        if its.shape != own.shape:
            raise ValueError(f"fastkd: state's {name} has shape {tuple(its.shape)}, must be {tuple(own.shape)}")
        return its.to(self.device)


def check_table(name: str, table: object) -> AliasTable:
    if not isinstance(table, AliasTable):
        raise TypeError(f"fastkd: {name} is {type(table).__name__}, must be an AliasTable")
    return table


def check_one_for_each_item(name: str, value: object, table: AliasTable, what: str) -> Tensor:
    tensor = check_tensor(name, value)
    if tensor.dim() == 0 or tensor.shape[0] != len(table):
        raise ValueError(
            f"fastkd: {name} has shape {tuple(tensor.shape)}, must have {len(table)} {what}, one for each item of the table"
        )
    return tensor


def _lambda(value: float | Tensor, device: torch.device) -> Tensor:
    if isinstance(value, Tensor):
        check_dtype("inverse_temperature", value)
        return value.detach().to(device, torch.float64, copy=True)  # which another lambda is written to
    return number_tensor(check_number("inverse_temperature", value), device)


def _is_recorded(t: Tensor) -> bool:
    """Whether values cannot be looked at: while a program is traced, or captured in a CUDA graph, or where there are none."""
    return torch.compiler.is_compiling() or t.is_meta or (t.is_cuda and torch.cuda.is_current_stream_capturing())


def new_stream(seed: int | None, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # a table made in inference mode can be drawn from outside of it
        if seed is None:
            return _stream_of(draw_seed(0, 2**62, torch.device("cpu")), device)
        stream = torch.zeros(2, dtype=torch.int64, device=device)
        stream[:1].fill_(seed_of(seed))  # no copy from the host
        return stream


def _stream_of(seed: Tensor, device: torch.device) -> Tensor:
    return torch.cat([seed, torch.zeros_like(seed)]).to(device)
