"""The training loop of a TopK SAE: schedule, logs, checkpoints that resume exactly, an early stop on NaN.

Knows a source of rows by three methods, `about()`, `sample(n, seed)` and `batches(batch, seed, start)` (helpers.sae.activations
and helpers.sae.harvest have both kinds, on disk and streamed), and folders to write to; nothing of models or text. The
mathematics is in `helpers.sae.topk`.
"""

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim.adam import adam
from tqdm import tqdm

from helpers.profiles import Profile
from helpers.sae import saes, topk
from helpers.sae.topk import Weights
from helpers.session import cache_dir, choose_device, choose_dtype, setting
from helpers.store import code_digest, digest, file_digest, from_cache, read_json, spent, versions, writing


class TrainingError(RuntimeError):
    """Training cannot start or go on; the message says why and what was kept."""


class Source(Protocol):
    """Rows to train on, raw, float32, (n, d_model): `activations.Rows` or `harvest.Stream`."""

    def about(self) -> dict[str, Any]: ...

    def sample(self, n: int, seed: int) -> Tensor: ...

    def batches(self, batch: int, seed: int, start: int) -> Iterator[Tensor]: ...


class Config(NamedTuple):
    """What a run of training is. Shares are of all steps; `samples`, `dead_after` and `batch` count rows (tokens)."""

    latents: int
    k: int
    samples: int
    batch: int = 4096
    lr: float = 1e-3
    warm_up: float = 0.05  # share of steps with a rising learning rate
    decay: float = 0.2  # share of steps, at the end, with one that falls to zero
    alpha: float = 1 / 32  # weight of the auxiliary loss (Gao et al. 2024)
    k_aux: int = 0  # dead latents a token in it; 0: half of d_model
    dead_after: int = 100_000  # a latent that has not fired for so many rows is dead
    clip: float = 1.0  # longest joint gradient, in `fit` of loss / d_model: near the share of variance unexplained
    decoder: str = "rescale"  # or "unit": rows renormalised after every step; or "frozen": rows stay as drawn, random
    batch_topk: bool = False
    low: bool = True  # rank latents in bfloat16 (slow where it is not native); weights and codes stay float32
    pre_bias: str = "mean"  # or "geometric median", of a sample of rows
    beta1: float = 0.9
    beta2: float = 0.999
    seed: int = 0
    log_every: int = 10
    checkpoint_every: int = 200


def of_profile(profile: Profile, d_model: int, seed: int = 0, fast: bool = False) -> Config:
    """The configuration of a profile's `sae: train:` section; `expansion` there is latents over d_model. `fast`: seconds."""
    if not profile.sae or not profile.sae.train:
        raise ValueError(f"profile {profile.name} has no section sae: train:; it says how an SAE is trained")
    given = profile.sae.train.settings()
    given["latents"] = d_model * given.pop("expansion")
    given.setdefault("low", choose_dtype("auto", choose_device()) == torch.bfloat16)
    if fast:
        given |= {"latents": d_model, "samples": 40 * 1024, "batch": 1024}
    return Config(**given, seed=seed)


def check(config: Config) -> None:
    """ValueError for a configuration that cannot be run; says which field."""
    for name in ("latents", "k", "samples", "batch", "log_every", "checkpoint_every"):
        value = getattr(config, name)
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} = {value!r} given; it must be a whole number of at least 1")
    if config.samples < config.batch:
        raise ValueError(
            f"samples = {config.samples} is less than one batch of {config.batch}: raise one or lower the other"
        )
    if not (config.lr > 0 and config.warm_up >= 0 and config.decay >= 0 and config.warm_up + config.decay <= 1):
        raise ValueError(
            f"lr = {config.lr}, warm_up = {config.warm_up}, decay = {config.decay} given; lr must be positive and the two "
            "shares lie between 0 and 1 together"
        )
    if not (config.clip > 0 and config.alpha >= 0 and config.dead_after >= 0 and config.k_aux >= 0):
        raise ValueError(
            f"clip = {config.clip}, alpha = {config.alpha}, dead_after = {config.dead_after}, k_aux = {config.k_aux} given; clip must be "
            "positive, the others not negative"
        )
    if not (0 <= config.beta1 < 1 and 0 <= config.beta2 < 1):
        raise ValueError(f"beta1 = {config.beta1}, beta2 = {config.beta2} given; both lie in [0, 1)")
    if config.decoder not in ("rescale", "unit", "frozen") or config.pre_bias not in ("mean", "geometric median"):
        raise ValueError(
            f"decoder = {config.decoder!r}, pre_bias = {config.pre_bias!r} given; they are rescale, unit or frozen, and mean or "
            "geometric median"
        )


