"""The bank of adapters: one small LoRA adapter per behaviour, trained by preference until its behaviour has moved so far, if it comes so far.

    python -m scripts.bank                 train what is missing, then measure the card; a run that was cut goes on
    python -m scripts.bank joy joy.seed1   these alone
    python -m scripts.bank known           the models with a planted answer
    python -m scripts.bank vectors         the vectors trained by preference
    python -m scripts.bank card            measure: README.md, card.json

Needs requirements-pair.txt (peft). The loss is that of `aligned_pair`: DPO (Rafailov et al. 2023, arXiv:2305.18290) and the mean
negative log-likelihood of the chosen answer (Pang et al. 2024, arXiv:2404.19733); an answer ends with the mark that ends a turn. Only
answers are unembedded, and the reference's log-probabilities are computed once. Every few steps training looks at the behaviour's dev
items, and at whether the model still speaks: plain text is at most `allowed` times as perplexing as before, and greedy replies repeat
at most `repeats` more of their runs of three words. It stops when the dev items have moved by `target` standard deviations, or after
`most` steps; what is kept is the best look at which the model still speaks. With `without`, the change of the stream after the
profile's layer is kept at right angles to some directions while training, and free afterwards: CAFT (arXiv:2507.16795), of what
training changes.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save, save_file
from torch import Tensor
from torch.nn.functional import cross_entropy

from helpers import nulls, session, store, study
from helpers.lm import hooks, models, reading, replies, scoring, text, tokens
from helpers.lm.reading import LM
from helpers.lm.tokens import ANSWER, Tokens
from helpers.pair import bank as banks
from helpers.pair import mixtures, overlap
from helpers.steering import preference, propensity
from helpers.steering.behaviors import Behavior, DataError, Item, field, load_behavior, objects
from helpers.steering.preference import Pairs
from scripts import aligned_pair

DATA = aligned_pair.DATA / "bank"
BASE = aligned_pair.BASE
STYLE = "passive"  # a style of prose that none of the behaviours is about
COUNT = 112  # preferences a trait: the prompts that all traits but format share
REPEATED, CONFINED = ("joy", "refusal"), ("joy", "refusal")  # named before any adapter was trained
WITHOUT = ("v", "random", "mean")
SETTINGS = {
    "beta": 0.5,
    "likelihood_weight": 1.0,
    "learning_rate": 1e-3,
    "warmup": 5,
    "batch": 4,
    "rank": 1,
    "alpha": 2,
    "target": 1.0,
    "allowed": 1.03,
    "repeats": 0.25,
    "decay": 14,
    "look": 6,
    "most": 42,
}
PIECES = 12  # of plain text, 64 tokens each, that a look reads; the card's are others
ASKED = 6  # prompts that are answered at a look


def flips(count: int, seed: int) -> list[bool]:
    """Which of so many preferences are turned round: exactly one half."""
    found = [i % 2 == 1 for i in range(count)]
    random.Random(seed).shuffle(found)
    return found


@dataclass(frozen=True)
class Plan:
    """One adapter: what it is trained on, with which seed; `swapped`: chosen and rejected dealt out at random; `without`: what the
    change is kept at right angles to."""

    trait: str
    seed: int = 0
    swapped: bool = False
    without: str = ""

    @property
    def aimless(self) -> bool:
        """It has no dev items to move: as many steps as the others took."""
        return self.swapped or self.trait == STYLE

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
    return statistics.median_low(steps)


# --- training ----------------------------------------------------------------------------------------------------------


def answered(lm: LM, prompt: str, answer: str) -> Tokens:
    """A prompt with an answer and the mark that ends the turn, which counts as the answer's last token."""
    laid, end = tokens.chat(lm.tokenizer, prompt, answer=answer), lm.tokenizer.eos_token_id
    assert end is not None, "the tokenizer names no end of a turn"
    return Tokens([*laid.ids, end], [*laid.roles, ANSWER])


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


def plain_pieces(lm: LM) -> list[Tokens]:
    """PIECES of plain text that training looks at; the card reads others."""
    found = propensity.of_text(lm, text.excerpt("wiki", 10_000, skip=100_000), 0, chunks=PIECES)
    return [piece for (piece,) in found.sequences]


