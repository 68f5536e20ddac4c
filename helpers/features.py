"""Concepts of words and families of latents as notebook 09 asks for them: `concepts_of(lab)`, `families_of(lab, ...)`, `grown(lab, ...)`, a map.

Knows how the helpers fit together; nothing here judges.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from IPython.display import Markdown
from torch import Tensor

from helpers import figures, pages, store
from helpers.claims import table
from helpers.figures import Interactive
from helpers.pair import matching
from helpers.sae import decompose, families, latents, saes, train
from helpers.sae.families import Fired
from helpers.sae.latents import Latent
from helpers.sae.saes import Loaded
from helpers.session import Session
from helpers.steering import concepts
from helpers.steering.concepts import Followed, Following, Words
from helpers.store import write_file
from helpers.study import Single

# From a Gram matrix, words and a width to a number for each tree.
Measure = Callable[[np.ndarray, Words, int], np.ndarray]
Mixed = Callable[[Words, int], Words]  # a hierarchy and a seed to another one of the same words
CAUSAL, PLAIN, STREAM, STREAM_CAUSAL = SPACES = (
    "unembedding, causal product",
    "unembedding, Euclidean product",
    "stream, Euclidean product",
    "stream, causal product",
)
CHILD, PARENT, BEYOND = KINDS = ("child", "parent", "child less parent")
SHOWN = 6  # words in a table's cell
MOST = 6000  # latents that are clustered at once: their distances are all held
FEWEST = 30  # pairs of latents on which agreement is told
ROTATIONS, FEW = 20, 4  # turns of the smallest and the widest dictionary, and of those between
CONTEXTS, BEFORE, AFTER = 2, 40, 20  # of a latent on the page, and letters of each


# --- concepts ------------------------------------------------------------------------------------------------------------


class Steered(NamedTuple):
    """What vectors change of all words' log-probabilities at each of several strengths, nothing first: `change` (strengths, vectors,
    words) in nats, at a price `kl` (strengths, vectors)."""

    change: np.ndarray
    kl: np.ndarray


@dataclass(frozen=True, eq=False)
class Concepts:
    """A Single, the words that are single tokens of its model, and their ids."""

    lab: Single
    words: Words
    ids: list[int]
    names: list[str]  # of the branches
    trees: list[str]  # and of the trees

    @cached_property
    def stream(self) -> Tensor:
        """Rows (words, d_model) float64 after the layer of the words in sentences, less their mean."""
        rows = concepts.in_sentences(self.lab.model, self.words.words, self.lab.layer)
        return rows - rows.mean(0)

    @cached_property
    def grams(self) -> dict[str, np.ndarray]:
        """Inner products of all words (words, words), by SPACES."""
        lm = self.lab.model
        rows = {space: concepts.unembedded(lm, self.ids, space == CAUSAL) for space in (CAUSAL, PLAIN)}
        seen = concepts.as_unembedded(lm, self.stream, concepts.final_gain(lm))
        rows |= {STREAM: self.stream.numpy(), STREAM_CAUSAL: seen.numpy()}
        return {space: rows[space] @ rows[space].T for space in SPACES}

    def measured(self, measure: Measure, space: str) -> np.ndarray:
        """A measure of each tree (trees,)."""
        return measure(self.grams[space], self.words, self.lab.model.d_model)

    def chance(
        self, measure: Measure, space: str, draws: int, seed: int = 0, mixed: Mixed = Words.shuffled
    ) -> np.ndarray:
        """The same of a hierarchy `mixed` up so many times, (draws, trees): by default of random word sets of equal sizes."""
        every = [mixed(self.words, seed + i) for i in range(draws)]
        return np.stack([measure(self.grams[space], words, self.lab.model.d_model) for words in every])

    def vectors(self, kind: str, words: Words | None = None) -> Tensor:
        """Vectors of one of KINDS for each branch, one residual norm long: (branches, d_model) float32; of category vectors in the stream."""
        words = words or self.words
        c = concepts.coefficients(self.grams[STREAM], words.sets(), self.lab.model.d_model)
        parents, children = c[: words.tree.max() + 1][words.parents()], c[words.tree.max() + 1 :]
        rows = torch.as_tensor({CHILD: children, PARENT: parents, BEYOND: children - parents}[kind]) @ self.stream
        return (rows / rows.norm(dim=1, keepdim=True) * self.lab.residual_norm).float()

    def steered(self, kind: str, strengths: Sequence[float], words: Words | None = None) -> Steered:
        """`Steered` by those vectors at each of `strengths`, in residual norms."""
        vectors, again = self.vectors(kind, words).unique(dim=0, return_inverse=True)  # branches share their parent's
        every = torch.cat([x * vectors for x in strengths])
        found = store.kept(concepts.followed, self._where, every, self.ids)
        shape = len(strengths), len(vectors)
        change = found.words.reshape(*shape, -1)[:, again.numpy()] - self._plain.words[0]
        kl, nothing = found.kl.reshape(shape)[:, again.numpy()], np.zeros((1, *change.shape[1:]))
        return Steered(np.concatenate([nothing, change]), np.vstack([nothing[:, :, 0], kl]))

    def by_chance(
        self, kind: str, strengths: Sequence[float], draws: int, seed: int = 0
    ) -> list[tuple[Words, Steered]]:
        """The same by vectors of random word sets, with these sets."""
        mixed = [self.words.shuffled(seed + i) for i in range(draws)]
        return [(words, self.steered(kind, strengths, words)) for words in mixed]

    def says(self, branch: str, strength: float) -> Markdown:
        """A table of the trees' words that are likeliest with nothing added, and that a branch's vectors of all KINDS raise most; and how far
        words rise, in nats."""
        b, lm = self.names.index(branch), self.lab.model
        added = {kind: strength * self.vectors(kind)[b] for kind in KINDS}
        pushed = torch.stack([torch.zeros(lm.d_model), *added.values()])
        found = store.kept(concepts.followed, self._where, pushed, list(range(len(lm.embedding))))
        own, tree = self.words.branch == b, self.words.tree == self.words.parents()[b]
        groups = [np.array(self.ids)[x] for x in (own, tree & ~own, ~tree)]
        change = found.words - found.words[0]
        lines = []
        told = np.array(self.ids)
        for what, row, moved in zip(["nothing", *added], found.words, change, strict=True):
            top = told[np.argsort(-(moved if moved.any() else row)[told])[:SHOWN]].tolist()
            said = ", ".join(lm.tokenizer.decode([i]).strip() for i in top)
            lines.append([what, latents.cell(said), *(f"{moved[ids].mean():+.1f}" for ids in groups)])
        return table(
            ["added", "which of all words rise most", f"{branch}, nats", "its siblings", "other trees' words"], lines
        )

    def listed(self, tree: int, shown: int = 4) -> Markdown:
        """A table of a tree's branches with some of their words."""
        lines = []
        for b in np.flatnonzero(self.words.parents() == tree):
            parts = [
                [self.words.words[i] for i in np.flatnonzero((self.words.branch == b) & (self.words.held == held))]
                for held in (False, True)
            ]
            lines.append([self.names[b], *(", ".join(part[:shown]) for part in parts), sum(map(len, parts))])
        return table(["branch", "words that make its vector", "held out", "words"], lines)

    def at_kl(self, steered: Steered, target: float, words: Words) -> dict[str, np.ndarray]:
        """`concepts.raised` where every vector costs `target` nats a prediction."""
        return concepts.raised(concepts.at_kl(steered.change, steered.kl, target), words)

    @cached_property
    def _where(self) -> Following:
        return Following.of(self.lab.model, self.lab.layer)

    @cached_property
    def _plain(self) -> Followed:
        return store.kept(concepts.followed, self._where, torch.zeros(1, self.lab.model.d_model), self.ids)