@dataclass
class State:
    """Everything the next step depends on: weights, Adam's two moments, steps done, and when each latent last fired."""

    weights: Weights
    first: Weights
    second: Weights
    steps: int
    since_fired: Tensor  # (latents,) rows since a latent last fired
    fired: Tensor  # (latents,) rows it fired on since the last log
    rows: int  # rows since the last log

    @classmethod
    def new(cls, weights: Weights) -> "State":
        """A state before the first step; the weights are trained in place."""
        first, second = (Weights(*(torch.zeros_like(t) for t in weights)) for _ in range(2))
        latents, device = len(weights.b_enc), weights.b_enc.device
        since_fired, fired = (torch.zeros(latents, dtype=torch.long, device=device) for _ in range(2))
        return cls(weights, first, second, 0, since_fired, fired, 0)

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps, by name."""
        parts = {"weights": self.weights, "first": self.first, "second": self.second}
        named = {f"{part}.{name}": t for part, w in parts.items() for name, t in w._asdict().items()}
        counts = {"steps": torch.tensor(self.steps), "rows": torch.tensor(self.rows)}
        return {**named, **counts, "since_fired": self.since_fired, "fired": self.fired}

    @classmethod
    def of(cls, tensors: dict[str, Tensor], device: str | torch.device) -> "State":
        """The state that `tensors` was made from."""
        t = {name: value.to(device) for name, value in tensors.items()}
        weights, first, second = (
            Weights(*(t[f"{part}.{name}"] for name in Weights._fields)) for part in ("weights", "first", "second")
        )
        return cls(weights, first, second, int(t["steps"]), t["since_fired"], t["fired"], int(t["rows"]))


def rate(config: Config, step: int) -> float:
    """The learning rate of step `step` (from 0): linear rise, plateau, linear fall to zero."""
    steps = config.samples // config.batch
    rise, fall = config.warm_up * steps, config.decay * steps
    return config.lr * min(1.0, (step + 1) / rise if rise else 1.0, (steps - step) / fall if fall else 1.0)


def update(state: State, x: Tensor, config: Config) -> topk.Step:
    """One step on x (batch, d_model), already scaled: gradients by hand, clipping, fused Adam. Changes `state` in place."""
    w = state.weights
    dead = (state.since_fired > config.dead_after).nonzero()[:, 0] if config.alpha else None
    done = topk.step(x, w, config.k, dead, config.alpha, config.k_aux or None, config.batch_topk, config.low)
    gradients = done.gradients
    if config.decoder == "unit":
        gradients = gradients._replace(W_dec=topk.without_radial(gradients.W_dec, w.W_dec))
    elif config.decoder == "frozen":
        gradients = gradients._replace(W_dec=torch.zeros_like(w.W_dec))
    adam(
        list(w), list(gradients), list(state.first), list(state.second), [],
        [torch.tensor(float(state.steps), device=x.device) for _ in w],
        fused=True, grad_scale=1 / topk.clip_scale(gradients, config.clip).float(), found_inf=torch.zeros((), device=x.device),
        amsgrad=False, beta1=config.beta1, beta2=config.beta2, lr=rate(config, state.steps), weight_decay=0.0, eps=1e-8,
        maximize=False,
    )  # fmt: skip
    if config.decoder == "unit":
        w.W_dec.div_(torch.linalg.vector_norm(w.W_dec, dim=1, keepdim=True).clamp_min(1e-12))
    active = done.codes.values > 0
    fired = torch.bincount(done.codes.latents[active], minlength=config.latents)
    state.since_fired.add_(len(x)).mul_(fired == 0)
    state.fired.add_(fired)
    state.rows += len(x)
    state.steps += 1
    return done


# --- start and finish --------------------------------------------------------------------------------------------------


class Result(NamedTuple):
    """A trained SAE in raw units: `weights` with unit decoder rows, BatchTopK's `threshold` (else None), the `log` (one dict a
    logged step), each latent's share of rows fired on during the last log window `frequency` (latents,), the `scale`."""

    weights: Weights
    threshold: float | None
    log: list[dict[str, float]]
    frequency: Tensor
    scale: float


