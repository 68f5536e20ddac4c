"""What is downstream of a steering vector: the stream at later layers under it, to first order, and predictions with it put back.

A `Downstream` is `scoring.Continuations` that can also be looked into. Its rows are those of the response positions: the
last prompt token and each completion token that predicts another; what comes later changes nothing before it. Knows a model
and vectors, not dictionaries. First order by forward-mode differentiation, one pass a vector (Baydin et al. 2018, JMLR 18).
"""

from collections.abc import Callable, Sequence
from functools import cached_property, partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from helpers.lm import hooks, reading, scoring
from helpers.lm.scoring import Continuations


class Downstream(Continuations):
    """Prompts with completions whose stream can be read, and exchanged, at any block from the steered one on."""

    @classmethod
    def of(cls, where: Continuations) -> "Downstream":
        """The same prompts, completions and layer."""
        return cls(where.lm, where.sequences, where.layer)

    @cached_property
    def owners(self) -> Tensor:
        """(rows,) which completion each row belongs to: prompt * completions a prompt + the completion's number."""
        parts = []
        for first, chunk in zip(range(0, len(self.order), self.chunk), self._build(), strict=True):
            own = torch.tensor(self.order[first : first + self.chunk])[:, None] * self.group + torch.arange(self.group)
            parts.append(own.flatten()[chunk.scored.cpu().nonzero()[:, 0]])
        return torch.cat(parts)

    def rows(self, layers: Sequence[int], vector: Tensor, multiplier: float = 1.0) -> dict[int, Tensor]:
        """layer -> the stream (rows, d_model) float32 after it, multiplier * vector (d_model,) added after the steered one."""
        shift = hooks.checked(multiplier * vector, self.lm.d_model)
        return self._read(layers, lambda acts: hooks.shifted(acts, shift), lambda x: x)

    def carried(self, layers: Sequence[int], vector: Tensor) -> dict[int, Tensor]:
        """layer -> the Jacobian of its rows at the unsteered run times `vector` (d_model,): (rows, d_model) float32.

        What a small multiple of the vector arrives as, over that multiple. In bfloat16 compare with care: the rounding of a
        run is as large as a small change. Take a float32 model.
        """
        v = hooks.checked(vector, self.lm.d_model)

        def pushed(acts: Tensor) -> Tensor:
            return forward_ad.make_dual(acts, v.to(acts).expand_as(acts).clone())

        def tangent(x: Tensor) -> Tensor:
            found = forward_ad.unpack_dual(x).tangent
            return torch.zeros_like(x) if found is None else found

        with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):  # other kernels have no forward derivative
            return self._read(layers, pushed, tangent)

    def log_odds(self, layer: int, rows: Tensor) -> np.ndarray:
        """log p(completion 0) - log p(completion 1) of each prompt in nats, (prompts,) float64, if `rows` (rows, d_model) leave block
        `layer`, the steered one or one above; what is below it is not run."""
        sums, chunks = [], self._build()
        for chunk, own in zip(chunks, rows.split([int(x.scored.sum()) for x in chunks]), strict=True):
            acts = torch.zeros_like(chunk.acts)
            acts[chunk.scored] = own.to(acts)
            try:
                with torch.no_grad():
                    found = scoring.above(self.lm, layer, acts, chunk.scored, chunk.given, chunk.cache)
            finally:
                reading.forget(chunk.cache, chunk.length)
            token = scoring.token_log_probs(
                found.logits, chunk.targets, scoring.exact_logits(self.lm, found, chunk.targets)
            )
            sums.append(self._per_completion(chunk, token, mean=False))
        logp = scoring.finite(self._table(sums), self.lm).numpy()
        return logp[:, 0] - logp[:, 1]

    def _read(
        self, layers: Sequence[int], enters: Callable[[Tensor], Tensor], kept: Callable[[Tensor], Tensor]
    ) -> dict[int, Tensor]:
        """layer -> kept(stream) at the rows (rows, d_model) float32, if enters(x) leaves the steered block in place of x."""
        if low := [k for k in layers if k < self.layer]:
            raise ValueError(f"layer {low[0]} was asked for; the vector is added after layer {self.layer}")
        found: dict[int, list[Tensor]] = {k: [] for k in layers}

        def read(module: nn.Module, args: tuple[object, ...], out: hooks.Output, at: int, chosen: Tensor) -> None:
            found[at].append(kept(hooks.stream(out))[chosen].float().cpu())

        above = [k for k in layers if k > self.layer]
        for chunk in self._build():
            acts, nothing = enters(chunk.acts), torch.zeros_like(chunk.scored)
            if self.layer in layers:
                found[self.layer].append(kept(acts)[chunk.scored].float().cpu())
            readers = [partial(read, at=k, chosen=chunk.scored) for k in above]
            try:
                with (
                    torch.no_grad(),
                    hooks.hooked([hooks.block(self.lm, k) for k in above], readers),
                    hooks.capture(self.lm, [max(layers)], stop=True),
                ):
                    scoring.above(self.lm, self.layer, acts, nothing, chunk.given, chunk.cache)
            finally:
                reading.forget(chunk.cache, chunk.length)
        return {k: torch.cat(parts) for k, parts in found.items()}
