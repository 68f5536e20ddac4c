"""One language model, and what it reads: the residual stream at chosen layers and positions.

`LM` holds transformers' own weights, which every loop of this project runs, with blocks and unembedding found once and checked
on a few tokens; `LM.bridge` is TransformerLens' TransformerBridge over the same parameters, for people who want its hook
points. One reader serves everybody: batches by length, several layers in a pass, no block above the deepest one. Knows
token sequences, not where a model comes from (`models`) or what is done with what was read.
"""

import copy
import math
import operator
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from helpers import store
from helpers.lm import hooks, tokens
from helpers.lm.hooks import Output, hooked, stream
from helpers.lm.tokens import ANSWER, FILLER, USER, Batch, Tokenizer, Tokens
from helpers.session import why

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

CODE = ("lm.reading", "lm.hooks", "lm.tokens")


class ModelError(RuntimeError):
    """A model could not be had or cannot be used; the message says which, why, and what to do."""


class Unembedding(NamedTuple):
    """How a model makes logits of what reaches its unembedding h: cap(scale * (h W^T + bias)), cap(x) = cap tanh(x / cap)."""

    module: nn.Linear
    scale: float
    cap: float | None
    exact: bool

    def logits(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Of rows (n, d_model) with weight rows (n, d_model), one logit each; float32."""
        out = (hidden.float() * weight.float()).sum(-1)
        return self.finished(out if bias is None else out + bias.float())

    def finished(self, products: Tensor) -> Tensor:
        """Logits of the products h W^T + bias."""
        out = self.scale * products
        return out if self.cap is None else self.cap * torch.tanh(out / self.cap)


@dataclass(frozen=True, eq=False)
class LM:
    """A language model: transformers' own `weights`, its `tokenizer`, an `identity` by content; frozen, in eval mode.

    `blocks` in the order they run, whether each returns a tuple (`tuples`), and the `unembedding`, found and checked by `LM.of`.
    """

    weights: PreTrainedModel
    tokenizer: Tokenizer
    identity: str
    blocks: tuple[nn.Module, ...]
    tuples: tuple[bool, ...]
    unembedding: Unembedding

    @classmethod
    def of(cls, weights: PreTrainedModel, tokenizer: Tokenizer, identity: str) -> "LM":
        """The LM of a loaded transformers model; ModelError if it is no causal model whose blocks can be found and read.

        Six tokens are run: which list of modules runs as blocks, in order and once each; whether later tokens move what earlier
        ones give (then it is an encoder, such as BERT); how logits come from what reaches the unembedding.
        """
        weights.eval()
        for parameter in weights.parameters():
            parameter.requires_grad_(False)
        _check_vocabulary(weights, tokenizer, identity)
        blocks, tuples, unembedding = _probed(weights, identity)
        return cls(weights, tokenizer, identity, blocks, tuples, unembedding)

    @property
    def dtype(self) -> torch.dtype:
        return self.weights.dtype

    @property
    def device(self) -> torch.device:
        """Where the embedding lies, and so where inputs go."""
        return self.embedding.device

    @property
    def embedding(self) -> Tensor:
        """The input embedding's rows (vocabulary, d_model)."""
        return _embedding(self.weights)

    @property
    def d_model(self) -> int:
        """The width of the residual stream."""
        return self.weights.config.get_text_config().hidden_size

    @property
    def layers(self) -> int:
        """How many blocks there are."""
        return len(self.blocks)

    @property
    def longest(self) -> int | None:
        """The most tokens a sequence may have; None where the model sets no limit."""
        return getattr(self.weights.config.get_text_config(), "max_position_embeddings", None)

    @property
    def key(self) -> dict[str, str]:
        """What anything computed with the model depends on, for the cache's fingerprint."""
        return {"model": self.identity, "dtype": str(self.dtype), "device": self.device.type}

    def encode(self, text: str) -> Tensor:
        """Token ids (1, tokens) of plain text on the model's device: what `weights` and `bridge` take as they are."""
        return torch.tensor([tokens.plain(self.tokenizer, text).ids], device=self.device)

    def read_as(self, tokenizer: Tokenizer) -> "LM":
        """The same model with another tokenizer, so that two models' tokens correspond; ModelError if it has more tokens."""
        _check_vocabulary(self.weights, tokenizer, self.identity)
        return replace(self, tokenizer=tokenizer)

    @cached_property
    def bridge(self) -> "TransformerBridge":
        """TransformerLens' TransformerBridge over the same parameters: `lm.bridge.run_with_cache(lm.encode(text))`.

        Its modules are its own, so that hooks on it do not touch `weights`. ModelError where it would change what the model
        computes (a few tokens are run before and after), and for models of text and images, of which it wants all of it.
        """
        return _bridged(self)


# --- what a model is made of, checked on six tokens --------------------------------------------------------------------


def _embedding(weights: PreTrainedModel) -> Tensor:
    return cast(nn.Embedding, weights.get_input_embeddings()).weight


def _check_vocabulary(weights: PreTrainedModel, tokenizer: Tokenizer, identity: str) -> None:
    rows, vocabulary = len(_embedding(weights)), tokenizer.get_vocab()
    special = tokens.special_ids(tokenizer)
    if beyond := [token for token, i in vocabulary.items() if i >= rows and i not in special]:
        raise ModelError(
            f"{identity}: the tokenizer has {len(vocabulary)} tokens, the embedding {rows} rows, so that {len(beyond)} tokens such "
            f"as {beyond[0]!r} have none: load the tokenizer that belongs to these weights"
        )


def _probed(weights: PreTrainedModel, identity: str) -> tuple[tuple[nn.Module, ...], tuple[bool, ...], Unembedding]:
    """Blocks, whether they return tuples, and the unembedding of a model, found by running six tokens."""
    config, name = weights.config.get_text_config(), type(weights).__name__
    head = cast(nn.Linear | None, weights.get_output_embeddings())
    if head is None or weights.config.is_encoder_decoder:
        raise ModelError(f"{identity} ({name}) does not predict next tokens: a decoder-only language model is wanted")
    lists = [m for m in weights.modules() if isinstance(m, nn.ModuleList) and len(m) == config.num_hidden_layers]
    order: list[nn.Module] = []
    seen: dict[nn.Module, Output] = {}

    def note(module: nn.Module, args: tuple[object, ...], out: Output) -> None:
        order.append(module)
        seen[module] = out

    hidden: list[Tensor] = []
    ids = torch.tensor([[1, 2, 3], [1, 2, 4]]) % len(_embedding(weights))
    every = [module for group in lists for module in group]
    handle = head.register_forward_pre_hook(lambda module, args: hidden.append(args[0]))
    try:
        with hooked(every, [note] * len(every)), torch.no_grad():
            logits = weights(input_ids=ids.to(weights.device), use_cache=False).logits.float()
    finally:
        handle.remove()
    shape = (2, 3, config.hidden_size)
    for group in lists:
        found = [m for m in order if m in set(group)]
        if found == list(group) and all(_is_stream(seen[m], shape) for m in group):
            break
    else:
        raise ModelError(
            f"{identity} ({name}): no list of {config.num_hidden_layers} modules runs in order and gives a residual stream of width "
            f"{config.hidden_size}; its blocks are not known"
        )
    if len(hidden) != 1 or hidden[0].shape != shape:
        raise ModelError(
            f"{identity} ({name}): the unembedding does not read the whole stream once; scores are not known"
        )
    if not torch.isfinite(logits).all():
        raise ModelError(
            f"{identity} ({name}) predicts NaN or infinity in {_said(weights.dtype)}: use bfloat16 or float32"
        )
    one, other = logits[0, :2], logits[1, :2]
    if float((one - other).abs().max()) > 8 * _rounding(weights.dtype) * float(one.abs().max()):
        raise ModelError(
            f"{identity} ({name}): a later token changes what is predicted before it; a causal model is wanted"
        )
    return tuple(group), tuple(isinstance(seen[m], tuple) for m in group), _head(config, head, hidden[0], logits)


def _said(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _rounding(dtype: torch.dtype) -> float:
    """The relative error that long sums in a dtype may have."""
    return max(torch.finfo(dtype).eps, 1e-5)


def _is_stream(out: Output, shape: tuple[int, ...]) -> bool:
    return isinstance(stream(out), Tensor) and stream(out).shape == shape


def _head(config: object, head: nn.Linear, hidden: Tensor, logits: Tensor) -> Unembedding:
    """How this model's logits come from `hidden` (2, 3, d_model): by which of the known ways, or by none (`exact` false)."""
    weight, bias = head.weight, getattr(head, "bias", None)
    products = hidden.float() @ weight.float().T + (0.0 if bias is None else bias.float())
    cap = getattr(config, "final_logit_softcapping", None)
    scales = [1.0, getattr(config, "logit_scale", None), getattr(config, "logits_scaling", None)]
    scales += [1 / s for s in scales[1:] if s] + [1 / math.sqrt(hidden.shape[-1])]
    allowed = _rounding(logits.dtype if weight.dtype == torch.float32 else weight.dtype) * float(
        logits.square().mean().sqrt()
    )
    for scale in scales:
        if scale:
            rule = Unembedding(head, float(scale), cap, True)
            if float((rule.finished(products) - logits).square().mean().sqrt()) <= allowed:
                return rule
    return Unembedding(head, 1.0, None, False)


# --- TransformerLens over the same parameters --------------------------------------------------------------------------


@contextmanager
def _nothing_installs() -> Iterator[None]:
    """Context: a dependency that starts a process fails. TransformerLens runs pip in the user's environment for some models."""

    def refused(*args: object, **kwargs: object) -> None:
        raise ModelError(f"a library wanted to run a command, {str(args)[:200]}; nothing is run or installed here")

    kept, subprocess.Popen = subprocess.Popen, refused  # type: ignore[misc,assignment]
    try:
        yield
    finally:
        subprocess.Popen = kept  # type: ignore[misc]


def _bridged(lm: LM) -> "TransformerBridge":
    from transformer_lens.model_bridge import TransformerBridge

    if lm.weights.config.get_text_config() is not lm.weights.config:
        raise ModelError(
            f"{lm.identity} is a model of more than text: TransformerLens wants all its parts; read `weights` instead"
        )
    shared = {id(t): t for t in (*lm.weights.parameters(), *lm.weights.buffers())}
    twin = copy.deepcopy(lm.weights, shared)  # other modules, the same tensors
    name = lm.weights.config._name_or_path or lm.identity
    try:
        with _nothing_installs():
            bridge = TransformerBridge.boot_transformers(name, hf_model=twin, tokenizer=lm.tokenizer, dtype=lm.dtype)
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"TransformerLens cannot wrap {lm.identity}: {why(error)}; `weights` works") from None
    bridge._tokenizer = lm.tokenizer  # type: ignore[assignment]  # its setter makes a variant that adds a first token; templates write their own
    bridge.eval()
    for parameter in bridge.parameters():
        parameter.requires_grad_(False)
    _check_bridge(lm, bridge)
    return bridge


def _check_bridge(lm: LM, bridge: "TransformerBridge") -> None:
    """ModelError if a bridge's streams or logits differ from the weights' own by more than rounding."""
    ids = (torch.arange(1, 9)[None] % len(lm.embedding)).to(lm.device)
    names = {hooks.resid_post(layer): layer for layer in range(lm.layers)}
    with torch.no_grad():
        with hooks.capture(lm, list(names.values())) as acts:
            logits = lm.weights(input_ids=ids, use_cache=False).logits
        theirs, cache = bridge.run_with_cache(ids, names_filter=lambda name: name in names)
    pairs = [("the logits", logits, theirs), *((name, acts[layer], cache[name]) for name, layer in names.items())]
    for what, ours, other in pairs:
        gap = float((ours.float() - other.float()).norm() / ours.float().norm())
        if not gap <= 8 * _rounding(lm.dtype):
            raise ModelError(
                f"TransformerLens changes {lm.identity}: {what} differ by {gap:.1%} on eight tokens; use `weights`, not the bridge"
            )


# --- forward passes ----------------------------------------------------------------------------------------------------


def inputs(lm: LM, batch: Batch, attend_filler: bool = True) -> dict[str, Tensor]:
    """What `weights` takes for a padded batch: padding unattended, positions counted over real tokens.

    With `attend_filler` false, filler tokens keep their positions but nobody attends to them. ValueError for more tokens than
    the model has positions, and for token ids that have no embedding.
    """
    if lm.longest and int(batch.position_ids.max()) >= lm.longest:
        raise ValueError(
            f"a sequence of {int(batch.position_ids.max()) + 1} tokens was given; {lm.identity} takes {lm.longest}"
        )
    if int(batch.ids.max()) >= len(lm.embedding):
        raise ValueError(
            f"token id {int(batch.ids.max())} was given; the model embeds ids 0 to {len(lm.embedding) - 1}"
        )
    mask = batch.mask if attend_filler else batch.mask & (batch.roles != FILLER)
    parts = {"input_ids": batch.ids, "attention_mask": mask.long(), "position_ids": batch.position_ids}
    return {name: part.to(lm.device) for name, part in parts.items()}


def forward(
    lm: LM, batch: Batch, attend_filler: bool = True, output_hidden_states: bool = False
) -> CausalLMOutputWithPast:
    """transformers' own output for a padded batch, hooks firing. Errors as for `inputs`."""
    return lm.weights(**inputs(lm, batch, attend_filler), use_cache=False, output_hidden_states=output_hidden_states)


def logits_of_few(weights: PreTrainedModel) -> Tensor:
    """Logits (8, vocabulary) float32 of a bare model on eight tokens: what two states of one model are compared by."""
    embedding = _embedding(weights)
    ids = torch.arange(1, 9, device=embedding.device)[None] % len(embedding)
    with torch.no_grad():
        return weights(input_ids=ids, use_cache=False).logits[0].float()


def packed(lm: LM, ids: Tensor, layers: Sequence[int]) -> dict[int, Tensor]:
    """layer -> (rows, context, d_model): the stream after each of `layers` for rows of token ids (rows, context) without padding.

    The blocks above the deepest layer, and the unembedding, are not run.
    """
    with hooks.capture(lm, layers, stop=True) as acts, torch.no_grad():
        lm.weights(input_ids=ids.to(lm.device), use_cache=False)
    return acts


def steered(lm: LM, layer: int, vector: Tensor | None) -> AbstractContextManager[None]:
    """Context: `vector` (d_model,) is added to every token after block `layer`; None: nothing is."""
    return nullcontext() if vector is None else hooks.add(lm, layer, vector)


def unhooked(lm: LM) -> None:
    """ValueError if hooks are set on the model: what is kept on disk is that of the model as it is, and would not know of them."""
    for module in lm.weights.modules():
        foreign = [
            h for h in module._forward_hooks.values() if not getattr(h, "__module__", "").startswith("transformers.")
        ]
        if foreign or module._forward_pre_hooks or "forward" in module.__dict__:
            raise ValueError(
                f"{lm.identity} has hooks set, and this result is kept on disk without them: leave the context first, or run the "
                "model yourself (reading.forward, reading.residuals)"
            )


def batches(
    lm: LM,
    sequences: Sequence[Tokens],
    layers: Sequence[int],
    batch_size: int = 32,
    attend_filler: bool = True,
    by_length: bool = True,
) -> Iterator[tuple[list[int], Batch, dict[int, Tensor]]]:
    """The sequences in batches: which they are, the padded batch, layer -> stream (batch, tokens, d_model).

    No block above the deepest of `layers` is run. Like lengths come together, for less padding; `by_length` false keeps the
    order given, for hooks that were built for it.
    """
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i].ids) if by_length else 0)
    for start in tqdm(range(0, len(order), batch_size), desc="read", leave=False):
        chosen = order[start : start + batch_size]
        batch = tokens.pad([sequences[i] for i in chosen], lm.tokenizer.pad_token_id, side="right")
        with hooks.capture(lm, layers, stop=True) as acts, torch.no_grad():
            forward(lm, batch, attend_filler)
        yield chosen, batch, acts


