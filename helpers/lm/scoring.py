"""What a model gives a text: log-probabilities of completions under added vectors, KL, gradients, losses; from any block on.

A vector is added at `response` positions (the last prompt token and everything after), so the prompt and all blocks up to the
steered one are run once, and every vector and strength after that costs only the upper blocks on the completion's tokens:
see `Continuations`. Whatever runs a model from a block on (`above`) or wants a loss (`losses`) is here; what is scored, and
why, is said by `steer`, `patching` and `saes`.
"""

import copy
import functools
import math
import operator
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from helpers import store
from helpers.lm import hooks, reading, tokens
from helpers.lm.hooks import capture, resume_at
from helpers.lm.reading import LM
from helpers.lm.tokens import ANSWER, Tokens


def whole_cache(lm: LM) -> DynamicCache:
    """An empty key-value cache that keeps every token, also where attention slides over a window (its mask sees to that).

    ValueError for a model that cannot be run on from one: see `LM.unscored`.
    """
    if lm.unscored:
        raise ValueError(lm.unscored)
    return DynamicCache()


def token_log_probs(logits: Tensor, targets: Tensor, exact: Tensor, block: int = 64) -> Tensor:
    """log softmax(logits)[target], float32 (tokens,), for logits (tokens, vocabulary) of any dtype.

    `exact` (tokens,): the targets' logits in float32. In bf16 a logit of 20 is rounded by 0.06, which is as large as some effects.
    In place on one small buffer: three times as fast on a CPU as logsumexp over the whole, which spends its time on fresh memory.
    """
    out = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    buffer = torch.empty(min(block, len(logits)), logits.shape[1], dtype=torch.float32, device=logits.device)
    for start in range(0, len(logits), block):
        rows = slice(start, start + block)
        part = buffer[: len(logits) - start].copy_(logits[rows]).scatter_(1, targets[rows, None], exact[rows, None])
        top = part.amax(1, keepdim=True)
        out[rows] = exact[rows] - top[:, 0] - part.sub_(top).exp_().sum(1).log()
    return out


def token_kl(given: Tensor, logits: Tensor, block: int = 16) -> Tensor:
    """KL(given || softmax(logits)) of each token in nats, float32 (tokens,); `given` log-probabilities (tokens, vocabulary) float32.

    On a CPU in blocks that stay in its cache, which is six times as fast.
    """
    block = block if logits.device.type == "cpu" else len(logits)
    parts = zip(given.split(block), logits.split(block), strict=True)
    return torch.cat([(p.exp() * (p - q.float().log_softmax(-1))).sum(-1) for p, q in parts])


