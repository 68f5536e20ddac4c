"""Activations of text on disk and in memory: what a shard holds, whether it is whole, and rows read back shuffled.

A harvest is a folder of shards; a shard is one safetensors file with a sidecar that holds its count and checksum. Knows the
layout and how to read it, not how activations are made (`helpers.sae.harvest`).
"""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from helpers import store
from helpers.lm import models
from helpers.lm.hooks import resid_post

OUTLIER = 10.0  # a token whose residual is longer than this many medians is a massive activation


class HarvestError(RuntimeError):
    """Activations cannot be had or read; the message names the shard and the row, or the two models that do not fit."""


# --- shards ------------------------------------------------------------------------------------------------------------


class Chunk(NamedTuple):
    """The token rows of shard `number`: ids, kept, documents (rows, context).

    `counts` says how many tokens are kept and, by reason, how many are not.
    """

    number: int
    ids: np.ndarray
    kept: np.ndarray
    documents: np.ndarray
    counts: Counter[str]


class Acts(NamedTuple):
    """The kept tokens of a chunk at one layer, on the CPU: residuals (tokens, d_model) and their lengths (tokens,)."""

    rows: Tensor
    norms: Tensor


def write_shard(folder: Path, chunk: Chunk, acts: dict[int, Acts]) -> None:
    """One shard and, after it, its sidecar: without the sidecar it does not count."""
    rows, positions = np.nonzero(chunk.kept)
    tensors = {f"layer.{k}": a.rows for k, a in acts.items()} | {f"norm.{k}": a.norms for k, a in acts.items()}
    tensors |= {"ids": torch.from_numpy(chunk.ids), "row": torch.from_numpy(rows.astype(np.int32))}
    tensors |= {"position": torch.from_numpy(positions.astype(np.int32))}
    tensors |= {"document": torch.from_numpy(chunk.documents[rows, positions])}
    data = save(tensors)
    store.write_file(folder / f"shard-{chunk.number:05d}.safetensors", data)
    note = {"count": len(rows), "bytes": len(data), "sha256": store.digest(data), "tokens": dict(chunk.counts)}
    store.write_file(folder / f"shard-{chunk.number:05d}.json", json.dumps(note))


def whole(folder: Path, index: int) -> bool:
    """Whether a shard is there and matches its count and checksum; one that does not is named and removed."""
    shard, sidecar = (folder / f"shard-{index:05d}.{end}" for end in ("safetensors", "json"))
    if not sidecar.exists():
        return False
    note = store.read_json(sidecar)
    if note and shard.exists() and shard.stat().st_size == note["bytes"] and store.file_digest(shard) == note["sha256"]:
        return True
    print(f"shard {index} of harvest {folder.name} is damaged; it is made again")
    for path in (sidecar, shard):
        path.unlink(missing_ok=True)
    return False


# --- reading -----------------------------------------------------------------------------------------------------------


class Rows:
    """Rows (samples, d_model) that can be asked for by index; what `helpers.sae.train` and the studies read from."""

    d_model: int

    def __len__(self) -> int:
        raise NotImplementedError

    def rows(self, index: Tensor) -> Tensor:
        """The samples of `index` (n,): (n, d_model) float32."""
        raise NotImplementedError

    def about(self) -> dict[str, Any]:
        """What the rows are, as an SAE's metadata says it: model_name, hook_name, context_size, data set."""
        raise NotImplementedError

    def sample(self, n: int, seed: int = 0) -> Tensor:
        """n samples (or all there are), drawn without repeats: (n, d_model) float32."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))[:n]
        return self._finite(self.rows(index := order.sort().values), index)

    def batches(self, batch: int, seed: int = 0, start: int = 0, block: int = 64, pool: int = 16) -> Iterator[Tensor]:
        """Batches (batch, d_model) without end, epoch after epoch, from batch number `start` on.

        Blocks of `block` neighbouring samples are permuted, and samples within every `pool` batches: a seeded shuffle that
        touches pool * batch / block places of the disk at a time and holds one batch. What does not fill a batch at the end
        of an epoch is left out. ValueError for fewer samples than a batch, or with sample and shard if one is not finite.
        """
        places = self.places()
        per_epoch = (places // block * block) // batch
        if per_epoch < 1:
            raise ValueError(
                f"{places} samples cannot fill one batch of {batch} (in blocks of {block}): harvest more or ask for less"
            )
        number = start
        while True:
            epoch, within = divmod(number, per_epoch)
            order = torch.randperm(places // block, generator=seeded(seed, epoch))
            for first in range(within // pool * pool, per_epoch, pool):
                n = min(pool, per_epoch - first)
                mixed = first * batch + torch.randperm(n * batch, generator=seeded(seed, epoch, first + 1))
                for i in range(max(within - first, 0), n):
                    at = mixed[i * batch : (i + 1) * batch]
                    index = self.placed(order[at // block] * block + at % block)
                    yield self._finite(self.rows(index), index)
                    number += 1

    def places(self) -> int:
        """How many places `batches` puts in order: the samples."""
        return len(self)

    def placed(self, place: Tensor) -> Tensor:
        """The samples (n,) that stand at places (n,)."""
        return place

    def _finite(self, rows: Tensor, index: Tensor) -> Tensor:
        if not bool(torch.isfinite(rows.sum())) and not torch.isfinite(rows).all():
            bad = int(index[(~torch.isfinite(rows)).any(1).nonzero()[0, 0]])
            raise ValueError(
                f"sample {bad} ({self.place(bad)}) holds NaN or infinity: remove that shard and harvest it again"
            )
        return rows

    def place(self, index: int) -> str:
        """Where a sample lies, in words."""
        return f"row {index}"


def about_rows(model: str, source: object, layer: int, context: int, outlier: float, **more: object) -> dict[str, Any]:
    """The metadata of residuals after `layer`, in SAELens's words where it has them."""
    return {
        "model_name": model.split("@")[0],
        "model_revision": model.split("@")[-1],
        "hook_name": resid_post(layer),
        "context_size": context,
        "dataset_path": source,
        "exclude_special_tokens": True,
        "exclude_first_token": True,
        "exclude_outliers_beyond_medians": outlier,
        "convention": models.CONVENTION,
        **more,
    }


