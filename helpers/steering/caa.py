"""Contrastive activation addition: read activations of contrast pairs, keep a steering vector with its papers.

Extract (here), aggregate (`directions`), apply (`lm.hooks`, `lm.scoring`). Rimsky et al. 2023 (arXiv:2312.06681); the all-position
variant with one padded pair is that of the "steering vector reconstruction" source study.
"""

import json
import math
import operator
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple, SupportsIndex

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from helpers import stats
from helpers.entries import DataError, parse
from helpers.lm import models, reading, tokens
from helpers.lm.hooks import resid_post
from helpers.lm.reading import LM
from helpers.lm.tokens import ANSWER, FILLER, SPECIAL, SYSTEM, Tokenizer, Tokens
from helpers.steering.behaviors import AnswerPair, ContrastPair, SystemPair
from helpers.store import digest, write_file


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


def tokens_of(tokenizer: Tokenizer, pair: ContrastPair, closed: bool = False) -> tuple[Tokens, Tokens]:
    """The positive and the negative text of a pair as the model sees them; `closed`, with the mark that ends an answer's turn."""
    if isinstance(pair, SystemPair):
        q = pair.question
        return tokens.chat(tokenizer, q, system=pair.positive), tokens.chat(tokenizer, q, system=pair.negative)
    if isinstance(pair, AnswerPair):
        q = pair.question
        one, other = (tokens.chat(tokenizer, q, answer=a, closed=closed) for a in (pair.positive, pair.negative))
        return one, other
    return tokens.plain(tokenizer, pair.positive), tokens.plain(tokenizer, pair.negative)


def extract(
    lm: LM,
    pairs: Sequence[ContrastPair],
    layers: Sequence[int],
    where: str | Sequence[int] = "last",
    batch_size: int = 32,
) -> Halves:
    """Activations of both halves of each pair, averaged over `where` (default: the last token, as in CAA)."""
    both = [tokens_of(lm.tokenizer, pair) for pair in pairs]
    acts, seconds = reading.means(lm, [s for sides in both for s in sides], layers, where, batch_size=batch_size)
    return Halves(acts[0::2, 0], acts[1::2, 0], list(layers), 2 * len(pairs), seconds)


READ = {"answer": "mean over the answer", "last": "last token", "turn": "end-of-turn mark"}  # places of an answer pair


def extract_answers(
    lm: LM, pairs: Sequence[AnswerPair], layers: Sequence[int], batch_size: int = 32
) -> dict[str, Halves]:
    """Answer pairs at each place of READ, from one pass: a later token changes nothing before it, and the mark that ends a turn is the
    same on both sides."""
    sides = [side for pair in pairs for side in tokens_of(lm.tokenizer, pair, closed=True)]
    masks = [torch.zeros(3, len(side.ids), dtype=torch.bool) for side in sides]
    for mask, side in zip(masks, sides, strict=True):
        mask[0] = torch.tensor(side.roles) == ANSWER
        mask[1, -2] = mask[2, -1] = True
    acts, seconds = reading.means(lm, sides, layers, "+".join(READ), masks, batch_size)
    return {
        where: Halves(acts[0::2, i], acts[1::2, i], list(layers), 2 * len(pairs), seconds)
        for i, where in enumerate(READ)
    }


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
        here = [i for i, role in enumerate(side.roles) if role == SYSTEM]
        if not here or len(here) != here[-1] - here[0] + 1:
            raise DataError(
                f"the system prompt of {pair.question!r} is empty, or stands in more than one place: nothing to pad"
            )
        end = here[-1] + 1
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


PARTS = ("masked", "contrast", "after", "from the start")  # the position sets of a padded pair that a study reads


