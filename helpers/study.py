"""What a notebook starts from: `single(s)`, a model with its behaviours, or `pair(s)`, the same before and after preference training.

    study = single(s)
    study.model, study.layer, study.names, study.vectors()["joy"], study.residual_norm, study.nulls("joy", 500)

Everything is made when it is first asked for, at the sizes of a fast run where the session is one. Knows what the helpers do and
how they fit together; nothing here measures or judges.
"""

from collections.abc import Mapping, Sequence
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
from helpers.pair import crosscoder, patching
from helpers.pair.crosscoder import Joined, Planted
from helpers.sae import activations, harvest, latents, saes, train
from helpers.sae.activations import Pair, Rows, Samples
from helpers.sae.latents import Latent
from helpers.sae.saes import Loaded
from helpers.session import Session
from helpers.steering import behaviors, caa, directions, propensity
from helpers.steering.behaviors import Behavior
from helpers.steering.caa import Halves

ANSWERS, SYSTEM, PADDED = "answer pairs", "system pairs", "padded system pairs"
RANDOM, LIKE_ROWS, SHUFFLED, OTHERS = "random", "random (residual covariance)", "shuffled labels", "another behaviour"
UNRELATED, SECOND = "unrelated", "second seed"  # the fine-tune without preferences; the base's SAE from another seed
OPEN = 8  # open prompts of a behaviour whose residuals give the stream's length and covariance
FAST_BEHAVIORS, FAST_PAIRS, FAST_ITEMS, FAST_ROWS = 3, 6, 6, 100


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

    @property
    def _read(self) -> list[int]:
        """The layers that a pass over pairs reads: all at once, so that no notebook makes another's pass again."""
        return self.layers if self.layer in self.layers else [*self.layers, self.layer]

    @property
    def _prompts(self) -> list[tokens.Tokens]:
        return [tokens.chat(self.model.tokenizer, q) for b in self.data.values() for q in b.open[:OPEN]]

    @cached_property
    def residuals(self) -> Tensor:
        """Rows (tokens, d_model) float32 after the layer, of the user's tokens in some open prompts of every behaviour."""
        return reading.rows(self.model, self._prompts, self.layer)

    @cached_property
    def residual_norm(self) -> float:
        """The median length of those rows: lengths and strengths are in units of it."""
        return float(self.residuals.norm(dim=1).median())

    def halves(self, kind: str = ANSWERS, layers: Sequence[int] | None = None) -> dict[str, Halves]:
        """What each behaviour's contrast pairs give at the layers looked at; read once, then cached.

        At the last position; of PADDED pairs over all positions but fillers and special tokens (`parts`).
        """
        if kind == PADDED:
            return {n: part["masked"] for n, part in self.parts(layers).items()}
        pairs = {n: b.answer_pairs if kind == ANSWERS else b.system_pairs for n, b in self.data.items()}
        return {n: caa.extract(self.model, p, list(layers or self._read)) for n, p in pairs.items()}

    def parts(self, layers: Sequence[int] | None = None) -> dict[str, dict[str, Halves]]:
        """What each behaviour's padded system pairs give over each position set of `caa.PARTS`, from the same passes."""
        at = list(layers or self._read)
        return {n: caa.extract_padded(self.model, b.system_pairs, at, caa.PARTS) for n, b in self.data.items()}

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

    def responses(self, vectors: Mapping[str, Tensor], length: float, items: int = 0) -> np.ndarray:
        """The same for each behaviour's own `vectors` (n, d_model), mean of its items: (n, behaviours)."""
        return np.stack([self.response(n, v, length, items).mean(1) for n, v in vectors.items()], axis=1)

    def change(self, name: str, vectors: Tensor, length: float, items: int = 0, per_token: bool = False) -> np.ndarray:
        """The same by a finite step: the steered model's log-odds less the unsteered one's, (n, items); `per_token`, of log-odds in
        which each log p is divided by its completion's tokens."""
        units = [v / v.norm() * self.residual_norm for v in vectors]
        scores = scoring.log_odds(self.tested(items)[name], units, [0.0, length], per_token)
        return scores[:, 1] - scores[:, 0]

    def by_layer(self, kind: str = ANSWERS, length: float = 0.1) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """On the dev items alone and by gradient, at every layer of `layers`: each behaviour's response (layers,) in nats to its own
        vector of that kind, `length` residual norms long; and the standard deviation of random directions' responses (layers,)."""
        own, chance = {}, {}
        sizes = torch.stack([reading.rows(self.model, self._prompts, k).norm(dim=1).median() for k in self.layers])
        for n, h in self.halves(kind, self.layers).items():
            where = propensity.of_items(self.model, self.data[n].dev, self.layers[0])
            at_each = (
                scoring.linear_response(where, self.layers[1:])
                .reshape(len(self.layers), -1, self.model.d_model)
                .mean(1)
            )
            at_each = at_each * length * sizes.double().numpy()[:, None]
            units = [directions.mean(*h.at(k)).numpy() for k in self.layers]
            own[n] = np.array([g @ u / np.linalg.norm(u) for g, u in zip(at_each, units, strict=True)])
            chance[n] = np.linalg.norm(at_each, axis=1) / self.model.d_model**0.5
        return own, chance

    def price(self, name: str, vectors: Tensor, length: float, prompts: int) -> np.ndarray:
        """What that costs elsewhere: KL in nats a token of the model's own replies to the behaviour's first open `prompts`, under
        each of `vectors` (n, d_model) brought to `length` residual norms: (n, prompts)."""
        own = propensity.of_replies(self.model, self.data[name].open[:prompts], self.layer)
        units = [v / v.norm() * self.residual_norm for v in vectors]
        return scoring.kl(own, units, [length])[:, 0]

    def say(self, question: str, vectors: dict[str, Tensor], length: float, tokens: int = 40) -> Markdown:
        """A table of what the model answers when each vector, at `length` residual norms, is added to its answer."""
        ask = {"nothing": torch.zeros(self.model.d_model), **{n: v / v.norm() for n, v in vectors.items()}}
        pushes = torch.stack([v.float() * length * self.residual_norm for v in ask.values()])
        said = replies.generate(self.model, [question] * len(ask), self.layer, pushes, max_new_tokens=tokens)
        return table(["added", "reply"], [list(row) for row in zip(ask, said, strict=True)])

    def contrast(self, name: str, kind: str = ANSWERS, rows: int = 3) -> Markdown:
        """A table of a behaviour's first contrast pairs: both sides, the length of their difference, its cosine with the mean."""
        b, (pos, neg) = self.data[name], self.halves(kind)[name].at(self.layer)
        pairs = [(p.positive, p.negative) for p in (b.answer_pairs if kind == ANSWERS else b.system_pairs)]
        difference = (pos - neg).double()
        cosine = stats.cosine(difference.numpy(), difference.mean(0).numpy())
        found = zip(pairs[:rows], difference.norm(dim=1).tolist(), cosine, strict=False)
        body = [[*both, f"{norm:.0f}", f"{c:.2f}"] for both, norm, c in found]
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

    def saes(self, seeds: Sequence[int]) -> list[Loaded]:
        """The SAEs of several seeds; the one that there is, where it comes out of a registry."""
        return [self.sae(seed) for seed in (seeds if self._trained else seeds[:1])]

    def frozen(self, seed: int = 0) -> Loaded | None:
        """The null of that SAE, whose random decoder rows were not trained: see `train.dictionary`. None for one out of a registry."""
        s = self.session
        return train.dictionary(s.profile, self.text[0], s.device, seed, s.fast, True)[0] if self._trained else None

    def sae_after(self, share: float, seed: int = 0) -> Loaded | None:
        """The SAE of a seed as it is after that share of its training tokens, by the whole schedule, shortened; None for one out of a
        registry."""
        if not self._trained:
            return None
        s = self.session
        config = train.of_profile(s.profile, self.model.d_model, seed, s.fast)
        config = config._replace(samples=max(round(share * config.samples), config.batch))
        folder = train.sae(self.text[0], config, s.device)
        return saes.load(folder, device=s.device, d_model=self.model.d_model, layer=s.profile.layer)

    @property
    def _trained(self) -> bool:
        how = self.session.profile.sae
        return not (how and how.release)

    def contexts(self, seed: int = 0, limit: int = 1200) -> list[Latent]:
        """What each latent of that SAE responds to, in `limit` rows of its text (few in a fast run); made once, then kept with it."""
        s = self.session
        loaded, folder = train.dictionary(s.profile, self.text[0], s.device, seed, s.fast)
        return latents.of(folder, self.model, loaded.sae, self.text[0], limit=FAST_ROWS if s.fast else limit)


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

    @property
    def models(self) -> dict[str, Single]:
        """All models by name, the base first."""
        return {self.names[0]: self.before} | self.fine_tunes

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

    def saes(self, seed: int = 0) -> dict[str, Loaded]:
        """The SAE of every model, by name, each trained on its own model's text from one seed and in one order of tokens; and
        SECOND, another of the base that differs in its seed alone. Published ones where the profile's pair names them."""
        s = self.before.session
        made = train.dictionaries(s.profile, self.before.text[0], self.after.text[0], s.device, seed, s.fast)
        found = {self.names[0]: made.base, self.names[1]: made.chat, SECOND: made.second}
        return found | ({UNRELATED: self.unrelated.sae(seed)} if self.unrelated else {})

    def crosscoders(self, seed: int = 0) -> dict[str, tuple[Loaded, Joined]]:
        """For each fine-tune the crosscoder of it and the base, and their held-out rows, joined; none where the profile does not say how
        an SAE is trained."""
        if not self._trainable:
            return {}
        return {who: self._crosscoder(*parts, seed) for who, parts in self.texts.items()}

    def control(self, energies: Sequence[float], seed: int = 0) -> tuple[Loaded, Joined, Tensor] | None:
        """A crosscoder whose answer is known: of the base and the base with features planted in it, of which each has one of `energies`
        (see `Planted`); their held-out rows, and the planted directions. None where there is no crosscoder of the pair either."""
        if not self._trainable:
            return None
        fitting, held = (part.base for part in self.texts[self.names[1]])
        planted = [Planted(rows, energies, seed) for rows in (fitting, held)]
        return *self._crosscoder((fitting, planted[0]), (held, planted[1]), seed), planted[0].directions

    @property
    def _trainable(self) -> bool:
        how = self.before.session.profile.sae
        return bool(how and how.train)

    def _crosscoder(self, fitting: tuple[Rows, Rows], held: tuple[Rows, Rows], seed: int) -> tuple[Loaded, Joined]:
        s, rows = self.before.session, Joined(*fitting)
        loaded, _ = crosscoder.dictionary(s.profile, rows, s.device, seed, s.fast)
        return loaded, Joined(*held, rows.scales)

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

    def of(model: LM) -> Single:
        return Single(s, model.read_as(chat.tokenizer), layer, layers, data)

    names = section.names if section else ("base", "chat")
    return Two(of(base), of(chat), of(other) if other else None, names, [n for n in trained if n in data])


def pooled(by_behavior: dict[str, Tensor]) -> Tensor:
    """The behaviours' tensors (behaviours, ...) in order, where all have one shape."""
    return torch.stack(list(by_behavior.values()))
