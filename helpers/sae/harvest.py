"""Activations of long text: residuals after chosen layers, on disk in shards or streamed, and read back shuffled.

Runs a model (`lm.reading`) up to the deepest layer asked for and no further. A shard is the residuals of a
fixed run of token rows, so it depends on no other shard: a killed harvest goes on at the next one, ranks take every N-th
one, and the bits are the same. Differences of a base and a chat model are read from two harvests of the same rows.

    python -m helpers.sae.harvest --source packaged:wiki+web+stories --layers 14 --tokens 300000
    torchrun --nproc-per-node 4 -m helpers.sae.harvest ...        the same shards, four at a time
"""

import argparse
import json
import operator
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from helpers import session, store
from helpers.lm import models, reading, replies, text
from helpers.lm import tokens as lm_tokens
from helpers.lm.reading import LM
from helpers.lm.tokens import Tokenizer
from helpers.profiles import Profile
from helpers.sae import activations
from helpers.sae.activations import Acts, Chunk, HarvestError, Pair, Samples
from helpers.steering import behaviors

FORMAT = 3  # raised when the bits of a shard change
SHARD_ROWS = 512
PASS_TOKENS = 2048  # of a forward pass: more was no faster on a CPU, and takes memory
Model = LM | str


def rows_a_pass(context: int) -> int:
    """Token rows a forward pass: as many for everybody, since the batch enters the last bits of bfloat16 rows."""
    return max(PASS_TOKENS // context, 1)


# --- shards of token rows ----------------------------------------------------------------------------------------------


def _chunks(
    tokenizer: Tokenizer, source: text.Source, context: int, part: str, tokens: int, size: int
) -> Iterator[Chunk]:
    """Chunks of `size` rows until `tokens` tokens are kept; the last one ends with the row that reaches them."""
    rows: list[text.Row] = []
    count: Counter[str] = Counter()
    before, total, index = count.copy(), 0, 0

    def chunk() -> Chunk:
        ids, kept, documents = (np.stack(parts) for parts in zip(*rows, strict=True))
        return Chunk(index, ids, kept, documents, count - before)

    for row in text.rows(tokenizer, source, context, part, count):
        rows.append(row)
        total += int(row.kept.sum())
        if len(rows) == size or total >= tokens:
            yield chunk()
            rows, before, index = [], count.copy(), index + 1
        if total >= tokens:
            return
    if rows:
        yield chunk()


@contextmanager
def _memory_said(model: LM, rows: int, context: int) -> Iterator[None]:
    """Context: where memory runs out, HarvestError says in what and what to do."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if type(error) is RuntimeError and "memory" not in str(error):
            raise
        raise HarvestError(
            f"a pass of {rows} x {context} tokens does not fit on {model.device}: give a smaller batch, a shorter context, a "
            "smaller dtype or another device"
        ) from None


def _forward(model: LM, chunk: Chunk, layers: Sequence[int], batch: int, bar: tqdm | None = None) -> dict[int, Acts]:
    """layer -> residuals of a chunk's kept tokens in the model's dtype; HarvestError names a row that is not finite."""
    kept, ids = torch.from_numpy(chunk.kept), torch.from_numpy(chunk.ids).long()
    ends = np.concatenate([[0], chunk.kept.sum(1).cumsum()])
    n, places = int(ends[-1]), torch.arange(int(ends[-1])).split(chunk.kept.sum(1).tolist())
    out = {k: Acts(torch.empty(n, model.d_model, dtype=model.dtype), torch.empty(n)) for k in layers}
    needed = (kept * torch.arange(1, kept.shape[1] + 1)).amax(1)  # nothing behind a row's last kept token changes it
    for some in needed.argsort(descending=True, stable=True).split(batch):
        width = max(int(needed[some[0]]), 1)
        with _memory_said(model, len(some), width):
            acts = reading.packed(model, ids[some, :width], layers)
        where = torch.cat([places[i] for i in some.tolist()])
        for k in layers:
            rows = acts[k][kept[some, :width].to(acts[k].device)]
            out[k].rows[where] = rows.cpu()
            out[k].norms[where] = rows.float().norm(dim=1).cpu()
        if bar is not None:
            bar.update(len(where))
    for k, (_, norms) in out.items():
        if not torch.isfinite(norms).all():
            bad = int((~torch.isfinite(norms)).nonzero()[0])
            row = int(np.searchsorted(ends, bad, side="right") - 1)
            document = chunk.documents[row][chunk.kept[row]][bad - ends[row]]
            raise HarvestError(
                f"shard {chunk.number}, sample {bad} (row {row}, document {document}) holds NaN or infinity at "
                f"layer {k} in {str(model.dtype).removeprefix('torch.')}: use bfloat16 or float32. Shards before it are kept"
            )
    return out


# --- harvest -----------------------------------------------------------------------------------------------------------


def _ranks() -> tuple[int, int]:
    """This process's rank and how many there are."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def _total(number: int) -> int:
    """The sum of `number` over all ranks, once all have come so far."""
    if _ranks()[1] == 1:
        return number
    shared = torch.tensor(number)
    torch.distributed.all_reduce(shared)
    return int(shared)


def _barrier() -> None:
    if _ranks()[1] > 1:
        torch.distributed.barrier()


def _plan(
    model: LM,
    tokenizer: Tokenizer,
    source: text.Source,
    layers: list[int],
    tokens: int,
    context: int,
    part: str,
    size: int,
) -> dict[str, Any]:
    return {
        "model": model.identity,
        "convention": models.CONVENTION,
        "source": text.fingerprint(source),
        "layers": layers,
        "tokens": tokens,
        "context": context,
        "prepend bos": bool(lm_tokens.first_token(tokenizer)),
        "template": lm_tokens.fingerprint(tokenizer),
        "part": part,
        "rows a shard": size,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "format": FORMAT,
        "libraries": store.versions(),
    }


def _check(model: LM, layers: Sequence[int], **sizes: int) -> None:
    """HarvestError or ValueError for layers that are not there, or sizes that make no sense."""
    for name, value in sizes.items():
        least = 0 if name == "batch" else 2 if name == "context" else 1
        if not isinstance(value, int) or value < least:
            raise ValueError(f"{name} = {value!r} given; it must be a whole number of at least {least}")
    depth = model.layers
    if not layers or any(not 0 <= k < depth for k in layers):
        raise HarvestError(f"layers {list(layers)} were asked for; the model has layers 0 to {depth - 1}")
    if model.longest and sizes["context"] > model.longest:
        raise ValueError(f"context = {sizes['context']} given; the model takes at most {model.longest} tokens")


def _room(folder: Path, tokens: int, layers: int, width: int, itemsize: int) -> None:
    need, free = tokens * layers * width * itemsize, store.free_bytes(folder)
    if need > free:
        raise OSError(
            f"this harvest needs {need / 1e9:.1f} GB and {free / 1e9:.1f} GB are free: ask for fewer tokens, make room, set "
            "CACHE_DIR in .env to another disk, or stream (harvest.Stream)"
        )


def _batch(folder: Path, plan: dict[str, Any], chosen: int) -> int:
    """Rows a forward pass of this harvest: a harvest keeps the batch its first shard was made with."""
    path = folder / "plan.json"
    if (kept := store.read_json(path)) and (not chosen or list(folder.glob("shard-*.json"))):
        return kept["batch"]
    batch = chosen or rows_a_pass(plan["context"])
    store.write_file(path, json.dumps({**plan, "batch": batch}, indent=1))
    return batch


@store.spent("harvest")
def run(
    model: LM,
    source: text.Source,
    layers: Sequence[int],
    tokens: int,
    context: int = 128,
    part: str = "train",
    shard_rows: int = SHARD_ROWS,
    batch: int = 0,
    tokenizer: Tokenizer | None = None,
) -> "Samples":
    """Residuals after `layers` for the first `tokens` kept tokens of `source`, kept on disk; at the first of `layers`.

    What is there already is checked and not made again; a source with fewer tokens gives them all and says so. `batch`: rows
    a forward pass, 0 for `rows_a_pass`. `tokenizer` makes the rows instead of the model's own (of a pair, the chat model's).
    With torch.distributed initialised each rank makes its share of the shards and all return the same. HarvestError,
    DataError, ValueError or OSError say what stood in the way; whole shards stay.
    """
    tokenizer = tokenizer or model.tokenizer
    layers = [operator.index(layer) for layer in layers]
    _check(model, layers, tokens=tokens, context=context, shard_rows=shard_rows, batch=batch)
    reading.unhooked(model)
    source, wanted = text.resolved(source), layers[0]
    layers = sorted(set(layers))
    plan = _plan(model, tokenizer, source, layers, tokens, context, part, shard_rows)
    folder = session.cache_dir() / "harvest" / store.digest(plan)[:24]
    finished, (rank, world) = folder / "sidecar.json", _ranks()
    if note := store.read_json(finished):
        if all(activations.whole(folder, i) for i in range(note["shards"])):
            store.from_cache()
            return Samples(folder, wanted, verify=False)
        finished.unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    store.sweep(folder)
    if not list(folder.glob("shard-*.json")):
        _room(folder, tokens, len(layers), model.d_model, model.dtype.itemsize)
    _barrier()  # nobody looks for shards while another still removes damaged ones
    if rank == 0:
        batch = _batch(folder, plan, batch)
    _barrier()
    batch = _batch(folder, plan, 0)  # as rank 0 settled it
    count: Counter[str] = Counter()
    began, shards, made = time.perf_counter(), 0, 0
    name = f"harvest {'+'.join(map(str, layers))}"
    silent: dict[str, Any] = {"disable": True} if rank > 0 else {}  # else TQDM_DISABLE decides
    with (
        tqdm(total=tokens, desc=name, unit="token", unit_scale=True, **silent) as bar,
        ThreadPoolExecutor(1) as writer,  # a shard is written while the next one is made
    ):
        written = writer.submit(lambda: None)
        for chunk in _chunks(tokenizer, source, context, part, tokens, shard_rows):
            count, shards = count + chunk.counts, shards + 1
            if chunk.number % world != rank or activations.whole(folder, chunk.number):
                bar.update(int(chunk.kept.sum()))
                continue
            acts = _forward(model, chunk, layers, batch, bar)
            written.result()
            written = writer.submit(activations.write_shard, folder, chunk, acts)
            made += int(chunk.kept.sum())
        written.result()
    made = _total(made)
    if rank == 0:
        if count["kept"] < tokens:
            print(
                f"the source holds {count['kept']:,} tokens in part {part!r}, fewer than the {tokens:,} asked for: all are used"
            )
        seconds = time.perf_counter() - began
        note = {"parameters": {**plan, "batch": batch}, "shards": shards, "counts": dict(count)}
        note |= {"seconds": round(seconds, 2), "tokens per second": round(made / seconds)}
        store.write_file(finished, json.dumps(note, indent=1))
    _barrier()
    return Samples(folder, wanted, verify=False)


# --- pairs -------------------------------------------------------------------------------------------------------------


def check_pair(base: Model, chat: Model) -> None:
    """HarvestError if two models, loaded or by name, differ in width or depth, or their tokenizers in any token; names the first."""
    outlines = []
    for m in (base, chat):
        if isinstance(m, LM):
            outlines.append(models.Outline(m.tokenizer, m.d_model, m.layers))
        else:
            outlines.append(models.outline(m))
    a, b = outlines
    if a[1:] != b[1:]:
        raise HarvestError(
            f"the base has d_model {a.d_model} and {a.layers} layers, the chat model {b.d_model} and {b.layers}: differences need a "
            "pair of one shape"
        )
    check_tokenizers(a.tokenizer, b.tokenizer)


def check_tokenizers(base: Tokenizer, chat: Tokenizer) -> None:
    """HarvestError that names the first token (by id) in which two tokenizers differ, or the first text they split differently."""
    ours, theirs = ({i: t for t, i in tokenizer.get_vocab().items()} for tokenizer in (base, chat))
    for i in range(max(max(ours), max(theirs)) + 1):
        if ours.get(i) != theirs.get(i):
            raise HarvestError(
                f"the two models do not share a tokenizer: token {i} is {ours.get(i)!r} in the base and {theirs.get(i)!r} in the chat "
                "model, so positions would not correspond"
            )
    for sample in (
        "The quick brown fox, 1234 times.\n\n\tnaïve — ça va? 你好",
        "def f(x):\n    return x ** 2  # unbelievably",
    ):
        a, b = (tokenizer(sample, add_special_tokens=False)["input_ids"] for tokenizer in (base, chat))
        if a != b:
            at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
            raise HarvestError(
                f"the two models do not share a tokenizer: they have the same tokens but split {sample[:20]!r} differently from token {at} on"
            )


def pair(
    base: Model, chat: Model, source: text.Source, layers: Sequence[int], tokens: int, context: int = 128,
    part: str = "train", shard_rows: int = SHARD_ROWS, batch: int = 0,
) -> Pair:  # fmt: skip
    """A harvest of `base` and one of `chat` over the same tokens, as `run` makes them, at the first of `layers`.

    The rows are those of the chat model's tokenizer: its template, its end-of-text token. A model given by name is
    loaded, run and freed before the other is loaded, so that a card need only hold one. HarvestError if the two do not fit.
    """
    check_pair(base, chat)
    tokenizer = chat.tokenizer if isinstance(chat, LM) else models.outline(chat).tokenizer
    settings, out = session.device_and_dtype(), []
    for given in (base, chat):
        model = given if isinstance(given, LM) else models.load(given, *settings)
        out.append(run(model, source, layers, tokens, context, part, shard_rows, batch, tokenizer))
        del model
        if settings[0].startswith("cuda"):
            torch.cuda.empty_cache()
    return activations.aligned(*out)


class Stream:
    """Batches straight from the model, nothing on disk: harvest and train in one go.

    `chat` given, rows are chat - base, of the chat tokenizer's token rows. Rows come in pools of about `pool_tokens` tokens; a
    pool's samples are shuffled and cut into batches, what is left of it is not used. Batch number `start` is found again
    without running what lies before its pool.
    """

    def __init__(
        self, model: LM, source: text.Source, layer: int, chat: LM | None = None, context: int = 128,
        part: str = "train", pool_tokens: int = 131_072, batch_rows: int = 0,
    ):  # fmt: skip
        if chat is not None:
            check_pair(model, chat)
        _check(model, [layer], context=context, pool_tokens=pool_tokens, batch=batch_rows)
        self.models = [m for m in (model, chat) if m is not None]
        self.tokenizer = self.models[-1].tokenizer
        self.source, self.layer, self.context, self.part = text.resolved(source), layer, context, part
        self.pool_rows = max(pool_tokens // context, 1)
        self.batch_rows = batch_rows or rows_a_pass(context)
        self.d_model = model.d_model

    def about(self) -> dict[str, Any]:
        """What the rows are, as an SAE's metadata says it."""
        plans = [
            _plan(m, self.tokenizer, self.source, [self.layer], 0, self.context, self.part, self.pool_rows)
            for m in self.models
        ]
        known = {
            "prepend_bos": plans[0]["prepend bos"],
            "model_dtype": plans[0]["dtype"],
            "batch_rows": self.batch_rows,
        }
        known["stream"] = store.digest(plans)[:24]
        if len(self.models) == 2:
            known["difference"] = " - ".join(m.identity for m in reversed(self.models))
        return activations.about_rows(
            self.models[-1].identity, plans[0]["source"], self.layer, self.context, activations.OUTLIER, **known
        )

    def _chunks(self) -> Iterator[Chunk]:
        return _chunks(self.tokenizer, self.source, self.context, self.part, 1 << 62, self.pool_rows)

    def _rows(self, chunk: Chunk) -> Tensor:
        """The samples of a pool, outliers of either model left out; in the model's dtype, a difference in float32."""
        acts = [_forward(m, chunk, [self.layer], self.batch_rows)[self.layer] for m in self.models]
        fine = torch.stack([a.norms <= activations.OUTLIER * a.norms.median() for a in acts]).all(0)
        if len(acts) == 1:
            return acts[0].rows[fine]
        return acts[1].rows[fine].float().sub_(acts[0].rows[fine])

    def sample(self, n: int, seed: int = 0) -> Tensor:
        """n samples out of the first pools: (n, d_model) float32."""
        found: list[Tensor] = []
        for chunk in self._chunks():
            found.append(self._rows(chunk))
            if sum(map(len, found)) >= n:
                break
        rows = torch.cat(found)
        return rows[torch.randperm(len(rows), generator=activations.seeded(seed))[:n]].float()

    def batches(self, batch: int, seed: int = 0, start: int = 0) -> Iterator[Tensor]:
        """Batches (batch, d_model) float32 without end, from batch number `start` on; ValueError if no pool fills one."""
        number, epoch = 0, 0
        while True:
            before = number
            for chunk in self._chunks():
                n = int(0.99 * chunk.kept.sum()) // batch  # known without a forward pass: outliers are far fewer
                if number + n > start:
                    rows = self._rows(chunk)
                    order = torch.randperm(len(rows), generator=activations.seeded(seed, epoch, chunk.number))
                    order = order[torch.arange(n * batch) % len(order)]
                    for i in range(max(start - number, 0), n):
                        yield rows[order[i * batch : (i + 1) * batch]].float()
                number += n
            if number == before:
                raise ValueError(
                    f"no pool of {self.pool_rows} rows fills one batch of {batch}: give more text or ask for less"
                )
            epoch += 1


# --- conversations -----------------------------------------------------------------------------------------------------


def _answers(profile: Profile, given: Sequence[LM], length: int, fast: bool) -> list[str]:
    """Files of the answers of every model that a profile names to its behaviours' open prompts; of models not `given` one is
    loaded only where its answers are not kept yet."""
    questions = [q for name in profile.behaviors for q in behaviors.load_behavior(name).open]
    questions, length = (questions[:8], 8) if fast else (questions, length)
    device, dtype, found = str(given[0].device), given[0].dtype, []
    for name in profile.models():
        key = models.key(name, device, dtype)
        path = replies.chats_path(key, questions, length)
        if not path.exists():
            own = [model for model in given if model.key == key]
            path = replies.chats(own[0] if own else models.load(name, device, dtype), questions, length)
        found.append(str(path))
    return list(dict.fromkeys(found))


def _described(profile: Profile, given: Sequence[LM], part: str, fast: bool) -> tuple[list[str], int, int]:
    """Source, tokens and context of a profile's `sae: harvest:` section: one text for every model and notebook."""
    if not profile.sae:
        raise HarvestError(
            f"profile {profile.name} has no section sae: harvest:; copy the one of notebooks/profiles/smollm2.yaml"
        )
    how = profile.sae.harvest
    source = list(how.source)
    if how.chats:
        source += _answers(profile, given, how.chats, fast)
    tokens = how.tokens if part == "train" else how.held_out
    return source, min(tokens, 6000) if fast else tokens, how.context


def of_profile(
    model: LM, profile: Profile, part: str = "train", fast: bool = False, layers: Sequence[int] = ()
) -> Samples:
    """The harvest a profile's `sae: harvest:` section describes, at the profile's layer, or at all of `layers` in one pass and then at
    the first of them; `fast` takes a few thousand tokens.

    `source` as in helpers/lm/text.py; with `chats` (a number of new tokens) the answers of every model that the profile names
    to the behaviours' open prompts are among its sources; `tokens` of the part train, `held_out` of the part held-out.
    """
    source, tokens, context = _described(profile, [model], part, fast)
    at = list(layers) or [profile.layer]
    return run(model, source, at, tokens, context, part, max(SHARD_ROWS // len(at), 1))  # shards of one size on disk


def pair_of_profile(base: LM, chat: LM, profile: Profile, part: str = "train", fast: bool = False) -> Pair:
    """The harvest of `of_profile` through two models, token by token: the same rows as any other model of the profile reads."""
    source, tokens, context = _described(profile, [base, chat], part, fast)
    return pair(base, chat, source, [profile.layer], tokens, context=context, part=part)


# --- command line ------------------------------------------------------------------------------------------------------


@contextmanager
def _distributed() -> Iterator[None]:
    """Join the ranks of torchrun, if it started this process."""
    if int(session.setting("WORLD_SIZE", "1")) < 2:
        yield
        return
    torch.distributed.init_process_group("gloo", timeout=timedelta(days=7))  # a rank may be slow
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def main() -> None:
    """The command line: one harvest, its folder printed last."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--source", nargs="+", default=["packaged:wiki+web+stories"], help="see helpers/lm/text.py")
    parser.add_argument("--layers", type=int, nargs="+", help="default: the profile's layer")
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--profile", default="")
    parser.add_argument("--model", default="", help="default: the profile's chat model")
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--part", default="train", choices=text.PARTS)
    parser.add_argument("--batch", type=int, default=0, help="rows a forward pass (default: 2048 tokens)")
    parser.add_argument("--shard-rows", type=int, default=SHARD_ROWS, help="token rows a shard")
    o = parser.parse_args()
    profile = session.load_profile(o.profile)
    device, dtype = session.device_and_dtype(profile)
    with _distributed():
        if device == "cuda":
            device = f"cuda:{session.setting('LOCAL_RANK', '0')}"
        model = models.load(o.model or profile.chat, device, dtype)
        source = o.source if len(o.source) > 1 else o.source[0]
        found = run(model, source, o.layers or [profile.layer], o.tokens, o.context, o.part, o.shard_rows, o.batch)
        if _ranks()[0] == 0:
            counts = ", ".join(f"{n:,} {why}" for why, n in found.note["counts"].items())
            print(
                f"{len(found):,} samples at layer(s) {found.note['parameters']['layers']} ({counts}) in {found.folder}"
            )


if __name__ == "__main__":
    main()
