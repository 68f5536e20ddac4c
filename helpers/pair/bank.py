"""A bank of fine-tunes of one base, each trained for one behaviour to one dose: what each changed, measured in the same places.

A bank is a folder: an adapter a folder with its `training.json`, `vectors.safetensors` trained by preference, and `card.json`, what
each adapter measurably did. `scripts/bank.py` makes the committed one. Fine-tunes are loaded one at a time, and what is measured of
one is kept under what it is made of, so that a warm run loads none.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from helpers import session, store
from helpers.lm import models, reading
from helpers.lm.reading import LM
from helpers.pair import mixtures, patching
from helpers.sae import evaluation
from helpers.sae.activations import Samples
from helpers.steering.behaviors import BEHAVIORS, Item

KINDS = (
    "own.0",
    "own.1",
    "aside.0",
    "bank.0",
)  # of trained vectors: on which pairs, or where they were held; and the seed


PLANTS = ("same", "earlier", "other")  # models with a planted answer


class BankError(RuntimeError):
    """A bank of adapters is not whole; the message says what is missing and what to do."""


class Text(NamedTuple):
    """Token rows (rows, context) on which changes are read, and the positions that count, `kept` (rows, context) bool."""

    ids: Tensor
    kept: Tensor

    @classmethod
    def of(cls, held_out: Samples, rows: int, seed: int = 0) -> "Text":
        """So many rows of the text that was held out, drawn by the seed."""
        some = evaluation.spliceable(held_out, rows, seed)
        return cls(some.ids, some.kept)


def _shorter(residuals: Tensor, limit: float) -> Tensor:
    return residuals.float().cpu().norm(dim=-1) <= limit


def on_text(base: LM, fine_tune: LM | str, where: Text, layer: int, limit: float) -> mixtures.Change:
    """What a fine-tune, or one of that name, changes after the layer on the text's kept tokens no longer than `limit`."""

    of_base = {**base.key, "layer": layer, "ids": store.digest(where.ids)}  # read once for any number of fine-tunes

    def read() -> dict[str, Tensor]:
        return {"rows": reading.packed(base, where.ids, [layer])[layer].cpu()}

    def compute() -> dict[str, Tensor]:
        before = store.cached("stream", of_base, read, __name__)["rows"]
        after = reading.packed(_load(base, fine_tune), where.ids, [layer])[layer]
        kept = where.kept & _shorter(before, limit) & _shorter(after, limit)
        if not kept.any():
            raise ValueError(
                f"no token of the text has residuals no longer than {limit:g}: nothing is left to read a change on"
            )
        found = mixtures.Change.of(after.float().cpu()[kept] - before.float().cpu()[kept])
        return {"mean": found.mean, "moment": found.moment}

    key = _key(base, fine_tune) | {
        "layer": layer,
        "limit": limit,
        "ids": store.digest(where.ids),
        "kept": store.digest(where.kept),
    }
    found = store.cached("change", key, compute, __name__)
    return mixtures.Change.by(found["mean"], found["moment"])


class AtItems(NamedTuple):
    """What the change at the layer does to a behaviour's items, to first order, in nats (items,): all of it, and the part of it along
    the behaviour's vector."""

    whole: np.ndarray
    along: np.ndarray


def at_items(base: LM, fine_tune: LM | str, items: Sequence[Item], v: Tensor, layer: int, limit: float) -> AtItems:
    """The same fine-tune on a behaviour's `items`, by the base's gradient at every token that it changes."""

    def compute() -> dict[str, Tensor]:
        both = patching.answers(base, _load(base, fine_tune), items, layer, limit)
        whole, along = both.first_order(both.rows), both.along({"v": v[None]})["v"][0]
        return {"whole": torch.from_numpy(whole), "along": torch.from_numpy(along)}

    key = _key(base, fine_tune) | {
        "layer": layer,
        "limit": limit,
        "v": store.digest(v),
        "items": [list(i) for i in items],
    }
    found = store.cached("at items", key, compute, __name__)
    return AtItems(found["whole"].numpy(), found["along"].numpy())