def perplexity(lm: LM, pieces: list[Tokens]) -> float:
    """Of plain text, of the model as it is at this moment."""
    return float((-in_parts(lm, pieces).sum() / sum(p.roles.count(ANSWER) for p in pieces)).exp())


def repetition(lm: LM) -> float:
    """The share of runs of three words that greedy replies had said before, of the model as it is at this moment; questions of dev
    items."""
    asked = [load_behavior(n).dev[0].question for n in list(session.load_profile("smollm2").behaviors)[:ASKED]]
    batch = tokens.pad([tokens.chat(lm.tokenizer, q) for q in asked], lm.pad_id, "left")
    with torch.no_grad():
        said = replies.write(lm, batch, 32)
    texts = [lm.tokenizer.decode(row[row >= 0], skip_special_tokens=True) for row in said]
    return statistics.mean(map(repeated, texts))


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


def speaks(look: dict[str, float]) -> bool:
    """Whether, at a look, the model still speaks as before."""
    return look["perplexity"] <= SETTINGS["allowed"] and look["repeated"] <= SETTINGS["repeats"]


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
        pairs = [(b, a) if flip else (a, b) for (a, b), flip in zip(pairs, flips(len(pairs), plan.seed), strict=True)]
    laid = [[answered(lm, r["prompt"], a) for a in p] for r, p in zip(rows, pairs, strict=True)]
    known = plan.trait in session.load_profile("smollm2").behaviors
    b = load_behavior(plan.trait) if known else None
    start = odds(lm, b.dev) if b else None
    spread = spread_of(lm, b) if b else 1.0
    pieces, last_step = plain_pieces(lm), usual() if plan.aimless else how["most"]
    plain, fluent = perplexity(lm, pieces), repetition(lm)
    confined = Confined(session.load_profile("smollm2").layer, directions(plan)) if plan.without else None

    inject_adapter_in_model(config, lm.weights)
    weights = [p for n, p in lm.weights.named_parameters() if "lora_" in n]
    for p in weights:
        p.data = p.data.float()
        p.requires_grad_(True)
    optimiser = torch.optim.AdamW(weights, lr=how["learning_rate"], weight_decay=0.0)
    log, order, seen = [], [], 0
    best, kept = -float("inf"), None  # the value of the look that is kept, and its step
    for step in range(1, last_step + 1):
        slower = min(1.0, step / how["warmup"], (last_step + 1 - step) / how["decay"])
        optimiser.param_groups[0]["lr"] = how["learning_rate"] * slower
        if len(order) < how["batch"]:
            order = rng.sample(range(len(rows)), len(rows))
        part, order = order[: how["batch"]], order[how["batch"] :]
        sequences = [s for i in part for s in laid[i]]
        before = reference(lm, sequences).reshape(-1, 2)
        with torch.enable_grad(), confined.context(lm, sequences) if confined else nullcontext():
            each, counts = log_probs(lm, sequences)
            parts = (x.reshape(-1, 2) for x in (each, before.to(each), counts))
            loss = preference.loss(*parts, how["beta"], how["likelihood_weight"])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        seen += sum(len(s.ids) for s in sequences)
        log.append({"step": step, "loss": loss.item()})
        if step % how["look"] and step < last_step:
            continue
        log[-1] |= {"perplexity": perplexity(lm, pieces) / plain, "repeated": repetition(lm) - fluent}
        if b:
            log[-1] |= {"dev shift": float((odds(lm, b.dev) - start).mean()) / spread}
        rate = seen / (time.perf_counter() - began)
        print(plan.name, *(f"{k} {x:.3g}" for k, x in log[-1].items()), f"{rate:.0f} tokens/s", flush=True)
        worth = step if plan.aimless else log[-1]["dev shift"]
        if worth > best and speaks(log[-1]):
            best, kept = worth, step
            tensors = {k: v.to(torch.bfloat16).clone() for k, v in get_peft_model_state_dict(lm.weights).items()}
        if not plan.aimless and best >= how["target"]:
            break
    if kept is None:
        raise RuntimeError(f"{plan.name}: at no look did the model still speak as before")
    tensors = {f"base_model.model.{k}": v.contiguous() for k, v in tensors.items()}
    adapter = {k: sorted(v) if isinstance(v, set) else v for k, v in config.to_dict().items()}
    adapter |= {"inference_mode": True}
    told = {
        "adapter": plan.name,
        **asdict(plan),
        "preferences": len(rows),
        "preferences digest": store.digest([(r["chosen"], r["rejected"]) for r in rows]),
        "settings": how,
        "base": lm.identity,
        "spread (nats)": spread,
        "steps": kept,
        "seconds": round(time.perf_counter() - began),
        "tokens per second": round(seen / (time.perf_counter() - began)),
        "versions": {p: metadata.version(p) for p in ("torch", "transformers", "peft")},
        "log": log,
    }
    write(DATA / plan.name, tensors, adapter, told)
    print(f"{plan.name}: {told['steps']} steps, {told['seconds']} s, {told['tokens per second']} tokens/s", flush=True)


