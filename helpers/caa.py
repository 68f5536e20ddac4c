"""Contrastive activation addition: read activations of contrast pairs, keep a steering vector with its papers.

Extract (here), aggregate (`directions`), apply (`hooks`, `steer`). Rimsky et al. 2023 (arXiv:2312.06681); the all-position
variant with one padded pair is that of the "steering vector reconstruction" source study.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save
from torch import Tensor
from tqdm import tqdm

from helpers import models, prompts
from helpers.behaviors import AnswerPair, SystemPair, TextPair
from helpers.hooks import Positions, capture, resid_post
from helpers.prompts import FILLER, SPECIAL, SYSTEM, Tokens
from helpers.store import cached, digest, write_file


class Halves(NamedTuple):
    """Activations of both sides of every pair at every layer read: `pos` and `neg` (pairs, layers, d_model), float32."""

    pos: Tensor
    neg: Tensor
    layers: list[int]
    passes: int
    seconds: float

    def at(self, layer: int) -> tuple[Tensor, Tensor]:
        """(pos, neg), each (pairs, d_model), at one layer."""
        i = self.layers.index(layer)
        return self.pos[:, i], self.neg[:, i]


def tokens_of(tokenizer: Any, pair: SystemPair | AnswerPair | TextPair) -> tuple[Tokens, Tokens]:
    """The positive and the negative text of a pair as the model sees them."""
    if isinstance(pair, SystemPair):
        return tuple(prompts.chat(tokenizer, pair.question, system=s) for s in (pair.positive, pair.negative))
    if isinstance(pair, AnswerPair):
        return tuple(prompts.chat(tokenizer, pair.question, answer=a) for a in (pair.positive, pair.negative))
    return prompts.plain(tokenizer, pair.positive), prompts.plain(tokenizer, pair.negative)


def read(
    model: Any,
    sequences: Sequence[Tokens],
    layers: Sequence[int],
    where: str | Sequence[int] = "last",
    masks: Sequence[Tensor] | None = None,
    batch_size: int = 32,
    attend_filler: bool = True,
) -> tuple[Tensor, float]:
    """Mean residual over chosen positions of each sequence, (sequences, sets, layers, d_model) float32, and the seconds it took.

    `where` as in `prompts.positions` (one set), or `masks`, one bool (sets, tokens) per sequence. Sums in float64. Runs no deeper than the
    last layer asked for. Cached on disk; the seconds are those of the run that made it.
    """
    key = {
        "model": model.identity,
        "dtype": str(model.original_model.dtype),
        "device": models.device_of(model).type,
        "sequences": digest([[s.ids, s.roles] for s in sequences]),
        "layers": list(layers),
        "where": where if masks is None else digest([m.tolist() for m in masks]),
        "attend_filler": attend_filler,
        "batch_size": batch_size,
    }

    def compute() -> dict[str, Tensor]:
        began = time.perf_counter()
        acts = _read(model, sequences, list(layers), where, masks, batch_size, attend_filler)
        return {"acts": acts, "seconds": torch.tensor(time.perf_counter() - began)}

    entry = cached("activations", key, compute, ("caa", "hooks", "prompts", "models"))
    return entry["acts"], float(entry["seconds"])


def _read(
    model: Any,
    sequences: Sequence[Tokens],
    layers: list[int],
    where: Any,
    masks: Any,
    batch_size: int,
    attend_filler: bool,
) -> Tensor:
    sets = 1 if masks is None else len(masks[0])
    out = torch.empty(len(sequences), sets, len(layers), model.cfg.d_model)
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i].ids))  # like lengths together: less padding
    for start in tqdm(range(0, len(order), batch_size), desc="read", leave=False):
        rows = order[start : start + batch_size]
        batch = prompts.pad([sequences[i] for i in rows], model.tokenizer.pad_token_id, side="right")
        if masks is None:
            chosen = prompts.positions(batch, where).prompt[:, None]
        else:
            chosen = torch.zeros(len(rows), sets, batch.ids.shape[1], dtype=torch.bool)
            for r, i in enumerate(rows):
                chosen[r, :, : masks[i].shape[1]] = masks[i]
        if not chosen.any(-1).all():
            row = rows[int((~chosen.any(-1)).nonzero()[0, 0])]
            text = model.tokenizer.decode(sequences[row].ids)[:60]
            raise ValueError(f"no position {where!r} in sequence {row} ({text!r}…); it would average nothing")
        with capture(model, layers, stop=True) as acts:
            models.run(model, batch, attend_filler=attend_filler)
        weight = chosen.double() / chosen.sum(-1, keepdim=True)
        for k, layer in enumerate(layers):
            stream = acts[layer].cpu() if acts[layer].device.type == "mps" else acts[layer]  # mps has no float64
            out[rows, :, k] = (weight.to(stream.device) @ stream.double()).float().cpu()
    return out


def extract(
    model: Any,
    pairs: Sequence[SystemPair | AnswerPair | TextPair],
    layers: Sequence[int],
    where: str | Sequence[int] = "last",
    batch_size: int = 32,
) -> Halves:
    """Activations of both halves of each pair, averaged over `where` (default: the last token, as in CAA)."""
    both = [tokens_of(model.tokenizer, pair) for pair in pairs]
    acts, seconds = read(model, [s for sides in both for s in sides], layers, where, batch_size=batch_size)
    return Halves(acts[0::2, 0], acts[1::2, 0], list(layers), 2 * len(pairs), seconds)


PARTS = ("masked", "contrast", "after")  # the position sets of a padded pair that never hold filler or special tokens


def padded_masks(one: Tokens, other: Tokens) -> dict[str, Tensor]:
    """The position sets of a padded pair, each (tokens,) bool and the same for both halves.

    every: all positions, as the source study did (first token, specials and fillers included) · before: up to the first token
    that differs · contrast: from there to the end of the system prompt, fillers of either half out · after: past the system
    prompt, specials out · masked: contrast and after together.
    """
    a, b = torch.tensor(one.roles), torch.tensor(other.roles)
    inside = (a == SYSTEM) | (a == FILLER) | (b == SYSTEM) | (b == FILLER)
    index = torch.arange(len(a))
    first = int(index[torch.tensor(one.ids) != torch.tensor(other.ids)].min())
    last = int(index[inside].max())
    contrast = (a == SYSTEM) & (b == SYSTEM) & (index >= first)
    after = (index > last) & (a != SPECIAL)
    return {
        "every": torch.ones(len(a), dtype=torch.bool),
        "before": index < first,
        "contrast": contrast,
        "after": after,
        "masked": contrast | after,
    }


def extract_padded(
    model: Any,
    pairs: Sequence[SystemPair],
    layers: Sequence[int],
    include: Sequence[str] = ("masked",),
    filler: str = " .",
    batch_size: int = 32,
    attend_filler: bool = False,
) -> dict[str, Halves]:
    """All-position CAA: both halves of each pair padded to equal length, averaged over each set of positions in `include`.

    Sets are those of `padded_masks`; all come from one pass. Nobody attends to fillers unless `attend_filler`; the source study
    is `include=["every"], attend_filler=True`.
    """
    sequences, masks = [], []
    for pair in pairs:
        one, other = prompts.padded_pair(model.tokenizer, pair, filler)
        sequences += [one, other]
        sets = padded_masks(one, other)
        masks += [torch.stack([sets[name] for name in include])] * 2
    acts, seconds = read(model, sequences, layers, "+".join(include), masks, batch_size, attend_filler)
    passes = 2 * len(pairs)
    return {n: Halves(acts[0::2, i], acts[1::2, i], list(layers), passes, seconds) for i, n in enumerate(include)}


def residual_rows(model: Any, sequences: Sequence[Tokens], layer: int, batch_size: int = 32) -> Tensor:
    """The residual-stream rows (tokens, d_model) float32 of user and answer tokens after block `layer`.

    The template's own tokens are left out: they are the same rows again and again, and would rule any covariance.
    """
    rows = []
    for start in range(0, len(sequences), batch_size):
        batch = prompts.pad(sequences[start : start + batch_size], model.tokenizer.pad_token_id, side="right")
        chosen = (batch.roles == prompts.USER) | (batch.roles == prompts.ANSWER)
        with capture(model, [layer], Positions(chosen), stop=True) as acts:
            models.run(model, batch)
        rows.append(acts[layer].float().cpu())
    return torch.cat(rows)


# --- a vector with its papers --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SteeringVector:
    """A direction (d_model,) float32 for `blocks.layer.hook_resid_post`, with all that is needed to make it again.

    `residual_norm` is the median norm of the stream there, special tokens out: a multiplier means nothing without the two.
    """

    vector: Tensor
    layer: int
    behavior: str
    method: str
    positions: str
    model: str
    pairs: int
    data: str
    residual_norm: float
    read_from: str
    convention: str = models.CONVENTION

    @property
    def norm(self) -> float:
        """Euclidean length of the vector."""
        return float(self.vector.double().norm())

    def summary(self) -> str:
        """One line: what it is, how long, and how long against the stream."""
        return (
            f"{self.behavior} · layer {self.layer} · {self.method} over {self.pairs} pairs, {self.positions} · norm {self.norm:.2f} "
            f"= {self.norm / self.residual_norm:.3f} of the residual norm {self.residual_norm:.0f}"
        )


def make_vector(
    model: Any,
    direction: Tensor,
    layer: int,
    behavior: str,
    method: str,
    positions: str,
    pairs: Sequence[Any],
    residual_norm: float,
    read_from: str = "",
) -> SteeringVector:
    """The SteeringVector of a direction, with the data's hash and one example of the tokens it was read from.

    The example is made from `positions` where `prompts.positions` knows the word; give `read_from` for anything else.
    """
    if not read_from:
        batch = prompts.pad([tokens_of(model.tokenizer, pairs[0])[0]], model.tokenizer.pad_token_id)
        read_from = prompts.provenance(model.tokenizer, batch, prompts.positions(batch, positions))
    return SteeringVector(
        direction.float(), layer, behavior, method, positions, model.identity, len(pairs),
        digest([list(p) for p in pairs])[:16], float(residual_norm), read_from,
    )  # fmt: skip


def _files(path: str | Path) -> tuple[Path, Path]:
    """The .safetensors and .json of a vector's name; dots inside the name are kept."""
    name = str(path).removesuffix(".safetensors")
    return Path(name + ".safetensors"), Path(name + ".json")


