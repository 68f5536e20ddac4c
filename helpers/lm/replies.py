"""What a model says: one generator of replies, steered or not, greedy or sampled.

Written out rather than transformers' `generate`, so that nothing in a model's own generation settings (beams, a repetition
penalty, a cache switched off) changes what is said, and so that hooks see the prompt once and then one token at a time.
Knows prompts and hooks, not behaviours.
"""

import json
import operator
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from helpers import store
from helpers.lm import hooks, reading, tokens
from helpers.lm.reading import LM
from helpers.lm.scoring import finite, unembedding, whole_cache
from helpers.lm.tokens import Batch
from helpers.session import cache_dir

PLAIN = {"num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "use_cache": True, "penalty_alpha": 0.0}
_SAID: set[str] = set()


def _say_what_is_not_used(lm: LM) -> None:
    """Print, once a model, which of its own generation settings would have changed a greedy reply."""
    settings = getattr(lm.weights, "generation_config", None)
    asked = {n: getattr(settings, n, None) for n in PLAIN}
    other = [f"{n} = {v}" for n, v in asked.items() if v is not None and v != PLAIN[n]]
    if other and lm.identity not in _SAID:
        _SAID.add(lm.identity)
        print(f"{lm.identity}: its own generation settings {', '.join(other)} are not used here")


def ends(lm: LM) -> list[int]:
    """The tokens that end a reply: special ones, and those at which the model's own settings say that it stops."""
    settings = getattr(lm.weights, "generation_config", None), lm.weights.config.get_text_config()
    named = [getattr(s, "eos_token_id", None) for s in settings]
    stops = {i for n in named if n is not None for i in (n if isinstance(n, list | tuple) else [n])}
    return sorted(tokens.special_ids(lm.tokenizer) | stops)


def write(lm: LM, batch: Batch, max_new_tokens: int, temperature: float = 0.0) -> Tensor:
    """The ids (rows, max_new_tokens) that follow a left-padded batch, -1 from the reply's end on (at least one token each).

    Greedy at temperature 0, else sampled from softmax(logits / temperature) over all tokens, from torch's random state. Hooks
    that are set act: they see the prompt, then one token at a time.
    """
    _say_what_is_not_used(lm)
    if max_new_tokens < 1 or temperature < 0:
        raise ValueError(
            f"max_new_tokens = {max_new_tokens}, temperature = {temperature} given; 1 or more, and 0 or more, are wanted"
        )
    if not bool(batch.mask[:, -1].all()):
        raise ValueError(
            "a batch that ends in padding was given; pad it on the left, so that replies follow their prompts"
        )
    if lm.longest and int(batch.position_ids.max()) + max_new_tokens > lm.longest:
        raise ValueError(
            f"a prompt of {int(batch.position_ids.max()) + 1} tokens and {max_new_tokens} new ones: {lm.identity} takes {lm.longest}"
        )
    special = torch.tensor(ends(lm), device=lm.device)
    cache, given = whole_cache(lm), reading.inputs(lm, batch)
    ended = torch.zeros(len(batch.ids), dtype=torch.bool, device=lm.device)
    out = torch.full((len(batch.ids), max_new_tokens), -1)
    with torch.no_grad():
        for step in range(max_new_tokens):
            last = torch.zeros_like(given["input_ids"], dtype=torch.bool)
            last[:, -1] = True  # logits_to_keep would copy the unembedding once a row
            with unembedding(lm, last):
                logits = lm.weights(**given, past_key_values=cache, use_cache=True).logits[0].float()
            finite(logits, lm)
            chosen = logits.argmax(-1) if not temperature else _drawn(logits / temperature)
            ended |= torch.isin(chosen, special) & (step > 0)
            out[:, step] = torch.where(ended, -1, chosen).cpu()
            ended |= torch.isin(chosen, special)
            if bool(ended.all()):
                break
            mask = torch.cat([given["attention_mask"], torch.ones_like(chosen)[:, None]], 1)
            positions = given["position_ids"][:, -1:] + 1
            given = {"input_ids": chosen[:, None], "attention_mask": mask, "position_ids": positions}
    return out


def _drawn(logits: Tensor) -> Tensor:
    """One token a row (rows,) from softmax(logits): a uniform number looked up in the cumulative probabilities, which costs a
    quarter of `torch.multinomial`, with its random number for every word of the vocabulary."""
    exact = logits.cpu() if logits.device.type == "mps" else logits  # which has no float64
    sums = exact.double().softmax(-1).cumsum(-1)
    at = sums[:, -1:] * torch.rand(len(sums), 1, dtype=sums.dtype, device=sums.device)
    return torch.searchsorted(sums, at, right=True)[:, 0].clamp_max(logits.shape[1] - 1).to(logits.device)


@contextmanager
def seeded(lm: LM, seed: int) -> Iterator[None]:
    """Context: torch draws from `seed`, and goes on afterwards as if nothing had been drawn."""
    with torch.random.fork_rng(devices=[lm.device] if lm.device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def generate_ids(
    lm: LM,
    questions: Sequence[str],
    layer: int = 0,
    vector: Tensor | None = None,
    multiplier: float = 1.0,
    max_new_tokens: int = 40,
    temperature: float = 0.0,
    seed: int = 0,
) -> Tensor:
    """Reply ids (questions, max_new_tokens), -1 after the end of turn (at least one token each); cached on disk.

    With `vector`, multiplier * vector is added after block `layer` from the first response token on: one (d_model,) for all,
    or one a question (questions, d_model), which costs no more. Greedy at temperature 0, else sampled from `seed`.
    """
    if not questions:
        raise ValueError("no questions were given to answer")
    reading.unhooked(lm)
    batch = tokens.pad([tokens.chat(lm.tokenizer, q) for q in questions], lm.pad_id, "left")
    added = None if vector is None else _one_each(multiplier * vector, len(questions), lm.d_model)
    if added is not None and not bool(added.any()):
        added = None

    def compute() -> dict[str, Tensor]:
        where = tokens.positions(batch, "response")
        push = torch.zeros(1, lm.d_model) if added is None else added
        steered = hooks.edit(lm, layer, lambda x: hooks.shifted(x, push[:, None]), where)
        with nullcontext() if added is None else steered, seeded(lm, seed):
            return {"ids": write(lm, batch, max_new_tokens, temperature)}

    how = {
        "prompts": store.digest(batch.ids),
        "ends": ends(lm),
        "steering": [] if added is None else [operator.index(layer), store.digest(added.to(lm.dtype))],
        "write": [max_new_tokens, temperature, seed],
    }
    return store.cached("replies", lm.key | how, compute, __name__)["ids"]


def _one_each(vector: Tensor, n: int, d_model: int) -> Tensor:
    """One vector a row (n, d_model) of one for all, or of as many; ValueError for another number, shape, or NaN."""
    rows = vector if vector.ndim == 2 else hooks.checked(vector, d_model).expand(n, -1)
    if len(rows) != n:
        raise ValueError(f"{len(rows)} vectors were given for {n} questions: one for all, or one each is wanted")
    return torch.stack([hooks.checked(row, d_model) for row in rows])


def generate(
    lm: LM,
    questions: Sequence[str],
    layer: int = 0,
    vector: Tensor | None = None,
    multiplier: float = 1.0,
    max_new_tokens: int = 40,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[str]:
    """The replies of `generate_ids` as text."""
    ids = generate_ids(lm, questions, layer, vector, multiplier, max_new_tokens, temperature, seed)
    return [lm.tokenizer.decode(row[row >= 0], skip_special_tokens=True).strip() for row in ids]


@store.spent("chats")
def chats(lm: LM, questions: Sequence[str], max_new_tokens: int = 64, seed: int = 0, batch: int = 256) -> Path:
    """A .jsonl file of the model's own answers to `questions`, sampled at 0.7 from `seed`: a source of text; kept in the cache."""
    path = chats_path(lm.key, questions, max_new_tokens, seed, batch)
    if path.exists():
        store.from_cache()
        return path
    lines = []
    with seeded(lm, seed):
        for first in tqdm(range(0, len(questions), batch), desc="chats"):
            asked = questions[first : first + batch]
            prompts = [tokens.chat(lm.tokenizer, q) for q in asked]
            ids = write(lm, tokens.pad(prompts, lm.pad_id, "left"), max_new_tokens, temperature=0.7)
            for question, row in zip(asked, ids, strict=True):
                if answer := lm.tokenizer.decode(row[row >= 0], skip_special_tokens=True).strip():
                    lines.append(json.dumps({"question": question, "answer": answer}, ensure_ascii=False))
    return store.write_file(path, "\n".join(lines) + "\n")


def chats_path(
    key: Mapping[str, str], questions: Sequence[str], max_new_tokens: int = 64, seed: int = 0, batch: int = 256
) -> Path:
    """Where `chats` of the model with that `LM.key` lie, once they are made: known before the model is loaded."""
    parts = [*key.values(), list(questions), max_new_tokens, seed, batch, store.code_digest(__name__)]
    return cache_dir() / "chats" / f"{store.digest(parts)[:24]}.jsonl"