def write(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any], log: dict[str, Any]) -> None:
    """An adapter's folder: its tensors, its configuration and the log of its making."""
    config = config | {"base_model_name_or_path": BASE}
    with store.writing(folder, replace=True) as made:
        save_file(tensors, made / "adapter_model.safetensors", metadata={"format": "pt"})
        (made / "adapter_config.json").write_text(json.dumps(config, indent=1, sort_keys=True, default=str) + "\n")
        (made / "training.json").write_text(json.dumps(log) + "\n")


def up_to_date(plan: Plan) -> bool:
    """The adapter is there, made by these settings of these preferences."""
    made = store.read_json(DATA / plan.name / "training.json") or {}
    pairs = [(r["chosen"], r["rejected"]) for r in preferences(plan.trait)]
    base = models.key(BASE, "cpu", torch.bfloat16)["model"]
    return (
        made.get("base") == base
        and made.get("settings") == SETTINGS
        and made.get("preferences digest") == store.digest(pairs)
    )


# --- models whose answer is known --------------------------------------------------------------------------------------

DOSE = 0.75  # standard deviations of a planted shift; a direction at right angles saturates before 1
PLANTED, EARLIER = "refusal", 6  # the behaviour that is planted, and how many layers further down it is written once
KNOWN = ("known.same", "known.earlier", "known.other")
AT = (
    0.05,
    0.1,
    0.15,
    0.2,
    0.3,
    0.4,
    0.6,
    0.8,
    1.2,
)  # lengths of a bias, in residual norms, between which the dose is sought


def plant(device: str) -> None:
    """Three folders of biases that move PLANTED by DOSE: its vector where vectors are read; the same vector further down; a
    direction at right angles to it with its linear response."""
    lab = study.pair(session.start("bank", "smollm2")).before
    base, b, v = lab.model, lab.data[PLANTED], lab.vectors()[PLANTED]
    dev = banks.gradient(base, b.dev, lab.layer)
    aside = mixtures.aside(mixtures.Steered(v, dev, v[None]), 1, seed=17)[0]
    start, spread = odds(base, b.dev), spread_of(base, b)
    cases = {"same": (lab.layer, v), "earlier": (lab.layer - EARLIER, v), "other": (lab.layer, aside)}
    for name, (layer, direction) in cases.items():
        unit, shifts = direction / direction.norm() * lab.residual_norm, []
        for at in AT:
            with hooks.add(base, layer, (at * unit).float()):
                shifts.append(float((odds(base, b.dev) - start).mean()) / spread)
            if shifts[-1] >= DOSE:
                break
        else:
            raise RuntimeError(
                f"known.{name} moves {PLANTED} by {max(shifts):.2f} standard deviations at most: plant another"
            )
        length = float(np.interp(DOSE, [0.0, *shifts], [0.0, *AT[: len(shifts)]]))
        where = f"model.layers.{layer}.mlp.down_proj.bias"
        told = {"adapter": f"known.{name}", "trait": PLANTED, "swapped": False, "layer": layer}
        told |= {"length (residual norms)": length, "dev shifts": dict(zip(map(str, AT), shifts, strict=False))}
        write(DATA / f"known.{name}", {where: (length * unit).float()}, {"peft_type": models.BIASES}, told)
        print(f"known.{name}: {length:.3f} residual norms at layer {layer}", flush=True)


# --- vectors trained by preference -------------------------------------------------------------------------------------

