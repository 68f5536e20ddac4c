"""A bank of fine-tunes of one base, each trained for one behaviour to one dose: what each changed, measured in the same places.

A bank is a folder: an adapter a folder with its `training.json`, `vectors.safetensors` trained by preference, and `card.json`, what
each adapter measurably did. `scripts/bank.py` makes the committed one. Fine-tunes are loaded one at a time, and what is measured of
one is kept under what it is made of, so that a warm run loads none.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
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
from helpers.steering.behaviors import Item


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

    def compute() -> dict[str, Tensor]:
        before, after = (reading.packed(m, where.ids, [layer])[layer] for m in (base, _load(base, fine_tune)))
        kept = where.kept & _shorter(before, limit) & _shorter(after, limit)
        found = mixtures.Change.of(after.float().cpu()[kept] - before.float().cpu()[kept])
        return {"mean": found.mean, "moment": found.moment}

    key = _key(base, fine_tune) | {"layer": layer, "limit": limit, "text": store.digest([where.ids, where.kept])}
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


def _load(base: LM, given: LM | str) -> LM:
    lm = models.load(given, base.device.type, base.dtype) if isinstance(given, str) else given
    return lm.read_as(base.tokenizer)


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

    def names(self, **wanted: Any) -> list[str]:
        """The adapters whose log says so of every key, such as `trait="joy", swapped=False`."""
        return [n for n, log in self.logs.items() if all(log.get(k) == x for k, x in wanted.items())]

    def first(self, behaviors: Sequence[str]) -> dict[str, str]:
        """Each behaviour's first adapter, by behaviour; those without one are left out."""
        plain = {self.logs[n]["trait"]: n for n in self.names(seed=0, swapped=False, without="")}
        return {b: plain[b] for b in behaviors if b in plain}

    def by_chance(self, behaviors: Sequence[str]) -> list[str]:
        """The adapters that are about none of the behaviours: of another trait, or of preferences dealt out at random."""
        return [n for n, log in self.logs.items() if log["swapped"] or log["trait"] not in behaviors]

    def model(self, *adapters: str) -> str:
        """What a profile calls the base with these adapters on it."""
        return " + ".join([self.base, *(str((self.folder / a).relative_to(session.ROOT)) for a in adapters)])

    @cached_property
    def paths(self) -> dict[str, Tensor]:
        """Every trained vector's path (looks, d_model) float64, by behaviour and kind, such as "joy.own.0"."""
        return {n: x.double() for n, x in load_file(self.folder / "vectors.safetensors").items()}

    @cached_property
    def vectors(self) -> dict[str, Any]:
        """How they were trained: `steps`, and by vector the losses and the dev shifts at each of them."""
        return json.loads((self.folder / "vectors.json").read_text())

    @cached_property
    def card(self) -> dict[str, Any]:
        """What each adapter did: `shifts` {adapter: {behaviour: nats by item}}, perplexity and repetition."""
        return json.loads((self.folder / "card.json").read_text())