@contextmanager
def unembedding(lm: LM, chosen: Tensor) -> Iterator[dict[str, Tensor]]:
    """Context: only the `chosen` (batch, tokens) bool positions are unembedded, the logits are (1, chosen, vocabulary).

    Yields a dict that holds what reached the unembedding there, `hidden` (chosen, d_model), once the model has run.
    """
    kept: dict[str, Tensor] = {}

    def narrow(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        kept["hidden"] = args[0][chosen]
        return (kept["hidden"][None], *args[1:])

    handle = lm.unembedding.module.register_forward_pre_hook(narrow)
    try:
        yield kept
    finally:
        handle.remove()


class Predicted(NamedTuple):
    """Predictions of chosen tokens: what reached the unembedding, `hidden` (n, d_model), and the `logits` (n, vocabulary)."""

    hidden: Tensor
    logits: Tensor


def above(
    lm: LM, layer: int, acts: Tensor, chosen: Tensor, given: dict[str, Tensor], cache: Cache | None = None
) -> Predicted:
    """What the blocks above `layer` predict at the `chosen` (batch, tokens) positions if `acts` (batch, tokens, d_model) leaves it.

    `given`: input_ids, attention_mask and position_ids as the model takes them, on its device; `cache`: keys and values of the
    tokens before, which the run extends.
    """
    with unembedding(lm, chosen) as kept, resume_at(lm, layer, acts):
        logits = lm.weights(**given, past_key_values=cache, use_cache=cache is not None).logits[0]
    return Predicted(kept["hidden"], logits)


def exact_logits(lm: LM, predicted: Predicted, targets: Tensor) -> Tensor:
    """The targets' logits (tokens,) in float32: computed from what reached the unembedding where the model's own rule is known
    (`LM.of` checks it), else the model's own, rounded as they are."""
    head = lm.unembedding
    if head.exact:
        bias = getattr(head.module, "bias", None)
        out = head.logits(predicted.hidden, head.module.weight[targets], None if bias is None else bias[targets])
    else:
        out = predicted.logits.gather(1, targets[:, None])[:, 0].float()
    return out


def finite(values: Tensor, lm: LM) -> Tensor:
    """`values`, if all are finite; ValueError says what to do where a run has overflowed."""
    if not torch.isfinite(values).all():
        raise ValueError(
            f"a run of {lm.identity} gave NaN or infinity in {str(lm.dtype).removeprefix('torch.')}: use bfloat16 or float32, or a "
            "smaller multiplier"
        )
    return values


# --- completions under any vector --------------------------------------------------------------------------------------


SEVERAL = 48  # texts that several vectors' runs are put together to; more are hardly faster


class _Chunk(NamedTuple):
    """Some prompts with all their completions, run up to the steered block: see `Continuations`."""

    cache: Cache
    length: int
    given: dict[str, Tensor]
    acts: Tensor
    scored: Tensor
    targets: Tensor


def _shared(lm: LM, prompts: Sequence[Tokens]) -> int:
    """How many first tokens all prompts share, such as the template's: they are run once, and padding may follow them.

    0 where attention goes by places in the cache rather than by positions: windows, and whatever has no rotary angles.
    """
    config = lm.weights.config.get_text_config()
    windows = set(getattr(config, "layer_types", None) or ()) - {"full_attention"} or getattr(
        config, "sliding_window", None
    )
    if windows or not getattr(config, "rope_parameters", None) or len(prompts) < 2:
        return 0
    ids = [prompt.ids for prompt in prompts]
    return max(min(len(os.path.commonprefix(ids)), min(map(len, ids)) - 1), 0)


def _prompts(lm: LM, prompts: Sequence[Tokens]) -> tuple[DynamicCache, Tensor]:
    """Keys and values of prompts, the shared start first, the rest padded on the left; and which of them are real, (prompts, tokens)."""
    cache, n = whole_cache(lm), _shared(lm, prompts)
    parts = [[Tokens(prompts[0].ids[:n], prompts[0].roles[:n])], [Tokens(p.ids[n:], p.roles[n:]) for p in prompts]]
    real = torch.zeros(len(prompts), 0, dtype=torch.bool)
    for part in parts:
        batch = tokens.pad(part, lm.pad_id, "left")
        if batch.ids.shape[1]:  # a prompt of one token is the tail's first
            past = real[: len(part)]
            given = reading.inputs(lm, batch._replace(position_ids=batch.position_ids + past.shape[1]))
            given["attention_mask"] = torch.cat([past, batch.mask], 1).long().to(lm.device)
            with torch.no_grad(), unembedding(lm, torch.zeros_like(batch.mask)):  # what prompts predict is not wanted
                lm.weights(**given, past_key_values=cache, use_cache=True)
            real = torch.cat([past, batch.mask], 1)
            if len(part) < len(prompts):
                cache.batch_repeat_interleave(len(prompts))
                real = real.repeat(len(prompts), 1)
    return cache, real


class Continuations:
    """Prompts with one or more completions each, ready to be scored under any vector added after block `layer`.

    log p(completion | prompt) = sum over its tokens, read off one pass of the blocks above `layer` on the completions,
    with the prompt's keys and values cached. Built on first use; equal to a plain steered forward pass (tested).
    `texts`: (prompts, completions) lists of Tokens that share each prompt; every prompt has equally many completions.
    """

    def __init__(self, lm: LM, sequences: Sequence[Sequence[Tokens]], layer: int, budget: int = 400_000_000):
        self.lm, self.layer, self.group = lm, operator.index(layer), len(sequences[0]) if sequences else 0
        self.sequences = [list(group) for group in sequences]
        if any(len(group) != self.group for group in self.sequences):
            raise ValueError("every prompt must have the same number of completions")
        if not self.sequences:
            raise ValueError("no prompts were given to score")
        self.starts: list[int] = []
        for group in self.sequences:
            starts = {s.roles.index(ANSWER) for s in group if ANSWER in s.roles}
            if len(starts) != 1 or any(s.ids[: min(starts)] != group[0].ids[: min(starts)] for s in group):
                shown = lm.tokenizer.decode(group[0].ids)[:60]
                raise ValueError(f"the completions of {shown!r} do not follow one and the same prompt token for token")
            self.starts.append(starts.pop())
            if not self.starts[-1]:
                shown = lm.tokenizer.decode(group[0].ids)[:60]
                raise ValueError(f"nothing stands before the completion {shown!r}: its first token cannot be predicted")
        longest = [max(len(s.ids) for s in g) - p + 1 for g, p in zip(self.sequences, self.starts, strict=True)]
        self.order = sorted(range(len(longest)), key=longest.__getitem__)  # like lengths together: less padding
        self.most = max(1, budget // (2 * self.group * max(longest) * len(lm.embedding)))  # prompts whose logits fit
        self.chunk = min(20, self.most)
        self._chunks: list[_Chunk] = []
        self._copies: dict[tuple[int, int], _Chunk] = {}
        self._unsteered: dict[tuple[int, int], Tensor] = {}

    @cached_property
    def key(self) -> dict[str, object]:
        """What its scores depend on, for the cache's fingerprint."""
        return self.lm.key | {
            "layer": self.layer,
            "sequences": store.digest([[s.ids for s in g] for g in self.sequences]),
            "starts": self.starts,
        }

    def _build(self) -> list[_Chunk]:
        reading.unhooked(self.lm)  # chunks are kept, and hooks on skipped blocks would do nothing
        if not self._chunks:
            for start in range(0, len(self.order), self.chunk):
                rows = self.order[start : start + self.chunk]
                self._chunks.append(
                    self._build_chunk([self.sequences[i] for i in rows], [self.starts[i] for i in rows])
                )
        return self._chunks

    def _table(self, parts: list[Tensor]) -> Tensor:
        """Values (rows, ...) of the chunks, as (prompts, completions, ...) in the order the prompts were given."""
        joined = torch.cat(parts)
        joined = joined.reshape(-1, self.group, *joined.shape[1:])
        return joined[torch.tensor(self.order).argsort()]

    def _build_chunk(self, groups: list[list[Tokens]], starts: list[int]) -> _Chunk:
        lm = self.lm
        heads = [Tokens(g[0].ids[: p - 1], g[0].roles[: p - 1]) for g, p in zip(groups, starts, strict=True)]
        tails = [Tokens(s.ids[p - 1 :], s.roles[p - 1 :]) for g, p in zip(groups, starts, strict=True) for s in g]
        cache, before = _prompts(lm, heads)
        cache.batch_repeat_interleave(self.group)
        before = before.repeat_interleave(self.group, 0)
        tail = tokens.pad(tails, lm.pad_id, "right")
        given = reading.inputs(lm, tail._replace(position_ids=tail.position_ids + before.sum(1, keepdim=True)))
        given["attention_mask"] = torch.cat([before, tail.mask], 1).long().to(lm.device)
        with capture(lm, [self.layer], stop=True) as acts, torch.no_grad():
            lm.weights(**given, past_key_values=cache, use_cache=True)
        reading.forget(cache, before.shape[1])
        predicts = tail.mask & tail.mask.roll(-1, 1)  # each position predicts the next
        predicts[:, -1] = False
        targets = tail.ids.roll(-1, 1)[predicts].to(lm.device)
        return _Chunk(cache, before.shape[1], given, acts[self.layer], predicts.to(lm.device), targets)

    def _predicted(self, chunk: _Chunk, vector: Tensor, multiplier: float) -> Predicted:
        """Steered predictions of every completion token. Padding and prompt tokens are never unembedded."""
        acts = hooks.shifted(chunk.acts, multiplier * vector)
        try:
            return above(self.lm, self.layer, acts, chunk.scored, chunk.given, chunk.cache)
        finally:
            reading.forget(chunk.cache, chunk.length)

    def _per_completion(self, chunk: _Chunk, values: Tensor, mean: bool) -> Tensor:
        """Per-token values (tokens,) summed, or averaged, over each completion of the chunk."""
        scored = chunk.scored.cpu()
        table = torch.zeros(scored.shape, dtype=torch.float64)
        table[scored] = values.cpu().double()
        sums = table.sum(1)
        return sums / scored.sum(1) if mean else sums

    def _copied(self, number: int, count: int) -> _Chunk:
        """So many copies of a chunk, one after another."""
        chunk = self._build()[number]
        if count > 1 and (number, count) not in self._copies:
            cache = copy.copy(chunk.cache)
            cache.layers = [copy.copy(layer) for layer in cache.layers]
            for layer in cache.layers:  # its own batch_select_indices leaves out layers of no tokens
                if isinstance(layer, DynamicLayer) and layer.keys is not None and layer.values is not None:
                    layer.keys, layer.values = (x.repeat(count, 1, 1, 1) for x in (layer.keys, layer.values))
            given = {name: x.repeat(count, 1) for name, x in chunk.given.items()}
            several = chunk.acts.repeat(count, 1, 1), chunk.scored.repeat(count, 1), chunk.targets.repeat(count)
            self._copies = {(number, count): _Chunk(cache, chunk.length, given, *several)}  # the last alone
        return self._copies[number, count] if count > 1 else chunk

    def _runs(self, number: int, vectors: Tensor) -> Iterator[tuple[int, Predicted, Tensor]]:
        """Predictions of a chunk's completion tokens under each of `vectors` (n, d_model), run by run: of how many vectors, of which
        number the first is, and targets. Where texts are few, several vectors share a run."""
        rows = len(self._build()[number].acts)
        together = max(1, min(SEVERAL // rows, self.most * self.group // rows, len(vectors)))
        count = math.ceil(len(vectors) / math.ceil(len(vectors) / together))  # runs of one size
        for first in range(0, len(vectors), count):
            part = vectors[first : first + count]
            chunk = self._copied(number, count)
            full = torch.cat([part, part[-1:].expand(count - len(part), -1)])
            yield first, self._predicted(chunk, full.repeat_interleave(rows, 0)[:, None], 1.0), chunk.targets

    def _plain(self, number: int, count: int) -> Tensor:
        """Unsteered log-probabilities (tokens, vocabulary) of a chunk, from a run as large as those they are compared with."""
        if (number, count) not in self._unsteered:
            logits = self._predicted(self._copied(number, count), torch.zeros(self.lm.d_model), 0.0).logits
            own = {key: x for key, x in self._unsteered.items() if key[0] != number}
            self._unsteered = own | {(number, count): logits[: len(logits) // count].float().log_softmax(-1)}
        return self._unsteered[number, count]

    def _under(self, vectors: Tensor, score: Callable[[int, Predicted, Tensor], Tensor], mean: bool) -> np.ndarray:
        """Scores of tokens, given a chunk's number, predictions and targets, summed or averaged over each completion:
        (vectors, prompts, completions) float64."""
        if not len(vectors):
            raise ValueError("no vectors were given to score under")
        tables = []
        for number, chunk in enumerate(self._build()):
            each, size = list[Tensor](), len(chunk.targets)
            for first, predicted, targets in self._runs(number, vectors):
                each += score(number, predicted, targets).split(size)[: len(vectors) - first]
            tables.append(torch.stack([self._per_completion(chunk, x, mean) for x in each], 1))
            self._copies.clear()
        return self._table(tables).permute(2, 0, 1).numpy()

    def log_probs_under(self, vectors: Tensor) -> np.ndarray:
        """log p of each completion given its prompt under each of `vectors` (n, d_model), in nats: (n, prompts, completions) float64. Where
        texts are few several vectors share a run, which rounds a little otherwise than a run of each."""

        def score(number: int, predicted: Predicted, targets: Tensor) -> Tensor:
            return token_log_probs(predicted.logits, targets, exact_logits(self.lm, predicted, targets))

        return self._under(vectors, score, mean=False)

    def kl_under(self, vectors: Tensor) -> np.ndarray:
        """KL(unsteered || steered) per token of the completions, mean over tokens, in nats, in the same way."""

        def score(number: int, predicted: Predicted, targets: Tensor) -> Tensor:
            parts = predicted.logits.split(len(self._build()[number].targets))
            return torch.cat([token_kl(self._plain(number, len(parts)), x) for x in parts])

        return self._under(vectors, score, mean=True)

    def log_probs(self, vector: Tensor, multiplier: float = 1.0) -> np.ndarray:
        """log p of each completion given its prompt, in nats: (prompts, completions) float64."""
        return self.log_probs_under((multiplier * vector)[None])[0]

    def kl(self, vector: Tensor, multiplier: float = 1.0) -> np.ndarray:
        """KL(unsteered || steered) per token of the completions, mean over tokens, in nats: (prompts, completions)."""
        return self.kl_under((multiplier * vector)[None])[0]

    def gradients(self, above: Sequence[int] = ()) -> Tensor:
        """d log p(completion) / d shift at shift zero, (prompts, completions, layers, d_model) float32, nats a unit of residual.

        The linear response: for a small vector v, the change of log p is gradients @ v, for any v, at the price of one
        backward pass, which is the same for shifts after `layer` and after each of the layers `above` it, in this order.
        Compare with finite steps before relying on it.
        """
        if torch.is_inference_mode_enabled():
            raise ValueError("gradients were asked for inside torch.inference_mode(): leave it, or use torch.no_grad()")
        if any(k <= self.layer for k in above):
            raise ValueError(
                f"layers {list(above)} were given; they must lie above layer {self.layer}, which comes first"
            )
        parts = []
        for chunk in self._build():
            rows, device = len(chunk.acts), chunk.acts.device
            shifts = [torch.zeros(rows, 1, self.lm.d_model, device=device, requires_grad=True) for _ in (0, *above)]
            with torch.enable_grad(), ExitStack() as edits:
                for k, shift in zip(above, shifts[1:], strict=True):
                    edits.enter_context(hooks.edit(self.lm, k, functools.partial(hooks.shifted, v=shift)))
                logits = self._predicted(chunk, shifts[0], 1.0).logits.float()
                total = -cross_entropy(logits, chunk.targets, reduction="sum")
                found = torch.autograd.grad(total, shifts)
            parts.append(torch.cat(found, 1).float().cpu())
        return self._table(parts)

    def lengths(self) -> np.ndarray:
        """Number of tokens of each completion: (prompts, completions)."""
        return np.array([[len(s.ids) - p for s in g] for g, p in zip(self.sequences, self.starts, strict=True)])


Vectors = Sequence[Tensor] | Tensor  # (vectors, d_model)
Score = Callable[[Tensor], np.ndarray]  # of some vectors (n, d_model), one a row


def _sweep(kind: str, where: Continuations, vectors: Vectors, multipliers: Sequence[float], score: Score) -> np.ndarray:
    """score(multiplier * vector) for all, (vectors, multipliers, prompts, completions); each kept on disk under what is
    added to the stream, in its dtype: whoever adds the same to the same texts finds it there."""
    lm = where.lm
    reading.unhooked(lm)
    stack = torch.stack([hooks.checked(v, lm.d_model).double().cpu() for v in vectors])
    if not np.isfinite(multipliers).all():
        raise ValueError(f"multipliers {list(multipliers)} given; they must be finite")

    def key(shift: Tensor) -> dict[str, object]:
        added = shift.to(lm.dtype)
        return where.key | {"kind": kind, "added": store.digest(added) if bool(added.any()) else ""}

    shifts = [(key(m * vector), m * vector) for vector in stack for m in multipliers]
    every = {str(k): v for k, v in shifts}
    wanted = list(dict.fromkeys(str(k) for k, _ in shifts if not store.there("scores", k, __name__)))
    made = dict[str, Tensor]()
    together = max(1, min(SEVERAL // (where.group * len(where.sequences)), len(every)))

    def scored(key: dict[str, object]) -> np.ndarray:
        own = str(key)

        def compute() -> dict[str, Tensor]:
            if own not in made:  # with those that are wanted next; alone, if its entry was damaged
                names = wanted[wanted.index(own) :][:together] if own in wanted else [own]
                filled = [*names, *names[-1:] * (together - len(names))]  # runs of one size, whatever is kept already
                found = finite(torch.from_numpy(score(torch.stack([every[n] for n in filled]))), lm)[: len(names)]
                made.update(zip(names, found, strict=True))
            return {"scores": made.pop(own)}

        return store.cached("scores", key, compute, __name__)["scores"].numpy()

    found = [scored(key) for key, _ in tqdm(shifts, desc=kind, leave=False)]
    return np.stack(found).reshape(len(stack), len(multipliers), *found[0].shape)


def _two(where: Continuations) -> None:
    if where.group != 2:
        raise ValueError(f"log-odds are of two completions a prompt, and {where.group} were given: use log_probs")


def log_odds(
    where: Continuations, vectors: Vectors, multipliers: Sequence[float], per_token: bool = False
) -> np.ndarray:
    """log p(completion 0) - log p(completion 1) in nats, (vectors, multipliers, prompts) float64; cached on disk.

    With `per_token` each log p is divided by its completion's token count first, which takes length out.
    """
    _two(where)
    logp = _sweep("log p", where, vectors, multipliers, where.log_probs_under)
    logp = logp / where.lengths() if per_token else logp
    return logp[..., 0] - logp[..., 1]


def linear_response(where: Continuations, above: Sequence[int] = ()) -> np.ndarray:
    """Gradient of each prompt's log-odds with respect to the added vector, (prompts, d_model) float64; cached on disk.

    With layers `above` the one that is steered (layers, prompts, d_model): there and after each of these, from one backward pass.
    """
    _two(where)
    reading.unhooked(where.lm)
    above = [operator.index(k) for k in above]
    key = where.key | {"kind": "gradients", "above": above}

    def compute() -> dict[str, Tensor]:
        return {"gradients": finite(where.gradients(above), where.lm)}

    gradients = store.cached("scores", key, compute, __name__)["gradients"]
    response = (gradients[:, 0] - gradients[:, 1]).double().numpy().swapaxes(0, 1)
    return response if above else response[0]


def kl(where: Continuations, vectors: Vectors, multipliers: Sequence[float]) -> np.ndarray:
    """KL(unsteered || steered), nats a token, mean over completions: (vectors, multipliers, prompts) float64; cached."""
    return _sweep("KL", where, vectors, multipliers, where.kl_under).mean(-1)


def text_loss(where: Continuations, vectors: Vectors, multipliers: Sequence[float]) -> np.ndarray:
    """Cross-entropy of the completions, nats a token: (vectors, multipliers, prompts) float64; cached. exp is perplexity."""
    logp = _sweep("log p", where, vectors, multipliers, where.log_probs_under)
    return -(logp / where.lengths()).mean(-1)


# --- whole texts -------------------------------------------------------------------------------------------------------


class Resumed(NamedTuple):
    """A batch run from a block on: which sequences (`rows`), how many answer tokens each (`counts`), those tokens' predictions, one
    after another (`found`), and the stream they were made of, `acts` (batch, tokens, d_model)."""

    rows: list[int]
    counts: list[int]
    found: Predicted
    acts: Tensor


def resumed(
    lm: LM,
    sequences: Sequence[Tokens],
    layer: int,
    streams: Sequence[Tensor],
    batch_size: int = 16,
    graph: bool = False,
) -> Iterator[Resumed]:
    """Batch by batch what is predicted if `streams` (one (tokens, d_model) a sequence) leaves block `layer`; with `graph` the
    predictions can be differentiated with respect to `acts`."""
    if batch_size < 1:
        raise ValueError(f"batch_size = {batch_size} given; at least 1 is wanted")
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i].ids))  # like lengths together: less padding
    for first in range(0, len(order), batch_size):
        rows = order[first : first + batch_size]
        batch = tokens.pad([sequences[i] for i in rows], lm.pad_id, side="right")
        acts = torch.zeros(*batch.ids.shape, lm.d_model, dtype=torch.float32)
        for at, i in enumerate(rows):
            acts[at, : len(streams[i])] = streams[i]
        acts = acts.to(lm.device).to(lm.dtype).requires_grad_(graph)
        answers = batch.roles == ANSWER
        chosen = answers.roll(-1, 1).to(lm.device)
        with torch.set_grad_enabled(graph):
            found = above(lm, layer, acts, chosen, reading.inputs(lm, batch))
        yield Resumed(rows, answers.sum(1).tolist(), found, acts)


def losses(
    lm: LM, ids: Tensor, counted: Tensor, layer: int = 0, changes: Sequence[Callable[[Tensor], Tensor]] = ()
) -> list[list[Tensor]]:
    """Next-token cross-entropy in nats, one float64 (tokens,) for each row of token ids (rows, context) without padding.

    Of the predictions made at the `counted` (rows, context - 1) positions: of the model's own, then of one run for each of
    `changes`, in which the stream after block `layer` is change(x). What lies below that block is run once.
    """
    ids = ids.long().to(lm.device)
    chosen = torch.cat([counted, torch.zeros_like(counted[:, :1])], 1).to(lm.device)
    targets, sizes = ids.roll(-1, 1)[chosen], counted.sum(1).tolist()

    def each(logits: Tensor) -> list[Tensor]:  # a row at a time: vocabularies are large
        parts = zip(logits.split(sizes), targets.split(sizes), strict=True)
        return [cross_entropy(own.float(), target, reduction="none").double().cpu() for own, target in parts]

    given = {"input_ids": ids}
    with torch.no_grad():
        with capture(lm, [layer]) as acts, unembedding(lm, chosen):
            out = [each(lm.weights(**given, use_cache=False).logits[0])]
        out += [each(above(lm, layer, change(acts[layer]), chosen, given).logits) for change in changes]
    return out
