"""What a steering vector does: propensity, its price, and free text.

Propensity is the log-odds of a matching against a non-matching completion, in nats. A vector is added at `response` positions
(the last prompt token and everything after), so the prompt and all blocks up to the steered one are run once and every
vector and multiplier after that costs only the upper blocks on the completion's tokens: see `Continuations`.
Steerability as the slope over multipliers with its per-item spread: Tan et al. 2024 (arXiv:2407.12404).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from helpers import models, prompts, store
from helpers.behaviors import Behavior, Item
from helpers.hooks import add, capture, resume_at
from helpers.prompts import ANSWER, Tokens

CODE = ("steer", "hooks", "prompts", "models")


def _forget(cache: Any, length: int) -> None:
    """Cut each layer of a key-value cache back to `length` tokens; layers that were skipped are left as they are."""
    for layer in cache.layers:
        if extra := layer.get_seq_length() - length:
            layer.crop(-extra)


def token_log_probs(logits: Tensor, targets: Tensor, exact: Tensor, block: int = 128) -> Tensor:
    """log softmax(logits)[target], float32 (tokens,), for logits (tokens, vocabulary) of any dtype.

    `exact` (tokens,): the targets' logits in float32. In bf16 a logit of 20 is rounded by 0.06, which is as large as some effects.
    In place on one small buffer: three times as fast on a CPU as logsumexp over the whole, which spends its time on fresh memory.
    """
    out = torch.empty(len(logits), device=logits.device)
    buffer = torch.empty(min(block, len(logits)), logits.shape[1], device=logits.device)
    for start in range(0, len(logits), block):
        rows = slice(start, start + block)
        part = buffer[: len(logits) - start].copy_(logits[rows]).scatter_(1, targets[rows, None], exact[rows, None])
        top = part.amax(1, keepdim=True)
        out[rows] = exact[rows] - top[:, 0] - part.sub_(top).exp_().sum(1).log()
    return out


@contextmanager
def unembedding(model: Any, chosen: Tensor) -> Iterator[dict[str, Tensor]]:
    """Context: only the `chosen` (batch, tokens) bool positions are unembedded, the logits are (1, chosen, vocabulary).

    Yields a dict that holds what reached the unembedding there, `hidden` (chosen, d_model), once the model has run.
    """
    kept: dict[str, Tensor] = {}

    def narrow(module: Any, args: tuple) -> tuple:
        kept["hidden"] = args[0][chosen]
        return (kept["hidden"][None], *args[1:])

    handle = model.original_model.get_output_embeddings().register_forward_pre_hook(narrow)
    try:
        yield kept
    finally:
        handle.remove()


def exact_logits(model: Any, hidden: Tensor, targets: Tensor, logits: Tensor) -> Tensor:
    """The targets' logits (tokens,) in float32, from what reaches the unembedding, `hidden` (tokens, d_model), beside the model's own `logits`."""
    rows = model.original_model.get_output_embeddings().weight[targets].float()
    exact = (hidden.float() * rows).sum(-1)
    cap = getattr(model.original_model.config.get_text_config(), "final_logit_softcapping", None)
    exact = exact if cap is None else cap * torch.tanh(exact / cap)
    rounded = logits.gather(1, targets[:, None])[:, 0].float()
    # An architecture that does more to its logits than this keeps its own, rounded ones.
    same = (exact - rounded).abs() <= 0.02 * rounded.abs() + 0.1
    return exact if bool(same.all()) else rounded


class Continuations:
    """Prompts with one or more completions each, ready to be scored under any vector added after block `layer`.

    log p(completion | prompt) = sum over its tokens, read off one pass of the blocks above `layer` on the completions,
    with the prompt's keys and values cached. Built on first use; equal to a plain steered forward pass (tested).
    `texts`: (prompts, completions) lists of Tokens that share each prompt; every prompt has equally many completions.
    """

    def __init__(self, model: Any, sequences: Sequence[Sequence[Tokens]], layer: int, budget: int = 400_000_000):
        self.model, self.layer, self.group = model, layer, len(sequences[0])
        self.sequences = [list(group) for group in sequences]
        if any(len(group) != self.group for group in self.sequences):
            raise ValueError("every prompt must have the same number of completions")
        self.starts = []
        for group in self.sequences:
            starts = {s.roles.index(ANSWER) for s in group if ANSWER in s.roles}
            if len(starts) != 1 or any(s.ids[: min(starts)] != group[0].ids[: min(starts)] for s in group):
                shown = model.tokenizer.decode(group[0].ids)[:60]
                raise ValueError(f"the completions of {shown!r} do not follow one and the same prompt token for token")
            self.starts.append(starts.pop())
        longest = [max(len(s.ids) for s in g) - p + 1 for g, p in zip(self.sequences, self.starts, strict=True)]
        self.order = sorted(range(len(longest)), key=longest.__getitem__)  # like lengths together: less padding
        self.chunk = max(1, min(20, budget // (2 * self.group * max(longest) * model.cfg.d_vocab)))
        self._chunks: list[dict[str, Any]] = []

    def key(self) -> dict[str, Any]:
        """What its scores depend on, for the cache's fingerprint."""
        return {
            "model": self.model.identity,
            "dtype": str(self.model.original_model.dtype),
            "device": models.device_of(self.model).type,
            "layer": self.layer,
            "sequences": store.digest([[s.ids for s in g] for g in self.sequences]),
            "starts": self.starts,
        }

    def _build(self) -> list[dict[str, Any]]:
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

    def _build_chunk(self, groups: list[list[Tokens]], starts: list[int]) -> dict[str, Any]:
        model, where = self.model, models.device_of(self.model)
        pad_id = model.tokenizer.pad_token_id
        heads = [Tokens(g[0].ids[: p - 1], g[0].roles[: p - 1]) for g, p in zip(groups, starts, strict=True)]
        tails = [Tokens(s.ids[p - 1 :], s.roles[p - 1 :]) for g, p in zip(groups, starts, strict=True) for s in g]
        head, tail = prompts.pad(heads, pad_id, "left"), prompts.pad(tails, pad_id, "right")
        done = model.original_model(
            input_ids=head.ids.to(where),
            attention_mask=head.mask.long().to(where),
            position_ids=head.position_ids.to(where),
            use_cache=True,
            logits_to_keep=1,
        ).past_key_values
        done.batch_repeat_interleave(self.group)
        lengths = head.mask.sum(1).repeat_interleave(self.group)
        chunk = {
            "cache": done,
            "length": head.ids.shape[1],
            "options": {
                "input_ids": tail.ids.to(where),
                "attention_mask": torch.cat([head.mask.repeat_interleave(self.group, 0), tail.mask], 1)
                .long()
                .to(where),
                "position_ids": (tail.position_ids + lengths[:, None]).to(where),
            },
        }
        with capture(model, [self.layer], stop=True) as acts:
            model.original_model(**chunk["options"], past_key_values=done, use_cache=True)
        _forget(done, chunk["length"])
        chunk["acts"] = acts[self.layer]
        predicts = tail.mask & tail.mask.roll(-1, 1)  # each position predicts the next
        predicts[:, -1] = False
        chunk["scored"] = predicts.to(where)
        chunk["targets"] = tail.ids.roll(-1, 1)[predicts].to(where)
        return chunk

    def _logits(self, chunk: dict[str, Any], vector: Tensor, multiplier: float) -> tuple[Tensor, Tensor]:
        """Steered predictions of every completion token, (tokens, vocabulary), and the targets' own logits in float32.

        Padding and prompt tokens are never unembedded.
        """
        shift = (multiplier * vector).to(chunk["acts"].dtype).to(chunk["acts"].device)
        try:
            with (
                unembedding(self.model, chunk["scored"]) as kept,
                resume_at(self.model, self.layer, chunk["acts"] + shift),
            ):
                out = self.model.original_model(**chunk["options"], past_key_values=chunk["cache"], use_cache=True)
        finally:
            _forget(chunk["cache"], chunk["length"])
        return out.logits[0], exact_logits(self.model, kept["hidden"], chunk["targets"], out.logits[0])

    def _per_completion(self, chunk: dict[str, Any], values: Tensor, mean: bool) -> Tensor:
        """Per-token values (tokens,) summed, or averaged, over each completion of the chunk."""
        scored = chunk["scored"].cpu()
        table = torch.zeros(scored.shape, dtype=torch.float64)
        table[scored] = values.cpu().double()
        sums = table.sum(1)
        return sums / scored.sum(1) if mean else sums

    def log_probs(self, vector: Tensor, multiplier: float) -> np.ndarray:
        """log p of each completion given its prompt, in nats: (prompts, completions) float64."""
        sums = []
        for chunk in self._build():
            logits, exact = self._logits(chunk, vector, multiplier)
            token = token_log_probs(logits, chunk["targets"], exact)
            sums.append(self._per_completion(chunk, token, mean=False))
        return self._table(sums).numpy()

    def kl(self, vector: Tensor, multiplier: float) -> np.ndarray:
        """KL(unsteered || steered) per token of the completions, mean over tokens, in nats: (prompts, completions)."""
        means = []
        for chunk in self._build():
            if "unsteered" not in chunk:
                chunk["unsteered"] = self._logits(chunk, torch.zeros_like(vector), 0.0)[0].float().log_softmax(-1)
            p, q = chunk["unsteered"], self._logits(chunk, vector, multiplier)[0].float().log_softmax(-1)
            means.append(self._per_completion(chunk, (p.exp() * (p - q)).sum(-1), mean=True))
        return self._table(means).numpy()

    def gradients(self) -> Tensor:
        """d log p(completion) / d shift at shift zero, (prompts, completions, d_model) float32, nats a unit of residual.

        The linear response: for a small vector v, the change of log p is gradients @ v, for any v, at the price of one
        backward pass. Compare with finite steps before relying on it.
        """
        parts = []
        for chunk in self._build():
            shift = torch.zeros(len(chunk["acts"]), 1, self.model.cfg.d_model, device=chunk["acts"].device)
            with torch.enable_grad():
                shift.requires_grad_(True)
                logits = self._logits(chunk, shift, 1.0)[0].float()
                total = -torch.nn.functional.cross_entropy(logits, chunk["targets"], reduction="sum")
                parts.append(torch.autograd.grad(total, shift)[0][:, 0].float().cpu())
        return self._table(parts)

    def tokens(self) -> np.ndarray:
        """Number of tokens of each completion: (prompts, completions)."""
        return np.array([[len(s.ids) - p for s in g] for g, p in zip(self.sequences, self.starts, strict=True)])


