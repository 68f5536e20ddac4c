"""A model steered at its layer and looked at above it: `of(lab)`, with dictionaries of the later layers, for notebook 08.

    above = later.of(lab); above.layers, above.saes, above.vectors(0.1), above.changed(vectors, random)

Vectors here are made of every other answer pair, so that the rest can say whose a latent is. Knows how the helpers fit together;
nothing here judges.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, cast

import numpy as np
import torch
from IPython.display import Markdown
from torch import Tensor

from helpers import figures, nulls, stats, store
from helpers.claims import table
from helpers.lm import models
from helpers.lm.downstream import Downstream
from helpers.pair import matching
from helpers.sae import decompose, downstream, evaluation, evidence, harvest, latents, train
from helpers.sae.activations import Samples
from helpers.sae.downstream import Linear, Parted, Scores
from helpers.sae.latents import Latent
from helpers.sae.saes import Loaded
from helpers.sae.topk import Dictionary
from helpers.steering import directions, propensity
from helpers.study import Single

COUNT = 3  # layers above the steered one, where the profile's sweep has fewer
FAST_COUNT = 2
AT_ONCE = 25  # vectors whose changes are kept together
SAE, FROZEN, COMPONENTS, SINGULAR, RANDOM = BASES = (
    "latents of the SAE",
    "latents of random rows",
    "principal components",
    "singular vectors of the next block",
    "random axes",
)


def layers(lab: Single) -> list[int]:
    """The steered layer and those above it that are looked at: of the profile's sweep, or that a registry's SAEs are named for; evenly
    spread where these are too few. A fast run has two above."""
    how, top = lab.session.profile.sae, lab.model.layers - 1
    named = bool(how and how.release)
    found = sorted(
        {k for k in (how.ids_above if how and named else lab.session.profile.layers) if lab.layer < k <= top}
    )
    if len(found) < COUNT and not named:
        found = sorted(set(np.linspace(lab.layer, top, COUNT + 1).round().astype(int).tolist()[1:]) - {lab.layer})
    return [lab.layer, *(found[-FAST_COUNT:] if lab.session.fast else found)]


class Changed(NamedTuple):
    """What vectors change of every latent, by layer: of the `own` and of `random` ones, (vectors, parts, latents); on two parts of the
    prompts, neither in the other."""

    own: dict[int, Tensor]
    random: dict[int, Tensor]

    def scores(self, layer: int, part: int | None = None) -> Scores:
        """Scores at a layer on one part of the prompts, or on all."""
        pick = (lambda x: x.mean(1)) if part is None else (lambda x: x[:, part])
        return downstream.scores(pick(self.own[layer]), pick(self.random[layer]))

    def tops(self, layer: int, n: int, part: int | None = None) -> np.ndarray:
        """The n latents of largest score of each own vector: (vectors, n), as `downstream.tops`."""
        return downstream.tops(self.scores(layer, part).own, n)

    def again(self, layer: int, n: int) -> np.ndarray:
        """The share of each vector's tops on the one part of the prompts (rows) that each vector's tops on the other part hold too
        (columns), mean of both ways round: (vectors, vectors)."""
        return self._again([self.scores(layer, part).own for part in (0, 1)], n)

    def again_by_chance(self, layer: int, n: int) -> np.ndarray:
        """The same of random vectors, each with itself: (draws,)."""
        return np.diag(self._again([self.scores(layer, part).null for part in (0, 1)], n))

    @staticmethod
    def _again(halves: Sequence[np.ndarray], n: int) -> np.ndarray:
        one, other = (downstream.tops(z, n) for z in halves)
        return (downstream.shared(one, other) + downstream.shared(other, one)) / 2


ALONE = [
    "the vector: first-order effect, nats",
    *(
        f"{who}: {what}"
        for who in ("its rows", "random rows")
        for what in ("best", "mean", "length above", "cosine above")
    ),
]


def best_on_others(nats: np.ndarray) -> float:
    """The effect of the best row, chosen on every other item and measured on the rest, both ways round; `nats` (rows, items)."""
    one, other = nats[:, ::2].mean(1), nats[:, 1::2].mean(1)
    return float(other[one.argmax()] + one[other.argmax()]) / 2


class Alone(NamedTuple):
    """Single rows beside a whole vector of their length: the `latents` (n,) that make up most of it; what the `vector` does to the
    behaviour's items to first order, in nats (items,); by two kinds, those rows and rows drawn at random, the same of each row,
    `nats` (2, n, items); and above, (2, n), how long what arrives is, as a share of the vector's, and its cosine with that."""

    latents: list[int]
    vector: np.ndarray
    nats: np.ndarray
    length: np.ndarray
    cosine: np.ndarray

    def cells(self) -> list[str]:
        """A row of a table under ALONE."""
        whole = self.vector.mean()
        words = [f"{whole:+.2f}"]
        for nats, long, cosine in zip(self.nats, self.length, self.cosine, strict=True):
            shares = best_on_others(nats) / whole, nats.mean() / whole
            words += [*(f"{x:.0%}" for x in shares), f"{long.mean():.0%}", f"{cosine.mean():+.2f}"]
        return words