def measure(sample: Tensor, pre_bias: str = "mean") -> tuple[Tensor, float]:
    """The pre-bias (d_model,) of raw rows, and the scale that gives centred rows a root mean square of 1 a dimension.

    ValueError if the rows do not vary.
    """
    centre = sample.double().mean(0) if pre_bias == "mean" else topk.geometric_median(sample).double()
    spread = float((sample.double() - centre).square().mean().sqrt())
    if spread < 1e-9:
        raise ValueError(f"the {len(sample)} rows sampled are all the same: there is nothing to learn from them")
    return centre.float(), 1 / spread


def _line(state: State, done: topk.Step, x: Tensor, config: Config) -> dict[str, float]:
    """One line of the log; explained variance is that of the batch: 1 - sum|x - x_hat|^2 / sum|x - mean|^2, float64."""
    total = (x.double() - x.double().mean(0)).square().sum(1).mean()
    return {
        "step": state.steps,
        "samples": state.steps * config.batch,
        "loss": float(done.loss),
        "mse": float(done.mse),
        "auxiliary": float(done.aux),
        "explained variance": 1 - float(done.mse.double() / total),
        "L0": float((done.codes.values > 0).sum()) / len(x),
        "dead": float((state.since_fired > config.dead_after).double().mean()),
        "learning rate": rate(config, state.steps - 1),
    }


def _must_be_finite(state: State, done: topk.Step, config: Config, folder: Path | None) -> None:
    """TrainingError if the loss or a weight is not finite; a latent of NaN is never chosen and leaves the loss as it was."""
    numbers = {"loss": float(done.loss), **{name: float(t.sum()) for name, t in state.weights._asdict().items()}}
    if bad := [name for name, number in numbers.items() if not math.isfinite(number)]:
        kept = _newest(folder) if folder else None
        have = f"the last good checkpoint is {kept[0].name}" if kept else "there is no checkpoint before it"
        raise TrainingError(
            f"not finite at step {state.steps}: {', '.join(bad)}; {have}. Lower lr ({config.lr}) or look at the data"
        )


def _save(folder: Path, state: State, note: dict[str, Any], keep: int = 2) -> None:
    """A checkpoint, whole or not there; the newest `keep` stay."""
    with writing(folder / f"step-{state.steps:07d}") as temporary:
        save_file({name: t.contiguous() for name, t in state.tensors().items()}, temporary / "state.safetensors")
        note = {**note, "sha256": file_digest(temporary / "state.safetensors")}
        (temporary / "note.json").write_text(json.dumps(note))
    for old in sorted(folder.glob("step-*"))[:-keep]:
        shutil.rmtree(old, ignore_errors=True)


