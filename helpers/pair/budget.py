"""What a streamed run of training takes, before it starts: memory reckoned from shapes alone, hours from a short probe.

Knows the shapes of two models, of an SAE and of a training step, and a source that streams rows (`harvest.Stream`); not which profile
asks for it (`helpers.pair.diff`). Exact for what is kept, estimated from above for working memory: the tests hold it against torch's count.
"""

import copy
import time
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from helpers import session, store
from helpers.lm import files, models
from helpers.lm.reading import LM
from helpers.sae import activations, harvest, topk, train


class BudgetError(RuntimeError):
    """A run does not fit this machine; the message says where, how much is missing and what to do."""


# --- memory ------------------------------------------------------------------------------------------------------------


class Shape(NamedTuple):
    """What a model's memory depends on: number of parameters (tied ones once), width of the residual stream, of the MLP, of all
    heads together, and number of heads."""

    parameters: int
    d_model: int
    mlp: int
    attention: int
    heads: int


def shape(model: LM | str) -> Shape:
    """The shape of a model, loaded or by name; by name from its configuration alone, no weights are fetched or made."""
    if isinstance(model, LM):
        weights = model.weights
    else:
        path, _ = models.find(session.split(model)[0], "cpu", torch.bfloat16, None, weights=False)
        with torch.device("meta"):
            weights = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))
    config = weights.config.get_text_config()
    width, heads = config.hidden_size, config.num_attention_heads
    head = getattr(config, "head_dim", None) or width // heads
    mlp = getattr(config, "intermediate_size", None) or 4 * width
    return Shape(sum(p.numel() for p in weights.parameters()), width, mlp, head * heads, heads)


class Sizes(NamedTuple):
    """How a stream is cut: rows a forward pass, tokens a row, tokens a pool."""

    rows: int
    context: int
    pool_tokens: int


LOADED = ("weights of the base", "weights of the chat model")


class Budget(NamedTuple):
    """The most that training takes at once, in bytes by part: `parts` on the device, `host` in memory beside it, `disk`."""

    parts: dict[str, int]
    host: dict[str, int]
    disk: dict[str, int]

    @property
    def total(self) -> int:
        """Bytes on the device."""
        return sum(self.parts.values())

    def table(self) -> str:
        """A Markdown table of the parts and their sums, in GB (10^9 bytes)."""
        lines = ["| what | where | GB |", "|---|---|---|"]
        for where, parts in (("device", self.parts), ("host", self.host), ("disk", self.disk)):
            lines += [f"| {name} | {where} | {n / 1e9:.2f} |" for name, n in parts.items()]
            lines += [f"| **in all** | {where} | **{sum(parts.values()) / 1e9:.2f}** |"]
        return "\n".join(lines)


def forward_bytes(model: Shape, dtype: torch.dtype, rows: int, context: int) -> int:
    """Working memory of one forward pass cut at a block, eager attention: an upper estimate (a test holds it against torch's count).

    The stream in a few copies, some in float32; beside it the MLP's products, or queries, keys and values and the scores in dtype
    and float32. Nothing is unembedded.
    """
    tokens, size = rows * context, dtype.itemsize
    attention = 6 * tokens * model.attention * size + rows * model.heads * context**2 * (3 * size + 8)
    return tokens * model.d_model * (4 * size + 16) + max(attention, 4 * tokens * model.mlp * size)


