"""The diff-SAE: a TopK SAE of chat - base residuals, token by token, at one layer; its rows from disk, or streamed.

Where no disk holds the rows (two models of 2 billion parameters, 10^8 tokens) `harvest.Stream` makes them as training goes. What
such a run takes is said before it starts (`helpers.pair.budget`). Knows profiles, models and how an SAE is trained, not what it is asked
afterwards.
"""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from helpers import session, store
from helpers.lm import models
from helpers.lm.reading import LM
from helpers.pair import budget
from helpers.pair.budget import Budget, Sizes
from helpers.profiles import Diff, Harvest, Profile, ProfileError, Sae
from helpers.sae import decompose, harvest, saes, train
from helpers.sae.activations import Rows
from helpers.sae.topk import Dictionary
from helpers.steering import directions
from helpers.steering.caa import Halves

POOL_TOKENS = 131_072  # tokens harvested, then trained on, in turn


class DiffError(RuntimeError):
    """A diff-SAE cannot be trained as asked; the message says why and what to do."""


def section(profile: Profile) -> Diff:
    """A profile's section `pair: diff:`, empty where there is none."""
    return profile.pair and profile.pair.diff or Diff()


def settled(profile: Profile) -> Profile:
    """The profile as a diff-SAE uses it: `chat` is the pair's chat model, and where there is a section `pair: diff:`
    `layer` is its layer, and `sae` has its `harvest` and `train`, or the profile's own where it has none.

    An SAE of a registry that `sae:` names is dropped: it belongs to another model or layer. LAYER in .env stays.
    ModelError where the profile names no pair, ProfileError where neither section says how to harvest or train.
    """
    how, own, chat = section(profile), profile.sae, models.pair_names(profile)[1]
    if how == Diff():
        return profile.model_copy(update={"chat": chat})
    harvest, train = how.harvest or (own and own.harvest), how.train or (own and own.train)
    if not harvest or not train:
        lacks = "train" if harvest else "harvest"
        raise ProfileError(
            f"profile {profile.name}: neither sae: {lacks}: nor pair: diff: {lacks}: is there; one is wanted"
        )
    layer = profile.layer if session.setting("LAYER") or how.layer is None else how.layer
    return profile.model_copy(update={"chat": chat, "layer": layer, "sae": Sae(harvest=harvest, train=train)})


def check(profile: Profile, dtype: torch.dtype, device: str, fast: bool = False) -> bool:
    """Whether a settled profile's diff-SAE is trained on a stream; BudgetError, before anything is loaded, if that does not fit."""
    streaming = bool(section(profile).stream)
    if streaming:
        budget.check(planned(profile, dtype, fast), device)
    return streaming


# --- the dictionary ----------------------------------------------------------------------------------------------------


class Logged(NamedTuple):
    """The last line of an SAE's training log: explained variance of the last batch, its mean L0, the share of latents dead, which is
    those that had not fired for `dead_after` tokens."""

    explained_variance: float
    l0: float
    dead: float
    dead_after: int

    def __str__(self) -> str:
        return (
            f"at the end of training: explained variance {self.explained_variance:.3f}, L0 {self.l0:.1f}, {self.dead:.1%} of the latents "
            f"dead (not fired for {self.dead_after:,} tokens)"
        )


def logged(folder: Path) -> Logged:
    """What training logged last of the SAE in `folder`; DiffError if it was not trained here."""
    note = store.read_json(folder / "training.json")
    if not note:
        raise DiffError(f"{folder.name} holds no training.json: its SAE was not trained by helpers.sae.train")
    last = note["log"][-1]
    return Logged(last["explained variance"], last["L0"], last["dead"], note["config"]["dead_after"])


