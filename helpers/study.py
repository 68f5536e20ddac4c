"""What a notebook starts from: `single(s)`, a model with its behaviours, or `pair(s)`, the same before and after preference training.

    study = single(s)
    study.model, study.layer, study.names, study.vectors()["joy"], study.residual_norm, study.nulls("joy", 500)

Everything is made when it is first asked for, at the sizes of a fast run where the session is one. Knows what the helpers do and
how they fit together; nothing here measures or judges.
"""

import textwrap
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple, cast

import numpy as np
import torch
from IPython.display import Markdown
from torch import Tensor

from helpers import nulls, session, stats, store
from helpers.claims import table
from helpers.comparisons import Compared, Doses, estimated
from helpers.lm import models, reading, replies, scoring, text, tokens
from helpers.lm.reading import LM
from helpers.lm.scoring import Continuations
from helpers.lm.tokens import USER, Tokens
from helpers.pair import bank as banks
from helpers.pair import crosscoder, diff, mixtures, patching
from helpers.pair.bank import AtItems, Bank
from helpers.pair.crosscoder import Joined, Planted
from helpers.pair.mixtures import Change, NoRuler, Ruler, Sizes, Steered
from helpers.sae import activations, decompose, evaluation, evidence, harvest, labels, latents, saes, train
from helpers.sae.activations import Pair, Rows, Samples
from helpers.sae.evidence import Listed
from helpers.sae.latents import Latent
from helpers.sae.saes import Loaded
from helpers.sae.topk import Dictionary
from helpers.session import Session
from helpers.stats import Interval
from helpers.steering import behaviors, caa, directions, propensity
from helpers.steering.behaviors import AnswerPair, Behavior
from helpers.steering.caa import Halves
from helpers.steering.propensity import AtKL, Changes

ANSWERS, SYSTEM, PADDED = "answer pairs", "system pairs", "padded system pairs"
RANDOM, LIKE_ROWS, SHUFFLED, OTHERS = "random", "random (residual covariance)", "shuffled labels", "another behaviour"
MEAN = "the mean activation"
TOKENS = "every token", "first tokens left out", "outliers left out too"  # over which a fit is measured
UNRELATED, SECOND = "unrelated", "second seed"  # the fine-tune without preferences; the base's SAE from another seed
DRAWN = 12  # changes by chance that are drawn where there are no fine-tunes for them
SHOWN = 60  # letters of a reply in a table of many
READ = 25  # test items of a behaviour on which it is read, by gradient, what a change at the layer does to it
OPEN = 8  # open prompts of a behaviour whose residuals give the stream's length and covariance
FAST_BEHAVIORS, FAST_PAIRS, FAST_ITEMS, FAST_ROWS = 3, 6, 6, 100


class Lengths(NamedTuple):
    """Lengths of the residual stream at each layer: of each prompt's `first` and `second` token and the median of its `user` tokens
    (layers, prompts), and the median of all prompts' user tokens, `stream` (layers,)."""

    first: np.ndarray
    second: np.ndarray
    user: np.ndarray
    stream: np.ndarray


def _lengths(model: LM, prompts: list[Tokens], layers: list[int]) -> Lengths:
    first, second, user = np.zeros((3, len(layers), len(prompts)))
    every: list[list[Tensor]] = [[] for _ in layers]
    for rows, batch, acts in reading.batches(model, prompts, layers, by_length=False):
        for i, k in enumerate(layers):
            norms = acts[k].float().norm(dim=-1).cpu()
            first[i, rows], second[i, rows] = norms[:, :2].T
            own = [x[roles == USER] for x, roles in zip(norms, batch.roles, strict=True)]
            user[i, rows] = [x.median() for x in own]
            every[i] += own
    return Lengths(first, second, user, np.array([torch.cat(x).median() for x in every]))