def seeded(*numbers: int) -> torch.Generator:
    """A generator whose seed is a hash of all the numbers."""
    return torch.Generator().manual_seed(int(store.digest(list(numbers))[:15], 16))


class Array(Rows):
    """Rows held in memory (samples, d_model); `known` is what `about` says of them."""

    def __init__(self, tensor: Tensor, **known: object):
        self.tensor, self.d_model, self.known = tensor, tensor.shape[1], known

    def about(self) -> dict[str, Any]:
        return {"model_name": "none", "hook_name": "none", **self.known, "rows": store.digest(self.tensor)[:16]}

    def __len__(self) -> int:
        return len(self.tensor)

    def rows(self, index: Tensor) -> Tensor:
        return self.tensor[index].float()


class Samples(Rows):
    """A harvest on disk at one layer, memory-mapped; `note` is its sidecar. `at(layer)` gives another layer of it.

    Tokens with a residual longer than OUTLIER medians are left out (`dropped` says how many): a handful of massive
    activations (Sun et al. 2024, arXiv:2402.17762) can hold most of the variance and make any fit look good.
    `limit` is the longest residual that is used.
    """

    def __init__(self, folder: Path, layer: int, verify: bool = True, outlier: float = OUTLIER):
        self.folder, self.layer, self.outlier = Path(folder), layer, outlier
        note = store.read_json(self.folder / "sidecar.json")
        if note is None:
            raise HarvestError(
                f"{self.folder.name} is not a finished harvest: run it again, it goes on where it stopped"
            )
        self.note: dict[str, Any] = note
        if layer not in self.note["parameters"]["layers"]:
            raise HarvestError(f"layer {layer} was asked for; this harvest holds {self.note['parameters']['layers']}")
        numbers = range(self.note["shards"])
        if verify and (bad := [i for i in numbers if not whole(self.folder, i)]):
            raise HarvestError(
                f"shard {bad[0]} was damaged and is removed: run the harvest again, only it is made anew"
            )
        try:
            self.files = [safe_open(self.folder / f"shard-{i:05d}.safetensors", "pt") for i in numbers]
        except (SafetensorError, OSError) as error:
            raise HarvestError(f"{self.folder.name} cannot be read: {error}; run the harvest again") from None
        self.parts = [f.get_tensor(f"layer.{layer}") for f in self.files]
        self.starts = torch.tensor([0, *(len(p) for p in self.parts)]).cumsum(0)
        self.d_model = self.parts[0].shape[1]
        norms = torch.cat([f.get_tensor(f"norm.{layer}") for f in self.files])
        self.limit = float(outlier * norms.median())
        self.keep_only(norms <= self.limit)

    def about(self) -> dict[str, Any]:
        p = self.note["parameters"]
        known = {
            "prepend_bos": p["prepend bos"],
            "model_dtype": p["dtype"],
            "harvest": self.folder.name,
            "samples": len(self),
            "used": store.digest(self.used)[:16],
        }
        return about_rows(p["model"], p["source"], self.layer, p["context"], self.outlier, **known)

    def keep_only(self, mask: Tensor) -> None:
        """Use the harvested tokens of `mask` (all harvested,) and no others."""
        self.used = mask.nonzero()[:, 0]
        self.dropped = len(mask) - len(self.used)

    def __len__(self) -> int:
        return len(self.used)

    def places(self) -> int:
        """All harvested tokens where no more than one in a hundred is left out, so that models whose outliers are other tokens of
        one text still read it in one order; else the samples."""
        return int(self.starts[-1]) if 100 * self.dropped <= len(self.used) else len(self)

    def placed(self, place: Tensor) -> Tensor:
        """The samples that stand at places; for a token that is left out the next that is not."""
        if self.places() == len(self):
            return place
        return torch.searchsorted(self.used, place).clamp_max(len(self) - 1)

    def at(self, layer: int) -> "Samples":
        """The same harvest at another of its layers."""
        return Samples(self.folder, layer, verify=False, outlier=self.outlier)

    def rows(self, index: Tensor) -> Tensor:
        ordered, back = self.used[index].sort()
        cuts = torch.searchsorted(ordered, self.starts).tolist()
        out = torch.empty(len(index), self.d_model, dtype=self.parts[0].dtype)
        for i in torch.bucketize(ordered, self.starts[1:], right=True).unique_consecutive().tolist():
            here = slice(cuts[i], cuts[i + 1])
            out[back[here]] = self.parts[i][ordered[here] - self.starts[i]]
        return out.float()

    def named(self, name: str) -> Tensor:
        """(samples,) int32: the `document`, the `position` in its row, or the `row` in its shard, of every sample."""
        return torch.cat([f.get_tensor(name) for f in self.files])[self.used]

    def token_rows(self) -> tuple[Tensor, Tensor]:
        """All token rows (rows, context) int32, and the row each sample lies in (samples,)."""
        ids = [f.get_tensor("ids") for f in self.files]
        before = np.cumsum([0, *(len(i) for i in ids[:-1])])
        rows = [f.get_tensor("row") + int(b) for f, b in zip(self.files, before, strict=True)]
        return torch.cat(ids), torch.cat(rows)[self.used]

    def place(self, index: int) -> str:
        index = int(self.used[index])
        shard = int(torch.bucketize(torch.tensor(index), self.starts[1:], right=True))
        return f"shard {shard}, row {index - int(self.starts[shard])} of {self.folder.name}"


