"""What is scored to see whether a vector steers: items, letters, replies and plain text as continuations; a reader of free text.

Propensity is the log-odds of a matching against a non-matching completion, in nats; `lm.scoring` computes it, `lm.replies` writes
free text. Steerability as the slope over multipliers with its per-item spread: Tan et al. 2024 (arXiv:2407.12404).
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor

from helpers import stats
from helpers.lm import replies, scoring, tokens
from helpers.lm.reading import LM
from helpers.lm.scoring import Continuations
from helpers.lm.tokens import ANSWER, USER, Tokens
from helpers.steering.behaviors import Behavior, Item, SystemPair

Systems = Sequence[str | None] | None  # a system prompt for each item, or none at all


def of_items(lm: LM, items: Sequence[Item], layer: int, systems: Systems = None) -> Continuations:
    """Each item's question, under its own system prompt where `systems` has one, with its matching (0) and non-matching (1)
    completion."""
    rows = [
        [tokens.chat(lm.tokenizer, i.question, system, a) for a in (i.matching, i.non_matching)]
        for i, system in zip(items, systems or [None] * len(items), strict=True)
    ]
    return Continuations(lm, rows, layer)


def of_letters(lm: LM, items: Sequence[Item], layer: int, systems: Systems = None) -> Continuations:
    """Each item as a multiple-choice question in both orders, `systems` as in `of_items`; completions "(A" (0) and "(B" (1).

    Row 2i has the matching answer as (A), row 2i + 1 as (B).
    """
    rows = []
    for item, system in zip(items, systems or [None] * len(items), strict=True):
        for a, b in ((item.matching, item.non_matching), (item.non_matching, item.matching)):
            question = f"{item.question}\n\nChoices:\n (A) {a}\n (B) {b}\n\nAnswer with the letter of one choice."
            rows.append([tokens.chat(lm.tokenizer, question, system, letter) for letter in ("(A", "(B")])
    return Continuations(lm, rows, layer)


def of_replies(lm: LM, questions: Sequence[str], layer: int, max_new_tokens: int = 24) -> Continuations:
    """Each question with the model's own unsteered greedy reply: where KL is measured (on-policy)."""
    unsteered = replies.generate_ids(lm, questions, max_new_tokens=max_new_tokens)
    groups = [
        [tokens.conversation(lm.tokenizer, q, row[row >= 0].tolist())]
        for q, row in zip(questions, unsteered, strict=True)
    ]
    return Continuations(lm, groups, layer)


LETTERS, WRITTEN = "letters", "written completions"
MEASURES = {WRITTEN: of_items, LETTERS: of_letters}


def content(measure: str, rows: np.ndarray) -> np.ndarray:
    """For each item how much more of the matching answer than of the other, from rows (rows, ...) of log-odds or their gradients:
    as they are for written completions; for letters half the difference of an item's two orders, in which a liking for a letter
    cancels."""
    return (rows[0::2] - rows[1::2]) / 2 if measure == LETTERS else rows


def instructed(lm: LM, measure: str, items: Sequence[Item], layer: int, pairs: Sequence[SystemPair]) -> np.ndarray:
    """How far each item's log-odds (items,) rise, in nats, from the negative to the positive system prompt of its own one of `pairs`."""
    systems = [side for pair in pairs for side in (pair.positive, pair.negative)]
    where = MEASURES[measure](lm, [item for item in items for _ in range(2)], layer, systems)
    odds = content(measure, scoring.log_odds(where, [torch.zeros(lm.d_model)], [0.0])[0, 0])
    return odds[0::2] - odds[1::2]


class Changes(NamedTuple):
    """How far a measure moves, in nats: under what is about the behaviour, `own` (n,), and under the like about others, `foreign` (m,)."""

    own: np.ndarray
    foreign: np.ndarray

    @property
    def told_apart(self) -> float:
        """The chance that a change by the own is larger than one by a foreign (the area under the ROC curve), less the half that a
        blind measure has: from -0.5 to 0.5. No unit and no length of text is in it, so that measures and behaviours compare."""
        ranks = rankdata(np.concatenate([self.own, self.foreign]))
        n, m = len(self.own), len(self.foreign)
        return float((ranks[:n].sum() - n * (n + 1) / 2) / (n * m) - 0.5)

    def mixed(self, draws: int, seed: int = 0) -> np.ndarray:
        """The same (draws,) with own and foreign changes dealt out at random: the measure is then blind."""
        rng, both, n = np.random.default_rng(seed), np.concatenate(self), len(self.own)
        dealt = (rng.permutation(both) for _ in range(draws))
        return np.array([Changes(x[:n], x[n:]).told_apart for x in dealt])


