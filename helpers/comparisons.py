"""What steering vectors of several kinds do, side by side: at one length, at several, and estimated from a few finite steps.

`study` measures; here the numbers are compared, tabled and drawn. Knows claims and figures, not models.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from IPython.display import Markdown

from helpers import figures, stats
from helpers.claims import Claim, table
from helpers.session import Session
from helpers.stats import Interval


class Doses(NamedTuple):
    """What vectors do at several strengths, each (behaviours, vectors, strengths): the mean `change` of items' log-odds in nats, and
    the price: `kl` in nats a token of the model's own replies, and the `loss` of plain text in nats a token."""

    change: np.ndarray
    kl: np.ndarray
    loss: np.ndarray

    def panels(self, labels: Sequence[str]) -> dict[str, dict[str, list[Interval]]]:
        """What a figure shows, `labels` naming the vectors: in each unit, for each vector and strength, the mean over behaviours
        with its interval; KL in square roots, which grow in proportion to a strength, and loss as perplexity."""
        units: dict[str, tuple[np.ndarray, Callable[[float], float]]] = {
            "change of log-odds (nats)": (self.change, float),
            "KL (nats per token)": (self.kl.clip(0) ** 0.5, np.square),
            "perplexity of plain text": (self.loss, np.exp),
        }
        return {
            unit: {
                who: [stats.over(x).map(back) for x in of]
                for who, of in zip(labels, table.transpose(1, 2, 0), strict=True)
            }
            for unit, (table, back) in units.items()
        }


@dataclass(frozen=True, eq=False)
class Compared:
    """What vectors made in several ways do at one length: each item's change of log-odds in nats, (items,) by way and behaviour."""

    changes: dict[str, dict[str, np.ndarray]]
    length: float

    def mean(self, way: str) -> np.ndarray:
        """Each behaviour's mean change, (behaviours,)."""
        return np.array([x.mean() for x in self.changes[way].values()])

    def over(self, way: str) -> Interval:
        """Their mean, with its interval over behaviours."""
        return stats.over(self.mean(way))

    def versus(
        self, session: Session, name: str, way: str, other: str, null: np.ndarray, null_label: str, claim: Claim
    ) -> None:
        """What a claim about the difference of two ways judged, drawn: every way beside the draws of its `null` (draws, behaviours), and
        how much further the one moves the same items than the other."""
        each = {k: [*map(stats.over, of.values()), self.over(k)] for k, of in self.changes.items()}
        pairs = zip(self.changes[way].values(), self.changes[other].values(), strict=True)
        panels: dict[str, figures.Panel] = {
            "What does each do?": {
                "series": each,
                "null": [stats.band(x) for x in [*null.T, null.mean(1)]],
                "null_label": null_label,
                "xlabel": f"change of log-odds at {self.length:g} of the residual norm (nats)",
            },
            f"{way[:1].upper()}{way[1:]}: more than {other}?": {
                "series": {
                    "difference (95 % over items; all: over behaviours)": [
                        *(stats.over(x - y) for x, y in pairs),
                        stats.over(self.mean(way) - self.mean(other)),
                    ]
                },
                "xlabel": "nats gained, item by item",
                "verdict": claim.verdict,
            },
        }
        figures.forests(session, name, [*self.changes[way], "all"], panels)

    def ratio(self, top: str, bottom: str) -> Interval | None:
        """One way's change as a share of another's, both summed over behaviours; None where there is nothing to divide by."""
        return stats.ratio_if_clear(self.mean(top), self.mean(bottom))

    def ahead(self, way: str, other: str) -> Markdown:
        """In how many behaviours one way moves items further than another, in which not, and which either moves backwards, in a
        sentence or two."""
        names = list(self.changes[way])

        def those(which: np.ndarray) -> str:
            return ", ".join(n for n, yes in zip(names, which, strict=True) if yes)

        ahead = self.mean(way) > self.mean(other)
        said = f"*{way}* is ahead of *{other}* in {ahead.sum()} of {len(names)} behaviours"
        said += f", not in {those(~ahead)}." if not ahead.all() else "."
        back = [f"{those(self.mean(x) < 0)} (*{x}*)" for x in (way, other) if (self.mean(x) < 0).any()]
        return Markdown(f"{said} Backwards go {', '.join(back)}." if back else said)

    def table(self) -> Markdown:
        """A row for each way: its mean change, the share of items that move the wrong way, for how many behaviours it is best."""
        best = np.array([self.mean(way) for way in self.changes]).argmax(0)
        body = [
            [way, f"{self.over(way):+.2f}", f"{np.mean([(x < 0).mean() for x in of.values()]):.0%}", np.sum(best == i)]
            for i, (way, of) in enumerate(self.changes.items())
        ]
        return table(
            [
                "vector",
                "change in nats [95 % over behaviours]",
                "held-out items on which it lowers the log-odds",
                "best for so many behaviours",
            ],
            body,
        )

    def figure(
        self,
        session: Session,
        name: str,
        ways: Sequence[str],
        null: np.ndarray,
        null_label: str,
        claim: Claim,
        marks: Mapping[str, float] | None = None,
    ) -> None:
        """What a claim about some of the ways judged: behaviour by behaviour and over all, beside the draws of its `null`
        (draws, behaviours). Of a ratio, its own number too, with its thresholds, `marks`."""
        figures.forest(
            session,
            name,
            list(self.changes[ways[0]]),
            {way: [stats.over(x) for x in of.values()] if way in ways else None for way, of in self.changes.items()},
            pooled={way: self.over(way) for way in self.changes},
            null=[stats.band(x) for x in [*null.T, null.mean(1)]],
            null_label=null_label,
            title=f"{claim.statement[:1].upper()}{claim.statement[1:]}:",
            xlabel=f"change of log-odds at {self.length:g} of the residual norm\n(nats; 95 % over items, last row over behaviours)",
            marks=marks if claim.value is not None else None,
            judged=(f"ratio judged, {claim.unit}", claim.interval) if marks and claim.value is not None else None,
            verdict=claim.verdict,
        )


def estimated(measured: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """The mean over all items of what was measured on the first of them, (..., some): the prediction's mean over all, `predicted`
    (..., all), and the mean of what it misses where it was measured (the difference estimator, Cochran 1977, ch. 7)."""
    return predicted.mean(-1) + (measured - predicted[..., : measured.shape[-1]]).mean(-1)


def central(draws: np.ndarray) -> Interval:
    """The mean of draws (draws, ...), averaged over all else first, with the central 95 % of them: for a figure."""
    each = np.asarray(draws, np.float64).reshape(len(draws), -1).mean(1)
    return Interval(float(each.mean()), *stats.band(each))