def step_bytes(d_model: int, config: train.Config) -> int:
    """Working memory of one training step beside its pre-codes and gradients: an upper estimate, nearly all latents dead.

    The encoder ranked by, about ten copies of the batch, the chosen codes' bookkeeping; BatchTopK's look at all codes; and of the
    auxiliary loss the dead latents' rows, their gradients, and their codes, sparse or dense.
    """
    n, batch, low = config.latents, config.batch, 2 if config.low else 4
    plain = n * d_model * low + 40 * batch * d_model + 80 * batch * config.k
    everything = 2 * batch * n * (low + 8) if config.batch_topk else 0
    if not config.alpha:
        return plain + everything
    k_aux = min(config.k_aux or max(d_model // 2, 1), n)
    codes = max(80 * batch * k_aux, 16 * batch * min(n, 4 * k_aux))
    return plain + everything + 16 * n * d_model + batch * n * (low + 4) + codes


def reckoned(base: Shape, chat: Shape, dtype: torch.dtype, config: train.Config, cut: Sizes) -> Budget:
    """What a streamed diff-SAE takes: exact for weights, moments, gradients and pre-codes, estimated from above for the rest.

    Both models in `dtype`, the SAE and Adam's two moments in float32. The host holds the last pool's differences while both models'
    residuals become the next one's; the disk, while a checkpoint is written, two older ones.
    """
    d, size = chat.d_model, dtype.itemsize
    sae = 4 * (2 * config.latents * d + config.latents + d)
    counts = 2 * 8 * config.latents  # when and how often each latent fired
    drawn = min(config.samples, 16_384)  # train.fit measures them in float64
    pool = cut.pool_tokens * d * (8 + 4 * size)
    first = d * (8 * max(drawn, cut.pool_tokens) + 28 * drawn)
    return Budget(
        {
            LOADED[0]: base.parameters * size,
            LOADED[1]: chat.parameters * size,
            "weights of the SAE": sae,
            "Adam's two moments": 2 * sae,
            "gradients": sae,
            "counts of firing": counts,
            "pre-codes": config.batch * config.latents * (2 if config.low else 4),
            "working memory of a training step": step_bytes(d, config),
            "working memory of a forward pass": forward_bytes(chat, dtype, cut.rows, cut.context),
        },
        {"pools of rows": max(pool, first)},
        {"checkpoints": 3 * (3 * sae + counts), "the SAE": sae},
    )


def check(need: Budget, device: str, held: tuple[str, ...] = ()) -> None:
    """BudgetError if a budget, with a tenth to spare, does not fit what is free; says where. `held`: parts that are already there."""
    parts, host, disk = (
        sum(n for name, n in where.items() if name not in held) for where in (need.parts, need.host, need.disk)
    )
    smaller = "or lower expansion or batch in the profile's section pair: diff: train:"
    if device.startswith("cuda"):
        places = [(device, parts, files.free_memory(device), f"take a card with more memory, free this one, {smaller}")]
        places += [("the host", host, files.free_memory("cpu"), "close what else is running")]
    else:
        places = [(device, parts + host, files.free_memory(device), f"take a machine with more memory, {smaller}")]
    session.cache_dir().mkdir(parents=True, exist_ok=True)
    free = store.free_bytes(session.cache_dir())
    places += [("disk", disk, free, "make room, or set CACHE_DIR in .env to another disk")]
    for where, wanted, there, do in places:
        if 1.1 * wanted > there:
            raise BudgetError(
                f"training this diff-SAE takes {wanted / 1e9:.1f} GB on {where}, and a tenth to spare, but {there / 1e9:.1f} GB are "
                f"free there: {do}"
            )


# --- time --------------------------------------------------------------------------------------------------------------


class Probe(NamedTuple):
    """Speeds of a streamed run, in training tokens a second: of the harvest (both models), and of training on what it gave; and
    how many such tokens (`samples`) the run wants."""

    harvest: float
    training: float
    samples: int

    @property
    def hours(self) -> float:
        """Of the whole run: harvest and training take turns."""
        return self.samples * (1 / self.harvest + 1 / self.training) / 3600

    def __str__(self) -> str:
        took = f"{self.hours:.1f} hours" if self.hours >= 1 else f"{60 * self.hours:.2g} minutes"
        return f"harvest {self.harvest:,.0f} tokens/s, training {self.training:,.0f} tokens/s, in turn: {self.samples:,} tokens in about {took}"


def probe(stream: harvest.Stream, config: train.Config, device: str = "cpu", seconds: float = 20.0) -> Probe:
    """The speeds of a run on `stream`, from about `seconds` of it: a pool's harvest, then training steps, each for half of the time.

    What comes first (opening the source, a GPU's start) is outside the clock. Nothing is dead in the first steps, so that the
    auxiliary loss is not in it; a run with many dead latents is slower. ValueError for a configuration that cannot be run.
    """
    train.check(config)
    topk.check_sizes(stream.d_model, config.latents, config.k)
    rows, speed = _harvested(stream, seconds / 2)
    return Probe(speed, _trained(rows, config, device, seconds / 2), config.samples)


def _harvested(stream: harvest.Stream, seconds: float) -> tuple[Tensor, float]:
    """Rows (n, d_model) of a stream's first passes, a pool at most, and how many a second."""
    passes = copy.copy(stream)
    passes.pool_rows = min(stream.batch_rows, stream.pool_rows)
    pool, took = stream.pool_rows * stream.context, []
    found: list[Tensor] = []
    began = time.perf_counter()
    for chunk in passes._chunks():
        found.append(passes._rows(chunk))
        now = time.perf_counter()
        took.append(now - began)
        began = now
        if len(took) > 1 and (sum(took) > seconds or sum(map(len, found)) >= pool):
            break
    counted = slice(len(took) > 1, None)
    return torch.cat(found), sum(map(len, found[counted])) / sum(took[counted])


def _trained(rows: Tensor, config: train.Config, device: str, seconds: float) -> float:
    """Rows a second that training steps take, on batches drawn from `rows` with repeats."""
    centre, scale = train.measure(rows[:16_384].float(), config.pre_bias)
    start = topk.initial(rows.shape[1], config.latents, (scale * centre).to(device), config.seed)
    state, random = train.State.new(start), activations.seeded(config.seed)
    took: list[float] = []
    while len(took) < 3 or (len(took) < 50 and sum(took) < seconds):
        began = time.perf_counter()
        x = rows[torch.randint(len(rows), (config.batch,), generator=random)].to(device).float() * scale
        float(train.update(state, x, config).loss)  # waits for a GPU
        took.append(time.perf_counter() - began)
    return config.batch * (len(took) - 1) / sum(took[1:])