def save_vector(v: SteeringVector, path: str | Path) -> Path:
    """Write `path`.safetensors and `path`.json (everything else, hook name and norm included); returns the former."""
    tensors, papers = _files(path)
    note = {k: x for k, x in asdict(v).items() if k != "vector"}
    note |= {"hook": resid_post(v.layer), "norm": v.norm, "vector_sha256": digest(v.vector.contiguous())}
    write_file(papers, json.dumps(note, indent=1, ensure_ascii=False))
    return write_file(tensors, save({"vector": v.vector.contiguous()}))


def load_vector(path: str | Path) -> SteeringVector:
    """The SteeringVector `save_vector` wrote, to the same bits; ValueError if the two files do not belong together."""
    tensors, papers = _files(path)
    note = json.loads(papers.read_text(encoding="utf-8"))
    vector = load_file(tensors)["vector"]
    if digest(vector) != note.pop("vector_sha256"):
        raise ValueError(f"{tensors.name} is not the vector that its .json describes; make it again")
    return SteeringVector(vector, **{k: x for k, x in note.items() if k not in ("hook", "norm")})


def export_repeng(vectors: Sequence[SteeringVector], path: str | Path, model_type: str) -> Path:
    """Write repeng's (and llama.cpp's) GGUF layout: one `direction.<layer>` float32 tensor a layer. Returns the path.

    repeng counts layers as block outputs, as we do. `model_type` is transformers' own (llama, gemma2, ...).
    """
    import gguf

    path = Path(path)
    layers = [v.layer for v in vectors]
    if len(set(layers)) < len(layers):
        raise ValueError(
            f"two vectors at one layer were given (layers {layers}); GGUF control vectors hold one a layer"
        )
    temporary = path.with_name(f".tmp-{path.name}")
    writer = gguf.GGUFWriter(temporary, "controlvector")
    try:
        writer.add_string("controlvector.model_hint", model_type)
        writer.add_uint32("controlvector.layer_count", len(vectors))
        for v in vectors:
            writer.add_tensor(f"direction.{v.layer}", v.vector.float().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def export_direction(v: SteeringVector, folder: str | Path) -> Path:
    """Write refusal_direction's layout, `direction.pt` and `direction_metadata.json`. Returns the folder.

    That code names a layer by the residual *entering* it, so our layer L is written as L + 1.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(v.vector, folder / "direction.pt")
    write_file(folder / "direction_metadata.json", json.dumps({"pos": -1, "layer": v.layer + 1}))
    return folder