@dataclass(frozen=True, eq=False)
class Single:
    """One model, the layer where it is steered, and behaviours by name."""

    session: Session
    model: LM
    layer: int
    layers: list[int]
    data: dict[str, Behavior]
    _asked: dict[tuple[str, int], dict[str, Continuations]] = field(default_factory=dict, repr=False)
    _passes: dict[tuple[str, str, tuple[int, ...]], dict[str, Halves]] = field(default_factory=dict, repr=False)

    @property
    def names(self) -> list[str]:
        """The behaviours, in the profile's order."""
        return list(self.data)

    @property
    def _read(self) -> list[int]:
        """The layers that a pass over pairs reads, all at once, so that no notebook makes another's pass again: those looked at, the
        one that is steered, and the next."""
        also = (self.layer, min(self.layer + 1, self.model.layers - 1))
        return [*self.layers, *(k for k in also if k not in self.layers)]

    @property
    def _prompts(self) -> list[tokens.Tokens]:
        return [tokens.chat(self.model.tokenizer, q) for b in self.data.values() for q in b.open[:OPEN]]

    @cached_property
    def residuals(self) -> Tensor:
        """Rows (tokens, d_model) float32 after the layer, of the user's tokens in some open prompts of every behaviour."""
        return store.kept(reading.rows, self.model, self._prompts, self.layer)

    @cached_property
    def residual_norm(self) -> float:
        """The median length of those rows: lengths and strengths are in units of it."""
        return float(self.residuals.norm(dim=1).median())

    @cached_property
    def lengths(self) -> Lengths:
        """Lengths of the stream after each of `layers`, of the same prompts in one pass."""
        return store.kept(_lengths, self.model, self._prompts, self.layers)

    def halves(self, kind: str = ANSWERS, layers: Sequence[int] | None = None, where: str = "") -> dict[str, Halves]:
        """What each behaviour's contrast pairs give at the layers looked at, or at others; read once, then cached.

        Answer pairs at `where`, one of `caa.READ`, by default the profile's `answers`; system pairs and plain texts at the last
        position; PADDED pairs over all positions but fillers and special tokens (`parts`).
        """
        if kind == PADDED:
            return {n: part["masked"] for n, part in self.parts(layers).items()}
        place = (where or self.session.profile.answers) if kind == ANSWERS else SYSTEM
        return {n: self._pass(b, kind, layers)[place] for n, b in self.data.items()}

    def parts(self, layers: Sequence[int] | None = None) -> dict[str, dict[str, Halves]]:
        """What each behaviour's padded system pairs give over each position set of `caa.PARTS`, from the same passes."""
        return {n: self._pass(b, PADDED, layers) for n, b in self.data.items()}

    def _pass(self, b: Behavior, kind: str, layers: Sequence[int] | None) -> dict[str, Halves]:
        """What one pass over a behaviour's pairs of that kind gives, by place or position set; in memory from then on. Plain texts have
        their last token alone."""
        at = self._read if set(layers or ()) <= set(self._read) else list(layers or ())
        if (key := (b.name, kind, tuple(at))) not in self._passes:
            answers = [pair for pair in b.answer_pairs if isinstance(pair, AnswerPair)]
            if kind == PADDED:
                found = caa.extract_padded(self.model, b.system_pairs, at, caa.PARTS)
            elif kind == SYSTEM:
                found = {SYSTEM: caa.extract(self.model, b.system_pairs, at)}
            elif answers:
                found = caa.extract_answers(self.model, answers, at)
            else:
                found = dict.fromkeys(caa.READ, caa.extract(self.model, b.answer_pairs, at))
            self._passes[key] = found
        return self._passes[key]

    def as_source_001(self, names: Sequence[str] = (), pairs: int = 1) -> dict[str, tuple[Tensor, Tensor]]:
        """Both sides (pairs, d_model) at the layer of the first padded system `pairs` (0: all) of each behaviour that has some (or of
        `names`), as source 001 reads them: over every position, fillers and special tokens too, which it also attends to."""
        some = {n: self.data[n].system_pairs[: pairs or None] for n in names or self.names}
        read = {
            n: caa.extract_padded(self.model, p, [self.layer], ["every"], attend_filler=True)
            for n, p in some.items()
            if p
        }
        return {n: halves["every"].at(self.layer) for n, halves in read.items()}

    def differences(self, kind: str = ANSWERS, where: str = "") -> dict[str, Tensor]:
        """Of each behaviour what every pair's sides differ by, (pairs, d_model) float64; `where` as in `halves`."""
        both = {n: h.at(self.layer) for n, h in self.halves(kind, where=where).items()}
        return {n: pos.double() - neg.double() for n, (pos, neg) in both.items()}

    def vectors(self, kind: str = ANSWERS, where: str = "") -> dict[str, Tensor]:
        """The mean difference (d_model,) float64 of each behaviour's pairs, as long as it is; `where` as in `halves`."""
        return {n: directions.mean(*h.at(self.layer)) for n, h in self.halves(kind, where=where).items()}

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

    def unlike(self, cases: Iterable[tuple[str, str, int]], draws: int, seed: int = 0) -> Iterator[Tensor]:
        """For each case, a kind of pairs, a behaviour and a layer, random directions (draws, d_model) float64 of length one with the
        covariance of the user's tokens after that layer. One kind and behaviour weighs the same tokens at every layer."""
        rows: dict[int, Tensor] = {}
        order: dict[tuple[str, str], int] = {}
        for kind, name, k in cases:
            if k not in rows:
                rows[k] = store.kept(reading.rows, self.model, self._prompts, k)
            at = seed + order.setdefault((kind, name), len(order))
            yield nulls.like_rows(torch.eye(self.model.d_model)[0], rows[k], draws, at)

    def tokens_read(self, kind: str = ANSWERS) -> float:
        """How many tokens a forward pass over one side of a pair takes, mean of pairs and behaviours: its price."""
        tokenizer = self.model.tokenizer
        laid: list[tuple[Tokens, Tokens]] = []
        for b in self.data.values():
            if kind == PADDED:
                laid += [caa.padded_pair(tokenizer, p) for p in b.system_pairs]
            else:
                laid += [caa.tokens_of(tokenizer, p) for p in (b.system_pairs if kind == SYSTEM else b.answer_pairs)]
        return float(np.mean([len(side.ids) for sides in laid for side in sides]))

    def asked(self, measure: str, items: int = 0) -> dict[str, Continuations]:
        """Each behaviour's held-out test items (the first `items`; 0: all), ready to be scored by one of `propensity.MEASURES` under any
        vector."""
        if (measure, items) not in self._asked:
            each = {n: b.test[: items or None] for n, b in self.data.items()}
            ready = propensity.MEASURES[measure]
            self._asked[measure, items] = {n: ready(self.model, part, self.layer) for n, part in each.items()}
        return self._asked[measure, items]

    def tested(self, items: int = 0) -> dict[str, Continuations]:
        """The same by written completions, which everything but notebook 00 scores."""
        return self.asked(propensity.WRITTEN, items)

    def gradients(self, items: int = 0) -> dict[str, np.ndarray]:
        """The linear response (items, d_model) of those items' log-odds to a vector added at the layer."""
        return {n: scoring.linear_response(where) for n, where in self.tested(items).items()}

    def slopes(self, items: int = 0, part: str = "test") -> dict[str, np.ndarray]:
        """The same at every layer of `layers`, of test or dev items: (layers, items, d_model) nats a unit, from one backward pass."""
        at, width = self.layers, self.model.d_model
        each = {n: getattr(b, part)[: items or None] for n, b in self.data.items()}
        scored = {n: propensity.of_items(self.model, x, at[0]) for n, x in each.items()}
        return {n: scoring.linear_response(x, at[1:]).reshape(len(at), -1, width) for n, x in scored.items()}

    def response(self, name: str, vectors: Tensor, length: float, items: int = 0) -> np.ndarray:
        """By gradient, the change of each item's log-odds, in nats, from each of `vectors` (n, d_model) brought to `length` residual
        norms: (n, items)."""
        unit = (vectors / vectors.norm(dim=-1, keepdim=True)).double().numpy()
        return length * self.residual_norm * unit @ scoring.linear_response(self.tested(items)[name]).T

    def responses(self, vectors: Mapping[str, Tensor], length: float, items: int = 0) -> np.ndarray:
        """The same for each behaviour's own `vectors` (n, d_model), mean of its items: (n, behaviours)."""
        return np.stack([self.response(n, v, length, items).mean(1) for n, v in vectors.items()], axis=1)

    def compare(self, vectors: Mapping[str, Mapping[str, Tensor]], length: float, items: int = 0) -> Compared:
        """The same by way and behaviour: of each behaviour's own vector (d_model,), or mean of several (n, d_model)."""
        return Compared(
            {
                way: {n: self.response(n, v.reshape(-1, v.shape[-1]), length, items).mean(0) for n, v in of.items()}
                for way, of in vectors.items()
            },
            length,
        )

    def chance(self, kind: str, draws: int, length: float, items: int = 0, seed: int = 0) -> dict[str, np.ndarray]:
        """What vectors that hold nothing of a behaviour do to it, one vector a behaviour and draw: by the kind of null the mean
        response of its items, (draws, behaviours) in nats. Of OTHERS, vectors are dealt out so that none has its own."""
        drawn = {n: self.nulls(n, draws, seed, kind) for n in self.names}
        found = {
            null: self.responses({n: x[null] for n, x in drawn.items()}, length, items)
            for null in (RANDOM, LIKE_ROWS, SHUFFLED)
        }
        if len(self.names) > 1:
            every, place = pooled(self.vectors(kind)), np.arange(len(self.names))
            given = self.responses(dict.fromkeys(self.names, every), length, items)  # (whose vector, behaviour)
            found[OTHERS] = given[nulls.elsewhere(len(place), draws, seed), place]
        return found

    def instructed(self, measure: str, items: int) -> dict[str, Changes]:
        """By behaviour: how far `measure`, one of `propensity.MEASURES`, moves on each of the first test `items` between a positive and a
        negative system prompt of the behaviour's own, and of another one's: each item has another pair and another foreign
        behaviour."""
        found = {}
        for i, (n, b) in enumerate(self.data.items()):
            asked, others = b.test[:items], [*self.names[i + 1 :], *self.names[:i]]
            foreign = [self.data[others[j % len(others)]] for j in range(len(asked))]
            pairs = [
                x.system_pairs[j % len(x.system_pairs)]
                for who in ([b] * len(asked), foreign)
                for j, x in enumerate(who)
            ]
            moved = propensity.instructed(self.model, measure, asked * 2, self.layer, pairs)
            found[n] = Changes(moved[: len(asked)], moved[len(asked) :])
        return found

    def steered(self, measure: str, items: int, length: float, kind: str = ANSWERS) -> dict[str, Changes]:
        """The same by gradient under the behaviour's own vector, and under every other behaviour's, `length` residual norms long."""
        units = torch.stack(list(self.steps(kind, length).values())).double().numpy()
        slopes = self.gradients()  # of all items, which other notebooks want too
        if measure != propensity.WRITTEN:
            slopes = {n: scoring.linear_response(where) for n, where in self.asked(measure, items).items()}
        found = {}
        for i, n in enumerate(self.names):
            moved = propensity.content(measure, slopes[n])[:items] @ units.T
            found[n] = Changes(moved[:, i], np.delete(moved, i, 1).ravel())
        return found

    def change(self, name: str, vectors: Tensor, length: float, items: int = 0, per_token: bool = False) -> np.ndarray:
        """The same by a finite step: the steered model's log-odds less the unsteered one's, (n, items); `per_token`, of log-odds in
        which each log p is divided by its completion's tokens."""
        units = [v / v.norm() * self.residual_norm for v in vectors]
        scores = scoring.log_odds(self.tested(items)[name], units, [0.0, length], per_token)
        return scores[:, 1] - scores[:, 0]

    def by_layer(
        self, kind: str = ANSWERS, length: float = 0.1, where: str = "", part: str = "dev", items: int = 0
    ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """On dev items, or the first `items` of the test items, and by gradient, at every layer of `layers`: each behaviour's response
        (layers,) in nats to its own vector of that kind (`where` as in `halves`), `length` residual norms long; and the standard
        deviation of random directions' responses (layers,)."""
        own, chance = {}, {}
        slopes = self.slopes(items, part)
        for n, h in self.halves(kind, where=where).items():
            at_each = slopes[n].mean(1) * length * self.lengths.stream[:, None]
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

    def at_kl(
        self,
        vectors: Mapping[str, Tensor],
        strengths: Sequence[float],
        target: float,
        prompts: int,
        measured: int,
        items: int = 0,
    ) -> dict[str, AtKL]:
        """Each behaviour's own `vectors` (n, d_model) at the length, in residual norms, at which they change the model's own replies
        to its first open `prompts` by `target` nats a token: see `propensity.at_kl`. The change (n,) is that of the first `items`,
        estimated from `measured` of them (`estimated`)."""
        found = {}
        for n, v in vectors.items():
            units = [x / x.norm() * self.residual_norm for x in v]
            own = propensity.of_replies(self.model, self.data[n].open[:prompts], self.layer)
            at = propensity.at_kl(self.tested(measured)[n], own, units, strengths, target)
            predicted = self.response(n, v, 1.0, items) * at.strength[:, None]
            found[n] = at._replace(change=estimated(at.change, predicted))
        return found

    def doses(
        self,
        vectors: Mapping[str, Tensor],
        strengths: Sequence[float],
        prompts: int,
        pieces: int,
        measured: int,
        items: int = 0,
    ) -> Doses:
        """What each behaviour's own `vectors` (n, d_model) do at every one of `strengths`, in residual norms, 0 among them: to its
        first `items`, estimated from finite steps on `measured` of them; to the replies to its first open `prompts`; and to `pieces`
        of packaged plain text."""
        plain = propensity.of_text(self.model, text.excerpt("wiki", 40_000), self.layer, chunks=pieces)
        change, kl, loss = [], [], []
        for n, v in vectors.items():
            units = [x / x.norm() * self.residual_norm for x in v]
            own = propensity.of_replies(self.model, self.data[n].open[:prompts], self.layer)
            odds = scoring.log_odds(self.tested(measured)[n], units, strengths)  # (vectors, strengths, measured)
            predicted = self.response(n, v, 1.0, items)[:, None] * np.asarray(strengths)[:, None]
            change.append(estimated(odds - odds[:, [list(strengths).index(0)]], predicted))
            kl.append(scoring.kl(own, units, strengths).mean(-1))
            loss.append(scoring.text_loss(plain, units, strengths).mean(-1))
        return Doses(np.stack(change), np.stack(kl), np.stack(loss))

    def says(self, ways: Mapping[str, Mapping[str, Tensor]], strengths: Sequence[float], tokens: int) -> Markdown:
        """A table of what the model answers to each behaviour's first open question, under nothing and under its vector by each of
        `ways` at each of `strengths`: a row for each behaviour, replies cut short."""
        steps = {
            f"{way}, {x:+g}": {n: v / v.norm() * x * self.residual_norm for n, v in of.items()}
            for way, of in ways.items()
            for x in strengths
        }
        said = propensity.say(self.model, self.data, self.layer, steps, 1, tokens)
        body = [
            [f"**{n}**: {b.open[0]}", *(textwrap.shorten(said[way][n][0], SHOWN, placeholder=" …") for way in said)]
            for n, b in self.data.items()
        ]
        return table(["asked", *said], body)

    def say(self, question: str, vectors: dict[str, Tensor], length: float, tokens: int = 40) -> Markdown:
        """A table of what the model answers when each vector, at `length` residual norms, is added to its answer."""
        ask = {"nothing": torch.zeros(self.model.d_model), **{n: v / v.norm() for n, v in vectors.items()}}
        pushes = torch.stack([v.float() * length * self.residual_norm for v in ask.values()])
        said = replies.generate(self.model, [question] * len(ask), self.layer, pushes, max_new_tokens=tokens)
        return table(["added", "reply"], [list(row) for row in zip(ask, said, strict=True)])

    def marked(self, name: str) -> Markdown:
        """A table with the first of a behaviour's pairs and prompts, in «guillemets» the tokens that vectors are read from and added to."""
        b, tokenizer, where = self.data[name], self.model.tokenizer, self.session.profile.answers
        system, answer = (
            caa.tokens_of(tokenizer, x[0], closed=where == "turn")[0] for x in (b.system_pairs, b.answer_pairs)
        )
        places = {
            f"read, {ANSWERS} ({caa.READ[where]})": (answer, "answer" if where == "answer" else "last"),
            f"read, {SYSTEM} (last token)": (system, "last"),
            "added to": (tokens.chat(tokenizer, b.open[0]), "response"),
        }
        lines = []
        for what, (laid, at) in places.items():
            batch = tokens.pad([laid], self.model.pad_id)
            lines.append([what, latents.cell(tokens.provenance(tokenizer, batch, tokens.positions(batch, at)))])
        return table(["tokens", "in «guillemets»"], lines)

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
        registry, and where the profile does not say how one is trained."""
        how = self.session.profile.sae
        if not self._trained or not (how and how.train):
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

    def one_row(self, rows: int, seed: int = 0) -> dict[str, Interval]:
        """Explained variance, over documents, of a dictionary with a single row, the direction that first tokens bring: over every token of
        `rows` rows of text, over all of the text's tokens but the first of a row, and over those that are no outliers either."""
        used = self.text[0]
        some = evaluation.spliceable(used, rows, seed)
        chosen = some.kept.clone()
        chosen[:, 0] = True
        every = activations.Array(reading.packed(self.model, some.ids, [self.layer])[self.layer].cpu()[chosen])
        documents = torch.from_numpy(some.document)[:, None].expand_as(chosen)[chosen]
        rest = activations.Samples(used.folder, self.layer, verify=False, outlier=float("inf"))
        row = cast(Dictionary, evaluation.Principal(every.tensor.float(), 1))
        parts = ((every, documents), *((x, x.named("document")) for x in (rest, used)))
        found = (evaluation.explained([evaluation.evaluate(row, part)], of) for part, of in parts)
        return dict(zip(TOKENS, found, strict=True))

    def loss_added(self, dictionaries: Mapping[str, Dictionary], rows: int, seed: int = 0) -> dict[str, np.ndarray]:
        """Next-token loss in nats a token that each of `dictionaries` adds when it stands in for the stream on `rows` rows of held-out
        text, and MEAN, the mean activation: the mean of each document (documents,)."""
        some = evaluation.spliceable(self.text[1], rows, seed)
        mean, made = self.text[0].sample(50_000, seed).mean(0), list(dictionaries.values())
        found = evaluation.loss_recovered(self.model, made, self.layer, some.ids, some.kept, mean, self.text[1].limit)
        parts = {n: x.sae - x.model for n, x in zip(dictionaries, found, strict=True)}
        parts[MEAN] = found[0].mean - found[0].model
        count = stats.grouped(np.ones(len(some.document)), some.document)
        return {n: stats.grouped(x.numpy(), some.document) / count for n, x in parts.items()}

    def contexts(self, seed: int = 0, limit: int = 1200) -> list[Latent]:
        """What each latent of that SAE responds to, in `limit` rows of its text (few in a fast run); made once, then kept with it."""
        s = self.session
        loaded, folder = train.dictionary(s.profile, self.text[0], s.device, seed, s.fast)
        return latents.of(folder, self.model, loaded.sae, self.text[0], limit=FAST_ROWS if s.fast else limit)

    def labels(self, loaded: Loaded, wanted: Iterable[int], seed: int = 0) -> dict[int, str]:
        """What latents of that SAE are called, those that have a label: see `labels`. None of one that was trained in a
        fast run, or from another seed than 0: the profile's file names the latents of another."""
        s = self.session
        return {} if self._trained and (s.fast or seed) else labels.of(s.profile, loaded, wanted)

    def evidence(
        self, sae: Dictionary, words: Sequence[Latent], length: float, n: int, k: int, items: int = 0
    ) -> dict[str, Listed]:
        """What each behaviour's top `n` latents by a pursuit with `k` rows, and its top n by the codes of its answer
        pairs, have to do with it: chosen on every other pair and asked of the rest, rows added `length` residual norms
        long. `words`: the SAE's `contexts`, which say what is alive. See `evidence`."""
        alive, step = torch.tensor([one.frequency > 0 for one in words]), length * self.residual_norm
        found, gradients = {}, self.gradients(items)
        for name, h in self.halves().items():
            made, held = evidence.halved(h.at(self.layer))
            found[name] = evidence.of_latents(sae, made, held, gradients[name], step, k, n, alive)
        return found


ONE = Sizes(1, 1)  # the cosine with the mean takes neither components nor latents
ASKED = (
    "moved at this layer, nats",
    "of it along v",
    "rho by that share",
    "cosine beyond chance",
    "rho, and those not excluded",
    "verdict",
)


class Asked(NamedTuple):
    """A fine-tune and a behaviour: the `value` of the measure; how far the change at the layer moves the behaviour, all of it (`nats`) and
    `along` its vector; the `ruler`, or `why` there is none; and `second`, that of the share along the vector, which carries no verdict."""

    value: float
    nats: Interval
    along: Interval
    ruler: Ruler | None
    why: str
    second: Ruler | None = None

    @property
    def rhos(self) -> mixtures.Rhos | None:
        """The rhos that are not excluded. 0 stays open on a ruler that chance misleads, unless every rho up to a half is excluded."""
        if not self.ruler:
            return None
        found = self.ruler.read(self.value)
        return found._replace(low=0.0) if self.misled and found.low <= 0.5 else found

    @property
    def misled(self) -> bool:
        """Whether the ruler calls changes by chance related, or the same, more often than `mixtures.WRONG`: it can tell the same, and not
        the same, but nothing from chance."""
        return self.ruler is not None and self.ruler.errors[2] > mixtures.WRONG

    @property
    def rho(self) -> float:
        """The rho that fits the value best; nan without a ruler."""
        return self.ruler.rho(self.value) if self.ruler else float("nan")

    @property
    def rho_by_share(self) -> float:
        """The rho that fits the share of the shift along the vector best; nan without a ruler."""
        return self.second.rho(self.along.value / self.nats.value) if self.second else float("nan")

    @property
    def verdict(self) -> str:
        """Of `mixtures.VERDICTS`, or not run."""
        return self.rhos.verdict if self.rhos else "not run"

    def span(self) -> Interval | None:
        """The rhos as a figure draws them, with the one that fits best."""
        return Interval(min(max(self.rho, self.rhos.low), self.rhos.high), *self.rhos) if self.rhos else None

    def cells(self) -> list[str]:
        """A row of a table under ASKED."""
        rhos = f"{self.rho:+.2f}, {self.rhos.low:.2f} to {self.rhos.high:.2f}" if self.rhos else "-"
        by_share = f"{self.rho_by_share:+.2f}" if self.second else "-"
        numbers = [f"{x.value:+.1f} [{x.low:+.1f}, {x.high:+.1f}]" for x in (self.nats, self.along)]
        kept = self.misled and self.rhos is not None and not self.rhos.low
        why = f": {self.why}" if self.why else " (its ruler, misled by chance, cannot say *related*)" if kept else ""
        verdict = f"**{self.verdict}**{why}"
        return [*numbers, by_share, f"{self.value:+.2f}", rhos, verdict]


@dataclass(frozen=True, eq=False)
class Two:
    """A pair of models that read the same tokens: `before` preference training and `after`, each a Single at one layer; their
    names, which behaviours were trained as far as that is known, and, where the profile has one, a fine-tune without preferences."""

    before: Single
    after: Single
    unrelated: Single | None
    names: tuple[str, str]
    trained: list[str]
    _shifts: dict[tuple[int, str], dict[str, dict[str, np.ndarray]]] = field(default_factory=dict, repr=False)

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

        if (items, part) not in self._shifts:
            start = odds(self.before)
            found = {who: odds(one) for who, one in self.fine_tunes.items()}
            self._shifts[items, part] = {who: {n: x - start[n] for n, x in by.items()} for who, by in found.items()}
        return self._shifts[items, part]

    def spreads(self) -> dict[str, float]:
        """The standard deviation of each behaviour's log-odds over its test items in the base, in nats: the unit in which
        behaviours compare, whose completions are of any length."""
        none = torch.zeros(1, self.before.model.d_model)
        odds = {n: scoring.log_odds(where, none, [0.0])[0, 0] for n, where in self.before.tested().items()}
        return {n: float(x.std(ddof=1)) for n, x in odds.items()}

    def moved(self) -> dict[str, dict[str, np.ndarray]]:
        """`shifts` (items,) in standard deviations: each over its behaviour's of `spreads`."""
        spread = self.spreads()
        return {who: {n: x / spread[n] for n, x in by.items()} for who, by in self.shifts().items()}

    def beyond(self) -> dict[str, np.ndarray]:
        """By behaviour, how far preference training moved each item (items,), less the unrelated fine-tune where there is one, in
        standard deviations."""
        moved = self.moved()
        chat, other = moved[self.names[1]], moved.get(UNRELATED)
        return {n: x - other[n] if other else x for n, x in chat.items()}

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

    @cached_property
    def steered(self) -> dict[str, Steered]:
        """Each behaviour as a ruler sees it: its vector in the model before training, the mean effect of a push at every token on its test
        items, and its pairs' differences."""
        base, pairs, vectors = self.before, self.before.differences(), self.before.vectors()
        return {
            n: Steered(vectors[n], banks.gradient(base.model, b.test[:READ], base.layer), pairs[n])
            for n, b in base.data.items()
        }

    @cached_property
    def bank(self) -> Bank | None:
        """The profile's bank of fine-tunes; None where it names none."""
        section = self.before.session.profile.pair
        return Bank(session.path(section.bank), section.base) if section and section.bank else None

    def reading(self, rows: int, seed: int = 0) -> banks.Text:
        """So many rows of held-out text on which `change` reads what training did."""
        return banks.Text.of(self.texts[self.names[1]][1].base, rows, seed)

    def change(self, fine_tune: LM | str, where: banks.Text) -> Change:
        """What a fine-tune of the base, or one of that name, changes at the layer on that text."""
        return banks.on_text(self.before.model, fine_tune, where, self.before.layer, self.limit)

    def chance(self, where: banks.Text, seed: int = 0) -> dict[str, Change]:
        """Changes that other training makes, by name: of a bank the style's, the swapped preferences' and every behaviour's first, which
        are put to their items while they are loaded. Without a bank the unrelated fine-tune's and others like it with a mean drawn at
        random; without that, drawn like the pair's own."""
        if self.bank:
            found = {a: self.change(self.bank.model(a), where) for a in self.bank.by_chance()}
            for n, a in self.bank.first(self.before.names).items():
                found[a] = self.change(self.bank.model(a), where)
                self.at_items(self.bank.model(a), n)  # kept on disk: `ask` wants it
            return found
        like = self.change((self.unrelated or self.after).model, where)
        found = {UNRELATED: like} if self.unrelated else {}
        return found | {f"drawn {i}": c for i, c in enumerate(like.redrawn(DRAWN, seed))}

    def _others(self, chance: Mapping[str, Change], name: str, but: str = "") -> list[Change]:
        """The changes by chance of other training than for a behaviour, without the one called `but`."""
        about = self.bank.names(trait=name, swapped=False) if self.bank else []
        return [c for n, c in chance.items() if n not in (*about, but)]

    def diff_latents(self, seed: int = 0) -> Tensor:
        """Rows (latents, d_model) of the diff-SAE of one seed that fire on held-out text, the most used first."""
        s, (fitting, held) = self.before.session, self.texts[self.names[1]]
        profile, both = diff.settled(s.profile), (self.before.model, self.after.model)
        sae = diff.dictionary(profile, fitting.difference, *both, s.device, seed, s.fast)[0].sae
        return decompose.rows_of(sae)[evaluation.evaluate(sae, held.difference).order]

    def known(self, where: banks.Text, chance: Mapping[str, Change], draws: int = 6, seed: int = 0) -> dict[str, Asked]:
        """What the bank's models with a planted answer get: `ask` by the name of the plant; none without a bank."""
        if not self.bank:
            return {}
        below = self.bank.background
        return {
            n: self.ask(self.bank.model(below, a), trait, where, chance, draws, seed, but=below)
            for n, (a, trait) in self.bank.known.items()
        }

    def trained_vectors(self) -> dict[str, np.ndarray]:
        """The bank's vectors trained by preference at each of the steps they were looked at, by kind: (behaviours, looks, d_model), in the
        order of the names; none without a bank, or where it lacks a behaviour."""
        paths = self.bank.paths if self.bank else {}
        return {
            kind: np.stack([paths[f"{n}.{kind}"].numpy() for n in self.before.names])
            for kind in banks.KINDS
            if all(f"{n}.{kind}" in paths for n in self.before.names)
        }

    def overlaps(
        self, adapters: Mapping[str, str], chance: Mapping[str, Change], nats: Mapping[str, float]
    ) -> np.ndarray:
        """Signed cosines of each behaviour's vector with the mean changes of the `adapters`, one a behaviour, beyond those of changes by
        chance that are mild at the behaviour's size of shift: (fine-tunes, vectors)."""

        def one(adapter: str, n: str) -> float:
            others = mixtures.mild(self._others(chance, n, adapter), self.steered[n], nats[n])
            return mixtures.beyond(mixtures.MEAN, chance[adapter], others, self.steered[n], ONE)

        return np.array([[one(a, n) for n in adapters] for a in adapters.values()])

    def projections(self, adapters: Mapping[str, str], chance: Mapping[str, Change]) -> np.ndarray:
        """How far their mean changes go along each vector, in the residual's own units: (fine-tunes, vectors)."""
        vectors = self.before.vectors()
        unit = torch.stack([vectors[n] / vectors[n].norm() for n in adapters])
        return torch.stack([unit @ chance[a].mean for a in adapters.values()]).numpy()

    def by_layer(self) -> dict[str, np.ndarray]:
        """By fine-tune the cosine of every behaviour's vector with the mean change on its contrast pairs, at the same layer, each of those
        of the fine-tune: (behaviours, layers)."""
        before = self.before.halves()
        found = {}
        for who, one in self.fine_tunes.items():
            after, table = one.halves(), []
            for n in self.before.names:
                both = [
                    (directions.mean(*before[n].at(k)), diff.at_pairs(before[n], after[n], k).mean) for k in one.layers
                ]
                table.append([float(torch.cosine_similarity(v, m, dim=0)) for v, m in both])
            found[who] = np.array(table)
        return found

    def rulers(
        self, measure: str, chance: Mapping[str, Change], nats: float, sizes: Sizes, draws: int = 6, seed: int = 0
    ) -> dict[str, Ruler]:
        """One of `mixtures.MEASURES` of mixtures with changes by chance, at one size of shift, for every behaviour that has a ruler there
        (`mixtures.NoRuler` says why one has none)."""
        found = {}
        for n, one in self.steered.items():
            with suppress(NoRuler):
                others = self._others(chance, n)
                found[n] = store.kept(mixtures.ruler, measure, others, one, nats, sizes, draws=draws, seed=seed)
        return found

    def ask(
        self,
        fine_tune: LM | str,
        name: str,
        where: banks.Text,
        chance: Mapping[str, Change],
        draws: int = 6,
        seed: int = 0,
        but: str = "",
    ) -> Asked:
        """Whether a fine-tune changed the stream along a behaviour's vector: the signed cosine with the mean difference, beyond that of
        changes by chance, on a ruler of as many nats as its change at this layer moves the behaviour by. `but`: the change by chance
        that the fine-tune itself holds."""
        one, at = self.steered[name], self.at_items(fine_tune, name)
        nats, along = stats.over(at.whole), stats.over(at.along)
        others = mixtures.mild(self._others(chance, name, but), one, max(nats.value, 0.0))
        value = mixtures.beyond(mixtures.MEAN, self.change(fine_tune, where), others, one, ONE)
        if nats.low <= 0:
            way = "moves it the other way" if nats.high < 0 else "does not move it"
            return Asked(value, nats, along, None, f"the change at this layer {way}")
        try:
            ruler, second = (
                mixtures.ruler(m, others, one, nats.value, ONE, draws=draws, seed=seed) for m in mixtures.QUICK
            )
        except NoRuler as error:
            return Asked(value, nats, along, None, str(error))
        if max(ruler.errors[:2]) > mixtures.WRONG:
            errs = ", ".join(f"{x:.0%}" for x in ruler.errors)
            return Asked(value, nats, along, None, f"at this shift its ruler errs too often ({errs})")
        return Asked(value, nats, along, ruler, "", second)

    def at_items(self, fine_tune: LM | str, name: str) -> AtItems:
        """What such a fine-tune's change at the layer does to a behaviour's first test items: all of it, and along the behaviour's vector."""
        base = self.before
        v, items = base.vectors()[name], base.data[name].test[:READ]
        return banks.at_items(base.model, fine_tune, items, v, base.layer, self.limit)

    def forecast(self, asks: int) -> str:
        """About how long so many calls of `ask` take on this machine, from one timed pass over items: each call is one, and every
        behaviour is read once with its gradient, which is three."""
        base, n = self.before, len(self.before.names)
        laid = [t for x in base.tested().values() for group in x.sequences for t in group]
        some = laid[:: max(1, len(laid) // 16)][:16]
        began = time.perf_counter()
        reading.residuals(base.model, some, base.model.layers - 1)
        speed = sum(len(t.ids) for t in some) / (time.perf_counter() - began)
        hours = (asks + 3 * n) * sum(len(t.ids) for t in laid) / n / speed / 3600
        took = f"{hours:.1f} hours" if hours >= 1 else f"{60 * hours:.2g} minutes"
        return f"{asks} questions to fine-tunes at {speed:,.0f} tokens a second: about {took}, where nothing is kept"

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
    """The profile's pair of models; ModelError where it names none. What is trained is read up to the first layer above the steered one:
    further up a change has gone through blocks that changed too."""
    section = s.profile.pair
    base, chat = models.load_pair(s.profile, s.device, s.dtype)
    other = models.load(section.unrelated, s.device, s.dtype) if section and section.unrelated else None
    trained = list(section.trained) if section else []
    data = _data(s, trained)
    layer, layers = models.choose_layers(base, s.profile, s.fast)

    above = [k for k in layers if k > layer]
    few = layers[: layers.index(above[0]) + 1] if above else layers

    def of(model: LM, at: list[int]) -> Single:
        return Single(s, model.read_as(chat.tokenizer), layer, at, data)

    names = section.names if section else ("base", "chat")
    fine_tunes = of(chat, few), of(other, few) if other else None
    return Two(of(base, layers), *fine_tunes, names, [n for n in trained if n in data])


def diff_latents(lab: Single, seed: int = 0) -> Tensor:
    """`Two.diff_latents` of the pair of a Single's profile, whose models are loaded only where these are not kept."""
    s = lab.session
    of = [models.key(name, s.device, s.dtype) for name in models.pair_names(s.profile)]
    return store.kept(_diff_latents, s, seed, of, lab.text)


def _diff_latents(s: Session, seed: int, of: list[dict[str, str]], text: tuple[Samples, Samples]) -> Tensor:
    """The same; `of` and `text` say of which models, and of what they read."""
    return pair(s).diff_latents(seed)


def pooled(by_behavior: dict[str, Tensor]) -> Tensor:
    """The behaviours' tensors (behaviours, ...) in order, where all have one shape."""
    return torch.stack(list(by_behavior.values()))
