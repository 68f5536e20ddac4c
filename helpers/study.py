"""What a notebook starts from: `single(s)`, a model with its behaviours, or `pair(s)`, the same before and after preference training.

    study = single(s)
    study.model, study.layer, study.names, study.vectors()["joy"], study.residual_norm, study.nulls("joy", 500)

Everything is made when it is first asked for, at the sizes of a fast run where the session is one. Knows what the helpers do and
how they fit together; nothing here measures or judges.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from IPython.display import Markdown
from torch import Tensor

from helpers import nulls, stats
from helpers.claims import table
from helpers.lm import models, reading, replies, scoring, tokens
from helpers.lm.reading import LM
from helpers.lm.scoring import Continuations
from helpers.pair import patching
from helpers.sae import activations, harvest, train
from helpers.sae.activations import Pair, Samples
from helpers.sae.saes import Loaded
from helpers.session import Session
from helpers.steering import behaviors, caa, directions, propensity
from helpers.steering.behaviors import Behavior
from helpers.steering.caa import Halves

ANSWERS, SYSTEM = "answer pairs", "system pairs"
RANDOM, LIKE_ROWS, SHUFFLED, OTHERS = "random", "random (residual covariance)", "shuffled labels", "another behaviour"
UNRELATED, SECOND = "unrelated", "second seed"  # the fine-tune without preferences; the base's SAE from another seed
OPEN = 8  # open prompts of a behaviour whose residuals give the stream's length and covariance
FAST_BEHAVIORS, FAST_PAIRS, FAST_ITEMS = 3, 6, 6


@dataclass(frozen=True, eq=False)
class Single:
    """One model, the layer where it is steered, and behaviours by name."""

    session: Session
    model: LM
    layer: int
    layers: list[int]
    data: dict[str, Behavior]
    _tested: dict[int, dict[str, Continuations]] = field(default_factory=dict, repr=False)

    @property
    def names(self) -> list[str]:
        """The behaviours, in the profile's order."""
        return list(self.data)

    @cached_property
    def residuals(self) -> Tensor:
        """Rows (tokens, d_model) float32 after the layer, of the user's tokens in some open prompts of every behaviour."""
        prompts = [tokens.chat(self.model.tokenizer, q) for b in self.data.values() for q in b.open[:OPEN]]
        return reading.rows(self.model, prompts, self.layer)

    @cached_property
    def residual_norm(self) -> float:
        """The median length of those rows: lengths and strengths are in units of it."""
        return float(self.residuals.norm(dim=1).median())

    def halves(self, kind: str = ANSWERS, layers: Sequence[int] | None = None) -> dict[str, Halves]:
        """What each behaviour's contrast pairs give at the last position, at the layer or at several; read once, then cached."""
        pairs = {n: b.answer_pairs if kind == ANSWERS else b.system_pairs for n, b in self.data.items()}
        return {n: caa.extract(self.model, p, list(layers or [self.layer])) for n, p in pairs.items()}

    def vectors(self, kind: str = ANSWERS) -> dict[str, Tensor]:
        """The mean difference (d_model,) float64 of each behaviour's pairs, as long as it is."""
        return {n: directions.mean(*h.at(self.layer)) for n, h in self.halves(kind).items()}

    def steps(self, kind: str = ANSWERS, length: float = 0.1) -> dict[str, Tensor]:
        """The same, each `length` residual norms long."""
        return {n: v / v.norm() * length * self.residual_norm for n, v in self.vectors(kind).items()}

    def nulls(self, name: str, draws: int, seed: int = 0, kind: str = ANSWERS) -> dict[str, Tensor]:
        """Vectors (draws, d_model) as long as a behaviour's own that hold nothing of it, by what they are."""
        vectors, at = self.vectors(kind), seed + 1000 * self.names.index(name)
        v, others = vectors[name], [x for n, x in vectors.items() if n != name]
        return {
            RANDOM: nulls.random(v, draws, at),
            LIKE_ROWS: nulls.like_rows(v, self.residuals, draws, at),
            SHUFFLED: nulls.shuffled(*self.halves(kind)[name].at(self.layer), draws=draws, seed=at),
            OTHERS: nulls.others(v, others) if others else v.new_zeros(0, len(v)),
        }

    def tested(self, items: int = 0) -> dict[str, Continuations]:
        """Each behaviour's held-out test items (the first `items`; 0: all), ready to be scored under any vector."""
        if items not in self._tested:
            each = {n: b.test[: items or None] for n, b in self.data.items()}
            self._tested[items] = {n: propensity.of_items(self.model, part, self.layer) for n, part in each.items()}
        return self._tested[items]

    def gradients(self, items: int = 0) -> dict[str, np.ndarray]:
        """The linear response (items, d_model) of those items' log-odds to a vector added at the layer."""
        return {n: scoring.linear_response(where) for n, where in self.tested(items).items()}

    def response(self, name: str, vectors: Tensor, length: float, items: int = 0) -> np.ndarray:
        """By gradient, the change of each item's log-odds, in nats, from each of `vectors` (n, d_model) brought to `length` residual
        norms: (n, items)."""
        unit = (vectors / vectors.norm(dim=-1, keepdim=True)).double().numpy()
        return length * self.residual_norm * unit @ scoring.linear_response(self.tested(items)[name]).T

    def change(self, name: str, vectors: Tensor, length: float, items: int = 0) -> np.ndarray:
        """The same by a finite step: the steered model's log-odds less the unsteered one's, (n, items)."""
        units = [v / v.norm() * self.residual_norm for v in vectors]
        scores = scoring.log_odds(self.tested(items)[name], units, [0.0, length])
        return scores[:, 1] - scores[:, 0]

    def say(self, question: str, vectors: dict[str, Tensor], length: float, tokens: int = 40) -> Markdown:
        """A table of what the model answers when each vector, at `length` residual norms, is added to its answer."""
        ask = {"nothing": torch.zeros(self.model.d_model), **{n: v / v.norm() for n, v in vectors.items()}}
        pushes = torch.stack([v.float() * length * self.residual_norm for v in ask.values()])
        said = replies.generate(self.model, [question] * len(ask), self.layer, pushes, max_new_tokens=tokens)
        return table(["added", "reply"], [list(row) for row in zip(ask, said, strict=True)])

    def contrast(self, name: str, kind: str = ANSWERS, rows: int = 3) -> Markdown:
        """A table of a behaviour's first contrast pairs: both sides, the length of their difference, its cosine with the mean."""
        b, (pos, neg) = self.data[name], self.halves(kind)[name].at(self.layer)
        pairs = b.answer_pairs if kind == ANSWERS else b.system_pairs
        difference = (pos - neg).double()
        cosine = stats.cosine(difference.numpy(), difference.mean(0).numpy())
        found = zip(pairs[:rows], difference.norm(dim=1).tolist(), cosine, strict=False)
        body = [[p.positive, p.negative, f"{norm:.0f}", f"{c:.2f}"] for p, norm, c in found]
        return table(["positive", "negative", "length", "cosine with the mean"], body)

    @cached_property
    def text(self) -> tuple[Samples, Samples]:
        """Residuals of the profile's text at the layer: to train on, and held out."""
        s = self.session
        train_part, held_out = (
            harvest.of_profile(self.model, s.profile, part, s.fast) for part in ("train", "held-out")
        )
        return train_part, held_out

    def sae(self, seed: int = 0) -> Loaded:
        """The profile's SAE of this model: trained on its text, or out of a registry."""
        s = self.session
        return train.dictionary(s.profile, self.text[0], s.device, seed, s.fast)[0]


