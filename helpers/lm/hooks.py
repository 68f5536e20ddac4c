"""Read and write the residual stream after a block: context managers that leave nothing behind.

Knows blocks and tensors, not text or files. A hook returns a new tensor (the model's own is never edited in place) and is
removed in `finally`, also after an exception. Blocks that return a tuple (GPT-J, BLOOM, ...) and blocks that return a tensor
are served alike. Addition follows Rimsky et al. 2023 (arXiv:2312.06681).
"""

import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

Output = Tensor | tuple[Tensor | None, ...]
Hook = Callable[..., Output | None]


class Blocks(Protocol):
    """What hooks need of a model: its blocks in order, of how many parts the tuple is that each returns (0: a tensor), the
    width of the residual stream, and whether blocks can be skipped."""

    @property
    def blocks(self) -> Sequence[nn.Module]: ...

    @property
    def tuples(self) -> Sequence[int]: ...

    @property
    def d_model(self) -> int: ...

    @property
    def skips(self) -> bool: ...


def resid_post(layer: int) -> str:
    """TransformerLens' name of the stream after block `layer` (transformers: `hidden_states[layer + 1]`, save the last, which is normed)."""
    return f"blocks.{layer}.hook_resid_post"


def block(model: Blocks, layer: int) -> nn.Module:
    """Block number `layer`, any integer type; IndexError says which layers exist."""
    layer = operator.index(layer)
    if not 0 <= layer < len(model.blocks):
        raise IndexError(f"layer {layer} given, but the model has layers 0 to {len(model.blocks) - 1}")
    return model.blocks[layer]


def stream(out: Output) -> Tensor:
    """The residual stream (batch, tokens, d_model) in what a block returned."""
    first = out[0] if isinstance(out, tuple) else out
    assert first is not None  # the stream is never left out
    return first


class Positions(NamedTuple):
    """Where to read or write: `prompt` (batch, tokens) bool for the first pass, `later` for what generation adds."""

    prompt: Tensor
    later: bool = False


class _Cursor:
    """Turns Positions into a mask for each forward pass of one sequence, also under generation with its cache.

    With a cache every later pass has length one, so a mask built for the prompt would not fit: the cursor counts the
    tokens already seen. A pass longer than one token starts a new sequence; after a prompt of one token a new context does.
    """

    def __init__(self, positions: Positions | None):
        self.positions, self.seen = positions, 0

    def mask(self, acts: Tensor) -> Tensor:
        """The (batch, tokens) bool mask of the rows of `acts` (batch, tokens, d_model) that are meant."""
        batch, n = acts.shape[:2]
        if self.positions is None:
            return torch.ones(batch, n, dtype=torch.bool, device=acts.device)
        want = self.positions.prompt
        if n > 1 or self.seen < want.shape[1]:
            self.seen = 0
        start, self.seen = self.seen, self.seen + n
        if start == 0:
            if (batch, n) != tuple(want.shape):
                raise ValueError(
                    f"positions were built for a prompt of (batch, tokens) = {tuple(want.shape)} but the model ran on "
                    f"{(batch, n)}: build them from the same batch, or pass None for every position"
                )
            return want.to(acts.device)
        return torch.full((batch, n), self.positions.later, dtype=torch.bool, device=acts.device)