# --- what is read ------------------------------------------------------------------------------------------------------


def means(
    lm: LM,
    sequences: Sequence[Tokens],
    layers: Sequence[int],
    where: str | Sequence[int] = "last",
    masks: Sequence[Tensor] | None = None,
    batch_size: int = 32,
    attend_filler: bool = True,
) -> tuple[Tensor, float]:
    """Mean residual over chosen positions of each sequence, (sequences, sets, layers, d_model) float32, and the seconds it took.

    `where` as in `tokens.positions` (one set), or `masks`, one bool (sets, tokens) a sequence. Sums in float64. Cached on disk;
    the seconds are those of the run that made it. ValueError for a sequence in which no position is chosen.
    """
    unhooked(lm)
    layers = [operator.index(layer) for layer in layers]
    key = lm.key | {
        "sequences": store.digest([[s.ids, s.roles] for s in sequences]),
        "layers": layers,
        "where": (where if isinstance(where, str) else [int(i) for i in where])
        if masks is None
        else store.digest([m.tolist() for m in masks]),
        "attend_filler": attend_filler,
        "batch_size": batch_size,
    }

    def compute() -> dict[str, Tensor]:
        began = time.perf_counter()
        acts = _means(lm, sequences, layers, where, masks, batch_size, attend_filler)
        return {"acts": acts, "seconds": torch.tensor(time.perf_counter() - began)}

    entry = store.cached("activations", key, compute, CODE)
    return entry["acts"], float(entry["seconds"])


