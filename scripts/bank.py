"""The bank of adapters: one small LoRA adapter a behaviour, trained by preference until each has moved its behaviour as far.

    python -m scripts.bank                 train what is missing, then measure the card; a run that was cut goes on
    python -m scripts.bank joy joy.seed1   these alone
    python -m scripts.bank card            measure: README.md, card.json

Needs requirements-pair.txt (peft). The loss is that of `aligned_pair`: DPO (Rafailov et al. 2023, arXiv:2305.18290) and the mean
negative log-likelihood of the chosen answer (Pang et al. 2024, arXiv:2404.19733). Only answers are unembedded, the reference's
log-probabilities are computed once, and training stops at the first look at which the mean shift of the behaviour's dev items has
come to `target` standard deviations. With `without`, the change of the stream after the profile's layer is kept at right angles to
some directions while training, and free afterwards: CAFT (arXiv:2507.16795), of what training changes.
"""

import argparse
import functools
import json
import random
import statistics
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid

from helpers import nulls, session, store, study
from helpers.lm import hooks, models, reading, scoring, tokens
from helpers.lm.reading import LM
from helpers.lm.tokens import ANSWER, Tokens
from helpers.pair import overlap
from helpers.steering.behaviors import Behavior, DataError, Item, field, load_behavior, objects
from scripts import aligned_pair

DATA = aligned_pair.DATA / "bank"
BASE = aligned_pair.BASE
STYLE = "passive"  # a style of prose that none of the behaviours is about
COUNT = 112  # preferences a trait: the prompts that all traits but format share
REPEATED, CONFINED = ("joy", "refusal"), ("joy", "refusal")  # named before any adapter was trained
WITHOUT = ("v", "random", "mean")
SETTINGS = {
    "beta": 0.1,
    "likelihood_weight": 0.25,
    "learning_rate": 2e-3,
    "batch": 4,
    "rank": 1,
    "alpha": 2,
    "target": 1.5,
    "look": 3,
    "most": 84,
}


@dataclass(frozen=True)
class Plan:
    """One adapter: what it is trained on, with which seed; `swapped`: chosen and rejected dealt out at random; `without`: what the
    change is kept at right angles to."""

    trait: str
    seed: int = 0
    swapped: bool = False
    without: str = ""

    @property
    def name(self) -> str:
        return (
            self.trait
            + (f".seed{self.seed}" if self.seed else "")
            + (".swapped" if self.swapped else "")
            + (f".without_{self.without}" if self.without else "")
        )


def plans() -> dict[str, Plan]:
    """Every adapter of the bank, by name, in the order they are trained."""
    behaviors = session.load_profile("smollm2").behaviors
    every = [Plan(n) for n in behaviors] + [Plan(STYLE)]
    every += [Plan(n, swapped=True) for n in REPEATED]
    every += [Plan(n, seed) for n in REPEATED for seed in (1, 2)]
    every += [Plan(n, without=what) for n in CONFINED for what in WITHOUT]
    return {p.name: p for p in every}


def preferences(trait: str) -> list[dict[str, str]]:
    """The first COUNT prompts of a trait with the chosen and the rejected answer; DataError names file, line and field."""
    rows = []
    for file in (aligned_pair.DATA / "preferences.jsonl", DATA / "preferences.jsonl"):
        for place, row in objects(file):
            one = {name: field(place, row, name) for name in ("trait", "prompt", "chosen", "rejected")}
            rows += [one] if one["trait"] == trait else []
    shared = [r["prompt"] for r in aligned_pair.preferences(("joy",))[:COUNT]]
    found = [r for r in rows if trait == "format" or r["prompt"] in shared][:COUNT]
    if len(found) < COUNT:
        raise DataError(f"{trait}: {len(found)} preferences were found; {COUNT} are wanted")
    return found


def directions(plan: Plan) -> Tensor:
    """What a confined plan keeps out of the layer's change, (1, d_model): the reference's steering vector, a random direction with the
    stream's covariance, or the mean change that the same training made on its chosen answers when it was not confined."""
    lab = study.pair(session.start("bank", "smollm2", seed=plan.seed)).before
    v = lab.vectors()[plan.trait]
    if plan.without == "v":
        return v[None]
    if plan.without == "random":
        return nulls.like_rows(v, lab.residuals, 1, plan.seed)
    after = models.load(named(plan.trait), dtype=lab.model.dtype)
    laid = [tokens.chat(lab.model.tokenizer, r["prompt"], answer=r["chosen"]) for r in preferences(plan.trait)]
    said = torch.cat([torch.tensor(t.roles) == ANSWER for t in laid])
    change = [torch.cat(reading.residuals(m, laid, lab.layer))[said].double().mean(0) for m in (lab.model, after)]
    return (change[1] - change[0])[None]