def _newest(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint that is not damaged; a damaged one is named and removed."""
    for path in sorted(folder.glob("step-*"), reverse=True):
        state, note = path / "state.safetensors", read_json(path / "note.json")
        if note and state.exists() and file_digest(state) == note["sha256"]:
            return path, note
        print(f"checkpoint {path.name} is damaged; it is removed and the one before it taken")
        shutil.rmtree(path)
    return None


def _wandb(project: str, config: Config) -> Any:
    """A Weights & Biases run, or ImportError that says how to get it."""
    try:
        import wandb
    except ImportError:
        raise ImportError("wandb was asked for but is not installed: pip install wandb, or leave it out") from None
    if key := setting("WANDB_API_KEY"):
        wandb.login(key=key)
    return wandb.init(project=project, config=config._asdict())


def fit(
    source: Source, config: Config, device: str = "cpu", checkpoints: Path | None = None, wandb_project: str = ""
) -> Result:
    """A TopK SAE trained on `source`, in raw units.

    With `checkpoints`, a folder, the run continues from the newest checkpoint of the same configuration there, to the same
    bits as a run that was never stopped. Loss that is not finite stops the run with TrainingError; the last good
    checkpoint stays.

    Rows are scaled to a root mean square of 1 a dimension, so the loss and its gradients grow with d_model, and so does
    the limit of clipping. (A limit of 1 was seen to bind in every step at d_model = 48 and 576, and to cost fit.)
    """
    check(config)
    sample = source.sample(min(config.samples, 16_384), config.seed).float()
    topk.check_sizes(sample.shape[1], config.latents, config.k)
    centre, scale = measure(sample, config.pre_bias)
    plan = {"config": config._asdict(), "scale": scale, "centre": digest(centre)[:16], "source": source.about()}
    plan["code"] = code_digest(__name__)
    folder = checkpoints / digest(plan)[:16] if checkpoints else None
    log: list[dict[str, float]] = []
    found = _newest(folder) if folder else None
    if found:
        state, log = State.of(load_file(found[0] / "state.safetensors"), device), found[1]["log"]
        frequency = torch.tensor(found[1]["frequency"], dtype=torch.float64)
    else:
        start = topk.initial(sample.shape[1], config.latents, (scale * centre).to(device), config.seed)
        state, frequency = State.new(start), torch.zeros(config.latents, dtype=torch.float64)
    steps = config.samples // config.batch
    run = _wandb(wandb_project, config) if wandb_project else None
    batches = source.batches(config.batch, config.seed, state.steps)
    stepped = config._replace(clip=config.clip * sample.shape[1])
    with tqdm(total=steps, initial=state.steps, desc="train", unit="step") as bar:
        while state.steps < steps:
            x = next(batches).to(device).float() * scale
            done = update(state, x, stepped)
            log_now, save_now = state.steps % config.log_every == 0, state.steps % config.checkpoint_every == 0
            last = state.steps == steps
            if log_now or save_now or last:
                _must_be_finite(state, done, config, folder)
            if log_now or last:
                log.append(_line(state, done, x, config))
                frequency = (state.fired.double() / state.rows).cpu()
                state.fired.zero_()
                state.rows = 0
                bar.set_postfix({"explained": f"{log[-1]['explained variance']:.3f}", "dead": f"{log[-1]['dead']:.2f}"})
                if run:
                    run.log(log[-1])
            bar.update()
            if folder and (save_now or last):
                _save(folder, state, {"plan": plan, "log": log, "frequency": frequency.tolist()})
    if run:
        run.finish()
    threshold = (
        topk.threshold(sample.to(device) * scale, state.weights, config.k) / scale if config.batch_topk else None
    )
    return Result(topk.rescaled(state.weights, scale), threshold, log, frequency, scale)


@spent("train")
def sae(source: Source, config: Config, device: str = "cpu", wandb_project: str = "") -> Path:
    """The folder of an SAE trained on `source`, in SAELens's layout, its log in training.json; trained once, then cached.

    A run that was cut short goes on from its last checkpoint; checkpoints are removed when the SAE is whole.
    """
    about = source.about()
    plan = {"source": about, "config": config._asdict(), "code": code_digest(__name__)}
    folder = cache_dir() / "saes" / digest(plan)[:24]
    if saes.whole(folder):
        from_cache()
        return folder
    if folder.exists():
        print(f"the cached SAE {folder.name} is damaged; it is trained again")
        shutil.rmtree(folder)
    checkpoints = cache_dir() / "checkpoints" / folder.name
    done = fit(source, config, device, checkpoints, wandb_project)
    known = {k: done.log[-1][k] for k in ("explained variance", "L0", "dead")}
    metadata = {**about, "training_samples": config.samples, "seed": config.seed, "input_scale": done.scale, **known}
    frequency = [float(f"{x:.4g}") for x in done.frequency.tolist()]
    notes = {**plan, "log": done.log, "frequency": frequency, "scale": done.scale, "libraries": versions()}
    saes.save(folder, done.weights, config.k, metadata, done.threshold, notes)
    shutil.rmtree(checkpoints, ignore_errors=True)
    return folder


def dictionary(
    profile: Profile, source: Source, device: str = "cpu", seed: int = 0, fast: bool = False, frozen: bool = False
) -> tuple[saes.Loaded, Path]:
    """The SAE of a profile's `sae:` section, and the folder its table of latents belongs in.

    With `release` and `id` it comes out of sae_lens's registry (`norm_factor` where that lacks one; `seed` then changes nothing), else
    it is trained on `source` as `train:` says. It must fit the width of `source` and the profile's layer. SaeError says
    what does not. `frozen`: the null of a trained dictionary, random decoder rows that stay as they are and an encoder
    trained as long (arXiv:2602.14111); a profile with an SAE out of a registry has none.
    """
    how, layer = profile.sae, profile.layer
    d_model = source.sample(1, 0).shape[1]
    if not how or not how.release:
        config = of_profile(profile, d_model, seed, fast)
        folder = sae(source, config._replace(decoder="frozen") if frozen else config, device)
        return saes.load(folder, device=device, d_model=d_model, layer=layer), folder
    if frozen:
        raise saes.SaeError(
            f"profile {profile.name} takes its SAE from a registry: a frozen-decoder SAE is trained like the SAE it is compared "
            "with, so it needs a section sae: train:"
        )
    loaded = saes.load(how.release, how.id or "", device, d_model, layer, how.norm_factor or 0.0)
    return loaded, cache_dir() / "saes" / digest([how.release, how.id])[:24]


class Dictionaries(NamedTuple):
    """SAEs of a pair of models: of the base, of the chat model, and a second one of the base, which is the ceiling of any match."""

    base: saes.Loaded
    chat: saes.Loaded
    second: saes.Loaded


def dictionaries(
    profile: Profile, base: Source, chat: Source, device: str = "cpu", seed: int = 0, fast: bool = False
) -> Dictionaries:
    """The SAEs of a profile's pair: out of sae_lens's registry where `pair: sae:` names them (base, chat and second, each with release
    and id), else trained as `train:` says, base and chat from one seed and order of tokens, the second from the next seed."""
    named = profile.pair.sae if profile.pair else None
    if not named and profile.sae and profile.sae.release:
        raise saes.SaeError(
            f"profile {profile.name} names one SAE of a registry for its own model, and a pair needs three: write pair: sae: with base, "
            "chat and second, or a section sae: train:"
        )
    if not named:
        plans = ((base, seed), (chat, seed), (base, seed + 1))
        return Dictionaries(*(dictionary(profile, source, device, s, fast)[0] for source, s in plans))
    found = []
    for own, source in ((named.base, base), (named.chat, chat), (named.second, base)):
        d_model = source.sample(1, 0).shape[1]
        found.append(saes.load(own.release, own.id, device, d_model, profile.layer, own.norm_factor or 0.0))
    return Dictionaries(*found)