def configured(profile: Profile, d_model: int, seed: int = 0, fast: bool = False) -> train.Config:
    """The training of a settled profile's diff-SAE; a fast run on a stream is forty steps on few tokens."""
    config = train.of_profile(profile, d_model, seed, fast)
    if fast and section(profile).stream:
        config = config._replace(batch=128, samples=40 * 128, k=min(config.k, max(config.latents // 4, 1)))
    return config


def _harvest(profile: Profile) -> Harvest:
    if not profile.sae:
        raise DiffError(f"profile {profile.name} has no section sae: harvest: or pair: diff: harvest:; one is wanted")
    return profile.sae.harvest


def sizes(profile: Profile, fast: bool = False) -> Sizes:
    """How a settled profile's stream is cut."""
    context = _harvest(profile).context
    pool = 2048 if fast else POOL_TOKENS
    return Sizes(max(min(harvest.PASS_TOKENS, pool) // context, 1), context, pool)


def planned(profile: Profile, dtype: torch.dtype, fast: bool = False) -> Budget:
    """The budget of a profile's diff-SAE before either model is loaded; of one that is not streamed it says too much."""
    profile = settled(profile)
    base, chat = (budget.shape(name) for name in models.pair_names(profile))
    return budget.reckoned(base, chat, dtype, configured(profile, chat.d_model, 0, fast), sizes(profile, fast))


def streamed(profile: Profile, base: LM, chat: LM, fast: bool = False) -> harvest.Stream:
    """The stream of differences that a settled profile names.

    It reads `harvest: source` instead where none is named, and in a `fast` run, which needs no hub.
    """
    how, stream = sizes(profile, fast), section(profile).stream
    source = list(_harvest(profile).source) if fast or not stream else stream
    return harvest.Stream(
        base, source, profile.layer, chat, how.context, pool_tokens=how.pool_tokens, batch_rows=how.rows
    )


def _places(stream: harvest.Stream, config: train.Config) -> tuple[Path, Path]:
    """Where `train.sae` keeps the SAE of a stream, and its checkpoints until it is whole."""
    plan = {"source": stream.about(), "config": config._asdict(), "code": store.code_digest(train.__name__)}
    name = store.digest(plan)[:24]
    return session.cache_dir() / "saes" / name, session.cache_dir() / "checkpoints" / name


def dictionary(
    profile: Profile, pair_difference: Rows | None, base: LM, chat: LM, device: str = "cpu", seed: int = 0,
    fast: bool = False,
) -> tuple[saes.Loaded, Path]:  # fmt: skip
    """The diff-SAE of a profile, and the folder its table of latents belongs in; trained once, then cached.

    With `pair: diff: stream:` on a stream of that text through both models (part train): the budget and the probe's estimate
    are printed first, and a run that was cut short goes on from its last checkpoint, unprobed. Else on the rows of
    `pair_difference`, as `train:` says. Differences are far shorter than residuals; the scale that training wants is set by
    their own root mean square (`train.measure`), so none is chosen here. BudgetError if it does not fit, DiffError if the profile does not say what to train.
    """
    profile = settled(profile)
    if profile.sae and profile.sae.release:
        raise DiffError(
            f"profile {profile.name} names an SAE of a registry, which is of one model's residuals, not of differences: write "
            "pair: diff: with train: (see notebooks/profiles/gemma-2-2b.yaml)"
        )
    if section(profile).stream:
        loaded, folder = _of_stream(profile, base, chat, device, seed, fast)
    elif pair_difference is None:
        raise DiffError(
            f"profile {profile.name} names no text to stream (pair: diff: stream:), and no differences were given: give those of "
            "harvest.pair_of_profile"
        )
    else:
        loaded, folder = train.dictionary(profile, pair_difference, device, seed, fast)
    print(logged(folder))
    return loaded, folder


def _of_stream(profile: Profile, base: LM, chat: LM, device: str, seed: int, fast: bool) -> tuple[saes.Loaded, Path]:
    stream = streamed(profile, base, chat, fast)
    config = configured(profile, stream.d_model, seed, fast)
    folder, checkpoints = _places(stream, config)
    if not saes.whole(folder):
        begun = any(checkpoints.glob("*/step-*"))
        shapes = budget.shape(base), budget.shape(chat)
        need = budget.reckoned(*shapes, base.dtype, config, sizes(profile, fast))
        print(need.table())
        budget.check(need, device, (*budget.LOADED, "checkpoints") if begun else budget.LOADED)
        print(
            "goes on from its last checkpoint" if begun else budget.probe(stream, config, device, 1.0 if fast else 20.0)
        )
        if device.startswith("cuda"):
            torch.cuda.empty_cache()  # the probe's
    folder = train.sae(stream, config, device)
    return saes.load(folder, device=device, d_model=stream.d_model, layer=profile.layer), folder


# --- what it says of differences ---------------------------------------------------------------------------------------


class Written(NamedTuple):
    """Differences in a diff-SAE: `codes` (tokens, latents) on the latents that fire, the most used first, those latents' `rows`
    (latents, d_model), and the `bias` (d_model,), which is about the mean difference; float32 on the CPU."""

    codes: Tensor
    rows: Tensor
    bias: Tensor

    def read(self, n: int, deal: int | None = None) -> Tensor:
        """The differences (tokens, d_model) that the bias and the n most used latents make up. `deal`, a seed: the same codes
        on n latents drawn at random, which is what any n rows would do with them."""
        n = min(n, len(self.rows))
        chosen = torch.arange(n)
        if deal is not None:
            chosen = torch.randperm(len(self.rows), generator=torch.Generator().manual_seed(deal))[:n]
        return self.codes[:, :n] @ self.rows[chosen] + self.bias


def written(sae: Dictionary, order: Tensor, differences: Tensor) -> Written:
    """What a diff-SAE says of `differences` (tokens, d_model); `order`: its latents that fire, the most used first
    (`evaluation.Evaluation.order`)."""
    codes, rows = decompose.codes_of(sae, differences).cpu(), decompose.rows_of(sae).float().cpu()
    return Written(codes[:, order], rows[order], sae.b_dec.detach().float().cpu())


class Change(NamedTuple):
    """What training changed on contrast pairs, (d_model,) float64 each: the `mean` difference of the two models over both sides,
    which certainly is a part of it, and how it changed the `contrast` vector, in which what both sides share cancels."""

    mean: Tensor
    contrast: Tensor


def at_pairs(before: Halves, after: Halves, layer: int) -> Change:
    """The change from one model to another on the same contrast pairs, at their last position after `layer`."""
    sides = [
        directions.finite("residuals", a - b).mean(0) for a, b in zip(after.at(layer), before.at(layer), strict=True)
    ]
    return Change((sides[0] + sides[1]) / 2, sides[0] - sides[1])
