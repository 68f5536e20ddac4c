"""What a latent has to do with a behaviour, on pairs and items that did not choose it.

Half of a behaviour's pairs choose its latents: by a signed pursuit of their vector, and by the difference of their codes. The other
half says how well each tells the sides apart, held-out items what its decoder row does when it is added alone. Beside both stand
the vector itself, and all the other latents. Pure: activations, an SAE and gradients in, numbers out.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from helpers import stats
from helpers.sae import decompose, latents
from helpers.sae.decompose import Dictionary
from helpers.sae.latents import Context, Latent
from helpers.stats import Interval

PURSUIT, DIFFERENCE = "in v", "on pairs"  # how a latent came to be listed
Sides = tuple[Tensor, Tensor]  # activations of pairs: positive, negative, each (pairs, d_model)


class Evidence(NamedTuple):
    """A listed latent. Everything is in the direction of its sign in the list, so that a latent that the behaviour lowers counts
    downwards: `code`, its signed code; `auroc` of its code and `pre_auroc` of what the encoder gives before it chooses, on held-out
    pairs; `response` to its row alone, in nats, over held-out items. The p-values, Holm's over the list, are against the other
    latents."""

    way: str
    latent: int
    code: float
    auroc: Interval
    pre_auroc: Interval
    pre_auroc_p: float
    response: Interval
    response_p: float


class Listed(NamedTuple):
    """A behaviour's latents with their evidence, and what it is measured by: `auroc` and `response` of the vector itself, and those of
    all other living latents, `null_auroc` and `null_response`, each with the sign in which the choosing pairs, or v, have it."""

    rows: list[Evidence]
    auroc: Interval
    response: Interval
    null_auroc: np.ndarray
    null_response: np.ndarray


def halved(sides: Sides) -> tuple[Sides, Sides]:
    """Every other pair, and the rest."""
    return (sides[0][0::2], sides[1][0::2]), (sides[0][1::2], sides[1][1::2])


def of_latents(
    sae: Dictionary, made: Sides, held: Sides, gradients: np.ndarray, length: float, k: int, n: int, alive: Tensor
) -> Listed:
    """The `n` latents of largest code by a signed pursuit of the vector of `made` with `k` rows, and the n that `made` moves most.

    `held`: pairs that choose nothing. `gradients` (items, d_model): the linear response of held-out items, in nats per unit of what
    is added; rows are `length` long. `alive` (latents,) bool: the latents that stand for any latent. ValueError if those are fewer
    than two, or if there is a side of less than two pairs.
    """
    if int(alive.sum()) < 2 or min(len(side) for side in (*made, *held)) < 2:
        raise ValueError("two pairs in either half, and two living latents, are the least that this can be asked of")
    v, pairs = (made[0] - made[1]).double().mean(0).cpu(), (len(held[0]), len(held[1]))
    rows = decompose.rows_of(sae)
    unit, norms = (x.cpu() for x in decompose.unit_rows(rows))
    ways = {
        PURSUIT: decompose.pursuit(rows, v[None], k).codes[0],
        DIFFERENCE: decompose.encode_pairs(sae, *made).codes[0],
    }
    told = stats.auroc(*(decompose.codes_of(sae, side).cpu().numpy() for side in held))
    told_before = stats.auroc(*(decompose.pre_codes(sae, side).cpu().numpy() for side in held))
    lean = [decompose.pre_codes(sae, side).double().mean(0).cpu() for side in made]
    answers = np.concatenate([length * gradients @ part.double().numpy().T for part in unit.split(4096)], axis=1)
    null_told = _turned(told_before, (lean[0] - lean[1]).sign().numpy())
    null_answers = answers.mean(0) * (unit.double() @ v).sign().numpy()
    any_latent, found = alive.cpu().numpy(), []
    for way, codes in ways.items():
        size = codes.abs() * norms
        for i in size.topk(min(n, int((size > 0).sum()))).indices.tolist():
            sign, others = float(codes[i].sign()), any_latent & (np.arange(len(codes)) != i)
            area, before = (float(_turned(x[i], sign)) for x in (told, told_before))
            response = stats.over(sign * answers[:, i])
            p = (stats.p_value(before, null_told[others]), stats.p_value(response.value, null_answers[others]))
            one, other = (stats.auroc_interval(x, *pairs) for x in (area, before))
            found.append(Evidence(way, i, float(codes[i]), one, other, p[0], response, p[1]))
    holm = [stats.holm(p).tolist() for p in ([x.pre_auroc_p for x in found], [x.response_p for x in found])]
    along_v = stats.auroc(*((side.double().cpu() @ v).numpy() for side in held))
    return Listed(
        [x._replace(pre_auroc_p=a, response_p=b) for x, a, b in zip(found, *holm, strict=True)],
        stats.auroc_interval(float(along_v), *pairs),
        stats.over(length * gradients @ (v / v.norm()).numpy()),
        null_told[any_latent],
        null_answers[any_latent],
    )


def _turned(auroc: np.ndarray, sign: np.ndarray | float) -> np.ndarray:
    """AUROCs in the direction of a sign; one half for none."""
    return np.asarray(0.5 + np.asarray(sign) * (auroc - 0.5))


# --- as a table --------------------------------------------------------------------------------------------------------

HEAD = [
    "latent", "found", "code", "called", "makes likelier", "where it fires most", "AUROC of the code", "before the choice", "p",
    "its row alone, nats", "p",
]  # fmt: skip


def lines(found: Listed, words: Sequence[Latent], labels: Mapping[int, str]) -> list[list[str]]:
    """A line for v itself, then one for each latent, under HEAD: what it is called, and what it does."""

    def line(x: Evidence) -> list[str]:
        latent = words[x.latent]
        at = latents.cell(_near(latent.contexts[0])) if latent.contexts else "never fired"
        told = [f"{x.auroc:.2f}", f"{x.pre_auroc:.2f}", f"{x.pre_auroc_p:.2g}"]
        called = latents.cell(labels.get(x.latent, "-"))
        does = [f"{x.response:.2f}", f"{x.response_p:.2g}"]
        return [str(x.latent), x.way, f"{x.code:+.1f}", called, latents.words(latent), at, *told, *does]

    of_v = ["v itself", *["-"] * 5, "-", f"{found.auroc:.2f}", "-", f"{found.response:.2f}", "-"]
    return [of_v, *map(line, found.rows)]


def _near(context: Context, before: int = 34, after: int = 12) -> Context:
    return context._replace(before=context.before[-before:], after=context.after[:after])