def padded_masks(one: Tokens, other: Tokens) -> dict[str, Tensor]:
    """The position sets of a padded pair, each (tokens,) bool and the same for both halves.

    every: all positions, as the source study did (first token, specials and fillers included) · before: up to the first token
    that differs · contrast: from there to the end of the system prompt, fillers of either half out · after: past the system
    prompt, specials out · masked: contrast and after together · from the start: before and masked together.
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
        "from the start": (index < first) | contrast | after,
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


def most_filled(tokenizer: Tokenizer, pairs: Sequence[SystemPair]) -> SystemPair:
    """The pair whose halves differ most in length, so that padding it takes most fillers; the first of equals."""

    def fillers(pair: SystemPair) -> int:
        return sum(side.roles.count(FILLER) for side in padded_pair(tokenizer, pair))

    return max(pairs, key=fillers)


def shown_padded(tokenizer: Tokenizer, pair: SystemPair) -> tuple[str, str]:
    """Both halves of a padded pair as text, runs of averaged ("masked") positions in «guillemets»."""
    both = padded_pair(tokenizer, pair)
    batch = tokens.pad(both, tokens.padding(tokenizer), "right")
    chosen = tokens.positions(batch, padded_masks(*both)["masked"].expand(2, -1))
    one, other = (tokens.provenance(tokenizer, batch, chosen, row).replace("»«", "") for row in (0, 1))
    return one, other


def position_lengths(lm: LM, pair: SystemPair, layer: int) -> Tensor:
    """How long the difference of a padded pair's halves is at every position, (tokens,) float32; fillers are not attended to."""
    both = padded_pair(lm.tokenizer, pair)
    _, _, acts = next(reading.batches(lm, both, [layer], attend_filler=False))
    return (acts[layer][0] - acts[layer][1]).float().norm(dim=-1).cpu()


def same_from_the_start(halves: Mapping[str, Halves], layer: int) -> np.ndarray:
    """For every pair (pairs,) the cosine between its difference averaged over "masked" and over "from the start": 1 by algebra,
    since no token before the contrast has a difference to add."""
    masked, longer = (
        (pos - neg).double().numpy() for pos, neg in (halves[k].at(layer) for k in ("masked", "from the start"))
    )
    return stats.cosine(masked, longer)


# --- a vector with its papers --------------------------------------------------------------------------------------


def _whole(name: str, number: object) -> int:
    """A whole number; ValueError with its name for anything else."""
    with suppress(TypeError):  # of a tensor that holds no whole number
        if isinstance(number, SupportsIndex) and not isinstance(number, bool):
            return operator.index(number)
    raise ValueError(f"{name} {number!r} was given; a whole number is wanted")


@dataclass(frozen=True)
class SteeringVector:
    """A direction (d_model,) float32 for `blocks.layer.hook_resid_post`, with all that is needed to make it again.

    `residual_norm` is the median norm of the stream there, special tokens out: a multiplier means nothing without the
    two; None where nobody measured it. An imported vector has 0 `pairs`. ValueError if the vector could steer nothing:
    a shape other than (d_model,), zero, NaN, a negative layer.
    """

    vector: Tensor
    layer: int
    behavior: str
    method: str
    positions: str
    model: str
    pairs: int
    data: str
    residual_norm: float | None
    read_from: str
    convention: str = models.CONVENTION

    def __post_init__(self) -> None:
        vector, norm = self.vector.detach().float().cpu().contiguous(), self.residual_norm
        if vector.ndim != 1 or not len(vector):
            raise ValueError(f"a vector of shape {tuple(vector.shape)} was given; (d_model,) is wanted")
        if bad := int((~vector.isfinite()).sum()):
            raise ValueError(
                f"the vector holds {bad} values that are NaN or infinite in float32; finite ones are wanted"
            )
        if not vector.any():
            raise ValueError("the vector is zero: it steers nothing")
        if (layer := _whole("layer", self.layer)) < 0:
            raise ValueError(f"layer {layer} was given; the block whose output it is, counted from 0, is wanted")
        if norm is not None and not 0 < (norm := float(norm)) < math.inf:
            raise ValueError(f"residual_norm {norm} was given; a positive number is wanted, or None if it is not known")
        for name, value in (("vector", vector), ("layer", layer), ("residual_norm", norm)):
            object.__setattr__(self, name, value)

    @property
    def norm(self) -> float:
        """Euclidean length of the vector."""
        return float(self.vector.double().norm())

    def summary(self) -> str:
        """One line: what it is, how long, and how long against the stream."""
        over = f" over {self.pairs} pairs" if self.pairs else ""
        stream = "; residual norm not measured"
        if self.residual_norm:
            stream = f" = {self.norm / self.residual_norm:.3f} of the residual norm {self.residual_norm:.0f}"
        return (
            f"{self.behavior or 'unnamed'} · layer {self.layer} · {self.method}{over}, "
            f"{self.positions or 'position not said'} · norm {self.norm:.2f}{stream}"
        )