class Flow(NamedTuple):
    """What `figures.flow` draws."""

    nodes: list[figures.Node]
    links: list[tuple[int, int, float]]


@dataclass(frozen=True, eq=False)
class Later:
    """A Single, the `layers` looked at, the steered one first, and of each its SAE and text: to train on, and held out."""

    lab: Single
    layers: list[int]
    saes: dict[int, Loaded]
    texts: dict[int, tuple[Samples, Samples]]

    @property
    def above(self) -> list[int]:
        """The layers above the steered one."""
        return self.layers[1:]

    @cached_property
    def _halves(self) -> dict[str, dict[int, tuple[evidence.Sides, evidence.Sides]]]:
        """By behaviour and layer, the sides of every other pair and of the rest."""
        read = self.lab.halves(layers=self.layers)
        return {n: {k: evidence.halved(h.at(k)) for k in self.layers} for n, h in read.items()}

    def vectors(self, length: float) -> Tensor:
        """The mean difference of every other pair of each behaviour, `length` residual norms long: (behaviours, d_model) float32."""
        own = torch.stack([directions.mean(*h[self.lab.layer][0]) for h in self._halves.values()])
        return (own / own.norm(dim=1, keepdim=True) * length * self.lab.residual_norm).float()

    def random(self, length: float, draws: int, seed: int = 0) -> Tensor:
        """Random vectors as long, with the stream's covariance: (draws, d_model) float32."""
        return nulls.like_rows(self.vectors(length)[0], self.lab.residuals, draws, seed).float()

    def replies(self, prompts: int, tokens: int) -> Downstream:
        """The model's own unsteered replies, of so many tokens, to the first open `prompts` of every behaviour."""
        asked = [q for b in self.lab.data.values() for q in b.open[:prompts]]
        return Downstream.of(propensity.of_replies(self.lab.model, asked, self.lab.layer, tokens))

    def items(self, count: int) -> dict[str, Downstream]:
        """Each behaviour's first test items, whose written completions are scored."""
        return {n: Downstream.of(x) for n, x in self.lab.tested(count).items()}

    def changed(self, where: Downstream, own: Tensor, random: Tensor) -> Changed:
        """What vectors (n, d_model) change of every latent; every other prompt is the other part."""
        bases = {str(k): self.saes[k].sae for k in self.layers}
        at, parts = {str(k): k for k in self.layers}, [i % 2 for i in range(len(where.sequences))]
        pieces = [own, *random.split(AT_ONCE)]  # each kept as soon as it is there
        found = [store.kept(downstream.changes, where, part, bases, at, parts) for part in pieces]
        joined = {k: torch.cat([part[str(k)] for part in found[1:]]) for k in self.layers}
        return Changed({k: found[0][str(k)] for k in self.layers}, joined)

    def told(self, layer: int) -> np.ndarray:
        """AUROC of each latent on the pairs of each behaviour that made no vector: (behaviours, latents)."""
        return np.stack([downstream.told(self.saes[layer].sae, *h[layer][1]) for h in self._halves.values()])

    def tell_apart(self, least: float) -> np.ndarray:
        """How many latents of a layer above, of all, tell each behaviour's kept pairs apart either way, mean of layers: (behaviours,)."""
        every = [self.told(k) for k in self.above]
        return np.mean([(np.maximum(x, 1 - x) >= least).sum(1) for x in every], axis=0)

    def belonging(self, changed: Changed, layer: int, n: int, least: float) -> tuple[np.ndarray, np.ndarray]:
        """The share of the n latents that each vector changes most that belong to each behaviour: of own vectors (behaviours,
        behaviours), and of random ones (draws, behaviours). See `downstream.belonging`."""
        found, told = changed.scores(layer), self.told(layer)
        own, null = (downstream.belonging(downstream.tops(z, n), told, least) for z in (found.own, found.null))
        return own, null

    def fits(self) -> Markdown:
        """A table of how each layer's SAE fits held-out text."""
        lines = []
        for k in self.layers:
            sae, (fitting, held) = self.saes[k].sae, self.texts[k]
            fit = evaluation.evaluate(sae, held)
            many = evaluation.evaluate(self.components(k, max(round(fit.l0), 1)), held)
            lines.append(
                [k, len(fitting), sae.cfg.d_sae, f"{fit.l0:.0f}", f"{fit.dead:.0%}", f"{fit.explained_variance:.2f}",
                 f"{many.explained_variance:.2f}"]
            )  # fmt: skip
        head = ["layer", "rows trained on", "latents", "per token", "never fired", "variance explained (held-out)"]
        return table([*head, "by as many components as fire per token"], lines)

    def components(self, layer: int, count: int = 0) -> Dictionary:
        """The first principal components of a layer's text, so many or (0) all."""
        rows = self.texts[layer][0].sample(20_000)
        width = rows.shape[1]
        return cast(Dictionary, evaluation.Principal(rows, min(count or width, width)))

    def bases(self, layer: int, seed: int = 0) -> dict[str, Dictionary]:
        """Dictionaries at a layer above, by BASES: the SAE; as many random rows with a trained encoder, none for an SAE out of a registry;
        all principal components; what the next block reads most; axes at right angles, turned at random."""
        s = self.lab.session
        found: dict[str, Dictionary] = {SAE: self.saes[layer].sae}
        if not (s.profile.sae and s.profile.sae.release):
            text = self.texts[layer][0]
            found[FROZEN] = train.dictionary(s.profile.above(layer), text, s.device, seed, s.fast, frozen=True)[0].sae
        found[COMPONENTS] = self.components(layer)
        if layer + 1 < self.lab.model.layers:
            found[SINGULAR] = cast(Dictionary, downstream.read_by(self.lab.model, layer))
        width = self.lab.model.d_model
        turned = torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(seed))).Q
        return found | {RANDOM: cast(Dictionary, downstream.Axes(turned))}

    def ranked(
        self, where: Downstream, vectors: Tensor, bases: Mapping[str, Dictionary], layer: int
    ) -> dict[str, Tensor]:
        """What vectors (n, d_model) change of each element of some bases at a layer, mean of all prompts: (n, elements)."""
        at, parts = dict.fromkeys(bases, layer), [0] * len(where.sequences)
        return {n: x[:, 0] for n, x in store.kept(downstream.changes, where, vectors, bases, at, parts).items()}

    def parted(
        self,
        items: Mapping[str, Downstream],
        layer: int,
        vectors: Tensor,
        basis: Dictionary,
        sets: Sequence[Sequence[Tensor]],
        alone: bool = False,
        like: Sequence[Tensor] | None = None,
    ) -> list[Parted]:
        """`downstream.parted` of every behaviour with its own sets of elements (and its own elements to be `like`)."""
        rulers: Sequence[Tensor | None] = like or [None] * len(vectors)
        each = zip(items.values(), vectors, sets, rulers, strict=True)
        return [store.kept(downstream.parted, x, layer, v, basis, list(own), alone, one) for x, v, own, one in each]

    def linear(self, prompts: int, tokens: int, strengths: Sequence[float]) -> Linear:
        """`downstream.linear` of every behaviour's vector, strengths in residual norms, in float32: the layer is as it was chosen."""
        s = self.lab.session
        exact = models.load(s.profile.chat, s.device, torch.float32)
        where = Downstream(exact, self.replies(prompts, tokens).sequences, self.lab.layer)
        return store.kept(downstream.linear, where, self.vectors(1.0), self.above, list(strengths))

    def followed(self, seed: int = 0) -> dict[int, matching.Match]:
        """For each layer above, the certified match of its latents with those of the layer looked at below it."""
        pairs = zip(self.above, self.layers, strict=False)
        rows = {k: decompose.rows_of(x.sae) for k, x in self.saes.items()}
        return {
            k: store.kept(matching.match, rows[k], rows[below], device=self.lab.session.device) for k, below in pairs
        }

    def counted(self, changed: Changed, q: float, n: int) -> Markdown:
        """A table of how many latents change more than by chance at each layer: by behaviours' vectors, of their n tops, and by random
        vectors."""
        lines = []
        for k in self.layers:
            own, null = downstream.discovered(changed.scores(k), q)
            among = np.take_along_axis(own, np.abs(changed.tops(k, n)) - 1, axis=1).sum(1).mean()
            own, null = own.sum(1), null.sum(1)
            lines.append(
                [
                    k,
                    f"{np.median(own):.0f} ({own.min()} to {own.max()})",
                    f"{among:.1f}",
                    f"{null.mean():.1f}",
                    null.max(),
                ]
            )
        head = ["by behaviours' vectors: median (range)", f"of their top {n}, mean", "by random vectors, mean", "most"]
        return table(["layer", *head], lines)

    def listed(self, changed: Changed, name: str, n: int, words: Mapping[int, Mapping[int, Latent]]) -> Markdown:
        """A table of the n latents that a behaviour's vector changes most at each layer above: score beside random vectors, and beside the
        other behaviours' vectors; AUROC on the pairs that made no vector; where they fire, by layer of `words`."""
        i, lines = self.lab.names.index(name), []
        for k in self.above:
            own = changed.own[k].mean(1)
            others = own[[j for j in range(len(own)) if j != i]]
            beside = downstream.scores(own[[i]], others).own[0] if len(others) > 2 else np.full(own.shape[1], np.nan)
            score, told = changed.scores(k).own[i], self.told(k)[i]
            for latent in np.abs(changed.tops(k, n)[i]) - 1:
                other = f"{beside[latent]:+.1f}" if np.isfinite(beside[latent]) else "-"
                number = [f"{score[latent]:+.0f}", other, f"{told[latent]:.2f}"]
                lines.append([k, latent, *number, *latents.cells(words[k][latent])])
        head = ["score beside random vectors", "beside other behaviours'", "AUROC", "fires most on", "makes likelier"]
        return table(["layer", "latent", *head], lines)

    def flow(self, changed: Changed, name: str, n: int, words: Mapping[int, Mapping[int, Latent]]) -> Flow:
        """The n latents that a behaviour's vector changes most at each layer, and which of them are matched."""
        i, place = self.lab.names.index(name), dict[tuple[int, int], int]()
        nodes, links = list[figures.Node](), list[tuple[int, int, float]]()
        for column, k in enumerate(self.layers):
            score = changed.scores(k).own[i]
            for latent in (np.abs(changed.tops(k, n)[i]) - 1).tolist():
                place[k, latent] = len(nodes)
                told = "<br>".join(f"{a}: {b}" for a, b in latents.facts(words[k][latent]).items())
                label = f"{latent} {latents.words(words[k][latent], 1)}"
                nodes.append(figures.Node(column, float(score[latent]), label, told))
        for (k, found), below in zip(self.followed().items(), self.layers, strict=False):
            for j in [j for layer, j in place if layer == k]:
                partner = below, int(found.B_for_A[j])
                if partner in place:
                    links.append((place[partner], place[k, j], float(found.score[j].clamp(0, 1))))
        return Flow(nodes, links)

    def met(self, changed: Changed, layer: int, n: int) -> np.ndarray:
        """The share of the n latents that each vector changes most at a layer above (rows) whose match in the layer looked at below it is
        among those that each vector changes most there, with the same sign (columns): (vectors, vectors)."""
        tops, below = changed.tops(layer, n), self.layers[self.layers.index(layer) - 1]
        partner = self.followed()[layer].B_for_A.cpu().numpy()[np.abs(tops) - 1] + 1  # 0 for one without
        return downstream.shared(partner * np.sign(tops), changed.tops(below, n))

    def matched(self, least: float, seed: int = 0) -> Markdown:
        """A table of the matches of `followed`: of how many the cosine is `least` or more, as many where the rows of the layer below are
        turned at random, and of two seeds of the steered layer's SAE."""
        rows, seeds = {k: decompose.rows_of(x.sae) for k, x in self.saes.items()}, self.lab.saes((seed, seed + 1))

        def line(what: str, found: matching.Match) -> list[str]:
            cosine = matching.cosines(found)
            return [what, f"{cosine.mean():.2f}", f"{(cosine >= least).mean():.1%}"]

        lines = []
        for (k, found), below in zip(self.followed().items(), self.layers, strict=False):
            floor = store.kept(matching.references, rows[k], rows[below], seed)["rotated"]
            lines += [
                line(f"layer {k} with layer {below}", found),
                line("the same, rows of the lower turned at random", floor),
            ]
        if len(seeds) > 1:
            one, other = (decompose.rows_of(x.sae) for x in seeds)
            two = store.kept(matching.match, one, other)
            lines.append(line(f"two seeds of layer {self.lab.layer}", two))
        return table(["latents matched one to one", "mean cosine", f"at {least:g} or more"], lines)

    def rows_alone(self, where: Downstream, layer: int, n: int, length: float, seed: int = 0) -> dict[str, Alone]:
        """What single rows of the steered layer's SAE do when they alone are added, as long as the vector: for each behaviour the n that
        make up most of its vector (signed pursuit), and n that fire on text, drawn at random."""
        basis, vectors = self.saes[self.lab.layer].sae, self.vectors(length)
        rows = decompose.unit_rows(decompose.rows_of(basis))[0].cpu() * vectors[0].norm()
        living = evaluation.evaluate(basis, self.texts[self.lab.layer][1]).order
        drawn = living[torch.randperm(len(living), generator=torch.Generator().manual_seed(seed))[:n]]
        codes = decompose.pursuit(rows, vectors, n).codes
        best = codes.abs().topk(n).indices
        pushed = [
            torch.cat([v[None], torch.where(c[b] < 0, -1.0, 1.0)[:, None] * rows[b], rows[drawn]])
            for v, c, b in zip(vectors, codes, best, strict=True)
        ]
        every, back = torch.cat(pushed).unique(dim=0, return_inverse=True)
        shifts = store.kept(downstream.shifts, where, every, layer)[back].split([len(x) for x in pushed])
        found = {}
        for name, own, arrived, b in zip(self.lab.names, pushed, shifts, best, strict=True):
            nats = self.lab.response(name, own, length)
            flat = arrived.flatten(1).double().numpy()
            long, cosine = np.linalg.norm(flat, axis=1), stats.cosine(flat, flat[:1])
            found[name] = Alone(
                b.tolist(),
                nats[0],
                nats[1:].reshape(2, n, -1),
                *((x / x[0])[1:].reshape(2, n) for x in (long, cosine)),
            )
        return found

    def contexts(self, layer: int, wanted: Sequence[int], limit: int = 250) -> dict[int, Latent]:
        """What some latents of a layer respond to, in `limit` rows of its text, and the words they make likelier."""
        limit = 30 if self.lab.session.fast else limit
        only = torch.tensor(sorted(set(wanted)))
        found = store.kept(
            latents.table, self.lab.model, self.saes[layer].sae, self.texts[layer][0], limit=limit, only=only
        )
        return {x.index: x for x in found}


def of(lab: Single, seed: int = 0) -> Later:
    """The layers above a Single's, with SAEs trained from one pass over text, or out of the registry. ProfileError where the profile
    does not say which, ValueError where no layer lies above."""
    s, at = lab.session, layers(lab)
    if len(at) < 2:
        raise ValueError(f"layer {lab.layer} of {lab.model.layers} was given; there is none above it to look at")
    own = s.profile.above(at[1])
    parts = [harvest.of_profile(lab.model, own, part, s.fast, at[1:]) for part in ("train", "held-out")]
    texts = {lab.layer: lab.text} | {k: (parts[0].at(k), parts[1].at(k)) for k in at[1:]}
    saes = {lab.layer: lab.sae(seed)}
    for i, k in enumerate(
        at[1:], 1
    ):  # each from a start of its own: like starts make like latents, whatever the layers have in common
        saes[k] = train.dictionary(s.profile.above(k), texts[k][0], s.device, seed + i, s.fast)[0]
    return Later(lab, at, saes, texts)