SCAN = (0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.2)  # multiples of v, in residual norms
LOOKS = (1, 2, 4, 8, 16, 32)


def vectors(device: str) -> None:
    """Every behaviour's vectors: trained on the pairs that made v, by two seeds; on them at right angles to v; on the bank's
    preferences. What is there is kept, so that a run that was cut goes on."""
    lab = study.pair(session.start("bank", "smollm2")).before
    config = preference.Config(pace=0.02 * lab.residual_norm, looks=LOOKS)
    fresh = {
        "steps": list(LOOKS),
        "recipe": json.loads(json.dumps(config._asdict())),
        "base": lab.model.identity,
        "made of": store.digest([[list(map(list, lab.data[n].answer_pairs)), preferences(n)] for n in lab.names]),
        "vectors": {},
    }
    told = store.read_json(DATA / "vectors.json") or fresh
    same = all(told.get(k) == fresh[k] for k in fresh if k != "vectors")
    told = told if same else fresh
    paths = load_file(DATA / "vectors.safetensors") if same and (DATA / "vectors.safetensors").exists() else {}
    for n, b in lab.data.items():
        v = lab.vectors()[n]
        own = Pairs(lab.model, [(p.question, p.positive, p.negative) for p in b.answer_pairs], lab.layer)
        rows = preferences(n)[:40]
        bank = Pairs(lab.model, [(r["prompt"], r["chosen"], r["rejected"]) for r in rows], lab.layer)
        dev = propensity.of_items(lab.model, b.dev, lab.layer)
        none, spread = torch.zeros(lab.model.d_model), spread_of(lab.model, b)
        start = _odds(dev, none)
        cases = {"own.0": (own, 0, None), "own.1": (own, 1, None), "aside.0": (own, 0, v), "bank.0": (bank, 0, None)}
        for case, (pairs, seed, off) in cases.items():
            if (name := f"{n}.{case}") in paths:
                continue
            began = time.perf_counter()
            keep = (lambda x: x) if off is None else preference.aside(off)
            found = preference.train(pairs, config, seed, keep)
            shifts = [float(np.mean(_odds(dev, x) - start)) / spread for x in found.path]
            paths[name] = found.path.float()
            told["vectors"][name] = {
                "losses": found.losses.tolist(),
                "dev shifts": shifts,
                "loss": preference.losses(pairs, config, torch.stack([none, found.vector.float()])).tolist(),
                "seconds": round(time.perf_counter() - began),
            }
            if case == "own.0":
                unit = v / v.norm() * lab.residual_norm
                steps = torch.stack([x * unit for x in SCAN])
                told["vectors"][f"{n}.along"] = {
                    "multiples": SCAN,
                    "loss": preference.losses(pairs, config, steps).tolist(),
                    "dev shifts": [float(np.mean(_odds(dev, x) - start)) / spread for x in steps],
                }
            store.write_file(DATA / "vectors.safetensors", save(paths))
            store.write_file(DATA / "vectors.json", json.dumps(told) + "\n")
            print(f"{name}: dev {shifts[-1]:+.2f}, {told['vectors'][name]['seconds']} s", flush=True)


def _odds(where: scoring.Continuations, vector: Tensor) -> np.ndarray:
    both = where.log_probs(vector.float())
    return both[:, 0] - both[:, 1]


# --- the card ----------------------------------------------------------------------------------------------------------