# --- what to score -------------------------------------------------------------------------------------------------


def of_items(model: Any, items: Sequence[Item], layer: int) -> Continuations:
    """Each item's question with its matching (0) and non-matching (1) completion."""
    both = [[prompts.chat(model.tokenizer, i.question, answer=a) for a in (i.matching, i.non_matching)] for i in items]
    return Continuations(model, both, layer)


def of_letters(model: Any, items: Sequence[Item], layer: int) -> Continuations:
    """Each item as a multiple-choice question in both orders; completions "(A" (0) and "(B" (1).

    Row 2i has the matching answer as (A), row 2i + 1 as (B).
    """
    rows = []
    for item in items:
        for a, b in ((item.matching, item.non_matching), (item.non_matching, item.matching)):
            question = f"{item.question}\n\nChoices:\n (A) {a}\n (B) {b}\n\nAnswer with the letter of one choice."
            rows.append([prompts.chat(model.tokenizer, question, answer=letter) for letter in ("(A", "(B")])
    return Continuations(model, rows, layer)


def of_replies(model: Any, questions: Sequence[str], layer: int, max_new_tokens: int = 24) -> Continuations:
    """Each question with the model's own unsteered greedy reply: where KL is measured (on-policy)."""
    unsteered = generate_ids(model, questions, layer, torch.zeros(model.cfg.d_model), 0.0, max_new_tokens)
    groups = [
        [prompts.conversation(model.tokenizer, q, row[row >= 0].tolist())]
        for q, row in zip(questions, unsteered, strict=True)
    ]
    return Continuations(model, groups, layer)