def concepts_of(lab: Single) -> Concepts:
    """The trees of data/concepts, as far as their words are single tokens of a Single's model."""
    trees = concepts.load()
    ids = concepts.single_tokens(lab.model, [w for t in trees for b in t.branches for w in (*b.words, *b.held_out)])
    words = concepts.of_trees(trees, list(ids))
    owner = {w: (b.name, t.name) for t in trees for b in t.branches for w in (*b.words, *b.held_out)}
    branches, roots = (
        [owner[words.words[int(np.flatnonzero(part == i)[0])]][which] for i in range(int(part.max()) + 1)]
        for which, part in enumerate((words.branch, words.tree))
    )
    return Concepts(lab, words, [ids[w] for w in words.words], branches, roots)


# --- families over seeds -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Families:
    """Families of an SAE's `count` most used latents, of those that fire on `least` tokens of either half of held-out text or more, `size`
    to a family on average; and partner SAEs that differ in their seed."""

    lab: Single
    own: Loaded
    partners: list[Loaded]
    size: int
    least: int
    count: int

    @cached_property
    def _halves(self) -> list[tuple[Fired, Fired]]:
        """Of each SAE, what fires on the first half of the held-out text and on the second."""
        text = self.lab.text[1]
        cuts = (0, len(text) // 2, len(text) // 2 * 2)
        every = (self.own, *self.partners)
        return [tuple(store.kept(families.fired, x.sae, text, *cuts[i : i + 2]) for i in (0, 1)) for x in every]  # type: ignore[misc]

    def _alive(self, which: int) -> np.ndarray:
        fewest = np.minimum(*(x.counts() for x in self._halves[which]))
        most = np.sort(np.argsort(-fewest, kind="stable")[: self.count])
        return most[fewest[most] >= self.least]

    def _clustered(self, found: Fired, chosen: np.ndarray) -> np.ndarray:
        """Families (latents,) of the `chosen` latents, -1 for the rest."""
        out, some = np.full(found.latents, -1), found.only(chosen)
        out[chosen] = store.kept(families.by_firing, *some, max(len(chosen) // self.size, 2))
        return out

    @cached_property
    def firing(self) -> np.ndarray:
        """The SAE's families by firing together on the first half of the text (latents,), -1 for rare latents."""
        return self._clustered(self._halves[0][0], self._alive(0))

    @cached_property
    def again(self) -> np.ndarray:
        """The SAE's families by firing on the second half (latents,)."""
        return self._clustered(self._halves[0][1], self._alive(0))

    @cached_property
    def matches(self) -> list[matching.Match]:
        """The certified one-to-one match of the SAE with each partner."""
        rows, device = decompose.rows_of(self.own.sae), self.lab.session.device
        return [store.kept(matching.match, rows, decompose.rows_of(x.sae), device=device) for x in self.partners]

    @cached_property
    def _theirs(self) -> list[np.ndarray]:
        """Each partner's families on the second half, in the order of the SAE's own latents by the match, -1 for what is rare in either."""
        found = []
        for i, match in enumerate(self.matches, 1):
            of = self._clustered(self._halves[i][1], self._alive(i))[match.B_for_A.cpu().numpy()]
            found.append(np.where(self.firing >= 0, of, -1))
        return found

    def over_seeds(self, firing: np.ndarray | None = None, cosine: float = -1.0) -> np.ndarray:
        """Agreement of families by firing (the SAE's own, on the first half, if none are given) with each partner's on the second half,
        (partners,); of pairs with at least this `cosine`."""
        own = self.firing if firing is None else firing
        found = []
        for theirs, match in zip(self._theirs, self.matches, strict=True):
            some = (theirs >= 0) & (matching.cosines(match) >= cosine)
            found.append(families.agreement(own[some], theirs[some]) if some.any() else 0.0)
        return np.array(found)

    def over_halves(self, cosine: float = -1.0) -> np.ndarray:
        """The ceiling, (partners,): the same SAE on the two halves, on the latents that each partner is asked about."""
        found = []
        for theirs, match in zip(self._theirs, self.matches, strict=True):
            some = (theirs >= 0) & (matching.cosines(match) >= cosine)
            found.append(families.agreement(self.firing[some], self.again[some]) if some.any() else 0.0)
        return np.array(found)

    def by_match(self, levels: Sequence[float]) -> Markdown:
        """A table of both, mean of partners, among pairs whose cosine is at least each of `levels`, and how many these are."""
        lines = []
        for level in levels:
            own, other = self.over_halves(level).mean(), self.over_seeds(cosine=level).mean()
            pairs = [
                int(((x >= 0) & (matching.cosines(m) >= level)).sum())
                for x, m in zip(self._theirs, self.matches, strict=True)
            ]
            enough = min(pairs) >= FEWEST
            said = [f"{other:.2f}", f"{own:.2f}"] if enough else ["-", "-"]
            lines.append([f"{level:g}", f"{np.mean(pairs):.0f}", *said])
        return table(["cosine of a pair, at least", "pairs", "another seed", "the same SAE"], lines)

    def shuffled(self, draws: int, seed: int = 0) -> np.ndarray:
        """`over_seeds` of families of shuffled codes, (draws, partners)."""
        first, alive = self._halves[0][0], self._alive(0)
        mixed = [self._clustered(first.shuffled(seed + i), alive) for i in range(draws)]
        return np.stack([self.over_seeds(x) for x in mixed])

    def of_decoders(self, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Agreement of families by decoder cosine with each partner's (partners,); and the same of random dictionaries whose rows are
        paired as well as these (partners,)."""
        alive = torch.as_tensor(self._alive(0))
        rows, count = decompose.rows_of(self.own.sae).cpu()[alive], max(len(alive) // self.size, 2)
        labels, own, chance = store.kept(families.by_decoder, rows, count), [], []
        for i, (x, match) in enumerate(zip(self.partners, self.matches, strict=True)):
            theirs = decompose.rows_of(x.sae).cpu()[match.B_for_A.cpu()[alive]]
            own.append(families.agreement(labels, store.kept(families.by_decoder, theirs, count)))
            pair = families.partner_rows(rows, matching.cosines(match)[alive], seed + i)
            chance.append(families.agreement(*(store.kept(families.by_decoder, y, count) for y in pair)))
        return np.array(own), np.array(chance)

    def listed(self, words: Sequence[Latent], count: int, shown: int = 4) -> Markdown:
        """A table of the largest families by firing that hold a handful of latents, with some of these, out of `words`."""
        sizes = np.bincount(self.firing[self.firing >= 0])
        few = [int(f) for f in np.argsort(-sizes, kind="stable") if 3 <= sizes[f] <= 3 * self.size][:count]
        lines = []
        for f in few:
            own = np.flatnonzero(self.firing == f)
            told = "; ".join(f"{i}: {latents.cell(_near(words[i]))}" for i in own[:shown])
            lines.append([f, sizes[f], told])
        return table(["family", "latents", "some of them, and where each fires most"], lines)


def _near(latent: Latent) -> str:
    if not latent.contexts:
        return "(never fired)"
    c = latent.contexts[0]
    return f"{c.before[-18:]}«{c.token}»{c.after[:8]}"


def families_of(
    lab: Single, partners: Sequence[int], size: int, least: int, count: int = 2000, seed: int = 0
) -> Families | None:
    """Families of the SAE of a seed, with partner SAEs of other seeds; None for an SAE out of a registry, which has no others."""
    if not can_train(lab):
        return None
    return Families(lab, lab.sae(seed), [lab.sae(x) for x in partners], size, least, count)


def can_train(lab: Single) -> bool:
    """Whether the profile says how an SAE is trained."""
    how = lab.session.profile.sae
    return bool(how and how.train and not how.release)


# --- splitting -----------------------------------------------------------------------------------------------------------


class Split(NamedTuple):
    """What dictionaries of other widths keep of the families of small ones: by small one and width (smalls, widths), the smallest width
    first, which is another seed's; `thinned`, the same of as many latents as a small one has, drawn at random from each; and `chance`
    (draws, smalls, widths), of the whole ones turned at random, NaN where these are fewer."""

    kept: np.ndarray
    thinned: np.ndarray
    chance: np.ndarray

    def ceiling(self) -> np.ndarray:
        """What another seed of the smallest width keeps beyond chance (smalls,)."""
        return self.kept[:, 0] - self.chance[:, :, 0].mean(0)

    def shares(self, thinned: bool = False) -> np.ndarray:
        """What is kept beyond chance, as a share of what another seed of the smallest width keeps beyond chance: (smalls, widths). What
        `thinned` dictionaries keep by chance is what one of the smallest width does."""
        chance = np.nanmean(self.chance, 0)
        beyond = self.kept - chance
        return (self.thinned - chance[:, :1] if thinned else beyond) / beyond[:, :1]

    def by_chance(self) -> np.ndarray:
        """The same of each turn at random (draws, smalls, widths), less the mean of all; NaN where there are fewer turns."""
        chance = np.nanmean(self.chance, 0)
        return (self.chance - chance) / (self.kept - chance)[:, :1]


@dataclass(frozen=True, eq=False)
class Grown:
    """Dictionaries of several widths, trained on the same rows from different starts: `smalls` of the smallest width, `wide` by width."""

    smalls: list[Loaded]
    wide: dict[int, Loaded]
    seed: int

    def split(self, size: int, rank: int, least: int) -> Split:
        """`Split` of families by decoder cosine, `size` to a family on average, those of `least` latents or more; of each the first
        `rank` axes."""
        rows = [decompose.rows_of(x.sae).cpu() for x in self.smalls]
        wide = [decompose.rows_of(x.sae).cpu() for x in self.wide.values()]
        kept, thinned = np.zeros((2, len(rows), 1 + len(wide)))
        chance = np.full((ROTATIONS, *kept.shape), np.nan)
        g = torch.Generator().manual_seed(self.seed)
        for i, own in enumerate(rows):
            labels = store.kept(families.by_decoder, own, len(own) // size)
            for j, other in enumerate([rows[(i + 1) % len(rows)], *wide]):
                kept[i, j] = families.kept_subspaces(own, labels, other, rank, least).mean()
                some = other[torch.randperm(len(other), generator=g)[: len(own)]]
                thinned[i, j] = families.kept_subspaces(own, labels, some, rank, least).mean()
                draws, start = ROTATIONS if j in (0, len(wide)) else FEW, self.seed + 100 * i + j
                turned = store.kept(families.kept_by_chance, own, labels, other, rank, least, draws, start)
                chance[:draws, i, j] = turned
        return Split(kept, thinned, chance)


def grown(lab: Single, widths: Sequence[int], smalls: int, samples: int, seed: int = 0) -> Grown | None:
    """Dictionaries of `widths` times d_model, so many of the first, each trained on `samples` rows of the text; None where the profile
    does not say how one is trained. Each has a start of its own: like starts make like latents."""
    if not can_train(lab):
        return None
    s, d_model = lab.session, lab.model.d_model

    def one(width: int, start: int) -> Loaded:
        config = train.of_profile(s.profile, d_model, start, s.fast)
        config = config._replace(latents=width * d_model, samples=min(samples, config.samples))
        folder = train.sae(lab.text[0], config, s.device)
        return saes.load(folder, device=s.device, d_model=d_model, layer=s.profile.layer)

    few = [one(widths[0], seed + 20 + i) for i in range(smalls)]
    return Grown(few, {w: one(w, seed + 40 + w) for w in widths[1:]}, seed)


# --- the map -------------------------------------------------------------------------------------------------------------


class Map(NamedTuple):
    """Latents on a plane: the place of each, `at` (latents, 2), the number of its `family` (latents,), what it responds to; and by behaviour
    which of them, by their places in this list, are nearest to its vector."""

    at: np.ndarray
    family: np.ndarray
    words: list[Latent]
    near: dict[str, list[int]]


def map_of(lab: Single, size: int, near: int, seed: int = 0) -> Map:
    """The map of the SAE of a seed, its MOST used latents; families by decoder cosine, `size` to a family on average."""
    words = sorted(sorted(lab.contexts(seed), key=lambda x: -x.frequency)[:MOST], key=lambda x: x.index)
    rows = decompose.rows_of(lab.sae(seed).sae).cpu()[[x.index for x in words]]
    at = store.kept(families.layout, rows, seed)
    family = store.kept(families.by_decoder, rows, max(len(rows) // size, 2))
    vectors = lab.vectors()
    found = families.nearest(rows, torch.stack(list(vectors.values())), near)
    return Map(at, family, words, dict(zip(vectors, found.tolist(), strict=True)))


def write_page(s: Session, found: Map) -> str:
    """Write the map as a page beside the report, and say where: its folder and name."""
    cut = [
        [
            round(float(x), 2), round(float(y), 2), int(f), one.frequency, one.index,
            [[c.before[-BEFORE:], c.token, c.after[:AFTER]] for c in one.contexts[:CONTEXTS]], one.promotes[:3],
        ]
        for (x, y), f, one in zip(found.at, found.family, found.words, strict=True)
    ]  # fmt: skip
    path = s.results.parent / pages.MAP
    title = f"Latents of {s.model} after layer {s.profile.layer}"
    write_file(path, pages.page(pages.MAP, title=title, data={"latents": cut, "near": found.near}))
    return "/".join(path.parts[-2:])


def twin(found: Map, count: int) -> Interactive:
    """The map's `count` most used latents and the behaviours' nearest, to look at closely in a notebook."""
    from plotly import graph_objects

    often = np.argsort([-one.frequency for one in found.words], kind="stable")[:count]
    figure = graph_objects.Figure()
    colour = [figures.PALETTE[found.family[i] % 6] for i in often]
    size = [3 + 30 * float(found.words[i].frequency) ** 0.5 for i in often]
    told = [
        f"{found.words[i].index}: {latents.words(found.words[i], 2)}<br>{_escaped(_near(found.words[i]))}"
        for i in often
    ]
    figure.add_scatter(
        x=found.at[often, 0].round(2), y=found.at[often, 1].round(2), mode="markers", text=told, hoverinfo="text",
        marker={"size": np.round(size, 1), "color": colour, "opacity": 0.6}, showlegend=False,
    )  # fmt: skip
    for name, near in found.near.items():
        figure.add_scatter(
            x=found.at[near, 0].round(2), y=found.at[near, 1].round(2), mode="markers", name=name, text=[name] * len(near),
            hoverinfo="text", marker={"size": 11, "symbol": "star"},
        )  # fmt: skip
    figure.update_layout(template="simple_white", title="Latents by t-SNE; stars: nearest to behaviours' vectors")
    return figure


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("\n", "⏎")