@dataclass(frozen=True, eq=False)
class Two:
    """A pair of models that read the same tokens: `before` preference training and `after`, each a Single at one layer; their
    names, which behaviours were trained as far as that is known, and, where the profile has one, a fine-tune without preferences."""

    before: Single
    after: Single
    unrelated: Single | None
    names: tuple[str, str]
    trained: list[str]

    @property
    def untrained(self) -> list[str]:
        """The behaviours that the preferences were not about."""
        return [n for n in self.before.names if n not in self.trained]

    @property
    def fine_tunes(self) -> dict[str, Single]:
        """By name: the model after preference training, then the unrelated one."""
        return {self.names[1]: self.after} | ({UNRELATED: self.unrelated} if self.unrelated else {})

    @cached_property
    def texts(self) -> dict[str, tuple[Pair, Pair]]:
        """For each fine-tune its rows and the base's, token by token, to train on and held out; what any of the models has
        for an outlier is left out of all."""
        s, base = self.before.session, self.before.model
        found = {
            name: [harvest.pair_of_profile(base, one.model, s.profile, part, s.fast) for part in ("train", "held-out")]
            for name, one in self.fine_tunes.items()
        }
        for parts in zip(*found.values(), strict=True):
            activations.common(*parts)
        return {name: (parts[0], parts[1]) for name, parts in found.items()}

    @property
    def limit(self) -> float:
        """The length from which on a residual counts as an outlier of any of the models."""
        return min(side.limit for train_part, _ in self.texts.values() for side in train_part)

    @property
    def models(self) -> dict[str, Single]:
        """All models by name, the base first."""
        return {self.names[0]: self.before} | self.fine_tunes

    def shifts(self, items: int = 0, part: str = "test") -> dict[str, dict[str, np.ndarray]]:
        """By fine-tune and behaviour: how far training moved each held-out item's log-odds, in nats (items,); nothing steered."""
        none = torch.zeros(1, self.before.model.d_model)

        def odds(one: Single) -> dict[str, np.ndarray]:
            each = {n: getattr(b, part)[: items or None] for n, b in one.data.items()}
            scored = {n: propensity.of_items(one.model, x, one.layer) for n, x in each.items()}
            return {n: scoring.log_odds(where, none, [0.0])[0, 0] for n, where in scored.items()}

        start = odds(self.before)
        found = {who: odds(one) for who, one in self.fine_tunes.items()}
        return {who: {n: x - start[n] for n, x in by.items()} for who, by in found.items()}

    def spreads(self) -> dict[str, float]:
        """The standard deviation of each behaviour's log-odds over its test items in the base, in nats: the unit in which
        behaviours compare, whose completions are of any length."""
        none = torch.zeros(1, self.before.model.d_model)
        odds = {n: scoring.log_odds(where, none, [0.0])[0, 0] for n, where in self.before.tested().items()}
        return {n: float(x.std(ddof=1)) for n, x in odds.items()}

    def moved_on_dev(self) -> list[str]:
        """The behaviours whose dev items preference training moved, either way: they stand for the trained ones where a profile
        does not say what was trained."""
        return patching.moving(self.shifts(part="dev")[self.names[1]])