def of_text(model: Any, text: str, layer: int, tokens: int = 64, chunks: int = 16) -> Continuations:
    """Plain text in `chunks` pieces of `tokens` tokens, all but the first eight scored and steered: perplexity's ground."""
    whole = prompts.plain(model.tokenizer, text)
    first = [i for i, role in zip(whole.ids, whole.roles, strict=True) if role == prompts.SPECIAL][
        :1
    ]  # a BOS, if there is one
    ids = whole.ids[len(first) : len(first) + tokens * chunks]
    pieces = [first + ids[i : i + tokens] for i in range(0, len(ids) - tokens + 1, tokens)]
    return Continuations(model, [[Tokens(p, [prompts.USER] * 8 + [ANSWER] * (len(p) - 8))] for p in pieces], layer)


# --- scores --------------------------------------------------------------------------------------------------------


def _stacked(vectors: Sequence[Tensor] | Tensor) -> Tensor:
    return torch.stack([v.double().cpu() for v in vectors])


def _sweep(kind: str, where: Continuations, vectors: Any, multipliers: Sequence[float], score: Any) -> np.ndarray:
    stack = _stacked(vectors)

    def compute() -> dict[str, Tensor]:
        out, zero = [], None
        with tqdm(total=len(stack) * len(multipliers), desc=kind, leave=False) as bar:
            for vector in stack:
                row = []
                for m in multipliers:
                    if m == 0 or not vector.any():
                        zero = score(torch.zeros_like(vector), 0.0) if zero is None else zero
                    row.append(zero if m == 0 or not vector.any() else score(vector, m))
                    bar.update()
                out.append(np.stack(row))
        return {"scores": torch.from_numpy(np.stack(out))}

    key = where.key() | {"kind": kind, "vectors": store.digest(stack), "multipliers": [float(m) for m in multipliers]}
    return store.cached("scores", key, compute, CODE)["scores"].numpy()


