"""Which latents of one model's SAE look new, as if the other model had none like them, and what such a ranking finds.

`ranked` puts the latents of an SAE that can be ranked in one order of rows; the measures are `matching.only_in_B`'s. What follows
takes values of those latents and asks whether the top of a ranking stands out: from latents drawn at random, and from the top of
the same ranking in a fine-tune that was trained on something else. Knows SAEs, matches and rows, not models.
"""

import re
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import combinations
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from helpers import stats, store
from helpers.lm.tokens import Tokenizer
from helpers.pair import matching
from helpers.pair.alignment import Map
from helpers.pair.matching import Match, Scaling, Side
from helpers.sae import evaluation
from helpers.sae.activations import Samples
from helpers.sae.decompose import codes_of
from helpers.sae.topk import Dictionary
from helpers.stats import Interval

# --- latents that can be ranked ----------------------------------------------------------------------------------------


class Alive(NamedTuple):
    """The latents of an SAE that fire on held-out tokens of its own model: their numbers `ids` (n,); `rows` of the decoder and
    `columns` of the encoder (n, d_model) float32; the tokens each fires on, `fired` (n,); `side`, as `matching.side` has it."""

    ids: Tensor
    rows: Tensor
    columns: Tensor
    fired: Tensor
    side: Side


def alive(sae: Dictionary, frequency: Tensor, tokens: int) -> Alive:
    """The latents that fire at all, by the share (latents,) of `tokens` held-out tokens that each fires on."""
    index = (frequency > 0).nonzero()[:, 0]
    rows, columns = (x.detach().float().cpu()[index] for x in (sae.W_dec, sae.W_enc.T))
    whole = matching.side(sae, frequency)
    return Alive(index, rows, columns, frequency[index] * tokens, Side(*(x[index] for x in whole)))


class Ranked(NamedTuple):
    """Latents that can be ranked, `of` how many alive: their numbers `ids` (n,), unit decoder `rows` (n, d_model) float64, and how
    new each looks by every measure, `by` {measure: (n,)}, larger is newer."""

    ids: Tensor
    rows: np.ndarray
    by: dict[str, np.ndarray]
    of: int


def ranked(
    sae: Dictionary, new: Alive, old: Alive, found: Match, own: Tensor, other: Tensor, least_fired: int = 50,
    least_used: float = 0.3,
) -> Ranked:  # fmt: skip
    """The latents `new` of an SAE, by how new they look beside the `old` ones of another model's SAE, to which `found` matches them
    (old to new).

    `own` and `other` (tokens, d_model): activations of the SAE's model and of the other for the same tokens. Left out are latents
    without a partner, those that fire on fewer than `least_fired` tokens, and those that their own model hardly uses (latent
    scaling below `least_used`): what is measured of them is noise.
    """
    scaling = Scaling(*(x[new.ids] for x in store.kept(matching.latent_scaling, sae, own, other)))
    by = {k: v.numpy() for k, v in matching.only_in_B(found, old.side, new.side, scaling).items()}
    del by["encoder norm, wrong way"]
    sure = np.isfinite(np.stack(list(by.values()))).all(0) & (new.fired.numpy() >= least_fired)
    at = np.flatnonzero(sure & (scaling.own.numpy() > least_used))
    rows = torch.nn.functional.normalize(new.rows, dim=1).double().numpy()[at]
    return Ranked(new.ids[at], rows, {k: v[at] for k, v in by.items()}, len(new.ids))


def of_fine_tunes(
    sae: Mapping[str, Dictionary], living: Mapping[str, Alive], maps: Mapping[str, Map], acts: Mapping[str, Sequence[Tensor]],
    base: str, least_fired: int, device: str | torch.device = "cpu",
) -> dict[str, Ranked]:  # fmt: skip
    """By name: the latents of each fine-tune's SAE by how new they look beside the base's, and those of the base by how gone they look
    beside the first fine-tune's.

    The match is of the base's rows, carried over by the fine-tune's map (`maps`); `acts`: for each fine-tune the base's and its
    own activations (tokens, d_model) for the same tokens.
    """
    found: dict[str, Ranked] = {}
    for who, (old, new) in acts.items():
        rows = maps[who].directions(living[base].rows), living[who].rows
        kin = store.kept(matching.match, *rows, device=device)
        found[who] = ranked(sae[who], living[who], living[base], kin, new, old, least_fired)
        if base not in found:
            back = matching.turned(kin)
            found[base] = ranked(sae[base], living[base], living[who], back, old, new, least_fired)
    return found


def top(values: np.ndarray, n: int) -> np.ndarray:
    """The places (n,) of the n largest values, the largest first."""
    return np.argsort(-values, kind="stable")[:n]


def drawn(values: np.ndarray, n_top: int, n: int, seed: int = 0) -> np.ndarray:
    """The places (n,) of latents drawn at random that are not among the `n_top` largest; fewer where there are not as many."""
    rest = np.setdiff1d(np.arange(len(values)), top(values, n_top))
    return np.random.default_rng(seed).choice(rest, min(n, len(rest)), replace=False)