def gradient(base: LM, items: Sequence[Item], layer: int) -> Tensor:
    """What a push at every token but the first does to the log-odds of a behaviour's `items`, mean of items: (d_model,) float64, nats a
    unit. Where a vector is only added while the answer is written, see `scoring.linear_response`."""
    both = patching.answers(base, base, items, layer, float("inf"))
    each = both.base.gradients.double().split([len(r) for r in both.base.residuals])
    sums = torch.stack([g[1:].sum(0) for g in each])
    return (sums[0::2] - sums[1::2]).mean(0)


def _load(base: LM, given: LM | str) -> LM:
    lm = (
        _latest(given, base.device.type, base.dtype, _key(base, given)["fine-tune"]["model"])
        if isinstance(given, str)
        else given
    )
    return lm.read_as(base.tokenizer)


@lru_cache(maxsize=1)
def _latest(name: str, device: str, dtype: torch.dtype, identity: str) -> LM:
    """The fine-tune of that name; the last one stays loaded, since it is often asked for twice in a row. `identity`: of what the name
    stands for now, so that one that was trained anew is loaded anew."""
    return models.load(name, device, dtype)


def _key(base: LM, given: LM | str) -> dict[str, Any]:
    of = models.key(given, base.device.type, base.dtype) if isinstance(given, str) else given.key
    return {"base": base.key, "fine-tune": of}


