"""What each latent of an SAE responds to: contexts, frequency, logit lens; a table kept with the SAE and a page to browse.

Knows an SAE, a harvest of token rows, and a model's unembedding. The table is `latents.jsonl` beside the SAE's weights, one
latent a line, so that labels need no network; the page is one static file.
"""

import html
import json
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from helpers import pages, store
from helpers.lm import reading
from helpers.lm.reading import LM
from helpers.sae.activations import Samples
from helpers.sae.topk import Dictionary

PAGE = "latents.html"


class Context(NamedTuple):
    """A token on which a latent fired, with the text around it and the code's value."""

    before: str
    token: str
    after: str
    value: float


class Latent(NamedTuple):
    """One line of the table: index, share of samples fired on, its largest contexts, and the words it makes likelier and
    less likely by the logit lens."""

    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody asks of a latent
    frequency: float
    contexts: list[Context]
    promotes: list[str]
    suppresses: list[str]


def words(latent: Latent, n: int = 3) -> str:
    """The n words a latent makes likeliest, as they can stand in a Markdown table."""
    return ", ".join(repr(w) for w in latent.promotes[:n]).replace("|", "\\|").replace("`", "'")


def cell(text: str | Context) -> str:
    """A piece of text, or a context with its token in «guillemets», as it can stand in a Markdown table."""
    if isinstance(text, Context):
        text = f"{text.before}«{text.token}»{text.after}"
    text = re.sub(r"\s+", " ", text.replace("\n", "⏎"))
    return re.sub(r"([\\`*_#|<>\[\]$~])", r"\\\1", text)


def cells(latent: Latent) -> list[str]:
    """Where a latent fires most and the words it makes likelier, as they can stand in a Markdown table."""
    return [cell(latent.contexts[0]) if latent.contexts else "(never fired)", words(latent)]


def facts(latent: Latent, n: int = 2) -> dict[str, str]:
    """What an interactive figure says of a latent, as plotly's hover text can show it: its number, the n places where it fires
    most and the words it makes likelier."""
    places = "<br>".join(
        html.escape(re.sub(r"\s+", " ", f"{c.before}«{c.token}»{c.after}")) for c in latent.contexts[:n]
    )
    likelier = html.escape(", ".join(repr(word) for word in latent.promotes[:3]))
    return {"latent": str(latent.index), "fires most on": places or "(never)", "makes likelier": likelier}


def label(latent: Latent, before: int = 34, after: int = 12) -> str:
    """A latent's number and the end of the context in which it fires most, its token in «guillemets»."""
    if not latent.contexts:
        return f"{latent.index}   (never fired)"
    at = latent.contexts[0]
    return f"{latent.index}   …{at.before[-before:]}«{at.token}»{at.after[:after]}"


def largest(rows: Sequence[Latent], codes: Tensor, n: int, marked: Tensor) -> list[tuple[str, float, bool]]:
    """The n latents of largest |code| (latents,), as `figures.ranked` draws them: label, code, and whether it is `marked` (latents,)."""
    top = codes.abs().topk(n).indices.tolist()
    return [(label(rows[i]), float(codes[i]), bool(marked[i])) for i in top]


class Top(NamedTuple):
    """Per latent its n largest codes, at most one a token row: `values`, `rows` and `positions` (latents, n), and the share of
    samples it fired on, `frequency` (latents,). Where a latent fired in fewer rows the values are 0."""

    values: Tensor
    rows: Tensor
    positions: Tensor
    frequency: Tensor


def top_tokens(
    sae: Dictionary, samples: Samples, n: int = 6, limit: int = 0, batch: int = 32, only: Tensor | None = None
) -> Top:
    """Where each latent (or each of `only`) is largest, among the first `limit` token rows (all by default), `batch` at a time."""
    ids, row_of = samples.token_rows()
    position = samples.named("position").long()
    only = torch.arange(sae.cfg.d_sae) if only is None else only
    latents = len(only)
    rows = min(limit or len(ids), len(ids))
    values = torch.zeros(latents, n)
    where = torch.zeros(2, latents, n, dtype=torch.long)
    fired, seen = torch.zeros(latents, dtype=torch.long), 0
    starts = torch.searchsorted(row_of, torch.arange(rows + 1))
    for first in tqdm(range(0, rows, batch), desc="contexts"):
        last = min(first + batch, rows)
        index = torch.arange(int(starts[first]), int(starts[last]))
        with torch.no_grad():
            codes = sae.encode(samples.rows(index).to(sae.device)).float().cpu()[:, only]
        fired, seen = fired + (codes > 0).sum(0), seen + len(index)
        grid = codes.new_zeros(last - first, ids.shape[1], latents)
        grid[row_of[index] - first, position[index]] = codes
        best = grid.max(dim=1)  # (rows, latents): values, and the position in the row
        here = torch.stack([torch.arange(first, last)[:, None].expand_as(best.indices), best.indices])
        pooled = torch.cat([values, best.values.T], 1)
        values, chosen = pooled.topk(n, dim=1)
        where = torch.cat([where, here.transpose(1, 2)], 2).gather(2, chosen.expand(2, -1, -1))
    return Top(values, where[0], where[1], fired.double() / max(seen, 1))