def log_odds(
    where: Continuations, vectors: Sequence[Tensor] | Tensor, multipliers: Sequence[float], per_token: bool = False
) -> np.ndarray:
    """log p(completion 0) - log p(completion 1) in nats, (vectors, multipliers, prompts) float64; cached on disk.

    With `per_token` each log p is divided by its completion's token count first, which takes length out.
    """
    logp = _sweep("log p", where, vectors, multipliers, where.log_probs)
    logp = logp / where.tokens() if per_token else logp
    return logp[..., 0] - logp[..., 1]


def linear_response(where: Continuations) -> np.ndarray:
    """Gradient of each prompt's log-odds with respect to the added vector, (prompts, d_model) float64; cached on disk."""
    key = where.key() | {"kind": "gradients"}
    gradients = store.cached("scores", key, lambda: {"gradients": where.gradients()}, CODE)["gradients"]
    return (gradients[:, 0] - gradients[:, 1]).double().numpy()


def kl(where: Continuations, vectors: Sequence[Tensor] | Tensor, multipliers: Sequence[float]) -> np.ndarray:
    """KL(unsteered || steered), nats a token, mean over completions: (vectors, multipliers, prompts) float64; cached."""
    return _sweep("KL", where, vectors, multipliers, where.kl).mean(-1)


def text_loss(where: Continuations, vectors: Sequence[Tensor] | Tensor, multipliers: Sequence[float]) -> np.ndarray:
    """Cross-entropy of the completions, nats a token: (vectors, multipliers, prompts) float64; cached. exp is perplexity."""
    logp = _sweep("log p", where, vectors, multipliers, where.log_probs)
    return -(logp / where.tokens()).mean(-1)


# --- free text -----------------------------------------------------------------------------------------------------


def generate_ids(
    model: Any,
    questions: Sequence[str],
    layer: int,
    vector: Tensor,
    multiplier: float,
    max_new_tokens: int = 40,
    sample: bool = False,
    seed: int = 0,
) -> Tensor:
    """Reply ids (questions, max_new_tokens), -1 after the end of turn (at least one token each); cached on disk.

    multiplier * vector is added after block `layer` from the first response token on; greedy, or sampled from `seed`.
    """
    batch = prompts.pad([prompts.chat(model.tokenizer, q) for q in questions], model.tokenizer.pad_token_id, "left")
    device = models.device_of(model)

    def compute() -> dict[str, Tensor]:
        torch.manual_seed(seed)
        with add(model, layer, vector, multiplier, prompts.positions(batch, "response")):
            ids = model.original_model.generate(
                input_ids=batch.ids.to(device),
                attention_mask=batch.mask.long().to(device),
                max_new_tokens=max_new_tokens,
                do_sample=sample,
                pad_token_id=model.tokenizer.pad_token_id,
            )
        reply = ids[:, batch.ids.shape[1] :].cpu()
        ended = torch.isin(reply, torch.tensor(sorted(prompts.special_ids(model.tokenizer)))).long().cumsum(1) > 0
        ended[:, 0] = False
        return {"ids": torch.where(ended, -1, reply)}

    key = {
        "model": model.identity,
        "dtype": str(model.original_model.dtype),
        "device": device.type,
        "ids": store.digest(batch.ids),
        "write": [layer, store.digest(multiplier * vector.double()), max_new_tokens, sample, seed],
    }
    return store.cached("replies", key, compute, CODE)["ids"]


def generate(
    model: Any, questions: Sequence[str], layer: int, vector: Tensor, multiplier: float, **how: Any
) -> list[str]:
    """The replies of `generate_ids` as text."""
    ids = generate_ids(model, questions, layer, vector, multiplier, **how)
    return [model.tokenizer.decode(row[row >= 0], skip_special_tokens=True).strip() for row in ids]


class TextJudge:
    """A reader of free text that knows nothing of the model: TF-IDF of letter n-grams and a logistic regression.

    Trained on a behaviour's answer pairs and dev items, so that its held-out accuracy can be measured on the test items; score =
    log-odds that a text shows the behaviour. Crude, reproducible, and blind to activations.
    """

    def __init__(self, behavior: Behavior):
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline

        shown = [p.positive for p in behavior.answer_pairs] + [i.matching for i in behavior.dev]
        other = [p.negative for p in behavior.answer_pairs] + [i.non_matching for i in behavior.dev]
        features = TfidfVectorizer(analyzer="char_wb", ngram_range=(1, 4), sublinear_tf=True, min_df=2)
        self.pipeline = make_pipeline(features, LogisticRegression(C=10, max_iter=2000))
        self.pipeline.fit(shown + other, [1] * len(shown) + [0] * len(other))
        right = self.score([i.matching for i in behavior.test]) > self.score([i.non_matching for i in behavior.test])
        self.accuracy = float(np.mean(right))

    def score(self, texts: Sequence[str]) -> np.ndarray:
        """Log-odds (texts,) that each text shows the behaviour."""
        return self.pipeline.decision_function(list(texts))