class Apart(NamedTuple):
    """How well a measure tells own from foreign changes: of `each` behaviour (behaviours,), and the `null` (draws, behaviours) of a
    blind one."""

    each: np.ndarray
    null: np.ndarray


def apart(changes: Mapping[str, Changes], draws: int, seed: int = 0) -> Apart:
    """`Changes.told_apart` of every behaviour, and `draws` of `Changes.mixed`."""
    found = list(changes.values())
    null = np.stack([x.mixed(draws, seed + i) for i, x in enumerate(found)], axis=1)
    return Apart(np.array([x.told_apart for x in found]), null)


def of_text(lm: LM, text: str, layer: int, length: int = 64, chunks: int = 16) -> Continuations:
    """Plain text in `chunks` pieces of `length` tokens, all but the first eight scored and steered: perplexity's ground."""
    whole = tokens.plain(lm.tokenizer, text)
    first = tokens.first_token(lm.tokenizer)  # a BOS, if there is one
    ids = whole.ids[len(first) : len(first) + length * chunks]
    pieces = [first + ids[i : i + length] for i in range(0, len(ids) - length + 1, length)]
    return Continuations(lm, [[Tokens(p, [USER] * 8 + [ANSWER] * (len(p) - 8))] for p in pieces], layer)


class AtKL(NamedTuple):
    """Vectors at equal side effect: the `strength` of each (vectors,), whether it is enough (`reached`), and the `change` of every
    item's log-odds there, (vectors, items) in nats."""

    strength: np.ndarray
    reached: np.ndarray
    change: np.ndarray


def at_kl(
    items: Continuations, unsteered: Continuations, vectors: Sequence[Tensor], strengths: Sequence[float], target: float
) -> AtKL:
    """What vectors (d_model,) do to `items` at the multiple at which their mean KL on `unsteered` replies is `target` nats a token.

    KL is measured at `strengths`, which rise from 0, and interpolated in its square root: that grows with a small vector in
    proportion. Where the target is not reached the last strength is taken.
    """
    price = scoring.kl(unsteered, vectors, strengths).mean(-1)
    found = np.array([stats.at_level(kl, strengths, target**0.5) for kl in np.sqrt(price.clip(0))])
    strength = np.nan_to_num(found, nan=strengths[-1])
    steered = scoring.log_odds(items, [float(x) * v for x, v in zip(strength, vectors, strict=True)], [1.0])[:, 0]
    return AtKL(strength, np.isfinite(found), steered - scoring.log_odds(items, vectors[:1], [0.0])[0])


NOTHING = "nothing"


def say(
    lm: LM,
    data: Mapping[str, Behavior],
    layer: int,
    steps: Mapping[str, Mapping[str, Tensor]],
    prompts: int,
    max_new_tokens: int,
) -> dict[str, dict[str, list[str]]]:
    """Greedy replies to the first open `prompts` of every behaviour, in one batch: by what is added, NOTHING first, and behaviour.

    `steps`: for each way to steer a vector (d_model,) a behaviour, added after block `layer` from the first reply token on.
    """
    ask = [(n, k, q) for n, b in data.items() for k in (NOTHING, *steps) for q in b.open[:prompts]]
    added = [torch.zeros(lm.d_model).double() if k == NOTHING else steps[k][n].double() for n, k, _ in ask]
    said = replies.generate(lm, [q for *_, q in ask], layer, torch.stack(added), max_new_tokens=max_new_tokens)
    out: dict[str, dict[str, list[str]]] = {k: {n: [] for n in data} for k in (NOTHING, *steps)}
    for (n, k, _), reply in zip(ask, said, strict=True):
        out[k][n].append(reply)
    return out


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


class Heard(NamedTuple):
    """How a change of replies looks to readers, in nats: to each behaviour's `own` (replies,) by behaviour; `crossed`, the mean of
    every behaviour's replies to every reader, (readers, behaviours): other readers than the own are the null."""

    own: dict[str, np.ndarray]
    crossed: np.ndarray


def heard(
    readers: Mapping[str, TextJudge], before: Mapping[str, Sequence[str]], after: Mapping[str, Sequence[str]]
) -> Heard:
    """What every reader makes of the change from `before` to `after`, each one's replies by behaviour."""
    own, crossed = {}, np.empty((len(readers), len(readers)))
    for i, (name, reader) in enumerate(readers.items()):
        for j, steered in enumerate(readers):
            change = reader.score(after[steered]) - reader.score(before[steered])
            crossed[i, j] = change.mean()
            if name == steered:
                own[name] = change
    return Heard(own, crossed)