def named(adapter: str) -> str:
    """What a profile calls the reference with one adapter of the bank."""
    return f"{BASE} + {(DATA / adapter).relative_to(session.ROOT)}"


def usual() -> int:
    """The median number of steps that the behaviours' first adapters took: as many do those that have nowhere to get to."""
    first = [p.name for p in plans().values() if p == Plan(p.trait) and p.trait != STYLE]
    steps = [made["steps"] for n in first if (made := store.read_json(DATA / n / "training.json"))]
    return int(statistics.median(steps))


# --- training ----------------------------------------------------------------------------------------------------------


def log_probs(lm: LM, sequences: list[Tokens]) -> tuple[Tensor, Tensor]:
    """log p of each sequence's answer and its number of tokens, (sequences,); to be differentiated where gradients are on."""
    batch = tokens.pad(sequences, lm.pad_id, side="right")
    answers = batch.roles == ANSWER
    with scoring.unembedding(lm, answers.roll(-1, 1).to(lm.device)):
        logits = reading.forward(lm, batch).logits[0]
    each = -cross_entropy(logits.float(), batch.ids[answers].to(lm.device), reduction="none")
    counts = answers.sum(1)
    return torch.stack([part.sum() for part in each.split(counts.tolist())]), counts.to(each.device)


def in_parts(lm: LM, sequences: list[Tokens], size: int = 16) -> Tensor:
    """`log_probs` of many sequences, like lengths together, without a gradient: (sequences,) float64."""
    order, out = (
        sorted(range(len(sequences)), key=lambda i: len(sequences[i].ids)),
        torch.zeros(len(sequences)).double(),
    )
    with torch.no_grad():
        for i in range(0, len(order), size):
            part = order[i : i + size]
            out[part] = log_probs(lm, [sequences[j] for j in part])[0].double().cpu()
    return out


def odds(lm: LM, items: list[Item]) -> Tensor:
    """Log-odds of the items' matching completions, in nats (items,) float64, of the model as it is at this moment."""
    laid = [tokens.chat(lm.tokenizer, i.question, answer=a) for i in items for a in (i.matching, i.non_matching)]
    both = in_parts(lm, laid)
    return both[0::2] - both[1::2]


def spread_of(lm: LM, b: Behavior) -> float:
    """The standard deviation of a behaviour's log-odds over its test items before training, in nats: the unit of a dose."""
    return float(odds(lm, b.test).std())


_REFERENCE: dict[tuple[int, ...], float] = {}


def reference(lm: LM, sequences: list[Tokens]) -> Tensor:
    """What the model without its adapter gives the answers, (sequences,): each computed when it is first asked for, once in a run."""
    missing = [s for s in sequences if tuple(s.ids) not in _REFERENCE]
    if missing:
        with adapters_off(lm), torch.no_grad():
            found = log_probs(lm, missing)[0].tolist()
        _REFERENCE.update(zip([tuple(s.ids) for s in missing], found, strict=True))
    return torch.tensor([_REFERENCE[tuple(s.ids)] for s in sequences])


class Confined(NamedTuple):
    """A layer after which the change of the stream is kept at right angles to `directions` (n, d_model)."""

    layer: int
    directions: Tensor

    def context(self, lm: LM, sequences: list[Tokens]):
        """Context: the stream h of these sequences becomes h - P (h - h of the reference)."""
        batch = tokens.pad(sequences, lm.pad_id, side="right")
        with adapters_off(lm), torch.no_grad():
            before = reading.packed(lm, batch.ids, [self.layer])[self.layer].float()
        q = overlap.basis(self.directions).float()
        return hooks.edit(lm, self.layer, lambda x: (x.float() - ((x.float() - before) @ q.T) @ q).to(x.dtype))


def adapters_off(lm: LM):
    """Context: the model as it was before the adapter was put in."""
    from peft.tuners.lora import LoraLayer

    class Off:
        def __enter__(self):
            for m in lm.weights.modules():
                if isinstance(m, LoraLayer):
                    m.enable_adapters(False)

        def __exit__(self, *error):
            for m in lm.weights.modules():
                if isinstance(m, LoraLayer):
                    m.enable_adapters(True)

    return Off()


