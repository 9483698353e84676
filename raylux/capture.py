"""One forward and backward pass that gives, for each tracked layer, its inputs a and output gradients g.

Layout, fixed for everything that builds on it:

- ``a_NTM``: N sequences, T tokens (a module called c times in one forward has c·T), M inputs, the last
  being the constant 1 of the bias where the layer has one; zero on padding.
- ``g_NTP``: the gradient of the summed loss of sequence n with respect to the layer's output; zero on padding.
- of an expert of a mixture, which sees some tokens of some sequences: a and g as ``Routed``.
- of a layer above a classifier's pooling, which sees one row for each sequence: a [N, 1, M] and g [N, 1, P].
- of the word embedding: a [N, T, 1] int64, the token ids themselves, and g the gradient by each position's embedding.
- of a model over several devices: a and g where their layer is, the loss and the labels where the batch is.

The gradient of sequence n is then ``G_PM = Σ_t g_tP a_tM``, whatever the layer's own storage (``nn.Linear``
keeps [P, M], GPT-2's ``Conv1D`` [M, P]). Parameters are frozen: no weight gradient is ever formed. The graph begins
at the lowest tracked layer whatever is wanted, so that the forward pass has the same bits; the backward pass begins at
what a linear head reads (``heads``), at the logits of another, and stops at the lowest layer that is wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from raylux.batches import IGNORED, Batch, mask_of_rows
from raylux.checkpointing import blocks_of, checkpointed
from raylux.errors import NumericsError, UserError
from raylux.experts import SplitExperts
from raylux.gpu import is_unrepeatable, repeatable
from raylux.heads import End, end_of, linear_head
from raylux.influence.words import are_words
from raylux.layers import TrackedLayer
from raylux.loss import OutputLoss
from raylux.patches import Patches, output_rows
from raylux.profiling import of
from raylux.recording import Forward, Outputs, Record
from raylux.routed import Routed, Rows
from raylux.tasks import task_of

# The share of a sequence's tokens up to which logits are computed for those with a loss alone.
_FEW = 0.9

Labeller = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(probabilities [n, V], keys [n], positions [n]) -> labels [n] int64"""


@dataclass
class Captured:
    """What one batch left behind. Legend: N rows (filler included), T tokens (times calls), M inputs, P outputs.

    Attributes:
        raw: input group -> its calls' inputs [N, T, M] without the bias's coordinate; ``Routed`` of an expert.
        biased: input group -> whether its layers have a bias.
        mask: [N, T] bool, True on real tokens; None where there is no padding.
        grads: layer -> g [N, T, P].
        given: layer -> g [N, T, P] on the batch's own labels, where both were asked for.
        labels: [N, T] int64, the labels the loss was taken on (the sampled ones, if sampled).
        loss: [N] summed token loss of each sequence.
    """

    raw: dict[str, Rows]
    biased: dict[str, bool]
    mask: Tensor | None
    grads: dict[str, Rows]
    given: dict[str, Rows]
    labels: Tensor
    loss: Tensor

    @cached_property
    def inputs(self) -> dict[str, Rows]:
        """Input group -> a [N, T, M] in the model's precision."""
        return self.inputs_in(None)

    def inputs_in(self, dtype: torch.dtype | None) -> dict[str, Rows]:
        """Input group -> a [N, T, M], the bias's ones included."""
        return {
            name: self._routed(name, x, dtype or x.rows.dtype)
            if isinstance(x, Routed)
            else self._input(name, x, dtype or x.dtype)
            for name, x in self.raw.items()
        }

    def _routed(self, name: str, x: Routed, dtype: torch.dtype) -> Routed:
        """Rows of zeros may have become something on the way through an expert with biases."""
        assert x.places is not None
        ones = x.rows.new_ones(len(x.rows), int(self.biased[name]))
        return x.over(torch.cat([x.rows, ones], 1).to(dtype).masked_fill_((x.places < 0)[:, None], 0))

    def _input(self, name: str, x: Tensor, dtype: torch.dtype) -> Tensor:
        if are_words(x):
            return x  # what padding has is of no gradient
        if self.mask is None and not self.biased[name]:
            return x.to(dtype)
        rows, tokens, width = x.shape
        a = torch.empty(rows, tokens, width + self.biased[name], dtype=dtype, device=x.device)
        # On a CPU the rows of an odd width are rounded one entry after the other: five times the time.
        a[..., :width] = x if x.is_cuda else x.to(dtype)
        a[..., width:] = 1
        mask = None if self.mask is None else mask_of_rows(self.mask, tokens)
        if mask is not None:
            a.masked_fill_(~mask.unsqueeze(-1).to(a.device), 0)
        return a


