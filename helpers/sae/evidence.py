"""What a latent has to do with a behaviour, on pairs and items that did not choose it.

Half of a behaviour's pairs choose its latents: by a signed pursuit of their vector, and by the difference of their
codes. The other half says how well each tells the sides apart, held-out items what its decoder row does when it is
added alone. Beside both stand the vector itself, and all the other latents. Pure: activations, an SAE and gradients in,
numbers out.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from helpers import stats
from helpers.sae import decompose, latents
from helpers.sae.latents import Context, Latent
from helpers.sae.projections import Account, Part
from helpers.sae.topk import Dictionary
from helpers.stats import Interval

PURSUIT, DIFFERENCE = WAYS = ("in v", "on pairs")  # how a latent came to be listed
Sides = tuple[Tensor, Tensor]  # activations of pairs: positive, negative, each (pairs, d_model)


class Evidence(NamedTuple):
    """A listed latent: which of WAYS found it, its signed code `in_v` by the pursuit, and the difference of its codes
    `on_pairs`.

    The rest is in the direction of its sign (in v, if v listed it), so that a latent that the behaviour lowers counts
    downwards: `auroc` of its code and `pre_auroc` of what the encoder gives before it chooses, on held-out pairs;
    `response` to its row alone, in nats, over held-out items. The p-values, Holm's over the list, are against the other
    latents."""

    latent: int
    ways: tuple[str, ...]
    in_v: float
    on_pairs: float
    auroc: Interval
    pre_auroc: Interval
    pre_auroc_p: float
    response: Interval
    response_p: float


class Listed(NamedTuple):
    """A behaviour's latents with their evidence, by number in the order in which they were found, and `found`, those of
    each way, the largest first. What it is measured by: `auroc` and `response` of the vector itself, and those of all
    living latents, `null_auroc` and `null_response`, each with the sign in which the choosing pairs, or v, have it;
    `together`: the correlation, over living latents, of how well one tells the sides apart before the choice with what
    its row does."""

    rows: dict[int, Evidence]
    found: dict[str, list[int]]
    auroc: Interval
    response: Interval
    null_auroc: np.ndarray
    null_response: np.ndarray
    together: float

    def first(self, way: str) -> Evidence:
        """The largest latent that one of WAYS lists."""
        return self.rows[self.found[way][0]]


def halved(sides: Sides) -> tuple[Sides, Sides]:
    """Every other pair, and the rest."""
    return (sides[0][0::2], sides[1][0::2]), (sides[0][1::2], sides[1][1::2])


def of_latents(
    sae: Dictionary, made: Sides, held: Sides, gradients: np.ndarray, length: float, k: int, n: int, alive: Tensor
) -> Listed:
    """The `n` latents of largest code by a signed pursuit of the vector of `made` with `k` rows, and the n that `made`
    moves most.

    `held`: pairs that choose nothing. `gradients` (items, d_model): the linear response of held-out items, in nats per
    unit of what is added; rows are `length` long. `alive` (latents,) bool: the latents that stand for any latent.
    ValueError if those are fewer than two, or if there is a side of less than two pairs.
    """
    if int(alive.sum()) < 2 or min(len(side) for side in (*made, *held)) < 2:
        raise ValueError("two pairs in either half, and two living latents, are the least that this can be asked of")
    v, pairs = (made[0] - made[1]).double().mean(0).cpu(), (len(held[0]), len(held[1]))
    rows = decompose.rows_of(sae)
    unit, norms = (x.cpu() for x in decompose.unit_rows(rows))
    codes = {
        PURSUIT: decompose.pursuit(rows, v[None], k).codes[0],
        DIFFERENCE: decompose.encode_pairs(sae, *made).codes[0],
    }
    found = {way: _largest(x.abs() * norms, n) for way, x in codes.items()}
    told = stats.auroc(*(decompose.codes_of(sae, side).cpu().numpy() for side in held))
    told_before = stats.auroc(*(decompose.pre_codes(sae, side).cpu().numpy() for side in held))
    lean = [decompose.pre_codes(sae, side).double().mean(0).cpu() for side in made]
    answers = np.concatenate([length * gradients @ part.double().numpy().T for part in unit.split(4096)], axis=1)
    null_told = _turned(told_before, (lean[0] - lean[1]).sign().numpy())
    null_answers = answers.mean(0) * (unit.double() @ v).sign().numpy()
    living, listed = alive.cpu().numpy(), []
    for i in dict.fromkeys([*found[PURSUIT], *found[DIFFERENCE]]):
        ways = tuple(way for way in WAYS if i in found[way])
        sign, others = float(codes[ways[0]][i].sign()), living & (np.arange(len(living)) != i)
        area, before = (stats.auroc_interval(float(_turned(x[i], sign)), *pairs) for x in (told, told_before))
        response = stats.over(sign * answers[:, i])
        p = [stats.p_value(x.value, y[others]) for x, y in ((before, null_told), (response, null_answers))]
        in_v, on_pairs = (float(x[i]) for x in codes.values())
        listed.append(Evidence(i, ways, in_v, on_pairs, area, before, p[0], response, p[1]))
    holm = [stats.holm(p).tolist() for p in ([x.pre_auroc_p for x in listed], [x.response_p for x in listed])]
    along_v = stats.auroc(*((side.double().cpu() @ v).numpy() for side in held))
    return Listed(
        {x.latent: x._replace(pre_auroc_p=a, response_p=b) for x, a, b in zip(listed, *holm, strict=True)},
        found,
        stats.auroc_interval(float(along_v), *pairs),
        stats.over(length * gradients @ (v / v.norm()).numpy()),
        null_told[living],
        null_answers[living],
        stats.correlation([(told_before[living], answers.mean(0)[living])]),
    )


def _largest(size: Tensor, n: int) -> list[int]:
    """The latents of the n largest sizes (latents,) above zero."""
    return size.topk(min(n, int((size > 0).sum()))).indices.tolist()


def _turned(auroc: np.ndarray, sign: np.ndarray | float) -> np.ndarray:
    """AUROCs in the direction of a sign; one half for none."""
    return np.asarray(0.5 + np.asarray(sign) * (auroc - 0.5))


# --- as a table --------------------------------------------------------------------------------------------------------

HEAD = [
    "latent", "listed", "in v", "on pairs", "called", "makes likelier", "where it fires most", "AUROC of the code",
    "before the choice", "p", "its row alone, nats", "p",
]  # fmt: skip


def lines(found: Listed, words: Sequence[Latent], labels: Mapping[int, str]) -> list[list[str]]:
    """A line for v itself, then one for each latent, under HEAD: what it is called, and what it does."""

    def line(x: Evidence) -> list[str]:
        latent = words[x.latent]
        at = latents.cell(_near(latent.contexts[0])) if latent.contexts else "never fired"
        called = [latents.cell(labels.get(x.latent, "-")), latents.words(latent), at]
        told = [f"{x.auroc:.2f}", f"{x.pre_auroc:.2f}", f"{x.pre_auroc_p:.2g}"]
        does = [f"{x.response:.2f}", f"{x.response_p:.2g}"]
        return [str(x.latent), " and ".join(x.ways), f"{x.in_v:+.1f}", f"{x.on_pairs:+.1f}", *called, *told, *does]

    of_v = ["v itself", *["-"] * 7, f"{found.auroc:.2f}", "-", f"{found.response:.2f}", "-"]
    return [of_v, *map(line, found.rows.values())]


def _near(context: Context, before: int = 34, after: int = 12) -> Context:
    return context._replace(before=context.before[-before:], after=context.after[:after])


def sums(found: Account, words: Sequence[Latent], labels: Mapping[int, str]) -> list[list[str]]:
    """The lines (what, how much) by which a latent comes to its pre-code: see `projections.account`."""

    def named(i: int) -> str:
        return f"{i} ({latents.cell(labels[i]) if i in labels else latents.words(words[i], 2)})"

    def line(x: Part) -> list[str]:
        how = "raised" if x.difference > 0 else "lowered"
        return [f"{how} by {abs(x.difference):.2f}: {named(x.latent)}, rows at {x.cosine:+.2f}", f"{x.adds:+.2f}"]

    left = {"other latents that the pairs raise": found.raised, "other latents that they lower": found.lowered}
    left["what of v no difference of codes makes up"] = found.rest
    return [
        ["the zero vector (bias)", f"{found.bias:+.2f}"],
        *map(line, found.parts),
        *([name, f"{adds:+.2f}"] for name, adds in left.items()),
        [f"**before the choice: {named(found.latent)}**", f"**{found.total:+.2f}**"],
        ["its code", f"{found.code:.2f}"],
    ]
