"""What contrast pairs lower: latents more active on their negative side, and the positives that those can feign.

Pure: codes, vectors and an SAE in, numbers out, each with what chance gives. Follows Mayne et al. 2024 (arXiv:2411.08790, section
3.2), which reports a share of latents and one example pair, without a null.
"""

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy.stats import false_discovery_control, ttest_1samp
from torch import Tensor

from helpers import stats
from helpers.sae.decompose import centred, check_vectors, codes_of, rows_of, unit_rows
from helpers.sae.topk import Dictionary


class Negative(NamedTuple):
    """Latents active on either side of contrast pairs: how many (`active`); the `share` more active on the negative side, with
    its `null` (draws,) from pairs with sides shuffled; the share that is so beyond doubt (`reliable`: paired t-test, false
    discovery rate 5 % over the active) and its null, `reliable_null` (at most 200 draws,); the share that is as reliably more
    active on the positive side (`raised`); the negative part of the summed |mean difference| (`weight`); that mean
    `difference` (latents,) itself."""

    active: int
    share: float
    null: np.ndarray
    reliable: float
    reliable_null: np.ndarray
    raised: float
    weight: float
    difference: Tensor


def negative(pos: Tensor, neg: Tensor, draws: int = 500, seed: int = 0) -> Negative:
    """Which latents fire more on the negative side: from codes `pos` and `neg` (pairs, latents) of the two sides.

    One behaviour's numbers: latents that fire together are no sample, so an interval ranges over behaviours. Null: half of the
    pairs, drawn at random, have their sides swapped. ValueError for fewer than two pairs, or if nothing is active.
    """
    if pos.shape != neg.shape or pos.ndim != 2 or len(pos) < 2:
        raise ValueError(
            f"pos {tuple(pos.shape)} and neg {tuple(neg.shape)} were given; two equal (pairs, latents) with 2 pairs or more"
        )
    used = ((pos > 0) | (neg > 0)).any(0)
    if not bool(used.any()):
        raise ValueError("no latent is active on either side of any pair: are these codes?")
    gap = (pos - neg)[:, used].double().cpu().numpy()
    mean = gap.mean(0)
    rng, n = np.random.default_rng(seed), len(gap)

    def reliably(rows: np.ndarray) -> np.ndarray:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            p = np.nan_to_num(ttest_1samp(rows, 0, axis=-2).pvalue, nan=1.0)
        return ((false_discovery_control(p, axis=-1) < 0.05) & (rows.mean(-2) < 0)).mean(-1)

    half = np.where(np.arange(n) < n // 2, -1.0, 1.0)
    signs = np.stack([rng.permutation(half) for _ in range(draws)])
    return Negative(
        active=gap.shape[1],
        share=float((mean < 0).mean()),
        null=(signs @ gap < 0).mean(1),
        reliable=float(reliably(gap)),
        reliable_null=np.concatenate([reliably(gap * some[..., None]) for some in np.array_split(signs[:200], 20)]),
        raised=float(reliably(-gap)),
        weight=float(-mean.clip(max=0).sum() / np.abs(mean).sum().clip(1e-300)),
        difference=(pos - neg).mean(0).float().cpu(),
    )


def of_vectors(sae: Dictionary, halves: Sequence[tuple[Tensor, Tensor]], draws: int, seed: int = 0) -> list[Negative]:
    """`negative` for several vectors in one SAE, each of its own activations (pos, neg), with shuffles of its own."""
    codes = [(codes_of(sae, pos).cpu(), codes_of(sae, neg).cpu()) for pos, neg in halves]
    return [negative(pos, neg, draws, seed + 1000 * i) for i, (pos, neg) in enumerate(codes)]


class Spurious(NamedTuple):
    """A latent with a positive code of v though the pairs do not raise it: its `code`, its code in the zero vector (`zero`), the
    pairs' `difference`; and the negatively aligned latent that explains it (`source`, -1 if there is none): their decoder rows'
    `cosine`, and the `share` of the latent's rise over the zero vector's pre-code that the source alone supplies (NaN where it
    does not rise: then the bias explains it)."""

    latent: int
    code: float
    zero: float
    difference: float
    source: int
    cosine: float
    share: float


def spurious(sae: Dictionary, vector: Tensor, difference: Tensor) -> list[Spurious]:
    """The spurious positives of encode(v), largest code first; `difference` (latents,): mean code, positive less negative side.

    A latent i with difference D_i < 0 adds D_i (W_dec_i . W_enc_j) to the pre-code of j: positive where the two are negatively
    aligned. The source of j is the i with cos(W_dec_i, W_dec_j) < 0 that adds most.
    """
    v, rows = check_vectors(vector[None], sae.cfg.d_in).float(), rows_of(sae).float()
    codes, zero = codes_of(sae, torch.cat([v, torch.zeros_like(v)])).cpu()
    found = ((codes > 0) & (difference <= 0)).nonzero()[:, 0]
    found = found[codes[found].argsort(descending=True)]
    down = (difference < 0).nonzero()[:, 0]
    if not len(down):
        nothing = (-1, float("nan"), float("nan"))
        return [Spurious(j, float(codes[j]), float(zero[j]), float(difference[j]), *nothing) for j in found.tolist()]
    W_enc, lowered = sae.W_enc.detach()[:, found.to(sae.device)].float(), rows[down.to(sae.device)]
    cosines = (unit_rows(lowered)[0] @ unit_rows(rows[found.to(sae.device)])[0].T).cpu()  # (lowered, found)
    adds = (difference[down, None] * (lowered @ W_enc).cpu()).masked_fill(cosines >= 0, -torch.inf)
    best = adds.max(0)
    rise = v[0].cpu() @ W_enc.cpu()
    out = []
    for i, j in enumerate(found.tolist()):
        source, cosine, share = -1, float("nan"), float("nan")
        if best.values[i] > 0:
            source, cosine = int(down[best.indices[i]]), float(cosines[best.indices[i], i])
            share = float(best.values[i] / rise[i]) if rise[i] > 0 else float("nan")
        out.append(Spurious(j, float(codes[j]), float(zero[j]), float(difference[j]), source, cosine, share))
    return out


class Part(NamedTuple):
    """What one latent adds to the pre-code of another: the pairs' `difference` in its code times its row's product with
    the other's encoder column, `adds`; and the cosine of the two decoder rows."""

    latent: int
    difference: float
    cosine: float
    adds: float


class Account(NamedTuple):
    """The pre-code of one latent on a vector, as a sum: `bias` (its value for the zero vector), the largest `parts`
    along latents that the pairs raise or lower, what all others `raised` and `lowered` add, and the `rest` of v, which
    the latents' differences do not make up. They add up to `total`, of which the SAE makes the `code`."""

    latent: int
    bias: float
    parts: list[Part]
    raised: float
    lowered: float
    rest: float
    total: float
    code: float


def account(sae: Dictionary, vector: Tensor, difference: Tensor, latent: int, n: int = 4) -> Account:
    """How `latent` comes by its pre-code on `vector` (d_model,), whose pairs differ in mean code by `difference`
    (latents,); the `n` latents that add or take most by name. In float64.

    v = sum_i D_i W_dec_i + rest, so (v - b_dec) W_enc_j + b_j = bias + sum_i D_i (W_dec_i . W_enc_j) + rest . W_enc_j.
    """
    v, rows = check_vectors(vector[None], sae.cfg.d_in)[0].double().cpu(), rows_of(sae).double().cpu()
    column, change = sae.W_enc.detach()[:, latent].double().cpu(), difference.double().cpu()
    adds = change * (rows @ column)
    bias = float(sae.b_enc[latent].double()) - centred(sae) * float(sae.b_dec.detach().double().cpu() @ column)
    named = adds.abs().argsort(descending=True)[: min(n, int((adds != 0).sum()))].tolist()
    cosine = stats.cosine(rows[named].numpy(), rows[latent].numpy())
    parts = [Part(i, float(change[i]), float(c), float(adds[i])) for i, c in zip(named, cosine, strict=True)]
    left = adds.clone()
    left[named] = 0
    return Account(
        latent,
        bias,
        parts,
        float(left[change > 0].sum()),
        float(left[change < 0].sum()),
        float(v @ column - adds.sum()),
        bias + float(v @ column),
        float(codes_of(sae, vector[None])[0, latent]),
    )


def median_share(found: Sequence[Spurious]) -> float:
    """The median of what single opposed latents supply of the rise of those that rise; NaN where none does."""
    shares = [one.share for one in found if np.isfinite(one.share)]
    return float(np.median(shares)) if shares else float("nan")


class Supplied(NamedTuple):
    """`median_share` of each vector's spurious positives, `share` (vectors,), and what it is with differences dealt out at random
    among the latents that have one, `chance` (draws, vectors)."""

    share: np.ndarray
    chance: np.ndarray


def supplied(sae: Dictionary, vectors: Tensor, differences: Sequence[Tensor], draws: int, seed: int = 0) -> Supplied:
    """How much single opposed latents explain, for `vectors` (n, d_model) whose pairs differ by `differences` (latents,)."""
    g, chance = torch.Generator().manual_seed(seed), np.empty((draws, len(vectors)))
    for i, (v, difference) in enumerate(zip(vectors, differences, strict=True)):
        used = difference.nonzero()[:, 0]
        for draw in range(draws):
            dealt = difference.clone()
            dealt[used] = difference[used[torch.randperm(len(used), generator=g)]]
            chance[draw, i] = median_share(spurious(sae, v, dealt))
    own = [median_share(spurious(sae, v, d)) for v, d in zip(vectors, differences, strict=True)]
    return Supplied(np.array(own), chance)
