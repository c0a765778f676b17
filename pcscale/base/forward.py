"""The base model layer-major: all batches go through layer k before layer k+1 is read.

Each weight is read once per pass, not once per batch; hidden states wait on the host. Masks and rotary embeddings are
captured from the stock model's own forward, never rebuilt here.

Legend: B batch, T tokens of a sequence, H residual size, V vocabulary, N = tokens of a batch.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from pcscale.base.mapped import MappedBase
from pcscale.common.console import console
from pcscale.common.ledger import HIDDEN, ledger
from pcscale.common.sizes import HIDDEN_BUDGET_BYTES, LOGIT_CHUNK_VALUES
from pcscale.families.spec import Kind
from pcscale.model.stock import empty_model


class LayerMajorModel:
    """The stock base model, run on a device and in a dtype with at most one layer's weights in memory."""

    def __init__(self, base: MappedBase, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        self.base, self.device, self.dtype = base, device, dtype
        self.skeleton: nn.Module = empty_model(base.config)
        self.decoder = self.skeleton.base_model
        self.layers = [
            self.module(base.family.layer_prefix.format(layer=layer).rstrip(".")) for layer in range(base.num_layers)
        ]
        by_kind = {weight.kind: weight for weight in base.weights if weight.layer is None}
        self._embedding = by_kind[Kind.EMBEDDING]
        self._norm = by_kind[Kind.NORM]
        self._head = by_kind.get(Kind.HEAD, self._embedding)
        self._arguments: dict[tuple[int, ...], list[dict[str, Any]]] = {}
        self.read_bytes = 0
        """Bytes of the base's weights that were read so far, lookups in the embedding aside."""

    def module(self, name: str) -> nn.Module:
        """The stock module of a dotted name, for hooks."""
        return self.skeleton.get_submodule(name)

    @torch.no_grad()
    def hidden_states(self, batches: list[torch.Tensor], label: str | None) -> Iterator[list[torch.Tensor]]:
        """Run token batches `[B, T]` through the whole model but its head, with a progress bar that has the label.

        Yields:
            For each group of batches whose hidden states fit the host's budget, their final states `[B, T, H]` after
            the last norm, in the order of the batches.
        """
        tokens = sum(batch.numel() for batch in batches)
        with console.progress(label, tokens * self.base.num_layers, "token layers") as progress:
            for group in self._groups(batches):
                table_VH = self.base.tensor(self._embedding.name)
                hidden = [self._embed(batch, table_VH) for batch in group]
                waiting = sum(hidden_BTH.nbytes for hidden_BTH in hidden)
                ledger.enter(HIDDEN, "host", waiting)
                del table_VH
                for layer, module in enumerate(self.layers):
                    last = layer + 1 == self.base.num_layers
                    self.base.prefetch([self._norm.name] if last else self.base.layer_names(layer + 1))
                    prefix = self.base.family.layer_prefix.format(layer=layer)
                    with self._loaded(module, self.base.layer_names(layer), prefix):
                        for position, (batch, hidden_BTH) in enumerate(zip(group, hidden, strict=True)):
                            arguments = self._arguments[tuple(batch.shape)][layer]
                            hidden[position] = module(hidden_BTH.to(self.device), **arguments).to("cpu")
                            progress.advance(batch.numel(), f"layer {layer + 1}/{self.base.num_layers}")
                norm = self.module(self._norm.module)
                with self._loaded(norm, [self._norm.name], f"{self._norm.module}."):
                    hidden = [norm(hidden_BTH.to(self.device)).to("cpu") for hidden_BTH in hidden]
                try:
                    yield hidden
                finally:
                    ledger.enter(HIDDEN, "host", -waiting)

    @torch.no_grad()
    def losses(self, batches: list[torch.Tensor], label: str) -> torch.Tensor:
        """Next-token losses in nats, `[sequences, T - 1]` float32, of token batches `[B, T]`."""
        losses: list[torch.Tensor] = []
        for hidden in self.hidden_states(batches, label):
            group = batches[len(losses) : len(losses) + len(hidden)]
            losses += self._head_losses(hidden, [batch_BT.long() for batch_BT in group])
        return torch.cat(losses)

    def _head_losses(self, hidden: list[torch.Tensor], batches: list[torch.Tensor]) -> list[torch.Tensor]:
        """Cross entropy with the head in row blocks: neither the head nor any logits exist whole."""
        targets = [batch_BT[:, 1:].to(self.device) for batch_BT in batches]
        log_sums = [torch.full(target_BT.shape, -torch.inf, device=self.device) for target_BT in targets]
        picked = [torch.zeros(target_BT.shape, device=self.device) for target_BT in targets]
        for first, position, logits_BTV in self._logit_blocks([hidden_BTH[:, :-1] for hidden_BTH in hidden]):
            log_sum_BT, picked_BT = log_sums[position], picked[position]
            torch.logaddexp(log_sum_BT, logits_BTV.logsumexp(-1), out=log_sum_BT)
            row_BT, rows = targets[position] - first, logits_BTV.shape[-1]
            value_BT = logits_BTV.gather(-1, row_BT.clamp(0, rows - 1)[..., None])[..., 0]
            picked_BT.copy_(torch.where((row_BT >= 0) & (row_BT < rows), value_BT, picked_BT))
        return [(log_sum_BT - picked_BT).cpu() for log_sum_BT, picked_BT in zip(log_sums, picked, strict=True)]

    def _logit_blocks(self, hidden: list[torch.Tensor]) -> Iterator[tuple[int, int, torch.Tensor]]:
        """Logits in blocks of the head's rows: a block's first row, the batch's position, and float32 `[B, T, V]`."""
        head_VH = self.base.tensor(self._head.name)
        self.read_bytes += head_VH.nbytes
        rows = max(1, LOGIT_CHUNK_VALUES // max(hidden_BTH[..., 0].numel() for hidden_BTH in hidden))
        for first in range(0, len(head_VH), rows):
            block_VH = head_VH[first : first + rows].to(self.device, self.dtype)
            for position, hidden_BTH in enumerate(hidden):
                yield first, position, F.linear(hidden_BTH.to(self.device), block_VH).float()

    @torch.no_grad()
    def most_likely(
        self, hidden: list[torch.Tensor], count: int, temperature: float
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The most likely next tokens after final hidden states `[B, T, H]`, with the head in row blocks.

        Returns:
            A pair for each batch, on the host: their ids, int32 `[B, T, k]`, and the logarithms of their probabilities
            among all tokens at that temperature, float32.
        """
        tops = [(hidden_BTH.new_empty(0), hidden_BTH.new_empty(0)) for hidden_BTH in hidden]
        log_sums = [torch.full(hidden_BTH.shape[:2], -torch.inf, device=self.device) for hidden_BTH in hidden]
        for first, position, logits_BTV in self._logit_blocks(hidden):
            logits_BTV.div_(temperature)
            torch.logaddexp(log_sums[position], logits_BTV.logsumexp(-1), out=log_sums[position])
            best = logits_BTV.topk(min(count, logits_BTV.shape[-1]), dim=-1)
            values, ids = best.values, best.indices + first
            if first:
                values, ids = (torch.cat(pair, -1) for pair in zip(tops[position], (values, ids), strict=True))
                values, chosen = values.topk(min(count, values.shape[-1]), dim=-1)
                ids = ids.gather(-1, chosen)
            tops[position] = (values, ids)
        return [
            (ids.int().cpu(), (values - log_sum_BT[..., None]).cpu())
            for (values, ids), log_sum_BT in zip(tops, log_sums, strict=True)
        ]

    def head(self) -> torch.Tensor:
        """The whole head `[V, H]`, newly allocated on the device."""
        return self.base.tensor(self._head.name).to(self.device, self.dtype, copy=True)

    def one_group(self, batches: list[torch.Tensor]) -> list[torch.Tensor]:
        """The first of these batches: as many as go through the layers together."""
        return next(self._groups(batches), [])

    def _groups(self, batches: list[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
        item_bytes = self.base.config["hidden_size"] * self.dtype.itemsize
        group: list[torch.Tensor] = []
        for batch in batches:
            if group and (sum(b.numel() for b in group) + batch.numel()) * item_bytes > HIDDEN_BUDGET_BYTES:
                yield group
                group = []
            group.append(batch)
        if group:
            yield group

    def _embed(self, batch_BT: torch.Tensor, table_VH: torch.Tensor) -> torch.Tensor:
        """The first layer's input. The arguments that the stock forward gives each layer are kept by batch shape."""
        arguments: list[dict[str, Any]] = []

        def capture(hidden_BTH: torch.Tensor, *positional: Any, **named: Any) -> torch.Tensor:
            assert not positional, "stock decoders pass their layers named arguments"
            arguments.append(named)
            return hidden_BTH

        owner, _, norm_name = self._norm.module.rpartition(".")
        norm_owner, norm = self.module(owner), self.module(self._norm.module)
        embedding = self.module(self._embedding.module)
        try:
            for module in self.layers:
                module.forward = capture
            # Taken out, not patched as the layers are: a hook on the norm must not see states that passed no layer.
            setattr(norm_owner, norm_name, nn.Identity())
            # A lookup touches only its own rows, so the mapped table is used as it lies.
            embedding.forward = lambda ids_BT: F.embedding(ids_BT.to(table_VH.device), table_VH).to("cpu", self.dtype)
            hidden_BTH = self.decoder(input_ids=batch_BT.long(), use_cache=False).last_hidden_state
        finally:
            setattr(norm_owner, norm_name, norm)
            for module in (*self.layers, embedding):
                del module.forward
        self._arguments[tuple(batch_BT.shape)] = [
            {key: _to(value, self.device) for key, value in named.items()} for named in arguments
        ]
        return hidden_BTH

    @contextmanager
    def _loaded(self, module: nn.Module, names: list[str], prefix: str) -> Iterator[None]:
        """Give a module its weights for the time of the block."""
        stored = {name.removeprefix(prefix): self.base.tensor(name) for name in names}
        self.read_bytes += sum(tensor.nbytes for tensor in stored.values())
        tensors = {name: tensor.to(self.device, self.dtype) for name, tensor in stored.items()}
        del stored
        module.load_state_dict(tensors, strict=True, assign=True)
        try:
            yield
        finally:
            module.to_empty(device="meta")


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        return tuple(_to(part, device) for part in value)
    return value
