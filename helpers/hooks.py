"""Read and write the residual stream: context managers around `blocks.L.hook_resid_post`.

Knows about hook points and tensors, not about text, behaviours or files. A hook returns a new tensor (the model's own is
never edited in place) and is removed in `finally`, also after an exception. Ablation follows Arditi et al. 2024
(arXiv:2406.11717, eq. 4); addition follows Rimsky et al. 2023 (arXiv:2312.06681).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor


def resid_post(layer: int) -> str:
    """The name of the hook after block `layer` (transformers: `hidden_states[layer + 1]`, save the last, which is normed)."""
    return f"blocks.{layer}.hook_resid_post"


def hook_point(model: Any, layer: int) -> Any:
    """The hook point after block `layer` of a TransformerBridge; IndexError says which layers exist."""
    if not 0 <= layer < model.cfg.n_layers:
        raise IndexError(f"layer {layer} given, but the model has layers 0 to {model.cfg.n_layers - 1}")
    return model.hook_dict[resid_post(layer)]


class Positions(NamedTuple):
    """Where to read or write: `prompt` (batch, tokens) bool for the first pass, `later` for what generate() adds."""

    prompt: Tensor
    later: bool = False


class _Cursor:
    """Turns Positions into a mask for each forward pass of one sequence, also under generate() with its cache.

    With a cache every later pass has length one, so a mask built for the prompt would not fit: the cursor counts the
    tokens already seen. A pass longer than one token starts a new sequence.
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
def hooked(points: Sequence[Any], hook: Sequence[Any]) -> Iterator[None]:
    """Context: each of `points` (modules) runs its forward hook; all are removed at the end, also after an exception."""
    handles = []
    try:
        for point, fn in zip(points, hook, strict=True):
            handles.append(point.register_forward_hook(fn))
        yield
    finally:
        for handle in handles:
            handle.remove()


class Stop(Exception):
    """Raised after the last layer that is read, to save the rest of the forward pass."""


@contextmanager
def capture(
    model: Any, layers: Sequence[int], positions: Positions | None = None, stop: bool = False
) -> Iterator[dict]:
    """The residual stream after each of `layers`, filled in as the model runs inside the context.

    Yields a dict: layer -> (batch, tokens, d_model), passes of one generate() call joined along tokens; with `positions`
    layer -> (rows, d_model), the chosen rows in batch order. One sequence per context. With `stop` the forward pass ends
    after the deepest layer asked for (the model call then returns nothing: put it last in the `with`).
    """
    layers = list(layers)
    parts: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    acts: dict[int, Tensor] = {}
    cursors = {layer: _Cursor(positions) for layer in layers}

    def reader(layer: int) -> Any:
        def read(module: Any, args: Any, out: Tensor) -> None:
            kept = out.detach()
            parts[layer].append(kept[cursors[layer].mask(kept)] if positions is not None else kept.clone())
            joined = parts[layer]
            acts[layer] = joined[0] if len(joined) == 1 else torch.cat(joined, dim=0 if positions is not None else 1)
            if stop and layer == max(layers):
                raise Stop

        return read

    points, readers = [hook_point(model, layer) for layer in layers], [reader(layer) for layer in layers]
    with hooked(points, readers), suppress(Stop):
        yield acts


def ablated(acts: Tensor, direction: Tensor) -> Tensor:
    """x - (x . u) u with u = direction / |direction|, for acts (..., d_model); computed in float32."""
    unit = direction.float() / direction.float().norm()
    return (acts.float() - (acts.float() @ unit)[..., None] * unit).to(acts.dtype)


@contextmanager
def edit(model: Any, layer: int, change: Any, positions: Positions | None = None) -> Iterator[None]:
    """Context: change(x) in place of the residual stream x (batch, tokens, d_model) after block `layer`, at `positions`."""
    cursor = _Cursor(positions)

    def write(module: Any, args: Any, out: Tensor) -> Tensor:
        mask = cursor.mask(out)
        return torch.where(mask[..., None], change(out), out)

    with hooked([hook_point(model, layer)], [write]):
        yield


def _check(model: Any, vector: Tensor) -> Tensor:
    if vector.shape != (model.cfg.d_model,):
        raise ValueError(f"a vector of shape {tuple(vector.shape)} was given; the model wants ({model.cfg.d_model},)")
    if not torch.isfinite(vector).all():
        raise ValueError("the vector holds NaN or infinity; look at the differences it was made from")
    return vector.detach()


def add(model: Any, layer: int, vector: Tensor, multiplier: float = 1.0, positions: Positions | None = None) -> Any:
    """Context: x + multiplier * vector after block `layer`; multiplier in units of the vector as given (d_model,)."""
    v = multiplier * _check(model, vector)
    return edit(model, layer, lambda x: x + v.to(x.dtype).to(x.device), positions)


def ablate(model: Any, layer: int, direction: Tensor, positions: Positions | None = None) -> Any:
    """Context: remove the component along `direction` (d_model,) after block `layer`."""
    u = _check(model, direction)
    return edit(model, layer, lambda x: ablated(x, u.float().to(x.device)), positions)


def ablate_then_add(
    model: Any, layer: int, vector: Tensor, multiplier: float = 1.0, positions: Positions | None = None
) -> Any:
    """Context: set the component along `vector` to multiplier * |vector|, whatever it was before."""
    v = _check(model, vector)
    return edit(
        model,
        layer,
        lambda x: ablated(x, v.float().to(x.device)) + (multiplier * v).to(dtype=x.dtype).to(x.device),
        positions,
    )


@contextmanager
def resume_at(model: Any, layer: int, acts: Tensor) -> Iterator[None]:
    """Context: blocks 0..layer are skipped and `acts` (batch, tokens, d_model) stands for the output of block `layer`.

    What a steered run needs again and again: everything below the steered layer is the same for every vector. Key-value
    caches of the skipped blocks are not touched; hooks on skipped blocks fire on values that mean nothing.
    """
    hook_point(model, layer)
    blocks = [model.blocks[i].original_component for i in range(layer + 1)]

    def passed(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states

    try:
        for block in blocks[:-1]:
            block.forward = passed
        blocks[-1].forward = lambda *args, **kwargs: acts
        yield
    finally:
        for block in blocks:
            block.__dict__.pop("forward", None)