def _means(
    lm: LM,
    sequences: Sequence[Tokens],
    layers: list[int],
    where: str | Sequence[int],
    masks: Sequence[Tensor] | None,
    batch_size: int,
    attend_filler: bool,
) -> Tensor:
    sets = 1 if masks is None else len(masks[0])
    out = torch.empty(len(sequences), sets, len(layers), lm.d_model)
    for rows, batch, acts in batches(lm, sequences, layers, batch_size, attend_filler):
        if masks is None:
            chosen = tokens.positions(batch, where).prompt[:, None]
        else:
            chosen = torch.zeros(len(rows), sets, batch.ids.shape[1], dtype=torch.bool)
            for r, i in enumerate(rows):
                chosen[r, :, : masks[i].shape[1]] = masks[i]
        if not chosen.any(-1).all():
            row = rows[int((~chosen.any(-1)).nonzero()[0, 0])]
            text = lm.tokenizer.decode(sequences[row].ids)[:60]
            raise ValueError(f"no position {where!r} in sequence {row} ({text!r}…); it would average nothing")
        weight = chosen.double() / chosen.sum(-1, keepdim=True)
        for k, layer in enumerate(layers):
            acts_k = acts[layer].cpu() if acts[layer].device.type == "mps" else acts[layer]  # mps has no float64
            out[rows, :, k] = (weight.to(acts_k.device) @ acts_k.double()).float().cpu()
    if not torch.isfinite(out).all():
        raise ValueError(f"the residuals hold NaN or infinity in {_said(lm.dtype)}: use bfloat16 or float32")
    return out