class Capture:
    """Runs batches through a frozen model and records a and g of its tracked layers.

    Args:
        model: a causal LM or a classifier, called as its ``Task`` does.
        layers: the layers to record.
        groups: layer -> input group, as ``input_groups`` finds them; default: each layer by itself.
        checkpointing: keep of each block its input alone, and compute it again in the backward pass.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[TrackedLayer],
        groups: dict[str, str] | None = None,
        checkpointing: bool = False,
    ) -> None:
        self.model = model
        self.layers = tuple(layers)
        self.groups = groups or {layer.name: layer.name for layer in layers}
        self._modules = {layer.name: model.get_submodule(layer.name) for layer in layers}
        self._checkpointed = blocks_of(model, self._names()) if checkpointing else []
        self._blocks = [module for module in model.modules() if isinstance(module, SplitExperts)]
        # Torch gives the row of a padding token no gradient.
        self._unlearned = {
            layer.name: self._modules[layer.name].padding_idx
            for layer in layers
            if layer.words and self._modules[layer.name].padding_idx is not None
        }
        self._widths = {layer.name: layer.inputs - int(layer.bias) for layer in layers}
        self._patches = {layer.name: layer.patches for layer in layers}
        self._experts = {layer.name: _expert_of(model, layer.name) for layer in layers if layer.routed}
        self._head = linear_head(model, self._names())
        self.task = task_of(model)
        # Until an operation of the model turns out to have no kernel whose bits repeat.
        self._repeatable = True

    def _names(self) -> list[str]:
        return [layer.name for layer in self.layers]

    @contextmanager
    def forward(self, batch: Batch) -> Iterator[Forward]:
        """Run a batch with its graph kept, for whoever takes derivatives of the logits by the layers' outputs.

        Attention is computed by plain operations while this is open: the fused kernels have no second derivative.

        Args:
            batch: on the model's device.
        """
        targets = self.task.targets(batch)
        places = self._places(targets)
        record = Outputs()
        handles = [module.register_forward_hook(record.hook(name)) for name, module in self._modules.items()]
        try:
            with sdpa_kernel(SDPBackend.MATH), of("forward"):
                logits = self._logits(batch, places)
        finally:
            for handle in handles:
                handle.remove()
        flat = logits.reshape(-1, logits.shape[-1])
        with sdpa_kernel(SDPBackend.MATH):
            yield Forward(flat, targets.reshape(-1)[places] != IGNORED, self._rows(record), record.outputs)

    def _rows(self, record: Outputs) -> dict[str, list[Tensor]]:
        """Inputs of each call, a row for each that a convolution lies on."""
        patches = {name: each for name, each in self._patches.items() if each is not None}
        return {
            name: [patches[name].rows(x) for x in calls] if name in patches else calls
            for name, calls in record.inputs.items()
        }

    def run(
        self,
        batch: Batch,
        labeller: Labeller | None = None,
        both: bool = False,
        wanted: Collection[str] | None = None,
    ) -> Captured:
        """Forward and backward of one batch.

        Args:
            batch: on the model's device.
            labeller: draws labels from the model's probabilities where the batch has a label; default: its own.
            both: give the gradients on the batch's own labels too, by a second backward of the same forward.
            wanted: names of the layers to record, a layer pass's; default: all.

        Raises:
            NumericsError: the loss is not finite, or a layer took no part in it. Gradients are checked where they
                are summed, by layer and unit.
        """
        names = self._names() if wanted is None else wanted
        layers = [layer for layer in self.layers if layer.name in names]
        try:
            return self._run(batch, labeller, both, layers)
        except RuntimeError as error:
            if not (self._repeatable and is_unrepeatable(error)):
                raise
        self._repeatable = False
        return self._run(batch, labeller, both, layers)

    def _run(self, batch: Batch, labeller: Labeller | None, both: bool, layers: Sequence[TrackedLayer]) -> Captured:
        targets = self.task.targets(batch)
        places = self._places(targets)
        with self._recording(batch, layers) as record:
            with of("forward"), checkpointed(self._checkpointed):
                logits = self._logits(batch, places)
            record.open = False
            with of("backward"):
                end = end_of(self._head, record.before(logits), logits)
                losses = self._losses(end, logits, batch, targets.reshape(-1)[places], places, labeller, both)
            place = end.place
            del end, logits  # as wide as the vocabulary
            taken = []
            for index, one in enumerate(losses):
                with of("backward"), repeatable(place.device.type if self._repeatable else "cpu"):
                    grads = record.gradients(place, one.gradient, retain=index + 1 < len(losses))
                taken.append(self._gradients(grads, batch, layers))
            raw = self._inputs(record, batch, taken[0])
        for name, token in self._unlearned.items():
            for found in taken:
                if name in found:
                    ids, g = raw[self.groups[name]], found[name]
                    assert isinstance(ids, Tensor) and isinstance(g, Tensor)
                    found[name] = g * (ids != token)
        targets.view(-1)[places] = losses[0].labels
        labels, loss = self.task.labels(batch, targets), losses[0].token_loss.view(len(targets), -1).sum(1)
        if not torch.isfinite(loss).all():
            raise NumericsError("the loss of a sequence is not finite")
        biased = {layer.name: layer.bias for layer in self.layers if layer.name in raw}
        mask = None if bool(batch.mask.all()) else batch.mask
        return Captured(raw, biased, mask, taken[0], taken[1] if len(taken) > 1 else {}, labels, loss)

    def _places(self, targets: Tensor) -> Tensor | slice:
        """The flat tokens whose logits are wanted: of a sequence by itself those with a loss, where they are few.

        In a batch of several they would depend on the company, and with them the bits.
        """
        if len(targets) > 1 or not self.task.takes_places:
            return slice(None)
        places = (targets[0] != IGNORED).nonzero().squeeze(1)
        return places if 0 < len(places) <= _FEW * targets.shape[1] else slice(None)

    def _losses(
        self,
        end: End,
        logits: Tensor,
        batch: Batch,
        targets: Tensor,
        places: Tensor | slice,
        labeller: Labeller | None,
        both: bool,
    ) -> list[OutputLoss]:
        flat = logits.detach().reshape(-1, logits.shape[-1])
        draw = None
        if labeller is not None:
            where = self.task.where(batch)
            keys = batch.keys.repeat_interleave(where.shape[1])[places]
            place = where.reshape(-1)[places]

            def draw(probabilities: Tensor, at: Tensor) -> Tensor:
                return labeller(probabilities, keys[at], place[at])

        return end.losses(flat, targets, draw, both)

    def _logits(self, batch: Batch, places: Tensor | slice) -> Tensor:
        return self.task.logits(self.model, batch, places)

    @contextmanager
    def _recording(self, batch: Batch, layers: Sequence[TrackedLayer]) -> Iterator[Record]:
        wanted = {layer.name for layer in layers}
        record, leaders = Record(), {self.groups[name] for name in wanted}
        handles = [
            module.register_forward_hook(record.hook(name, keep_input=name in leaders, keep_edge=name in wanted))
            for name, module in self._modules.items()
        ]
        if self._head is not None:
            handles.append(self._head.register_forward_hook(record.head))
        for block in self._blocks:
            block.mask = batch.mask
        try:
            yield record
        finally:
            for handle in handles:
                handle.remove()
            for block in self._blocks:
                block.mask = block.routing = None

    def _inputs(self, record: Record, batch: Batch, grads: dict[str, Rows]) -> dict[str, Rows]:
        """Input group -> a without the bias's coordinate, on the device of its layers' gradients."""
        found: dict[str, Rows] = {}
        for name, device in {self.groups[layer]: g.device for layer, g in grads.items()}.items():
            calls = record.inputs.get(name, [])
            if name in self._experts:
                found[name] = self._routed(name, calls, self._widths[name])
            elif calls:
                # Token ids have no axis of coordinates.
                shaped = [x if x.is_floating_point() else x[..., None] for x in calls]
                parts = [_by_sequence(x, len(batch.mask), self._patches[name]) for x in shaped]
                # Hooks see what comes before a device's own copy of it.
                found[name] = (torch.cat(parts, 1) if len(parts) > 1 else parts[0]).to(device)
        return found

    def _routed(self, name: str, calls: Sequence[Tensor], width: int) -> Routed:
        """What an expert's module saw or was given back, by sequence; zeros where that is nothing."""
        block, expert = self._experts[name]
        routing, some = block.routing, next(block.parameters())
        if routing is None:
            raise NumericsError(f"layer '{name}' took no part in the loss")
        if len(calls) > 1:
            raise UserError(f"layer '{name}': experts that run more than once in a forward pass cannot be tracked")
        rows = calls[0] if calls else some.new_zeros(routing.totals[expert], width)
        return routing.routed(expert, rows)

    def _gradients(
        self, found: dict[str, list[Tensor | None]], batch: Batch, layers: Sequence[TrackedLayer]
    ) -> dict[str, Rows]:
        count, padded = len(batch.mask), not bool(batch.mask.all())
        grads: dict[str, Rows] = {}
        for layer in layers:
            calls = found.get(layer.name, [])
            there = [grad for grad in calls if grad is not None]
            if layer.routed:
                grads[layer.name] = self._routed(layer.name, there, layer.outputs)
                continue
            if not there:
                raise NumericsError(f"layer '{layer.name}' took no part in the loss")
            # A call whose output the loss does not depend on has no gradient, but its inputs are there.
            none = torch.zeros_like(there[0])
            convolved = self._patches[layer.name] is not None
            parts = [_by_place(none if grad is None else grad, count, convolved) for grad in calls]
            joined = torch.cat(parts, 1) if len(parts) > 1 else parts[0]
            # Where padding stands on the left, its own rows attend to themselves and may leak nothing into
            # the loss; a zero there is exact.
            mask = mask_of_rows(batch.mask, joined.shape[1]) if padded else None
            grads[layer.name] = joined if mask is None else joined * mask.unsqueeze(-1).to(joined.device)
        return grads


def _expert_of(model: nn.Module, name: str) -> tuple[SplitExperts, int]:
    """The block of an expert's matrix, and which of its experts it is."""
    path, expert, _ = name.rsplit(".", 2)
    block = model.get_submodule(path)
    assert isinstance(block, SplitExperts)
    return block, int(expert)


def _by_sequence(x: Tensor, sequences: int, patches: Patches | None) -> Tensor:
    """[B, T, D] from whatever the module saw ([B, T, D] or, as in OPT, [B·T, D]); a convolution's patches."""
    return x.reshape(sequences, -1, x.shape[-1]) if patches is None else patches.rows(x)


def _by_place(y: Tensor, sequences: int, convolution: bool) -> Tensor:
    """The same of what the module gave."""
    return output_rows(y) if convolution else _by_sequence(y, sequences, None)