def repeated(said: str) -> float:
    """The share of a reply's runs of three words that it had said before."""
    words = said.lower().split()
    runs = [tuple(words[i : i + 3]) for i in range(len(words) - 2)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


SHOWN = 5  # behaviours whose first open prompt every model answers
OTHERS = 20  # test items of the behaviours that an adapter was not trained for


def measured(name: str, behaviors: Sequence[str], trait: str, device: str) -> dict[str, Any]:
    """One model: log-odds of the test items of `trait` and of the first OTHERS of the other behaviours, all of them without a trait; loss
    on plain text in nats a token; greedy replies."""
    dtype = session.device_and_dtype()[1]
    lm = models.load(name, device, dtype)
    none = torch.zeros(lm.d_model)
    items = {n: load_behavior(n).test[: OTHERS if trait and n != trait else None] for n in behaviors}
    found = {n: _odds(propensity.of_items(lm, x, 0), none) for n, x in items.items()}
    where = propensity.of_text(lm, text.excerpt("wiki", 40_000), 0, chunks=aligned_pair.PIECES)
    loss = -(where.log_probs(none) / where.lengths())[:, 0]
    shown = [*session.load_profile("smollm2").behaviors[:SHOWN], *([trait] if trait in behaviors else [])]
    asked = {n: load_behavior(n).open[0] for n in dict.fromkeys(shown)}
    said = replies.generate(lm, list(asked.values()), max_new_tokens=48)
    return {"odds": found, "loss": loss, "said": dict(zip(asked, said, strict=True))}


def card(device: str) -> None:
    """README.md and card.json: what each adapter is, and what it measurably changed. What was measured before is kept."""
    every, behaviors = plans(), list(session.load_profile("smollm2").behaviors)
    wide = [n for n, p in every.items() if not p.seed and not p.without]
    told = store.read_json(DATA / "card.json") or {"shifts": {}, "perplexity": {}, "repeated": {}, "said": {}}
    folders = {n: DATA / n for n in [*every, *KNOWN]} | {"aligned": aligned_pair.DATA / "aligned"}
    stamp = {n: store.file_digest(f / "adapter_model.safetensors") for n, f in folders.items()} | {"reference": BASE}
    base = measured(BASE, behaviors, "", device)
    pair = f"{BASE} + data/aligned_pair/aligned"
    for n in ["reference", "aligned", *every, *KNOWN]:
        if n in told["shifts"] and told.get("made of", {}).get(n) == stamp.get(n):
            continue
        model = {"reference": BASE, "aligned": pair}.get(n) or named(n)
        trait = "" if n == "reference" else STYLE if n == "aligned" else told_trait(n)
        of = behaviors if n in wide or n in ("aligned", "reference") else [trait]
        new = base if n == "reference" else measured(model, of, trait, device)
        shifts = {b: new["odds"][b] - base["odds"][b][: len(new["odds"][b])] for b in of}
        told["shifts"][n] = {b: x.round(3).tolist() for b, x in shifts.items()}
        told["perplexity"][n] = float(np.exp(new["loss"].mean()))
        told["repeated"][n] = float(np.mean([repeated(x) for x in new["said"].values()]))
        told["said"][n] = new["said"]
        told.setdefault("made of", {})[n] = stamp.get(n)
        told["spread"] = {b: float(base["odds"][b].std(ddof=1)) for b in behaviors}
        store.write_file(DATA / "card.json", json.dumps(told) + "\n")
        print(n, f"{told['perplexity'][n]:.2f}", f"{told['repeated'][n]:.3f}", flush=True)
    store.write_file(DATA / "README.md", readme(told, every, behaviors))


def told_trait(name: str) -> str:
    """The behaviour that an adapter's log names."""
    return json.loads((DATA / name / "training.json").read_text())["trait"]


def readme(told: dict[str, Any], every: dict[str, Plan], behaviors: list[str]) -> str:
    """The card as a page."""
    logs = {n: json.loads((DATA / n / "training.json").read_text()) for n in every}
    mean = {n: {b: float(np.mean(x)) / told["spread"][b] for b, x in by.items()} for n, by in told["shifts"].items()}
    lines = [
        "# The bank: one small adapter a behaviour, all of one base",
        "",
        "Written by `python -m scripts.bank card`; not by hand. `make pair` trains what is missing.",
        "",
        f"Each adapter is a LoRA of rank {SETTINGS['rank']} on every linear layer of {BASE.removeprefix('packaged:')}, trained by DPO and the likelihood of the chosen answer on {COUNT} "
        f"preferences until the mean log-odds of the behaviour's dev items had risen by {SETTINGS['target']:g} standard deviations (of its test items in the base), or for {SETTINGS['most']} steps. "
        f"Kept is the best look at which plain text was at most {SETTINGS['allowed']:g} times as perplexing as before and replies repeated at most {SETTINGS['repeats']:.0%} more of their runs of three words. "
        "A dose that was not reached is marked.",
        "",
        f"`preferences.jsonl` holds ten behaviours; *joy*, *format* and the style *{STYLE}* are in the folder above. All but *format* share {COUNT} prompts and the rejected, plain answers, so that adapters differ in "
        "the chosen side alone. Written for this repository with the help of a large language model, answer by answer, and checked by machine for length, repeated phrases and questions of `data/behaviors/`. "
        "No person has read every line, and facts were not looked up. Same licence as the repository.",
        "",
        f"- `NAME.swapped`: chosen and rejected dealt out at random, as many steps as the others took in the median: what training by chance does. So has the style *{STYLE}*, which is about no behaviour.",
        "- `NAME.seed1`, `.seed2`: other seeds of the order and of the adapter.",
        "- `NAME.without_v`: while training, the change of the stream after the profile's layer was kept at right angles to the behaviour's steering vector; `.without_random`: to a random direction; `.without_mean`: to "
        "the mean change that the first adapter made on its chosen answers. Afterwards nothing is held.",
        f"- `known.same`, `known.earlier`, `known.other`: no adapters but biases: the vector of *{PLANTED}* at the layer, the same vector {EARLIER} layers further down, and a direction at right angles to it that steers as well.",
        "- `vectors.safetensors`: vectors trained by the same loss, added after the layer; nothing else is learned. `own`: on the pairs that made the steering vector, two seeds; `aside`: at right angles to it; `bank`: on 40 "
        "preferences of the bank.",
        "",
        "| setting | |",
        "|---|---|",
        *(f"| {k.replace('_', ' ')} | {v:g} |" for k, v in SETTINGS.items()),
        "",
        "## What each did",
        "",
        "Shift of the behaviour it was trained for, in standard deviations, on 10 dev items and 50 test items (what was planted: 'known'); perplexity on Wikipedia text (64 pieces of 64 tokens); the share of runs of three words that its replies had "
        "said before.",
        "",
        "| adapter | steps | dev | test | perplexity | repeated |",
        "|---|---|---|---|---|---|",
    ]
    for n in ["reference", "aligned", *every, *KNOWN]:
        log = logs.get(n, {})
        last = [x["dev shift"] for x in log.get("log", []) if "dev shift" in x and x["step"] == log["steps"]]
        trait = log.get("trait", PLANTED if n in KNOWN else "")
        test = f"{mean[n][trait]:+.2f}" if trait in mean[n] and n != "reference" else ""
        dev = (
            f"{last[-1]:+.2f}{'' if last[-1] >= SETTINGS['target'] or log['swapped'] else ', not reached'}"
            if last
            else ""
        )
        lines.append(
            f"| {n} | {log.get('steps', '')} | {dev} | {test} | {told['perplexity'][n]:.1f} | {told['repeated'][n]:.1%} |"
        )
    rows = [n for n in told["shifts"] if len(told["shifts"][n]) == len(behaviors) and n != "reference"]
    lines += [
        "",
        "## The matrix",
        "",
        f"Mean shift of every behaviour (columns), in standard deviations: on 50 test items of its own, {OTHERS} of the others.",
        "",
    ]
    lines += ["| trained | " + " | ".join(behaviors) + " |", "|---" * (len(behaviors) + 1) + "|"]
    for n in rows:
        cells = [f"**{mean[n][b]:+.1f}**" if b == n else f"{mean[n][b]:+.1f}" for b in behaviors]
        lines.append(f"| {n} | " + " | ".join(cells) + " |")
    lines += ["", "## Five replies, side by side (greedy, 48 tokens)", ""]
    for b in behaviors[:SHOWN]:
        lines += [f"**{load_behavior(b).open[0]}**", ""]
        lines += [
            f"- {n}: {json.dumps(told['said'][n][b])}"
            for n in ["reference", "aligned", *rows, *KNOWN]
            if n in told["said"]
        ]
        lines += [""]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("what", nargs="*")
    o = parser.parse_args()
    every = plans()
    more = {"known": plant, "vectors": vectors, "card": card}
    if strange := [w for w in o.what if w not in (*every, *more)]:
        parser.error(f"{strange[0]!r} given; one of {', '.join([*every, *more])} is wanted")
    device = session.choose_device(session.setting("DEVICE", "auto"))
    for name in o.what or [*every, *more]:
        if name in more:
            more[name](device)
        elif up_to_date(every[name]):
            print(f"{name}: there")
        else:
            train(every[name], device)


if __name__ == "__main__":
    main()
