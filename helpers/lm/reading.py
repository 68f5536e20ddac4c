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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from helpers import store
from helpers.lm import hooks, tokens
from helpers.lm.hooks import Output, hooked, stream
from helpers.lm.tokens import ANSWER, FILLER, USER, Batch, Tokenizer, Tokens
from helpers.session import why

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

CACHED_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}  # whose keys and values can be cut back


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

    `blocks` in the order they run, of how many parts the tuple is that each returns (`tuples`, 0: a tensor), and the
    `unembedding`, found and checked by `LM.of`. `skips`: what is above a block needs nothing of what is below it but the
    stream. `unscored`: why the model is only read, neither scored nor asked for replies; empty where it is both.
    """

    weights: PreTrainedModel
    tokenizer: Tokenizer
    identity: str
    blocks: tuple[nn.Module, ...]
    tuples: tuple[int, ...]
    unembedding: Unembedding
    skips: bool = True
    unscored: str = ""
    version: int = 0  # counts edits of the weights in place

    @classmethod
    def of(cls, weights: PreTrainedModel, tokenizer: Tokenizer, identity: str) -> "LM":
        """The LM of a loaded transformers model; ModelError if it is no causal model whose blocks can be found and read.

        A few tokens are run: which list of modules runs as blocks, in order and once each; whether later tokens move what
        earlier ones give (then it is an encoder, such as BERT); how logits come from what reaches the unembedding; whether
        padding, positions from 0, a start above the lower blocks and cached keys and values leave the logits as they are (of models
        that differ in their weights' values alone, only the first is asked these last four).
        """
        if hasattr(weights, "peft_config") or any("parametriz" in type(m).__module__ for m in weights.modules()):
            raise ModelError(
                f"{identity} holds an adapter or a parametrisation beside its weights: merge it into them first"
            )
        weights.eval()
        for parameter in weights.parameters():
            parameter.requires_grad_(False)
        _check_vocabulary(weights, tokenizer, identity)
        lm = cls(weights, tokenizer, identity, *_probed(weights, identity))
        alike = _architecture(lm)
        if alike not in _CHECKED:
            with torch.no_grad():
                _check_padding(lm)
                _CHECKED[alike] = _skips(lm), _unscored(lm)
        skips, unscored = _CHECKED[alike]
        version = sum(p._version for p in weights.parameters())
        return replace(lm, skips=skips, unscored=unscored and f"{identity} {unscored}", version=version)

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
        """The most tokens a sequence may have; None where the model sets no limit.

        Where every rotary angle changes once a token lies beyond some length (longrope), it is that length: past it the
        longest text of a batch, or what was cached before, would change what the others give.
        """
        config = self.weights.config.get_text_config()
        rope = getattr(config, "rope_parameters", None) or {}
        limits = [getattr(config, name, None) for name in ("max_position_embeddings", "max_seq_len")]
        if rope.get("rope_type") == "longrope":
            limits.append(rope.get("original_max_position_embeddings"))
        return min((limit for limit in limits if limit), default=None)

    @property
    def pad_id(self) -> int:
        """The id that batches are padded with; nobody attends to it."""
        return tokens.padding(self.tokenizer, len(self.embedding))

    @property
    def key(self) -> dict[str, str]:
        """What anything computed with the model depends on, for the cache's fingerprint."""
        return {"model": self.identity, "dtype": str(self.dtype), "device": self.device.type}

    def encode(self, text: str) -> Tensor:
        """Token ids (1, tokens) of plain text on the model's device: what `weights` and `bridge` take as they are."""
        return torch.tensor([tokens.plain(self.tokenizer, text).ids], device=self.device)

    def read_as(self, tokenizer: Tokenizer) -> "LM":
        """The same model with another tokenizer, so that two models' tokens correspond; ModelError if it has more tokens.

        Where that one lays out text in another way the identity says so: what is made of the two is not the model's own.
        """
        _check_vocabulary(self.weights, tokenizer, self.identity)
        own, other = (tokens.fingerprint(t) for t in (self.tokenizer, tokenizer))
        identity = self.identity if own == other else f"{self.identity}~{other[:8]}"
        return replace(self, tokenizer=tokenizer, identity=identity)

    @cached_property
    def bridge(self) -> "TransformerBridge":
        """TransformerLens' TransformerBridge over the same parameters: `lm.bridge.run_with_cache(lm.encode(text))`.

        Its modules are its own, so that hooks on it do not touch `weights`. ModelError where it would change what the model
        computes (a few tokens are run before and after), and for models of text and images, of which it wants all of it.
        """
        return _bridged(self)


# --- what a model is made of, checked on a few tokens ------------------------------------------------------------------


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


def _probed(weights: PreTrainedModel, identity: str) -> tuple[tuple[nn.Module, ...], tuple[int, ...], Unembedding]:
    """Blocks, of how many parts a tuple they return, and the unembedding of a model, found by running six tokens."""
    config, name = weights.config.get_text_config(), type(weights).__name__
    head = cast(nn.Linear | None, weights.get_output_embeddings())
    if head is None or weights.config.is_encoder_decoder:
        raise ModelError(f"{identity} ({name}) does not predict next tokens: a decoder-only language model is wanted")
    lists = [m for m in weights.modules() if isinstance(m, nn.ModuleList) and len(m) == config.num_hidden_layers]
    order: list[nn.Module] = []
    seen: dict[nn.Module, Output] = {}
    taken: dict[nn.Module, object] = {}

    def take(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        taken[module] = args[0] if args else kwargs.get("hidden_states")

    def note(module: nn.Module, args: tuple[object, ...], out: Output) -> None:
        order.append(module)
        seen[module] = out

    hidden: list[Tensor] = []
    ids = torch.tensor([[1, 2, 3], [1, 2, 4]]) % len(_embedding(weights))
    every = [module for group in lists for module in group]
    handles = [head.register_forward_pre_hook(lambda module, args: hidden.append(args[0]))]
    handles += [module.register_forward_pre_hook(take, with_kwargs=True) for module in every]
    try:
        with hooked(every, [note] * len(every)), torch.no_grad():
            logits = weights(input_ids=ids.to(weights.device), use_cache=False).logits.float()
    except Exception as error:
        raise ModelError(f"{identity} ({name}) cannot be run on token ids alone: {why(error)}") from None
    finally:
        for handle in handles:
            handle.remove()
    shape = (2, 3, config.hidden_size)
    for group in lists:
        found = [m for m in order if m in set(group)]
        if found == list(group) and all(_is_stream(seen[m], shape) for m in group) and _chained(group, taken, seen):
            break
    else:
        raise ModelError(
            f"{identity} ({name}): no list of {config.num_hidden_layers} modules runs in order, each on the residual stream "
            f"of width {config.hidden_size} that the one before gave; its blocks are not known"
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
    parts = tuple(len(seen[m]) if isinstance(seen[m], tuple) else 0 for m in group)
    return tuple(group), parts, _head(config, head, hidden[0], logits)


def _said(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _rounding(dtype: torch.dtype) -> float:
    """The relative error that long sums in a dtype may have."""
    return max(torch.finfo(dtype).eps, 1e-5)


def _is_stream(out: Output, shape: tuple[int, ...]) -> bool:
    return isinstance(stream(out), Tensor) and stream(out).shape == shape


def _chained(group: Iterable[nn.Module], taken: Mapping[nn.Module, object], seen: Mapping[nn.Module, Output]) -> bool:
    """Whether each block takes what the one before gave: they hold the stream, and are no other list of that length."""
    pairs = [(stream(seen[before]), taken[after]) for before, after in pairwise(group)]
    return all(isinstance(got, Tensor) and torch.equal(gave, got) for gave, got in pairs)


def _agree(ours: Tensor, other: Tensor, dtype: torch.dtype) -> bool:
    """Whether two ways to compute the same logits agree; batches of other shapes round otherwise, experts may change."""
    return bool((ours - other).norm() <= 32 * _rounding(dtype) * other.norm())


LONG, SHORT = Tokens([1, 2, 3, 4, 5, 6, 7], [USER] * 7), Tokens([8, 9, 5], [USER] * 3)  # what follows runs on these


_CHECKED: dict[tuple[type, str], tuple[bool, str]] = {}  # by `_architecture`: `LM.skips`, and why it is not scored


def _architecture(lm: LM) -> tuple[type, str]:
    """All of a model but its weights' values: its class, settings, shapes, kind of number and device."""
    shapes = [(name, tuple(p.shape), str(p.dtype), p.device.type) for name, p in lm.weights.named_parameters()]
    config = lm.weights.config
    said = [config.to_json_string(), config._attn_implementation, lm.unembedding[1:], shapes]
    return type(lm.weights), repr(said)


def _few(lm: LM, sequence: Tokens) -> Tokens:
    return sequence._replace(ids=[i % len(lm.embedding) for i in sequence.ids])


def _alone(lm: LM, sequence: Tokens) -> Tensor:
    """Logits (tokens, vocabulary) of one sequence as transformers runs it, nothing said of padding or positions."""
    ids = torch.tensor([_few(lm, sequence).ids], device=lm.device)
    return lm.weights(input_ids=ids, use_cache=False).logits[0].float()


def _check_padding(lm: LM) -> None:
    """ModelError where padding on the right, or positions counted from 0, change the logits."""
    batch = tokens.pad([_few(lm, LONG), _few(lm, SHORT)], 0, "right")
    try:
        logits = cast(Tensor, forward(lm, batch).logits).float()
    except Exception as error:
        raise ModelError(f"{lm.identity} ({type(lm.weights).__name__}) takes no padded batch: {why(error)}") from None
    for row, sequence in enumerate((LONG, SHORT)):
        if not _agree(logits[row, : len(sequence.ids)], _alone(lm, sequence), lm.dtype):
            raise ModelError(
                f"{lm.identity} ({type(lm.weights).__name__}): padding on the right, or positions counted from 0, change "
                "what it gives; a model that is indifferent to both is wanted"
            )


def _skips(lm: LM) -> bool:
    """Whether the upper blocks give the same where the lower ones are skipped; not if they take keys or values of those."""
    layer = max(lm.layers - 2, 0)
    ids = torch.tensor([_few(lm, LONG).ids], device=lm.device)
    with hooks.capture(lm, [layer], stop=True) as acts:
        lm.weights(input_ids=ids, use_cache=False)
    with suppress(Exception), hooks.resume_at(lm, layer, acts[layer]):
        return _agree(lm.weights(input_ids=ids, use_cache=False).logits[0].float(), _alone(lm, LONG), lm.dtype)
    return False


def forget(cache: Cache, length: int) -> None:
    """Cut each layer of a key-value cache back to `length` tokens; layers that were skipped are left as they are."""
    for layer in cache.layers:
        if isinstance(layer, DynamicLayer) and (extra := layer.get_seq_length() - length):
            layer.crop(-extra)


def _unscored(lm: LM) -> str:
    """Why a model cannot be run on from a cached prompt, padded on the left, again and again; empty where it can."""
    kinds = set(getattr(lm.weights.config.get_text_config(), "layer_types", None) or ())
    if other := sorted(kinds - CACHED_LAYERS):
        means = f"has layers of kind {other[0]}, whose state cannot be cut back to the prompt"
    elif not _runs_on(lm):
        means = "gives other predictions where padding lies on the left and keys and values come out of a cache"
    else:
        return ""
    return f"{means}: it can be read, but is not scored and writes no replies"


def _runs_on(lm: LM) -> bool:
    """Whether two rows' last two tokens get their logits, twice, if those before are padded on the left and cached."""
    rows = [_few(lm, LONG), _few(lm, SHORT)]
    whole = tokens.pad(rows, 0, "left")
    head, tail = (Batch(*(part[:, where] for part in whole)) for where in (slice(-2), slice(-2, None)))
    given = inputs(lm, tail) | {"attention_mask": whole.mask.long().to(lm.device)}
    expected, cache = torch.stack([_alone(lm, sequence)[-2:] for sequence in (LONG, SHORT)]), DynamicCache()
    with suppress(Exception):
        lm.weights(**inputs(lm, head), past_key_values=cache, use_cache=True)
        once = lm.weights(**given, past_key_values=cache, use_cache=True).logits.float()
        forget(cache, head.ids.shape[1])
        again = lm.weights(**given, past_key_values=cache, use_cache=True).logits.float()
        return _agree(once, expected, lm.dtype) and _agree(again, expected, lm.dtype)
    return False


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
    tokenizer = cast(PreTrainedTokenizerBase, copy.deepcopy(lm.tokenizer))  # a BOS is written into what it is given
    # Said to add its BOS, it is not loaded anew by name.
    tokenizer.init_kwargs = {**tokenizer.init_kwargs, "name_or_path": "", "add_bos_token": True}
    shared = {id(t): t for t in (*lm.weights.parameters(), *lm.weights.buffers())}
    twin = copy.deepcopy(lm.weights, shared)  # other modules, the same tensors
    twin.config.architectures = twin.config.architectures or [type(twin).__name__]  # missing where nothing was loaded
    name = lm.weights.config._name_or_path or lm.identity
    try:
        with _nothing_installs():
            bridge = TransformerBridge.boot_transformers(name, hf_model=twin, tokenizer=tokenizer, dtype=lm.dtype)
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

    With `attend_filler` false, filler tokens keep their positions but nobody attends to them. ValueError for more tokens
    than the model takes, for token ids that have no embedding, and for padding on the left where that changes what it gives.
    """
    if lm.unscored and not bool(batch.mask[:, 0].all()):
        raise ValueError(f"a batch padded on the left was given; {lm.unscored}. Pad it on the right to read it")
    if lm.longest and int(batch.position_ids.max()) >= lm.longest:
        raise ValueError(
            f"a sequence of {int(batch.position_ids.max()) + 1} tokens was given; {lm.identity} takes {lm.longest}"
        )
    least, most = int(batch.ids.min()), int(batch.ids.max())
    if least < 0 or most >= len(lm.embedding):
        raise ValueError(
            f"token id {most if least >= 0 else least} was given; the model embeds ids 0 to {len(lm.embedding) - 1}"
        )
    mask = batch.mask if attend_filler else batch.mask & (batch.roles != FILLER)
    parts = {"input_ids": batch.ids, "attention_mask": mask.long(), "position_ids": batch.position_ids}
    return {name: part.to(lm.device) for name, part in parts.items()}


def forward(
    lm: LM, batch: Batch, attend_filler: bool = True, output_hidden_states: bool = False
) -> CausalLMOutputWithPast:
    """transformers' own output for a padded batch, hooks firing. Errors as for `inputs`."""
    return lm.weights(**inputs(lm, batch, attend_filler), use_cache=False, output_hidden_states=output_hidden_states)


def ends(lm: LM) -> tuple[Tensor, Tensor]:
    """What the last block gives and what reaches the unembedding (1, 8, d_model) on eight tokens: between them stands the final norm."""
    kept: list[Tensor] = []
    handle = lm.unembedding.module.register_forward_pre_hook(lambda module, args: kept.append(args[0]))
    try:
        with hooks.capture(lm, [lm.layers - 1]) as acts:
            logits_of_few(lm.weights)
    finally:
        handle.remove()
    return acts[lm.layers - 1], kept[0]


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
    """ValueError if hooks are set on the model, or anything else changes what it computes: what is kept on disk is that of the
    model as it was loaded, and would not know of it."""
    device, changes = lm.device.type, []
    if torch.is_autocast_enabled(device):
        changes.append("runs under autocast")
    if lm.weights.training:
        changes.append("is in training mode")
    if sum(p._version for p in lm.weights.parameters()) != lm.version:
        changes.append("has had its weights edited")
    every = nn.modules.module
    if every._global_forward_hooks or every._global_forward_pre_hooks:
        changes.append("runs under global hooks")
    if changes:
        raise ValueError(
            f"{lm.identity} {changes[0]}: this result is kept on disk as that of the model as it was loaded"
        )
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
    if batch_size < 1 or not sequences or not all(s.ids for s in sequences):
        raise ValueError(
            f"{len(sequences)} sequences were given, {sum(not s.ids for s in sequences)} of them empty, to read {batch_size} at a "
            "time: one or more of each is wanted, none empty"
        )
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i].ids) if by_length else 0)
    for start in tqdm(range(0, len(order), batch_size), desc="read", leave=False):
        chosen = order[start : start + batch_size]
        batch = tokens.pad([sequences[i] for i in chosen], lm.pad_id, side="right")
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

    entry = store.cached("activations", key, compute, __name__)
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
    out = torch.empty(len(sequences), sets, len(layers), lm.d_model, dtype=torch.float32)
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
