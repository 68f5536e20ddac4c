"""Hierarchies of words, the vectors of their categories, and what such a vector does to the next word.

A tree has branches, a branch has words (data/concepts/*.yaml), some of which are held out. A category vector is that of Park et al.
2024, "The Geometry of Categorical and Hierarchical Concepts in Large Language Models": the direction that linear discriminant
analysis finds, as long as the words' mean is along it. Everything between two vectors is computed from the Gram matrix of all
words, so that hundreds of random hierarchies cost little. Knows a model's unembedding and residuals, no SAEs.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import yaml
from torch import Tensor

from helpers import stats
from helpers.lm import reading, scoring, tokens
from helpers.lm.reading import LM
from helpers.lm.scoring import Continuations
from helpers.lm.tokens import ANSWER, USER, Tokens
from helpers.session import ROOT

FOLDER = ROOT / "data" / "concepts"
FRAMES = (
    "The word was",
    "She wrote about",
    "The next topic is",
    "He had never heard of",
)  # the word is read after each
CONTEXTS = (  # a word of any tree can follow
    "My favourite example is",
    "The first word on the list was",
    "It reminded me of",
    "She said the word",
    "We often talk about",
)


class ConceptError(ValueError):
    """A file of words that cannot be used; the message says which and why."""


# --- words ---------------------------------------------------------------------------------------------------------------


class Branch(NamedTuple):
    """A category of words: those that make its vector, and those that are held out."""

    name: str
    words: list[str]
    held_out: list[str]


class Tree(NamedTuple):
    """A category of categories, and a card that says what it is."""

    name: str
    card: str
    branches: list[Branch]


def load(folder: Path = FOLDER) -> list[Tree]:
    """The trees of a folder, by file name. ConceptError for a file that is none, or a word that stands in two places."""
    found = [_tree(path) for path in sorted(folder.glob("*.yaml"))]
    every = [w.lower() for t in found for b in t.branches for w in (*b.words, *b.held_out)]
    if twice := sorted({w for w in every if every.count(w) > 1}):
        raise ConceptError(f"{', '.join(twice[:5])} stand in more than one place: a word belongs to one branch")
    if len(found) < 3:
        raise ConceptError(f"{len(found)} trees in {folder.name}; an interval over trees needs three or more")
    return found


def _tree(path: Path) -> Tree:
    given = yaml.safe_load(path.read_text(encoding="utf-8"))
    try:
        branches = [Branch(str(n), list(b["words"]), list(b["held_out"])) for n, b in given["children"].items()]
        name, card = str(given["name"]), str(given["card"])
    except (TypeError, KeyError, AttributeError) as error:
        raise ConceptError(
            f"{path.name} lacks {error}: a tree has a name, a card and children, each with words and held_out"
        ) from None
    if len(branches) < 2 or any(len(b.words) < 3 or not b.held_out for b in branches):
        raise ConceptError(f"{path.name}: two branches or more are wanted, each with three words and one held out")
    if not_text := [w for b in branches for w in (*b.words, *b.held_out) if not isinstance(w, str)]:
        raise ConceptError(f"{path.name}: {not_text[0]!r} is no text: put it in quotes")
    return Tree(name, card, branches)


class Words(NamedTuple):
    """All words in a row, and for each the number of its `tree` and of its `branch` (words,), and whether it is `held` out."""

    words: list[str]
    tree: np.ndarray
    branch: np.ndarray
    held: np.ndarray

    def shuffled(self, seed: int) -> "Words":
        """The same hierarchy of the same sizes, its places dealt out among the words at random: random word sets."""
        order = np.random.default_rng(seed).permutation(len(self.words))
        return self._replace(tree=self.tree[order], branch=self.branch[order], held=self.held[order])

    def exchanged(self, seed: int) -> "Words":
        """The same trees, the words of each exchanged among its branches at random, held-out ones among themselves."""
        rng, branch = np.random.default_rng(seed), self.branch.copy()
        for t in range(self.tree.max() + 1):
            for held in (False, True):
                at = np.flatnonzero((self.tree == t) & (self.held == held))
                branch[at] = rng.permutation(branch[at])
        return self._replace(branch=branch)

    def dealt(self, seed: int) -> "Words":
        """The same branches, dealt out among the trees at random: a shuffled hierarchy."""
        of = self.parents()
        return self._replace(tree=np.random.default_rng(seed).permutation(of)[self.branch])

    def parents(self) -> np.ndarray:
        """The tree of each branch (branches,)."""
        return np.array([self.tree[self.branch == b][0] for b in range(self.branch.max() + 1)])

    def sets(self) -> list[np.ndarray]:
        """The places of the words that make each tree and then each branch."""
        trees = [np.flatnonzero(~self.held & (self.tree == t)) for t in range(self.tree.max() + 1)]
        return trees + [np.flatnonzero(~self.held & (self.branch == b)) for b in range(self.branch.max() + 1)]


def of_trees(trees: Sequence[Tree], known: Sequence[str] = ()) -> Words:
    """The trees' words in a row; only those of `known`, if given, and no branch that keeps under two to learn from or none held out;
    no tree with one branch. ConceptError if fewer than three trees are left."""
    rows, trees_left, branches = list[tuple[str, int, int, bool]](), 0, 0
    for tree in trees:
        kept = []
        for b in tree.branches:
            parts = [[w for w in part if not known or w in known] for part in (b.words, b.held_out)]
            if len(parts[0]) >= 2 and parts[1]:
                kept.append(parts)
        if len(kept) < 2:
            continue
        for learnt, held in kept:
            rows += [(w, trees_left, branches, h) for part, h in ((learnt, False), (held, True)) for w in part]
            branches += 1
        trees_left += 1
    if trees_left < 3:
        raise ConceptError(f"{trees_left} trees have words that are one token of this model; three or more are needed")
    numbers = np.array([row[1:] for row in rows])
    return Words([row[0] for row in rows], numbers[:, 0], numbers[:, 1], numbers[:, 2].astype(bool))


def single_tokens(lm: LM, words: Sequence[str]) -> dict[str, int]:
    """The words that are one token after a space, with its id."""
    coded = {w: lm.tokenizer(" " + w, add_special_tokens=False)["input_ids"] for w in words}
    return {w: ids[0] for w, ids in coded.items() if len(ids) == 1}


# --- where words lie -----------------------------------------------------------------------------------------------------


def root(matrix: Tensor, power: float) -> Tensor:
    """A symmetric matrix (d, d) to some power, float64; directions in which it is flat to rounding are left out."""
    values, axes = torch.linalg.eigh(matrix.double())
    some = values > 1e-10 * values.max()
    return (axes[:, some] * values[some] ** power) @ axes[:, some].T


def unembedded(lm: LM, ids: Sequence[int], causal: bool) -> np.ndarray:
    """Unembedding rows of tokens, less the mean of the vocabulary, (tokens, d_model) float64; in the coordinates in which the causal
    inner product is the usual one, Cov^(-1/2) of all rows, or as they are."""
    rows = lm.unembedding.module.weight.detach().cpu()
    mean = rows.double().mean(0)
    some = rows[list(ids)].double() - mean
    return (some @ root(_covariance(rows, mean), -0.5) if causal else some).numpy()


def _covariance(rows: Tensor, mean: Tensor, block: int = 8192) -> Tensor:
    """Second moments about the mean (d, d) float64 of many rows."""
    parts = (part.double() - mean for part in rows.split(block))
    return sum((p.T @ p for p in parts), torch.zeros(len(mean), len(mean), dtype=torch.float64)) / len(rows)


def in_sentences(lm: LM, words: Sequence[str], layer: int, frames: Sequence[str] = FRAMES) -> Tensor:
    """The stream (words, d_model) float64 after a layer at the last token of each word, mean of sentences that end in it."""
    laid = [tokens.plain(lm.tokenizer, f"{frame} {w}") for w in words for frame in frames]
    found, _ = reading.means(lm, laid, [layer], "last")
    return found[:, 0, 0].double().reshape(len(words), len(frames), -1).mean(1)


def as_unembedded(lm: LM, rows: Tensor, gain: Tensor) -> Tensor:
    """Rows of the stream (n, d_model) in the coordinates in which the causal inner product is the usual one: times Cov^(1/2) of the
    unembedding as the stream sees it, through the final norm's `gain` (d_model,); what is near there has near logits."""
    seen = lm.unembedding.module.weight.detach().cpu().double() * gain.double()
    return rows @ root(_covariance(seen, seen.mean(0)), 0.5)