def likeness(rows: np.ndarray) -> float:
    """The mean cosine between two of some unit rows (n, d_model): near 1 the latents are one direction, and fewer than they seem."""
    n, total = len(rows), rows.sum(0)
    return float((total @ total - n) / (n * (n - 1)))


# --- what their rows do ------------------------------------------------------------------------------------------------


def push(rows: np.ndarray, gradients: Mapping[str, np.ndarray], shifts: Mapping[str, float]) -> np.ndarray:
    """How far each row (n, d_model), added to the stream, moves behaviours the way a model has moved, (n,) in standard deviations.

    To first order: the row times each behaviour's gradient (d_model,), standardised over the rows; behaviours weighed by their
    `shifts`, so that one that did not move counts nothing; the sum standardised again.
    """
    return _standard(np.sum([shift * _standard(rows @ gradients[n]) for n, shift in shifts.items()], axis=0))


def _standard(x: np.ndarray) -> np.ndarray:
    return np.asarray((x - x.mean()) / max(float(x.std()), 1e-300))


def change_of_codes(sae: Dictionary, before: Tensor, after: Tensor, batch: int = 4096) -> Tensor:
    """The mean change of an SAE's codes from one model's activations (tokens, d_model) to another's for the same tokens, as its decoder
    rows write it, (d_model,) float64."""
    change = torch.zeros(sae.cfg.d_sae, dtype=torch.float64)
    for one, other in zip(before.split(batch), after.split(batch), strict=True):
        change += codes_of(sae, other).double().cpu().sum(0) - codes_of(sae, one).double().cpu().sum(0)
    return (change / len(before)) @ sae.W_dec.detach().double().cpu()


# --- whether the top stands out ----------------------------------------------------------------------------------------


class Top(NamedTuple):
    """A value of every ranked latent, (n,), and the places of those that a ranking puts on `top`."""

    values: np.ndarray
    top: np.ndarray


def beyond(tops: Sequence[Top]) -> Interval:
    """The mean value of a ranking's top, less that of a control's top, with an interval over the latents of either; of one ranking
    alone, less the mean of all its latents."""
    if len(tops) == 1:
        return stats.over(tops[0].values[tops[0].top] - tops[0].values.mean())
    one, other = tops
    units = [(0, x) for x in one.values[one.top]] + [(1, x) for x in other.values[other.top]]
    return stats.over(units, _gap)


def between(
    some: Sequence[Dictionary], samples: Samples, device: str = "cpu", turned: bool = False
) -> dict[tuple[int, int], np.ndarray]:
    """For each two of several SAEs of one model, the cosine of every latent of the first that fires on `samples` with its partner in the
    second, (latents,): what a match reaches where nothing differs but the seed. `turned`: with the rows of the second turned by a
    random rotation, the floor."""
    rows = [alive(x, evaluation.evaluate(x, samples).frequency, len(samples)).rows for x in some]
    d_model = rows[0].shape[1]
    turn = torch.linalg.qr(torch.randn(d_model, d_model, generator=torch.Generator().manual_seed(0))).Q
    others = [x @ turn for x in rows] if turned else rows
    pairs = combinations(range(len(rows)), 2)
    return {(i, j): matching.cosines(store.kept(matching.match, rows[i], others[j], device=device)) for i, j in pairs}


def of_pairs(values: Mapping[tuple[int, int], float]) -> Interval:
    """The mean of what pairs of seeds give, with an interval over the seeds, each of which stands in several pairs: the jackknife of a
    U-statistic (Arvesen 1969). ValueError for fewer than three seeds."""
    seeds = sorted({seed for pair in values for seed in pair})
    return stats.over(seeds, lambda kept: float(np.mean([x for pair, x in values.items() if set(pair) <= set(kept)])))


def _gap(units: Sequence[tuple[int, float]]) -> float:
    one, other = (np.mean([x for side, x in units if side == k]) for k in (0, 1))
    return float(one - other)


def by_chance(tops: Sequence[Top], draws: int, seed: int = 0) -> np.ndarray:
    """What `beyond` gives where each top is as many latents drawn at random, (draws,)."""
    rng = np.random.default_rng(seed)
    drawn = [np.array([rng.choice(t.values, len(t.top), replace=False).mean() for _ in range(draws)]) for t in tops]
    return np.asarray(drawn[0] - (drawn[1] if len(drawn) > 1 else tops[0].values.mean()))


def predicted(
    change: Mapping[str, np.ndarray], gradients: Mapping[str, np.ndarray], spreads: Mapping[str, float],
    moved: Mapping[str, Mapping[str, np.ndarray]],
) -> np.ndarray:  # fmt: skip
    """Predicted and measured shifts (behaviours, fine-tunes, 2), in standard deviations: a fine-tune's mean change (d_model,) through
    each behaviour's gradient (d_model,) over its spread, and the mean of the items that it moved."""
    return np.array(
        [[[change[who] @ g / spreads[n], moved[who][n].mean()] for who in moved] for n, g in gradients.items()]
    )