@contextmanager
def hooked(modules: Sequence[nn.Module], hooks: Sequence[Hook]) -> Iterator[None]:
    """Context: each of `modules` runs its forward hook; all are removed at the end, also after an exception."""
    handles = []
    try:
        for module, hook in zip(modules, hooks, strict=True):
            handles.append(module.register_forward_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Stop(Exception):
    """Raised after the last layer that is read, to save the rest of the forward pass."""


@contextmanager
def capture(
    model: Blocks, layers: Sequence[int], positions: Positions | None = None, stop: bool = False
) -> Iterator[dict[int, Tensor]]:
    """The residual stream after each of `layers`, filled in as the model runs inside the context.

    Yields a dict: layer -> (batch, tokens, d_model), passes of one generation joined along tokens; with `positions`
    layer -> (rows, d_model), the chosen rows in batch order. Edits whose context was entered before are seen, later ones are
    not. One sequence per context. With `stop` the forward pass ends
    after the deepest layer asked for (the model call then returns nothing: put it last in the `with`).
    """
    layers = list(dict.fromkeys(operator.index(layer) for layer in layers))
    parts: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    acts: dict[int, Tensor] = {}
    cursors = {layer: _Cursor(positions) for layer in layers}

    def reader(layer: int) -> Hook:
        def read(module: nn.Module, args: tuple[object, ...], out: Output) -> None:
            kept = stream(out).detach()
            parts[layer].append(kept[cursors[layer].mask(kept)] if positions is not None else kept.clone())
            joined = parts[layer]
            acts[layer] = joined[0] if len(joined) == 1 else torch.cat(joined, dim=0 if positions is not None else 1)
            if stop and layer == max(layers):
                raise _Stop

        return read

    with hooked([block(model, layer) for layer in layers], [reader(layer) for layer in layers]), suppress(_Stop):
        yield acts


@contextmanager
def edit(
    model: Blocks, layer: int, change: Callable[[Tensor], Tensor], positions: Positions | None = None
) -> Iterator[None]:
    """Context: change(x) in place of the residual stream x (batch, tokens, d_model) after block `layer`, at `positions`."""
    cursor = _Cursor(positions)

    def write(module: nn.Module, args: tuple[object, ...], out: Output) -> Output:
        x = stream(out)
        new = torch.where(cursor.mask(x)[..., None], change(x), x)
        return (new, *out[1:]) if isinstance(out, tuple) else new

    with hooked([block(model, layer)], [write]):
        yield


def checked(vector: Tensor, d_model: int) -> Tensor:
    """`vector` (d_model,) without its gradient; ValueError for another shape, NaN or infinity: it would be broadcast, or spread."""
    if vector.shape != (d_model,):
        raise ValueError(f"a vector of shape {tuple(vector.shape)} was given; the model wants ({d_model},)")
    if not torch.isfinite(vector).all():
        raise ValueError(
            "the vector, with its multiplier, holds NaN or infinity; look at the differences it was made from"
        )
    return vector.detach()


def shifted(x: Tensor, v: Tensor) -> Tensor:
    """x + v, `v` (d_model,) or of each row (rows, 1, d_model), in the stream's dtype; ValueError where that overflows (float16)."""
    out = x + v.to(x.dtype).to(x.device)
    if x.dtype == torch.float16 and not torch.isfinite(out).all():
        raise ValueError("the steered stream overflows float16: use bfloat16 or float32, or a smaller multiplier")
    return out


def add(
    model: Blocks, layer: int, vector: Tensor, multiplier: float = 1.0, positions: Positions | None = None
) -> AbstractContextManager[None]:
    """Context: x + multiplier * vector after block `layer`; multiplier in units of the vector as given (d_model,)."""
    v = checked(multiplier * vector, model.d_model)
    return edit(model, layer, lambda x: shifted(x, v), positions)


@contextmanager
def resume_at(model: Blocks, layer: int, acts: Tensor) -> Iterator[None]:
    """Context: blocks 0..layer are skipped and `acts` (batch, tokens, d_model) stands for the output of block `layer`.

    What a steered run needs again and again: everything below the steered layer is the same for every vector. Key-value
    caches of the skipped blocks are not touched; hooks on skipped blocks fire on values that mean nothing. Where upper
    blocks take keys and values from lower ones (`skips` false; Gemma 4), these run, and what leaves block `layer` is
    exchanged.
    """
    block(model, layer)
    layer = operator.index(layer)
    if not model.skips:
        with edit(model, layer, lambda x: acts):
            yield
        return
    skipped = list(zip(model.blocks[: layer + 1], model.tuples, strict=False))

    def passing(parts: int, instead: Tensor | None = None) -> Callable[..., Output]:
        def forward(*args: Tensor, **kwargs: Tensor) -> Output:
            x = instead if instead is not None else args[0] if args else kwargs["hidden_states"]
            return (x, *[None] * (parts - 1)) if parts else x

        return forward

    before = [
        module.__dict__.get("forward") for module, _ in skipped
    ]  # set by somebody else, or by a context around this
    try:
        for at, (module, parts) in enumerate(skipped):
            module.__dict__["forward"] = passing(parts, acts if at == layer else None)
        yield
    finally:
        for (module, _), kept in zip(skipped, before, strict=True):
            module.__dict__.pop("forward")
            if kept is not None:
                module.__dict__["forward"] = kept