# --- category vectors ----------------------------------------------------------------------------------------------------


def shrinkage(inner: np.ndarray, width: int) -> float:
    """How far Ledoit & Wolf (2004) shrink the covariance of n rows of a `width` towards a multiple of the identity, from the centred
    rows' inner products (n, n)."""
    n = len(inner)
    mean, delta = np.trace(inner) / n / width, (inner**2).sum() / n**2
    beta = ((np.diag(inner) ** 2).sum() / n - delta) / (width * n)
    delta = (delta - 2 * mean * np.trace(inner) / n + width * mean**2) / width
    return 0.0 if min(beta, delta) <= 0 else float(min(beta, delta) / delta)


def coefficients(gram: np.ndarray, sets: Sequence[np.ndarray], width: int) -> np.ndarray:
    """Category vectors as sums of words: (sets, words), from the Gram matrix (words, words) of rows of a `width`.

    With x the rows of a set, m their mean and S their shrunk covariance: u = S^-1 m / |S^-1 m|, and the vector is (u . m) u
    (Park et al. 2024, eq. 4.1, Ledoit-Wolf in place of the sample's covariance). S^-1 by Woodbury's identity.
    """
    out = np.zeros((len(sets), len(gram)))
    for row, places in zip(out, sets, strict=True):
        k, n = gram[np.ix_(places, places)], len(places)
        centre = np.eye(n) - 1 / n
        inner = centre @ k @ centre
        s = shrinkage(inner, width)
        mean = np.full(n, 1 / n)
        if 0 < s < 1 and np.trace(inner) > 0:
            ridge = n * s / (1 - s) * np.trace(inner) / n / width
            mean = mean - centre @ np.linalg.solve(ridge * np.eye(n) + inner, centre @ k @ mean)
        along, square = np.full(n, 1 / n) @ k @ mean, mean @ k @ mean
        row[places] = mean * (along / max(square, 1e-300))
    return out