def make_vector(
    lm: LM,
    direction: Tensor,
    layer: int,
    behavior: str,
    method: str,
    positions: str,
    pairs: Sequence[ContrastPair],
    residual_norm: float | None,
    read_from: str = "",
) -> SteeringVector:
    """The SteeringVector of a direction, with the data's hash and one example of the tokens it was read from.

    The example is made from `positions` where `tokens.positions` knows the word; give `read_from` for anything else.
    """
    if not read_from:
        turn = positions == "turn"
        batch = tokens.pad([tokens_of(lm.tokenizer, pairs[0], closed=turn)[0]], lm.pad_id)
        read_from = tokens.provenance(lm.tokenizer, batch, tokens.positions(batch, "last" if turn else positions))
    return SteeringVector(
        direction, layer, behavior, method, positions, lm.identity, len(pairs),
        digest([list(p) for p in pairs])[:16], residual_norm, read_from,
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

    Both count layers by the block whose output is steered, from 0, as we do, so nothing is shifted; but llama.cpp
    steers from block 1 on and refuses a file with `direction.0`: ValueError. `model_type` is transformers' own (llama,
    gemma2, ...).
    """
    import gguf

    path = Path(path)
    layers, widths = [v.layer for v in vectors], [len(v.vector) for v in vectors]
    if not vectors:
        raise ValueError("no vectors were given; one or more are wanted")
    if len(set(layers)) < len(layers):
        raise ValueError(
            f"two vectors at one layer were given (layers {layers}); GGUF control vectors hold one a layer"
        )
    if 0 in layers:
        raise ValueError(
            "a vector at layer 0 was given; llama.cpp steers from layer 1 on and reads no file with layer 0"
        )
    if len(set(widths)) > 1:
        raise ValueError(
            f"vectors of {', '.join(map(str, widths))} dimensions were given; those of one model are wanted"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{path.name}")
    writer = gguf.GGUFWriter(temporary, "controlvector")
    try:
        writer.add_string("controlvector.model_hint", model_type)
        writer.add_uint32("controlvector.layer_count", len(vectors))
        for v in vectors:
            writer.add_tensor(f"direction.{v.layer}", v.vector.numpy())
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

    That code names a layer by the residual *entering* it, so our layer L is written as L + 1. `pos` is the one token
    that was read: -1 for `last`, the number for one such as "-2", null for any other word.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    one = "-1" if v.positions == "last" else v.positions
    pos = int(one) if re.fullmatch(r"-?\d+", one) else None
    torch.save(v.vector, folder / "direction.pt")
    write_file(folder / "direction_metadata.json", json.dumps({"pos": pos, "layer": v.layer + 1}))
    return folder


# --- vectors of others ---------------------------------------------------------------------------------------------


def _there(path: Path) -> Path:
    if not os.path.isfile(path):
        raise ValueError(f"{str(path)!r}: no such file")
    return path


def _tensor(path: Path) -> Tensor:
    """The one floating-point tensor in a .pt file; nothing is unpickled."""
    _there(path)
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path.name} cannot be read as a tensor of weights and nothing else: {reason}") from None
    if not isinstance(found, Tensor) or not found.is_floating_point():
        what = found.dtype if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(f"{path.name} holds {what}; one floating-point tensor is wanted")
    return found


def _row(path: Path, rows: Tensor, layer: int | None) -> tuple[Tensor, int]:
    """A row of persona_vectors' (layers + 1, d_model), by hidden_states' numbers, and our layer."""
    if rows.ndim != 2 or len(rows) < 2:
        raise ValueError(
            f"{path.name} has shape {tuple(rows.shape)}; persona_vectors' (layers + 1, d_model) is wanted, or "
            "refusal_direction's (d_model,) as direction.pt beside its direction_metadata.json"
        )
    last = len(rows) - 1
    choose = f"choose one of layer=1 to layer={last}"
    if layer is None:
        raise ValueError(f"{path.name} holds {len(rows)} layers: {choose}")
    if layer == 0:
        raise ValueError(f"row 0 of {path.name} is of the embeddings, before any block: {choose}")
    if not 0 < layer <= last:
        raise ValueError(f"{path.name} has no layer {layer}: {choose}")
    if layer == last:
        warnings.warn(
            f"row {last} of {path.name} is the last: in persona_vectors' own files it is read after the final norm, "
            "and is not what the last block puts out",
            stacklevel=3,
        )
    return rows[layer], layer - 1


def _refusal(folder: Path, layer: int | None) -> tuple[Tensor, int, str]:
    """(vector, our layer, position) of refusal_direction's two files."""
    vector = _tensor(folder / "direction.pt")
    name = "direction_metadata.json"
    note = parse(name, _there(folder / name).read_bytes().decode("utf-8-sig", errors="replace"))
    if not isinstance(note, dict):
        raise ValueError(f"{name}: {type(note).__name__} given, an object with layer and pos is wanted")
    entered, pos = _whole(f"{name}: layer", note.get("layer")), note.get("pos")
    if layer not in (None, entered):
        raise ValueError(f"layer {layer} was asked for; {name} says layer {entered}, and the file holds one direction")
    if entered == 0:
        raise ValueError(f"{name}: layer 0 is what enters the first block, the embeddings, which no block puts out")
    if entered < 0:
        raise ValueError(
            f"{name}: layer {entered} was given; the number of the block that the residual enters is wanted"
        )
    return vector, entered - 1, "" if pos is None else str(_whole(f"{name}: pos", pos))