def _data(s: Session, first: Sequence[str] = (), extra: bool = False) -> dict[str, Behavior]:
    """The profile's behaviours, those of `first` leading; a fast run has few of them, small."""
    names = [*first, *(n for n in s.profile.behaviors if n not in first)]
    names = [*names[: FAST_BEHAVIORS if s.fast else None], *(s.profile.extra if extra else ())]
    found = {b.name: b for b in map(behaviors.load_behavior, names)}
    if s.fast:
        found = {name: behaviors.trim(b, pairs=FAST_PAIRS, items=FAST_ITEMS) for name, b in found.items()}
    return found


def single(s: Session, extra: bool = False) -> Single:
    """The profile's chat model and behaviours; with `extra`, the behaviours that the profile names for its SAE alone too."""
    model = models.load(s.profile.chat, s.device, s.dtype)
    layer, layers = models.choose_layers(model, s.profile, s.fast)
    return Single(s, model, layer, layers, _data(s, extra=extra))


def pair(s: Session) -> Two:
    """The profile's pair of models; ModelError where it names none."""
    section = s.profile.pair
    base, chat = models.load_pair(s.profile, s.device, s.dtype)
    other = models.load(section.unrelated, s.device, s.dtype) if section and section.unrelated else None
    trained = list(section.trained) if section else []
    data = _data(s, trained)
    layer, layers = models.choose_layers(base, s.profile, s.fast)
    one, two, three = (m and Single(s, m.read_as(chat.tokenizer), layer, layers, data) for m in (base, chat, other))
    assert one and two
    names = section.names if section else ("base", "chat")
    return Two(one, two, three, names, [n for n in trained if n in data])


def pooled(by_behavior: dict[str, Tensor]) -> Tensor:
    """The behaviours' tensors (behaviours, ...) in order, where all have one shape."""
    return torch.stack(list(by_behavior.values()))