def right_angles(gram: np.ndarray, words: Words, width: int) -> np.ndarray:
    """1 - |cosine of a parent's vector with child less parent|, mean over a tree's branches, (trees,): 1 is a right angle."""
    c = coefficients(gram, words.sets(), width)
    parents, children = c[: words.tree.max() + 1][words.parents()], c[words.tree.max() + 1 :]
    return _by_tree(1 - np.abs(_cosines(gram, parents, children - parents)), words)


def strangers(gram: np.ndarray, words: Words, width: int, seed: int = 0) -> np.ndarray:
    """The same of parents with children that are not theirs, (trees,): sets that do not lie in one another."""
    c, n = coefficients(gram, words.sets(), width), words.tree.max() + 1
    parents = words.parents()
    order = (parents + 1 + np.random.default_rng(seed).integers(n - 1, size=len(parents))) % n
    return _by_tree(1 - np.abs(_cosines(gram, c[order], c[n:] - c[order])), words)


def corners(gram: np.ndarray, words: Words, width: int) -> np.ndarray:
    """1 - |cosine + 1 / (k - 1)| of two children less their parent, mean over the pairs of a tree's k children, (trees,): 1 where the
    children are the corners of a regular simplex about the parent."""
    c, n, parents = coefficients(gram, words.sets(), width), words.tree.max() + 1, words.parents()
    out = []
    for t in range(n):
        sides = c[n:][parents == t] - c[t]
        k = len(sides)
        inner = sides @ gram @ sides.T
        cosine = inner / np.sqrt(np.outer(np.diag(inner), np.diag(inner)))
        out.append(1 - np.abs(cosine[np.triu_indices(k, 1)] + 1 / (k - 1)).mean())
    return np.array(out)


def separation(gram: np.ndarray, words: Words, width: int, among: str = "all") -> np.ndarray:
    """AUROC with which a branch's vector tells its held-out words from others', mean over a tree's branches, (trees,).

    The others: `all` held-out words of other branches, or of its `siblings` alone, told by child less parent.
    """
    c, n, parents = coefficients(gram, words.sets(), width), words.tree.max() + 1, words.parents()
    vectors = c[n:] if among == "all" else c[n:] - c[parents]
    seen = vectors @ gram
    found = []
    for b, t in enumerate(parents):
        own = words.held & (words.branch == b)
        other = words.held & (words.branch != b) & (True if among == "all" else words.tree == t)
        found.append(float(stats.auroc(seen[b, own], seen[b, other])))
    return _by_tree(np.array(found), words)


def unequal(gram: np.ndarray, words: Words, width: int) -> np.ndarray:
    """By how much children differ in how much of their parent they hold, (trees,): the variance of their shares over the squared mean
    share; 0 where child less parent is at right angles to the parent, whatever the noise.

    A share is the mean of a child's words along an axis, the mean of the tree's held-out words, all words' mean taken off. Shares by
    every other word and by the rest are multiplied, so that what words differ by on their own is 0 on average. `width` is not used.
    """
    centred = gram - gram.mean(0) - gram.mean(1)[:, None] + gram.mean()
    parents, found = words.parents(), []
    for t in range(words.tree.max() + 1):
        along = centred[:, words.held & (words.tree == t)].mean(1)
        own = [np.flatnonzero(~words.held & (words.branch == b)) for b in np.flatnonzero(parents == t)]
        one, other = (np.array([along[x[i::2]].mean() for x in own]) for i in (0, 1))
        found.append(float(np.cov(one, other)[0, 1] / (np.concatenate([one, other]).mean() ** 2)))
    return np.array(found)


def among_siblings(gram: np.ndarray, words: Words, width: int) -> np.ndarray:
    """`separation` from siblings (trees,)."""
    return separation(gram, words, width, "siblings")