class Difference(Rows):
    """chat - base, token by token, in float32."""

    def __init__(self, base: Samples, chat: Samples):
        self.base, self.chat, self.d_model = base, chat, base.d_model

    def __len__(self) -> int:
        return len(self.base)

    def about(self) -> dict[str, Any]:
        base, chat = self.base.about(), self.chat.about()
        return {**chat, "difference": f"{chat['model_name']} - {base['model_name']}", "base_harvest": base["harvest"]}

    def places(self) -> int:
        """As of either side."""
        return self.base.places()

    def placed(self, place: Tensor) -> Tensor:
        """As of either side."""
        return self.base.placed(place)

    def rows(self, index: Tensor) -> Tensor:
        return self.chat.rows(index) - self.base.rows(index)

    def named(self, name: str) -> Tensor:
        """As `Samples.named`; the same of either side."""
        return self.base.named(name)

    def token_rows(self) -> tuple[Tensor, Tensor]:
        """As `Samples.token_rows`; the same of either side."""
        return self.base.token_rows()

    def place(self, index: int) -> str:
        return f"{self.base.place(index)} or of {self.chat.folder.name}"


class Pair(NamedTuple):
    """The same tokens through two models: `base`, `chat`, and their `difference`; sample i of each is the same token."""

    base: Samples
    chat: Samples

    def at(self, layer: int) -> "Pair":
        """The same pair at another of its layers."""
        return aligned(self.base.at(layer), self.chat.at(layer))

    @property
    def difference(self) -> Difference:
        return Difference(self.base, self.chat)


def _same_tokens(one: Samples, other: Samples) -> None:
    """HarvestError if two harvests do not hold the same tokens in the same places."""
    same = len(one.files) == len(other.files) and len(one.parts[0]) == len(other.parts[0])
    for part in zip(one.files, other.files, strict=True) if same else ():
        same = same and all(torch.equal(*(f.get_tensor(name) for f in part)) for name in ("ids", "row", "position"))
    if not same:
        raise HarvestError(
            "the two harvests do not hold the same tokens: make them with harvest.pair, or harvest.pair_of_profile"
        )


def aligned(base: Samples, chat: Samples) -> Pair:
    """The pair, each side reduced to the tokens that are outliers in neither."""
    pair = Pair(base, chat)
    common(pair)
    return pair


def common(*pairs: Pair) -> None:
    """Reduce pairs over the same token rows to the tokens that all of them use, so that their samples correspond; changes them in place."""
    sides = [side for pair in pairs for side in pair]
    for side in sides[1:]:
        _same_tokens(sides[0], side)
    used = torch.zeros(len(sides), int(sides[0].starts[-1]), dtype=torch.bool)
    for mask, side in zip(used, sides, strict=True):
        mask[side.used] = True
    for side in sides:
        side.keep_only(used.all(0))