def train(plan: Plan, device: str = "cpu") -> None:
    """One adapter, trained and saved in bfloat16 with its log. Seeded: one machine gives one adapter."""
    from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model

    how, began = SETTINGS, time.perf_counter()
    torch.manual_seed(plan.seed)
    lm = models.load(BASE, device, torch.bfloat16)
    lm.weights.set_attn_implementation("sdpa")
    config = LoraConfig(
        r=how["rank"], lora_alpha=how["alpha"], lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    rng = random.Random(plan.seed)
    rows = preferences(plan.trait)
    pairs = [(r["chosen"], r["rejected"]) for r in rows]
    if plan.swapped:
        flips = [i % 2 == 1 for i in range(len(pairs))]  # exactly half of them
        rng.shuffle(flips)
        pairs = [(b, a) if flip else (a, b) for (a, b), flip in zip(pairs, flips, strict=True)]
    laid = [[tokens.chat(lm.tokenizer, r["prompt"], answer=a) for a in p] for r, p in zip(rows, pairs, strict=True)]
    known = plan.trait in session.load_profile("smollm2").behaviors
    b = load_behavior(plan.trait) if known else None
    start = odds(lm, b.dev) if b else None
    spread = spread_of(lm, b) if b else 1.0
    confined = Confined(session.load_profile("smollm2").layer, directions(plan)) if plan.without else None

    inject_adapter_in_model(config, lm.weights)
    weights = [p for n, p in lm.weights.named_parameters() if "lora_" in n]
    for p in weights:
        p.data = p.data.float()
        p.requires_grad_(True)
    optimiser = torch.optim.AdamW(weights, lr=how["learning_rate"], weight_decay=0.0)
    log, order, seen = [], [], 0
    for step in range(1, how["most"] + 1):
        if len(order) < how["batch"]:
            order = rng.sample(range(len(rows)), len(rows))
        part, order = order[: how["batch"]], order[how["batch"] :]
        sequences = [s for i in part for s in laid[i]]
        with torch.enable_grad(), confined.context(lm, sequences) if confined else nullcontext():
            each, counts = log_probs(lm, sequences)
            gained = each.reshape(-1, 2) - reference(lm, sequences).reshape(-1, 2).to(each)
            preference = -logsigmoid(how["beta"] * (gained[:, 0] - gained[:, 1])).mean()
            likelihood = -(each / counts).reshape(-1, 2)[:, 0].mean()
            loss = preference + how["likelihood_weight"] * likelihood
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        seen += sum(len(s.ids) for s in sequences)
        log.append(
            {"step": step, "loss": float(loss), "preference": float(preference), "likelihood": float(likelihood)}
        )
        if b and step % how["look"] == 0:
            log[-1]["dev shift"] = float((odds(lm, b.dev) - start).mean()) / spread
            print(
                f"{plan.name} {step} {loss:.3f} {log[-1]['dev shift']:+.2f} {seen / (time.perf_counter() - began):.0f} tokens/s",
                flush=True,
            )
            if log[-1]["dev shift"] >= how["target"] and not plan.swapped:
                break
        if (not b or plan.swapped) and step == usual():
            break
    tensors = {
        f"base_model.model.{k}": v.to(torch.bfloat16).contiguous()
        for k, v in get_peft_model_state_dict(lm.weights).items()
    }
    adapter = {k: sorted(v) if isinstance(v, set) else v for k, v in config.to_dict().items()}
    adapter |= {"base_model_name_or_path": BASE, "inference_mode": True}
    told = {
        "adapter": plan.name,
        **asdict(plan),
        "preferences": len(rows),
        "preferences digest": store.digest([(r["chosen"], r["rejected"]) for r in rows]),
        "settings": how,
        "base": lm.identity,
        "spread (nats)": spread,
        "steps": log[-1]["step"],
        "seconds": round(time.perf_counter() - began),
        "tokens per second": round(seen / (time.perf_counter() - began)),
        "versions": {p: metadata.version(p) for p in ("torch", "transformers", "peft")},
        "log": log,
    }
    with store.writing(DATA / plan.name, replace=True) as folder:
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        (folder / "adapter_config.json").write_text(json.dumps(adapter, indent=1, sort_keys=True, default=str) + "\n")
        (folder / "training.json").write_text(json.dumps(told) + "\n")
    print(f"{plan.name}: {told['steps']} steps, {told['seconds']} s, {told['tokens per second']} tokens/s", flush=True)


def up_to_date(plan: Plan) -> bool:
    """The adapter is there, made by these settings of these preferences."""
    made = store.read_json(DATA / plan.name / "training.json") or {}
    pairs = [(r["chosen"], r["rejected"]) for r in preferences(plan.trait)]
    return made.get("settings") == SETTINGS and made.get("preferences digest") == store.digest(pairs)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("what", nargs="*")
    o = parser.parse_args()
    every = plans()
    if strange := [w for w in o.what if w not in every]:
        parser.error(f"{strange[0]!r} given; one of {', '.join(every)} is wanted")
    for name in o.what or every:
        if up_to_date(every[name]):
            print(f"{name}: there")
        else:
            train(every[name], session.choose_device(session.setting("DEVICE", "auto")))


if __name__ == "__main__":
    main()