def planted(words: Words, width: int, size: float, seed: int = 0) -> np.ndarray:
    """Rows (words, width) with a known answer: a part of the tree and one of the branch, `size` as long as the noise each, and noise."""
    rng = np.random.default_rng(seed)
    noise, tree, branch = (
        rng.standard_normal((n, width)) for n in (len(words.words), words.tree.max() + 1, words.branch.max() + 1)
    )
    return noise + size * (tree[words.tree] + branch[words.branch])


def _cosines(gram: np.ndarray, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Cosines of vectors given as sums of words, row by row."""
    inner = [((a @ gram) * b).sum(1) for a, b in ((one, other), (one, one), (other, other))]
    return inner[0] / np.sqrt(np.maximum(inner[1] * inner[2], 1e-300))


def _by_tree(of_branches: np.ndarray, words: Words) -> np.ndarray:
    """Means over each tree's branches, (..., trees), of numbers (..., branches)."""
    parents = words.parents()
    return np.stack([of_branches[..., parents == t].mean(-1) for t in range(parents.max() + 1)], axis=-1)


# --- steering the next word ----------------------------------------------------------------------------------------------


class Followed(NamedTuple):
    """What vectors do to the next word, mean of contexts: log-probabilities of `words` (vectors, words) in nats, and KL(unsteered ||
    steered) of the whole prediction, `kl` (vectors,)."""

    words: np.ndarray
    kl: np.ndarray


class Following(Continuations):
    """Contexts whose next word is looked at while a vector is added after a block at their last token."""

    @classmethod
    def of(cls, lm: LM, layer: int, contexts: Sequence[str] = CONTEXTS) -> "Following":
        """Plain contexts."""
        rows = []
        for context in contexts:
            ids = tokens.plain(lm.tokenizer, context).ids
            rows.append([Tokens([*ids, ids[-1]], [USER] * len(ids) + [ANSWER])])  # what stands there is not looked at
        return cls(lm, rows, layer)


def followed(where: Following, vectors: Tensor, ids: list[int]) -> Followed:
    """`Followed` of `vectors` (n, d_model) added as they are, for words by their token ids."""
    words, kl = torch.zeros(len(vectors), len(ids), dtype=torch.float64), torch.zeros(len(vectors), dtype=torch.float64)
    for number, chunk in enumerate(where._build()):
        for first, predicted, targets in where._runs(number, vectors):
            plain = where._plain(number, len(targets) // len(chunk.targets))
            logits = scoring.finite(predicted.logits, where.lm).split(len(plain))
            for i, logp in enumerate((x.float().log_softmax(-1) for x in logits[: len(vectors) - first]), first):
                words[i] += logp[:, ids].double().sum(0).cpu()
                kl[i] += (plain.exp() * (plain - logp)).sum().double().cpu()
    count = len(where.sequences)
    return Followed((words / count).numpy(), (kl / count).numpy())


def raised(change: np.ndarray, words: Words) -> dict[str, np.ndarray]:
    """How far vectors of branches (branches, words) raise words over those of other trees, in nats, mean over a tree's branches, (trees,):
    the `own` held-out words; those of `siblings`; and held-out words of the branch of the tree that rises `least`."""
    found = dict[str, list[float]](own=[], siblings=[], least=[])
    parents = words.parents()
    for b, t in enumerate(parents):
        moved = change[b] - change[b, words.tree != t].mean()
        held = {c: float(moved[words.held & (words.branch == c)].mean()) for c in np.flatnonzero(parents == t).tolist()}
        found["own"].append(held[b])
        found["siblings"].append(float(moved[(words.tree == t) & (words.branch != b)].mean()))
        found["least"].append(min(held.values()))
    return {k: _by_tree(np.array(x), words) for k, x in found.items()}


def at_kl(change: np.ndarray, kl: np.ndarray, target: float) -> np.ndarray:
    """Changes (vectors, words) at the strength at which each vector costs `target` nats, from those at several strengths that rise from
    0, `change` (strengths, vectors, words) and `kl` (strengths, vectors): between them by the root of KL, which grows with a small
    vector in proportion; beyond the last, the last."""
    out = np.empty(change.shape[1:])
    for i, cost in enumerate(np.sqrt(np.maximum.accumulate(kl.clip(0))).T):
        at = float(np.clip(np.interp(target**0.5, cost, np.arange(len(cost))), 0, len(cost) - 1))
        low = min(int(at), len(cost) - 2)
        out[i] = change[low, i] + (at - low) * (change[low + 1, i] - change[low, i])
    return out


def final_gain(lm: LM) -> Tensor:
    """What the final norm multiplies each dimension by (d_model,) float64, read off eight tokens; of a LayerNorm up to its centring."""
    stream, hidden = (x[0].double().cpu() for x in reading.ends(lm))
    unit = stream / stream.square().mean(1, keepdim=True).sqrt()
    return (hidden * unit).sum(0) / unit.square().sum(0)