# --- the folder --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bank:
    """The adapters of a folder, of one base. BankError where there are none."""

    folder: Path
    base: str

    @cached_property
    def logs(self) -> dict[str, dict[str, Any]]:
        """Every adapter's training.json, by its name."""
        found = {f.parent.name: json.loads(f.read_text()) for f in sorted(self.folder.glob("*/training.json"))}
        if not found:
            raise BankError(f"the folder {self.folder.name} holds no adapters: run `make pair`, or leave `bank:` out")
        return found

    def names(self, **wanted: str | int) -> list[str]:
        """The adapters whose log says so of every key, such as `trait="joy", swapped=False`."""
        return [n for n, log in self.logs.items() if all(log.get(k) == x for k, x in wanted.items())]

    def first(self, behaviors: Sequence[str]) -> dict[str, str]:
        """Each behaviour's first adapter, by behaviour; those without one are left out."""
        plain = {self.logs[n]["trait"]: n for n in self.names(seed=0, swapped=False, without="")}
        return {b: plain[b] for b in behaviors if b in plain}

    def by_chance(self) -> list[str]:
        """The adapters that are about no behaviour: of preferences dealt out at random, or of a trait that is no behaviour."""
        plain = [
            n
            for n in self.names(seed=0, swapped=False, without="")
            if not (BEHAVIORS / f"{self.logs[n]['trait']}.jsonl").exists()
        ]
        return [*self.names(swapped=True), *plain]

    def model(self, *adapters: str) -> str:
        """What a profile calls the base with these adapters on it."""
        places = [self.folder / a for a in adapters]
        inside = [p.relative_to(session.ROOT) if p.is_relative_to(session.ROOT) else p for p in places]
        return " + ".join([self.base, *map(str, inside)])

    def _read(self, name: str) -> Path:
        file = self.folder / name
        if not file.exists():
            raise BankError(f"the bank {self.folder.name} has no {name}: run `make pair`, which makes what is missing")
        return file

    @cached_property
    def paths(self) -> dict[str, Tensor]:
        """Every trained vector's path (looks, d_model) float64, by behaviour and kind, such as "joy.own.0"."""
        return {n: x.double() for n, x in load_file(self._read("vectors.safetensors")).items()}

    @cached_property
    def vectors(self) -> dict[str, Any]:
        """How they were trained: `steps`, and by vector the losses and the dev shifts at each of them."""
        return json.loads(self._read("vectors.json").read_text())

    @cached_property
    def card(self) -> dict[str, Any]:
        """What each adapter did: `shifts` {adapter: {behaviour: nats by item}}, perplexity and repetition."""
        return json.loads(self._read("card.json").read_text())

    @property
    def background(self) -> str:
        """The change by chance that the planted models have."""
        return max(self.names(swapped=True), default="")

    @property
    def known(self) -> dict[str, tuple[str, str]]:
        """The planted models: by what was planted, its folder and the behaviour."""
        found = {k: f"known.{k}" for k in PLANTS if f"known.{k}" in self.logs}
        return {k: (n, self.logs[n]["trait"]) for k, n in found.items()} if self.background else {}

    def more_seeds(self, behavior: str) -> list[str]:
        """A behaviour's other fine-tunes, which differ in the seed alone."""
        return [n for n in self.names(trait=behavior, swapped=False, without="") if self.logs[n]["seed"]]

    def confined(self) -> dict[str, dict[str, np.ndarray]]:
        """By behaviour and what was held out while training ("nothing" first): how far its test items moved, in nats (items,)."""
        found: dict[str, dict[str, np.ndarray]] = {}
        for n, log in self.logs.items():
            if log.get("without"):
                trait = log["trait"]
                by = found.setdefault(trait, {"nothing": np.array(self.card["shifts"][trait][trait])})
                by[log["without"]] = np.array(self.card["shifts"][n][trait])
        return found

    def steps(self, behavior: str, without: str) -> int:
        """How many steps that training took."""
        return self.logs[behavior if without == "nothing" else f"{behavior}.without_{without}"]["steps"]

    def moved(self, behaviors: Sequence[str]) -> np.ndarray:
        """How far each behaviour's first fine-tune moved every one of them, in standard deviations of their items: (fine-tunes,
        behaviours)."""
        first, card = self.first(behaviors), self.card
        return np.array(
            [[np.mean(card["shifts"][first[i]][j]) / card["spread"][j] for j in behaviors] for i in behaviors]
        )

    def reached(self, behaviors: Sequence[str]) -> list[list[str]]:
        """For a table: each behaviour's loss with nothing added, along its vector, free and at right angles; and the dev shifts of the
        last three, in standard deviations."""
        rows = []
        for n in behaviors:
            along, free, aside = (self.vectors["vectors"][f"{n}.{kind}"] for kind in ("along", "own.0", "aside.0"))
            best = int(np.argmin(along["loss"]))
            losses = [free["loss"][0], along["loss"][best], free["loss"][1], aside["loss"][1]]
            shifts = [along["dev shifts"][best], free["dev shifts"][-1], aside["dev shifts"][-1]]
            rows.append([n, *(f"{x:.2f}" for x in losses), *(f"{x:+.2f}" for x in shifts)])
        return rows

    def dev_shift(self, behaviors: Sequence[str], kind: str) -> list[float]:
        """How far each behaviour's trained vector of a kind moved its dev items in the end, in standard deviations."""
        return [self.vectors["vectors"][f"{n}.{kind}"]["dev shifts"][-1] for n in behaviors]


# --- what predicts what ------------------------------------------------------------------------------------------------


def shape(table: np.ndarray) -> np.ndarray:
    """A table (fine-tunes, behaviours) without the size of each fine-tune's change: every row over its length."""
    return table / np.linalg.norm(table, axis=1, keepdims=True)


def predicted(along: np.ndarray, moved: np.ndarray) -> list[str]:
    """For a table: how the shift along vectors (fine-tunes, vectors) goes with what moved (fine-tunes, behaviours). The correlation over
    fine-tunes with the own vector, mean of behaviours; the same with others' vectors; in how many the own is highest."""
    n = len(along)
    r = np.corrcoef(along.T, moved.T)[:n, n:]  # vectors, behaviours
    best = int((r.argmax(0) == np.arange(n)).sum())
    return [f"{np.diag(r).mean():+.2f}", f"{r[~np.eye(n, dtype=bool)].mean():+.2f}", f"{best} of {n}"]
