"""The pass: all tokens through layer 0 of every model, then layer 1, …

At any time one layer's attention or a few experts are in memory, beside the hidden states. What several models need is
read once for all of them, and the next matrices are read, by several threads, while the present ones compute.
Models that have been the same so far, and are in this layer, are computed once.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from ..base.errors import KernelError, SourceError, WeightError
from ..base.workers import default_threads
from .ahead import Ahead, places_of
from .device import device_of
from .head import Head
from .kept import Kept, Observer
from .layer import ALL, Input, Key, Layer, Need, State, Tensor
from .model import Model, Reader
from .ops import rms_norm
from .places import Places

#: bytes of activations that are computed at a time, about
_BLOCK_BYTES = 1 << 28
#: experts with few tokens that a GPU computes at a time
EXPERTS_TOGETHER = 16
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}

Progress = Callable[[str, int, int], None]
"""Called with where the pass is, and how many of how many tokens × layers are done."""

Logits = Callable[[int, int, Tensor], None]
"""Called with the number of a chunk, the number of a model, and its logits float32 [n positions, n_vocab]."""

HiddenStates = Callable[[int, int, Tensor], None]
"""Called with the number of layers that are done, the number of a model, and its hidden states float32
[n_chunks, n_ctx, n_embd], which are to be read, not changed, and are others after the next layer."""


@dataclass(frozen=True)
class Options:
    """How a pass is done."""

    device: str = "cpu"
    dtype: str = "f32"
    """of matrix products: f32, bf16"""
    n_threads: int = 0
    """0: as many as torch would take (OMP_NUM_THREADS, or all processors)"""
    memory: int | None = None
    """bytes of hidden states that stay in memory; beyond, they are files mapped into it. None: no limit"""
    folder: Path | None = None
    """where what is kept between layers lies, and files of hidden states; None: nothing is kept"""
    identity: str = ""
    """what a kept state must be of: models, tokens, settings"""
    experts_together: int = 0
    """routed experts with few tokens that are computed in one product; 0: one on a CPU, several on a GPU"""
    keep_seconds: float = 0.0
    """what is computed in so many seconds may be lost; 0: it is kept after each layer"""


def threads_of(options: Options) -> int:
    """How many threads compute; the last bits of float32 products depend on it."""
    return options.n_threads or min(default_threads(), torch.get_num_threads())


class _Group(NamedTuple):
    """Models that have been the same so far."""

    members: list[int]
    hidden: Tensor


class _Running(NamedTuple):
    """A group on its way through a layer."""

    group: _Group
    model: Model
    layer: Layer
    need: Need


@dataclass
class Pass:
    """A pass over chunks of tokens, int [n_chunks, n_ctx], of one or more models with the same vocabulary.

    Raises SourceError for models that do not belong together and for tokens that are none of theirs."""

    models: Sequence[Model]
    tokens: npt.NDArray[np.integer]
    options: Options = field(default_factory=Options)
    observers: Sequence[Observer | None] = ()
    """one a model, or none"""
    on_logits: Logits | None = None
    logits_from: int = 0
    """the first position of each chunk whose logits are asked for"""
    progress: Progress = lambda what, n_done, n_total: None
    on_hidden: HiddenStates | None = None
    read_again: Callable[[int], Sequence[str]] = lambda number: ()
    """the tensors that somebody else reads when a layer is done, by name"""

    def __post_init__(self) -> None:
        if not self.models:
            raise SourceError("there is no model to compute")
        if self.tokens.ndim != 2 or self.tokens.size == 0 or self.tokens.dtype.kind not in "iu":
            raise SourceError(
                f"tokens must be integers [n_chunks, n_ctx], not {self.tokens.dtype} {list(self.tokens.shape)}"
            )
        self.n_chunks, self.n_ctx = self.tokens.shape
        first = self.models[0]
        self.n_layers, self.n_embd = first.family.n_layers, first.family.n_embd
        for model in self.models:
            f, g = model.family, first.family
            if (f.n_layers, f.n_embd, f.n_vocab) != (g.n_layers, g.n_embd, g.n_vocab):
                raise SourceError(
                    f"{model.name}: has {f.n_layers} layers, {f.n_embd:,} values a token and {f.n_vocab:,} tokens, but "
                    f"{first.name} has {g.n_layers}, {g.n_embd:,} and {g.n_vocab:,}; they are not the same model"
                )
        low, high = int(self.tokens.min()), int(self.tokens.max())
        if low < 0 or high >= first.family.n_vocab:
            raise SourceError(
                f"{first.name}: token {low if low < 0 else high:,} is not one of its {first.family.n_vocab:,}; was "
                "the text tokenized with another model's tokenizer?"
            )
        self.device = device_of(self.options.device)
        if self.options.dtype not in DTYPES:
            raise KernelError(f"dtype '{self.options.dtype:.40}' is not one that models are computed in: f32, bf16")
        if self.options.n_threads < 0:
            raise KernelError(
                f"{self.options.n_threads} threads cannot compute; give 1 or more, or 0 for all processors"
            )
        self.n_threads = threads_of(self.options)
        per_block = _BLOCK_BYTES // (4 * first.family.widest * self.n_ctx)
        self.block_chunks = max(1, min(self.n_chunks, per_block))
        self._together = self.options.experts_together or (EXPERTS_TOGETHER if self.device.type == "cuda" else 1)
        self._units = 0
        """layers that are done, over all groups"""
        self._partly: dict[tuple[int, ...], int] = {}
        """tokens x layers that are done of the present layer, by a group's members"""

    # ------------------------------------------------------------ the run

    def run(self) -> None:
        """Compute. Raises SourceError, WeightError, OutputError, ResumeError."""
        for _ in self.steps():
            pass

    def steps(self) -> Generator[int, None, None]:
        """Compute layer by layer as it is asked for: the number of layers that are done, first those that an earlier
        run kept, then one more each time, when the layer is kept. Raises as `run`."""
        before = torch.get_num_threads()
        torch.set_num_threads(self.n_threads)
        try:
            with ExitStack() as stack, torch.inference_mode():
                kept = None
                if self.options.folder is not None:
                    kept = stack.enter_context(
                        Kept(self.options.folder, self.options.identity, self.options.keep_seconds)
                    )
                self._places = Places(self.options.memory, self.options.folder, self.device)
                self._ahead = stack.enter_context(Ahead(self.device, DTYPES[self.options.dtype], self.n_threads))
                stack.push(self._ended)  # before those that read are waited for
                self._total = self._count_units()
                layer, groups = self._begin(kept)
                yield layer
                self._tell(min(layer, self.n_layers - 1))
                for number in range(layer, self.n_layers):
                    groups = [part for group in groups for part in self._split(group, number)]
                    self._layer(number, groups)
                    for observer in self.observers:
                        if observer is not None:
                            observer.end_of_layer(number)
                    if self.on_hidden is not None:
                        for group in groups:
                            for i in group.members:
                                self.on_hidden(number + 1, i, group.hidden)
                    if kept is not None:
                        kept.save(number + 1, groups, self.observers, last=number + 1 == self.n_layers)
                    yield number + 1
                self._head(groups)
        except torch.OutOfMemoryError as e:
            raise KernelError(f"{self.device}: {str(e).splitlines()[0]:.200}; give fewer tokens or models") from None
        finally:
            torch.set_num_threads(before)

    def _paths(self) -> Iterator[list[Hashable]]:
        """For each layer, equal values for models that are the same up to its end."""
        so_far: list[Hashable] = [m.key_of("token_embd.weight") for m in self.models]
        for number in range(self.n_layers):
            so_far = [hash((s, m.layer_key(number))) for s, m in zip(so_far, self.models, strict=True)]
            yield so_far

    def _count_units(self) -> int:
        """Layers that will be computed, over all groups."""
        return sum(len(set(paths)) for paths in self._paths())

    def _begin(self, kept: Kept | None) -> tuple[int, list[_Group]]:
        found = None if kept is None else kept.load(self.observers, self._new_hidden)
        self._expect(0 if found is None else found[0])
        if found is None:
            return 0, self._embed()
        layer, groups = found
        self._units = sum(len(set(paths)) for _, paths in zip(range(layer), self._paths(), strict=False))
        return layer, [_Group(members, hidden) for members, hidden in groups]

    def _expect(self, layer: int) -> None:
        """Say what will be read from this layer on."""
        first = self.models[0].family
        runs: list[Iterable[str]] = [[] if layer else ["token_embd.weight"]]
        for number in range(layer, self.n_layers):
            runs += [[key.name for key in first.keys(number)], self.read_again(number)]
        runs += [["output_norm.weight", *([first.output] if self.on_logits is not None else [])]]
        for reader in self._readers():
            models = [m for m in self.models if m.weights is reader]
            reader.expect(*([n for n in run if n in reader.tensors and not all(m.is_ready(n) for m in models)]
                            for run in runs))  # fmt: skip

    def _readers(self) -> list[Reader]:
        return list({id(m.weights): m.weights for m in self.models}.values())

    def _ended(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and kind is not GeneratorExit:  # between layers nothing is waited for
            for reader in self._readers():
                reader.abandon()

    def _new_hidden(self) -> Tensor:
        return self._places.make((self.n_chunks, self.n_ctx, self.n_embd))

    def _embed(self) -> list[_Group]:
        name = "token_embd.weight"
        used, at = np.unique(self.tokens, return_inverse=True)
        places = torch.from_numpy(at.reshape(-1).astype(np.int64))
        groups: dict[Hashable, _Group] = {}
        for i, model in enumerate(self.models):
            key = model.key_of(name)
            if key in groups:
                groups[key].members.append(i)
                continue
            rows = model.weights.rows(name, used.astype(np.int64))
            if model.change is not None and model.change.key(name) is not None:
                rows = model.change.apply(model.weights.tensors[name], ALL, rows)
            hidden = self._new_hidden()
            flat, table = hidden.view(-1, self.n_embd), torch.from_numpy(rows)
            for start in range(0, len(places), 1 << 14):
                flat[start : start + (1 << 14)] = table[places[start : start + (1 << 14)]].to(self.device)
            groups[key] = _Group([i], hidden)
        return list(groups.values())

    def _split(self, group: _Group, number: int) -> list[_Group]:
        """The group's models by what they have in this layer, each part with hidden states of its own."""
        parts: dict[Hashable, list[int]] = {}
        for i in group.members:
            parts.setdefault(self.models[i].layer_key(number), []).append(i)
        first, *others = parts.values()
        out = [_Group(first, group.hidden)]
        for members in others:
            hidden = self._new_hidden()
            hidden.copy_(group.hidden)
            out.append(_Group(members, hidden))
        return out

    # ------------------------------------------------------------ a layer

    def _layer(self, number: int, groups: list[_Group]) -> None:
        running: list[_Running] = []
        for group in groups:
            model = self.models[group.members[0]]
            state = State(
                group.hidden, self.block_chunks, self._places.zeros, self._watchers(group.members), self._together
            )
            layer = model.family.layer(number, state)
            running.append(_Running(group, model, layer, next(layer)))
        while running:
            # whole tensors first, then experts in order: who did not choose an expert waits at a later one
            first = min((one.need.keys for one in running), key=lambda keys: (keys[0].mat, keys[0].name))
            following = [one for one in running if one.need.keys != first]
            alike: dict[Hashable, list[_Running]] = {}
            for one in running:
                if one.need.keys == first:
                    alike.setdefault(tuple(one.model.key_of(k.name) for k in first), []).append(one)
            queue = list(alike.values())
            self._ahead.prepare(queue[0][0].model, first)
            for i, each in enumerate(queue):
                # while this one computes, the next matrices are read, quantized and put in place
                if i + 1 < len(queue):
                    self._ahead.prepare(queue[i + 1][0].model, first)
                else:
                    self._ahead.prepare_some(queue[0][0].model, queue[0][0].need.following)
                later = {at for others in queue[i + 1 :] for at in places_of(others[0].model, first)}
                matrices = self._ahead.take(each[0].model, first, later)
                for one in each:
                    try:
                        following.append(one._replace(need=one.layer.send(matrices)))
                    except StopIteration:
                        self._end_of_layer(one, number)
                    else:
                        left, whole = following[-1].need.left
                        self._partly[tuple(one.group.members)] = self.tokens.size * (whole - left) // whole
                    self._tell(number)
                del matrices
            self._ahead.forget(first)
            running = following

    def _end_of_layer(self, one: _Running, number: int) -> None:
        for at in range(0, self.n_chunks, self.block_chunks):
            if not torch.isfinite(one.group.hidden[at : at + self.block_chunks]).all():
                raise WeightError(
                    f"{one.model.name}: layer {number} gives values that are NaN or Inf; are its weights damaged?"
                )
        self._partly.pop(tuple(one.group.members), None)
        self._units += 1

    def _tell(self, number: int) -> None:
        done = self._units * self.tokens.size + sum(self._partly.values())
        self.progress(f"layer {number + 1} of {self.n_layers}", done, self._total * self.tokens.size)

    def _watchers(self, members: list[int]) -> Callable[[Input], None] | None:
        watching = [o for i in members if i < len(self.observers) and (o := self.observers[i]) is not None]
        if not watching:
            return None

        def see(given: Input) -> None:
            for observer in watching:
                observer.see(given)

        return see

    # ------------------------------------------------------------ the head

    def _head(self, groups: list[_Group]) -> None:
        """Logits of every model, chunk by chunk; and the inputs of the output tensor for those who watch."""
        if self.on_logits is None and not any(o is not None for o in self.observers):
            return
        of_model = {i: group.hidden for group in groups for i in group.members}
        norms = [
            torch.from_numpy(m.weights.matrix(Key("output_norm.weight", ALL))[0]).to(self.device) for m in self.models
        ]
        heads = self._heads() if self.on_logits is not None else []
        for chunk in range(self.n_chunks):
            for i, model in enumerate(self.models):
                x = rms_norm(of_model[i][chunk], norms[i], model.family.eps)
                if (see := self._watchers([i])) is not None:
                    see(Input((model.family.output,), x, ALL, 1))
                if self.on_logits is not None:
                    self.on_logits(chunk, i, heads[i].logits(x[self.logits_from :]))

    def _heads(self) -> list[Head]:
        """The output of every model; those that share one share the memory."""
        found: dict[Hashable, Head] = {}
        for model in self.models:
            key = (model.key_of(model.family.output), model.family.output)
            if key not in found:
                found[key] = Head(model, self.device, DTYPES[self.options.dtype])
        return [found[m.key_of(m.family.output), m.family.output] for m in self.models]