def correlation(points: np.ndarray) -> Interval:
    """How predicted and measured shifts (behaviours, fine-tunes, 2) agree: Pearson's correlation over behaviours, the mean of the
    fine-tunes, with an interval over behaviours, on the scale of arctanh (Fisher 1915). ValueError for fewer than four behaviours."""
    if len(points) < 4:
        raise ValueError(f"{len(points)} behaviours were given; a correlation over them wants four or more")
    found = stats.over(points, _correlations)
    return Interval(*(float(np.tanh(x)) for x in found))


def _correlations(points: np.ndarray) -> float:
    return float(np.mean([np.arctanh(np.clip(_pearson(*fine.T), -0.9999, 0.9999)) for fine in points.swapaxes(0, 1)]))


def _pearson(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.corrcoef(x, y)[0, 1]) if x.std() > 0 and y.std() > 0 else 0.0


def dealt(points: np.ndarray, draws: int, seed: int = 0) -> np.ndarray:
    """The correlations (draws,) where what is predicted is dealt out among the behaviours at random."""
    rng, out = np.random.default_rng(seed), np.empty(draws)
    for i in range(draws):
        mixed = np.stack([points[rng.permutation(len(points)), :, 0], points[..., 1]], -1)
        out[i] = np.tanh(_correlations(mixed))
    return out


# --- encoder norms, as source 002 reads them ---------------------------------------------------------------------------


def norm_gaps(found: Match, A: Side, B: Side) -> np.ndarray:
    """`matching.norm_excess` by the latents of A, whose partners they are, (n,) float64; NaN where one has none."""
    excess = matching.norm_excess(found, A, B)[found.B_for_A.clamp_min(0)]
    return torch.where(found.B_for_A >= 0, excess, torch.nan).numpy()


def largest(gaps: np.ndarray, n: int) -> Interval:
    """The mean of the `n` largest norm differences to one SAE over that to another, for the same latents (latents, 2), with an interval
    over the latents.

    The largest are chosen anew whenever latents are left out: an interval over those chosen once would be too narrow. Most latents
    never are among the largest, so that the units are skewed by nature: the interval covers 92 to 94 % (12 and 50 of 1,000).
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the .* units are skewed")
        found = stats.over(gaps, partial(_log_ratio, n=n))
    return Interval(*(float(np.exp(x)) for x in found))


def _log_ratio(gaps: np.ndarray, n: int) -> float:
    whole = np.nan_to_num(gaps, nan=-np.inf)
    one, other = np.partition(whole, len(whole) - n, axis=0)[-n:].mean(0)
    return float(np.log(max(one, 1e-3) / max(other, 1e-3)))


def exchanged(gaps: np.ndarray, n: int, draws: int, seed: int = 0) -> np.ndarray:
    """The ratios (draws,) where each latent's two differences change places with a probability of one half: nothing is new in either."""
    rng = np.random.default_rng(seed)
    swaps = (rng.random(len(gaps)) < 0.5 for _ in range(draws))
    return np.exp([_log_ratio(np.where(swap[:, None], gaps[:, ::-1], gaps), n) for swap in swaps])


def found_again(values: np.ndarray, read: np.ndarray, n: int) -> np.ndarray:
    """Which of the n latents that one reading puts on top are in the top n of `values` (latents,), (n,) bool; NaN ranks last."""
    known, again = (top(np.nan_to_num(x, nan=-np.inf), n) for x in (values, read))
    return np.isin(again, known)


def random_partners(values: np.ndarray, A: Side, B: Side, n: int, draws: int, seed: int = 0) -> np.ndarray:
    """The shares (draws,) of `found_again` where each latent of B has a partner in A drawn at random."""
    rng, old, new = np.random.default_rng(seed), A.encoder_norms.numpy(), B.encoder_norms.numpy()
    partners = (rng.integers(0, len(old), len(new)) for _ in range(draws))
    return np.array([found_again(values, new - old[p], n).mean() for p in partners])


# --- what they fire on -------------------------------------------------------------------------------------------------


def like(samples: Samples, tokenizer: Tokenizer, pattern: str) -> Tensor:
    """Which tokens of a harvest are, as text, what a regular expression describes in full, (samples,) bool."""
    ids, row = samples.token_rows()
    at = ids[row, samples.named("position").long()].tolist()
    fits = {i: bool(re.fullmatch(pattern, tokenizer.decode([i]), re.DOTALL)) for i in set(at)}
    return torch.tensor([fits[i] for i in at])


def share_of_firing(sae: Dictionary, samples: Samples, marked: Tensor, batch: int = 2048) -> Tensor:
    """Of the tokens each latent fires on, the share that are `marked` (samples,), (latents,) float64; 0 for one that never fires."""
    hit, fired = (torch.zeros(sae.cfg.d_sae, dtype=torch.float64) for _ in range(2))
    for part in torch.arange(len(marked)).split(batch):
        on = codes_of(sae, samples.rows(part)).cpu() > 0
        fired, hit = fired + on.sum(0), hit + on[marked[part]].sum(0)
    return hit / fired.clamp_min(1)