def _final_norm(lm: LM) -> tuple[Tensor, float]:
    """The gain (d_model,) of the norm between the last block and the unembedding, and 1.0 if it centres, else 0.0.

    It is the module that turns the one's output into the other's input, whatever its name or kind; gain and centring are read
    off what it does to rows of length sqrt(d_model). ValueError if there is none: the model does more than that to the stream.
    """
    stream, hidden = reading.ends(lm)
    inside = {module for block in lm.blocks for module in block.modules()}
    for module in reversed(list(lm.weights.modules())):
        if module in inside or not any(kind in type(module).__name__.lower() for kind in ("norm", "identity")):
            continue
        with suppress(Exception):
            if torch.allclose(module(stream), hidden, rtol=1e-3, atol=1e-4):
                return _gain(module, lm)
    raise ValueError(
        f"{type(lm.weights).__name__} does more than norm what its last block gives before it unembeds it: its logit lens is not known"
    )


def _gain(module: torch.nn.Module, lm: LM) -> tuple[Tensor, float]:
    """The gain (d_model,) float32 of a norm, and 1.0 if it centres, else 0.0."""
    x = torch.randn(lm.d_model, generator=torch.Generator().manual_seed(0)).to(lm.device)
    x = (x - x.mean()) / (x - x.mean()).square().mean().sqrt()

    def normed(row: Tensor) -> Tensor:
        return module(row.to(lm.dtype)[None, None])[0, 0].float()

    gain = (normed(x) - normed(-x)) / (2 * x)
    centred = float((normed(x + 1) - normed(x)).norm()) < 0.05 * float(normed(x).norm())  # it does not see the 1
    return gain, float(centred)


@torch.no_grad()
def logit_lens(lm: LM, W_dec: Tensor, n: int = 8, batch: int = 512) -> tuple[list[list[str]], list[list[str]]]:
    """The n words each decoder row (latents, d_model) raises most and lowers most, read through the final norm's weight and
    the unembedding (centred first where that norm is a LayerNorm); the norm's scaling of each token is left out.
    ValueError if the model does more than norm what it unembeds."""
    gain, centre = _final_norm(lm)
    unembed = lm.unembedding.module.weight.float()
    out: tuple[list[list[str]], list[list[str]]] = ([], [])
    for first in range(0, len(W_dec), batch):
        rows = W_dec[first : first + batch].to(unembed.device).float()
        logits = ((rows - centre * rows.mean(1, keepdim=True)) * gain) @ unembed.T
        for words, largest in zip(out, (True, False), strict=True):
            chosen = logits.topk(n, dim=1, largest=largest).indices.cpu()
            words.extend([[lm.tokenizer.decode([i]) for i in row] for row in chosen.tolist()])
    return out


def table(
    lm: LM, sae: Dictionary, samples: Samples, n: int = 6, window: int = 12, limit: int = 0, only: Tensor | None = None
) -> list[Latent]:
    """One Latent for each of the SAE's (or of `only`), contexts out of `samples` (the first `limit` token rows), `window` tokens
    either side."""
    only = torch.arange(sae.cfg.d_sae) if only is None else only
    top = top_tokens(sae, samples, n, limit, only=only)
    promotes, suppresses = logit_lens(lm, sae.W_dec.detach()[only])
    ids, decode = samples.token_rows()[0], lm.tokenizer.decode

    def context(value: float, row: int, at: int) -> Context:
        text = ids[row].tolist()
        before, after = decode(text[max(at - window, 0) : at]), decode(text[at + 1 : at + 1 + window])
        return Context(before, decode([text[at]]), after, round(value, 3))

    out = []
    for j in range(len(promotes)):
        found = zip(top.values[j].tolist(), top.rows[j].tolist(), top.positions[j].tolist(), strict=True)
        contexts = [context(*f) for f in found if f[0] > 0]
        out.append(Latent(int(only[j]), round(float(top.frequency[j]), 6), contexts, promotes[j], suppresses[j]))
    return out


def save(folder: Path, rows: list[Latent], title: str) -> None:
    """The page as latents.html and the table as latents.jsonl, beside the SAE."""
    lines = [
        json.dumps(row._asdict() | {"contexts": [list(c) for c in row.contexts]}, ensure_ascii=False) for row in rows
    ]
    store.write_file(folder / "latents.html", page(rows, title))
    store.write_file(folder / "latents.jsonl", "\n".join(lines) + "\n")


@store.spent("latents")
def of(folder: Path, lm: LM, sae: Dictionary, samples: Samples, limit: int = 0) -> list[Latent]:
    """The table of the SAE in `folder`, made and kept there on first use, or when how it is made has changed."""
    made = {"code": store.code_digest(__name__), "page": store.file_digest(pages.TEMPLATES / PAGE)}
    made_with = json.dumps({**made, "samples": samples.about(), "limit": limit, "model": lm.key})
    mark = folder / "latents.json"
    if mark.exists() and mark.read_text() == made_with:
        store.from_cache()
    else:
        about = samples.about()
        save(folder, table(lm, sae, samples, limit=limit), f"Latents of {about['hook_name']}, {about['model_name']}")
        store.write_file(mark, made_with)
    return load(folder)


def load(folder: Path) -> list[Latent]:
    """The table kept with an SAE; FileNotFoundError says how to make it."""
    path = folder / "latents.jsonl"
    if not path.exists():
        raise FileNotFoundError(
            f"no table of latents in {folder.name}: make it with latents.table and latents.save (notebook 00 does)"
        )
    rows = []
    for line in path.read_text(encoding="utf-8").split("\n")[:-1]:
        entry = json.loads(line)
        rows.append(Latent(**(entry | {"contexts": [Context(*c) for c in entry["contexts"]]})))
    return rows


def page(rows: list[Latent], title: str) -> str:
    """One static HTML file in which every latent can be searched and sorted; needs nothing else."""
    data = [[r.index, r.frequency, [list(c) for c in r.contexts], r.promotes, r.suppresses] for r in rows]
    return pages.page(PAGE, title=title, data=data)