def residuals(
    lm: LM, sequences: Sequence[Tokens], layer: int, vector: Tensor | None = None, batch_size: int = 32
) -> list[Tensor]:
    """The residual stream (tokens, d_model) float32 after block `layer` of each sequence, on the CPU.

    With `vector` (d_model,), of a run in which it is added to every token after that block. Hooks that are set act; batches
    keep the order of `sequences`.
    """
    found: dict[int, Tensor] = {}
    with steered(lm, layer, vector):
        for rows, _, acts in batches(lm, sequences, [layer], batch_size, by_length=False):
            for r, i in enumerate(rows):
                found[i] = acts[layer][r, : len(sequences[i].ids)].float().cpu()
    return [found[i] for i in range(len(sequences))]


def rows(
    lm: LM, sequences: Sequence[Tokens], layer: int, roles: Sequence[int] = (USER, ANSWER), batch_size: int = 32
) -> Tensor:
    """The residual-stream rows (tokens, d_model) float32, after block `layer`, of the tokens that have one of `roles`.

    User and answer by default: the template's own tokens are the same rows again and again, and would rule any covariance.
    """
    streams = residuals(lm, sequences, layer, batch_size=batch_size)
    return torch.cat(
        [
            x[torch.isin(torch.tensor(t.roles), torch.tensor(list(roles)))]
            for x, t in zip(streams, sequences, strict=True)
        ]
    )