def _control(path: Path, layer: int | None) -> tuple[Tensor, int]:
    """(vector, layer) of a GGUF control vector."""
    import gguf

    _there(path)
    try:
        named = [(re.fullmatch(r"direction\.(\d+)", t.name), t.data) for t in gguf.GGUFReader(path).tensors]
        found = {int(name[1]): torch.from_numpy(data.copy()) for name, data in named if name}
    except Exception as error:
        raise ValueError(f"{path.name} cannot be read as GGUF: {error}") from None
    if not found:
        raise ValueError(f"{path.name} holds no direction.<layer>; a control vector of repeng or llama.cpp is wanted")
    if layer is None and len(found) == 1:
        layer = next(iter(found))
    if layer not in found:
        which = "" if layer is None else f"no direction.{layer}; "
        raise ValueError(f"{path.name}: {which}choose one of its layers {', '.join(map(str, sorted(found)))}")
    if not found[layer].is_floating_point():
        raise ValueError(f"{path.name}: direction.{layer} is quantised; float32 or float16 is wanted")
    return found[layer], layer


def import_direction(
    source: str | Path,
    layer: int | None = None,
    behavior: str = "",
    model: str = "",
    residual_norm: float | None = None,
) -> SteeringVector:
    """The SteeringVector in a file of somebody else's. `layer` is the *file's own* number, ours is in the result.

    - refusal_direction: a folder with `direction.pt` and `direction_metadata.json`, or the former. It names the block
      whose *input* the direction is: its layer L is our L - 1, and the file says which. `pos` becomes `positions`.
    - persona_vectors: a `.pt` of shape (layers + 1, d_model), indexed as transformers' `hidden_states`: row k enters
      block k, our layer k - 1. Row 0 is of the embeddings: refused. The last is read after the final norm: warned of.
    - repeng and llama.cpp: a `.gguf` with `direction.<layer>`, the block whose output it is: the same number here.

    None holds its pairs or the stream's norm: give `residual_norm` if it is known. ValueError says what is wrong.
    """
    path = Path(source)
    layer = None if layer is None else _whole("layer", layer)
    name, positions = path.name, ""
    if os.path.isdir(path) or path.name == "direction.pt":
        vector, ours, positions = _refusal(path if os.path.isdir(path) else path.parent, layer)
        origin = "refusal_direction"
    elif path.suffix == ".gguf":
        (vector, ours), origin = _control(path, layer), "a GGUF control vector"
    elif path.suffix == ".pt":
        (vector, ours), origin = _row(path, _tensor(path), layer), "persona_vectors"
        if named := re.fullmatch(r"(.+)_(prompt_avg|response_avg|prompt_last)_diff", path.stem):
            behavior, positions = behavior or named[1], named[2]
    else:
        raise ValueError(
            f"{_there(path).name}: a folder of refusal_direction, a .pt of persona_vectors or a .gguf is wanted"
        )
    if vector.ndim != 1:
        raise ValueError(f"{name}: a direction of shape {tuple(vector.shape)}; (d_model,) is wanted")
    try:
        return SteeringVector(
            vector, ours, behavior, f"imported from {origin}", positions, model, 0,
            f"{name}@{digest(vector)[:16]}", residual_norm, f"not known: imported from {name}",
        )  # fmt: skip
    except ValueError as error:
        raise ValueError(f"{name}, direction at our layer {ours}: {error}") from None
