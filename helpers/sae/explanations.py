"""Whether a latent explains itself: its direction is put where a question names a word, and the reply is read for its words.

The question is "What is the meaning of X?", with the direction added at the X, as source 002 asks. A method that cannot name a word
whose residual is put there cannot name a latent, so `of_words` gives such residuals. Knows models and tables of latents.
"""

import re
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from helpers.lm import hooks, reading, replies, tokens
from helpers.lm.hooks import Positions
from helpers.lm.reading import LM
from helpers.sae.latents import Latent

QUESTION = "What is the meaning of X?"
WORDS = (
    "music", "water", "school", "winter", "money", "bread", "garden", "doctor", "river", "football", "computer", "marriage",
)  # fmt: skip


def of_words(lm: LM, layer: int, words: Sequence[str] = WORDS) -> Tensor:
    """The residual (words, d_model) after block `layer` at the last token of each word that stands in the question, less their mean."""
    asked = [tokens.chat(lm.tokenizer, QUESTION.replace("X", word)) for word in words]
    last = [max(i for i, role in enumerate(q.roles) if role == tokens.USER) - 1 for q in asked]  # then a question mark
    rows = torch.stack([r[i] for r, i in zip(reading.residuals(lm, asked, layer), last, strict=True)])
    return rows - rows.mean(0)


def replies_to(lm: LM, layer: int, rows: Tensor, length: float, max_new_tokens: int = 24) -> list[str]:
    """What the model replies to the question with each row (n, d_model), brought to `length`, added after block `layer` at the X."""
    question = tokens.chat(lm.tokenizer, QUESTION)
    batch = tokens.pad([question] * len(rows), lm.pad_id, "left")
    where = torch.zeros_like(batch.mask)
    where[:, max(i for i, t in enumerate(question.ids) if "X" in lm.tokenizer.decode([t]))] = True
    long = (torch.nn.functional.normalize(rows.float(), dim=1) * length)[:, None].to(lm.device)
    with hooks.edit(lm, layer, lambda x: x + long.to(x.dtype), Positions(where)):
        ids = replies.write(lm, batch, max_new_tokens)
    return [lm.tokenizer.decode(row[row >= 0], skip_special_tokens=True).strip() for row in ids]


def named(lm: LM, layer: int, lengths: Sequence[float], max_new_tokens: int = 24) -> list[float]:
    """The share of known WORDS that the replies name when the words' own residuals are added, at each of `lengths`."""
    rows, wanted = of_words(lm, layer), [{word} for word in WORDS]
    said = (replies_to(lm, layer, rows, length, max_new_tokens) for length in lengths)
    return [float(hits(answers, wanted).diagonal().mean()) for answers in said]


def words_of(latent: Latent, least: int = 4) -> set[str]:
    """The words, of `least` letters or more, that a latent makes likeliest or on which it is largest."""
    found = [*latent.promotes, *(c.token for c in latent.contexts)]
    return {w.strip().lower() for w in found if len(w.strip()) >= least and w.strip().isalpha()}


def hits(said: Sequence[str], words: Sequence[set[str]]) -> np.ndarray:
    """Whether each reply holds, as a whole word, one of each latent's words: (latents, replies) bool."""
    spoken = [set(re.findall(r"[a-z]+", reply.lower())) for reply in said]
    return np.array([[bool(own & reply) for reply in spoken] for own in words])


def gain(table: np.ndarray) -> np.ndarray:
    """Whether each latent's own reply hits, less the mean of the other latents' replies, (latents,) from `hits` (latents, latents)."""
    own, n = table.diagonal().astype(np.float64), len(table)
    return np.asarray(own - (table.sum(1) - own) / (n - 1))


def dealt(tables: Sequence[np.ndarray], draws: int, seed: int = 0) -> np.ndarray:
    """The mean `gain` over the latents of all tables, (draws,), where the replies of each table are dealt out among its latents."""
    rng = np.random.default_rng(seed)
    orders = ([rng.permutation(len(t)) for t in tables] for _ in range(draws))
    return np.array(
        [np.concatenate([gain(t[:, o]) for t, o in zip(tables, order, strict=True)]).mean() for order in orders]
    )
