"""Contrastive activation addition: read activations of contrast pairs, keep a steering vector with its papers.

Extract (here), aggregate (`directions`), apply (`lm.hooks`, `lm.scoring`). Rimsky et al. 2023 (arXiv:2312.06681); the all-position
variant with one padded pair is that of the "steering vector reconstruction" source study.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from helpers.behaviors import AnswerPair, SystemPair, TextPair
from helpers.lm import models, reading, tokens
from helpers.lm.hooks import resid_post
from helpers.lm.reading import LM
from helpers.lm.tokens import FILLER, SPECIAL, SYSTEM, Tokenizer, Tokens
from helpers.store import DataError, digest, write_file


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


def tokens_of(tokenizer: Tokenizer, pair: SystemPair | AnswerPair | TextPair) -> tuple[Tokens, Tokens]:
    """The positive and the negative text of a pair as the model sees them."""
    if isinstance(pair, SystemPair):
        return tuple(tokens.chat(tokenizer, pair.question, system=s) for s in (pair.positive, pair.negative))
    if isinstance(pair, AnswerPair):
        return tuple(tokens.chat(tokenizer, pair.question, answer=a) for a in (pair.positive, pair.negative))
    return tokens.plain(tokenizer, pair.positive), tokens.plain(tokenizer, pair.negative)


def extract(
    lm: LM,
    pairs: Sequence[SystemPair | AnswerPair | TextPair],
    layers: Sequence[int],
    where: str | Sequence[int] = "last",
    batch_size: int = 32,
) -> Halves:
    """Activations of both halves of each pair, averaged over `where` (default: the last token, as in CAA)."""
    both = [tokens_of(lm.tokenizer, pair) for pair in pairs]
    acts, seconds = reading.means(lm, [s for sides in both for s in sides], layers, where, batch_size=batch_size)
    return Halves(acts[0::2, 0], acts[1::2, 0], list(layers), 2 * len(pairs), seconds)


def padded_pair(tokenizer: Tokenizer, pair: SystemPair, filler: str = " .") -> tuple[Tokens, Tokens]:
    """Both prompts of a system pair, the shorter system prompt filled up with `filler` tokens to equal length.

    Position by position the two then hold the same token, save inside the system prompt; fillers have a role of their own.
    """
    sides = [tokens.chat(tokenizer, pair.question, system=s) for s in (pair.positive, pair.negative)]
    filler_ids = tokenizer(filler, add_special_tokens=False)["input_ids"]
    if not filler_ids:
        raise ValueError(f"the filler {filler!r} has no tokens")
    width = max(len(s.ids) for s in sides)
    out = []
    for side in sides:
        missing = width - len(side.ids)
        end = max(i for i, role in enumerate(side.roles) if role == SYSTEM) + 1
        fill = [filler_ids[i % len(filler_ids)] for i in range(missing)]
        out.append(
            Tokens(
                side.ids[:end] + fill + side.ids[end:],
                side.roles[:end] + [FILLER] * missing + side.roles[end:],
            )
        )
    tail = 1 + max(i for t in out for i, role in enumerate(t.roles) if role in (SYSTEM, FILLER))
    if out[0].ids[tail:] != out[1].ids[tail:]:
        raise DataError(f"the prompts of {pair.question!r} do not share their tokens after the system prompt")
    return out[0], out[1]


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
    lm: LM,
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
        one, other = padded_pair(lm.tokenizer, pair, filler)
        sequences += [one, other]
        sets = padded_masks(one, other)
        masks += [torch.stack([sets[name] for name in include])] * 2
    acts, seconds = reading.means(lm, sequences, layers, "+".join(include), masks, batch_size, attend_filler)
    passes = 2 * len(pairs)
    return {n: Halves(acts[0::2, i], acts[1::2, i], list(layers), passes, seconds) for i, n in enumerate(include)}


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
    lm: LM,
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

    The example is made from `positions` where `tokens.positions` knows the word; give `read_from` for anything else.
    """
    if not read_from:
        batch = tokens.pad([tokens_of(lm.tokenizer, pairs[0])[0]], lm.tokenizer.pad_token_id)
        read_from = tokens.provenance(lm.tokenizer, batch, tokens.positions(batch, positions))
    return SteeringVector(
        direction.float(), layer, behavior, method, positions, lm.identity, len(pairs),
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
