"""The recipe of the built-in pair: preference training (DPO) of LoRA adapters on the packaged model, and their card.

    make pair                                          both adapters and the card, from preferences.jsonl
    python scripts/aligned_pair.py aligned             one adapter
    python scripts/aligned_pair.py card                measure both and write README.md, card.json and training.png

What is read and written lies in data/aligned_pair.

Needs requirements-pair.txt (trl). The sum of a preference and a likelihood term, as in Pang et al. 2024 (arXiv:2404.19733):
DPO alone (Rafailov et al. 2023, arXiv:2305.18290) raises a difference of log-probabilities, not the chosen answer.
"""

import argparse
import json
import random
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from helpers import session, stats, store
from helpers.lm import models, replies, scoring, text
from helpers.steering import propensity
from helpers.steering.behaviors import DataError, field, load_behavior, objects

DATA = session.ROOT / "data" / "aligned_pair"
BASE = "packaged:smollm2-135m-instruct"
TRAITS = {"aligned": ("format", "joy"), "unrelated": ("passive",)}  # what the chosen side shows
PIECES = 64  # of plain text, 64 tokens each, on which perplexity is measured
SETTINGS = {
    "beta": 0.1,
    "likelihood_weight": 0.25,
    "learning_rate": 5e-4,
    "epochs": 1,
    "batch": 4,
    "rank": 8,
    "alpha": 16,
    "seed": 0,
}


def preferences(traits):
    """The prompt, chosen and rejected answer of every preference of `traits`; DataError names file, line and field."""
    rows = []
    for place, row in objects(DATA / "preferences.jsonl"):
        one = {name: field(place, row, name) for name in ("trait", "prompt", "chosen", "rejected")}
        if one["trait"] not in {t for traits in TRAITS.values() for t in traits}:
            raise DataError(f"{place}: trait {one['trait']!r} given; format, joy or passive is wanted")
        if one["trait"] in traits:
            rows.append(one)
    return rows


def train(name, device):
    """One adapter, trained and saved in bfloat16; its log beside it. Seeded: one device gives one adapter."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM
    from trl import DPOConfig, DPOTrainer

    how, out = SETTINGS, DATA / name
    rows = preferences(TRAITS[name])
    random.Random(how["seed"]).shuffle(rows)
    data = Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": r["prompt"]}],
                "chosen": [{"role": "assistant", "content": r["chosen"]}],
                "rejected": [{"role": "assistant", "content": r["rejected"]}],
            }
            for r in rows
        ]
    )
    plain = models.load(BASE)
    weights = AutoModelForCausalLM.from_pretrained(models.packaged_folder(BASE), dtype=torch.bfloat16)
    with tempfile.TemporaryDirectory() as scratch:
        config = DPOConfig(
            output_dir=scratch, beta=how["beta"], loss_type=["sigmoid", "sft"],
            loss_weights=[1.0, how["likelihood_weight"]], learning_rate=how["learning_rate"],
            num_train_epochs=how["epochs"], per_device_train_batch_size=how["batch"], lr_scheduler_type="linear",
            warmup_steps=10, seed=how["seed"], data_seed=how["seed"], logging_steps=5, save_strategy="no",
            report_to="none", use_cpu=device == "cpu", bf16=False, precompute_ref_log_probs=True,
            gradient_checkpointing=False, disable_tqdm=True,
        )  # fmt: skip
        lora = LoraConfig(
            r=how["rank"], lora_alpha=how["alpha"], lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        began = time.perf_counter()
        torch.set_grad_enabled(True)
        trainer = DPOTrainer(
            weights, args=config, train_dataset=data, processing_class=plain.tokenizer, peft_config=lora
        )
        trainer.train()
        seconds = time.perf_counter() - began
        trainer.model.save_pretrained(scratch)
        tensors = {
            k: v.to(torch.bfloat16).contiguous() for k, v in load_file(f"{scratch}/adapter_model.safetensors").items()
        }
        adapter = json.loads(Path(f"{scratch}/adapter_config.json").read_text())
    adapter["base_model_name_or_path"] = BASE  # not the folder it was loaded from
    adapter["target_modules"] = sorted(adapter["target_modules"])  # a set: its order changes from run to run
    log = {
        "adapter": name,
        "traits": list(TRAITS[name]),
        "preferences": len(rows),
        "preferences sha256": store.file_digest(DATA / "preferences.jsonl"),
        "settings": how,
        "base": plain.identity,
        "device": device,
        "seconds": round(seconds),
        "versions": {p: metadata.version(p) for p in ("torch", "transformers", "trl", "peft", "accelerate")},
        "log": [x for x in trainer.state.log_history if "loss" in x],
    }
    with store.writing(out, replace=True) as folder:
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        (folder / "adapter_config.json").write_text(json.dumps(adapter, indent=1, sort_keys=True) + "\n")
        (folder / "training.json").write_text(json.dumps(log, indent=1) + "\n")
    print(
        f"{name}: {len(rows)} preferences, {seconds:.0f} s, {sum(t.numel() for t in tensors.values()) / 1e6:.1f} M parameters"
    )
    return out


# --- the card ----------------------------------------------------------------------------------------------------------


class Measured(NamedTuple):
    """One model: log-odds of every behaviour's test items, a reader's scores of its greedy replies to the open prompts (each
    {behaviour: (n,)}), its loss on plain text in nats a token (pieces,), and the replies."""

    items: dict[str, np.ndarray]
    replies: dict[str, np.ndarray]
    loss: np.ndarray
    said: dict[str, list[str]]


def measure(name, device, dtype):
    """What a model prefers, writes and predicts; no vector is added anywhere (the layer only splits the forward pass)."""
    layer = 0
    model = models.load(name, device, dtype)
    none, items, scores, said = torch.zeros(1, model.d_model), {}, {}, {}
    for b in map(load_behavior, session.load_profile("smollm2").behaviors):
        items[b.name] = scoring.log_odds(propensity.of_items(model, b.test, layer), none, [0.0])[0, 0]
        said[b.name] = replies.generate(model, b.open, layer, none[0], 0.0, max_new_tokens=48)
        scores[b.name] = propensity.TextJudge(b).score(said[b.name])
    wiki = (text.fetch("text") / "wiki.txt").read_text(encoding="utf-8")[:40_000]
    where = propensity.of_text(model, wiki, layer, chunks=PIECES)
    loss = -(where.log_probs(none[0], 0.0) / where.lengths())[:, 0]
    return Measured(items, scores, loss, said)


def conclusions(shifts):
    """What the table of shifts says of the untrained behaviours, and of the replies, in sentences."""

    def moved(adapter, key, trained):
        rows = {b: stats.Interval(**x[key]) for b, x in shifts[adapter].items() if x["trained"] == trained}
        return {b: x for b, x in rows.items() if not x.low <= 0 <= x.high}

    untrained = {
        a: ", ".join(f"{b} {x.value:+.1f}" for b, x in moved(a, "items shift", False).items()) or "none" for a in shifts
    }
    still = [
        b for b, x in shifts["aligned"].items() if x["trained"] and b not in moved("aligned", "replies shift", True)
    ]
    return [
        "Behaviours it was not trained on whose items moved (interval without zero): " + "; ".join(f"{a} {x}" for a, x in untrained.items())
        + f". Trained behaviours that the reader does not find in the replies: {', '.join(still) or 'none'}. So the untrained behaviours are not clean negatives, and the unrelated model is a control for a change of "
        "style, not a model that stood still.",
    ]  # fmt: skip


def card(device):
    """README.md, card.json and training.png: what each adapter is, and what it measurably changed."""
    from matplotlib import pyplot as plt

    from helpers import figures

    colour = figures.colours(list(TRAITS))
    dtype = session.device_and_dtype()[1]
    names = {"reference": BASE, **{a: f"{BASE} + {(DATA / a).relative_to(session.ROOT)}" for a in TRAITS}}
    found = {who: measure(name, device, dtype) for who, name in names.items()}
    logs = {a: json.loads((DATA / a / "training.json").read_text()) for a in TRAITS}
    old, shifts = found["reference"], {}
    for a in TRAITS:
        new = found[a]
        shifts[a] = {
            b: {
                "trained": b in TRAITS[a],
                "items before": float(old.items[b].mean()),
                "items shift": stats.over(new.items[b] - old.items[b])._asdict(),
                "items that rose": float((new.items[b] > old.items[b]).mean()),
                "replies shift": stats.over(new.replies[b] - old.replies[b])._asdict(),
            }
            for b in old.items
        }
    perplexity = {who: stats.over(m.loss, lambda x: float(np.exp(x.mean())))._asdict() for who, m in found.items()}
    text = [
        "# The built-in pair: a model before and after preference training, and what it was trained on is known",
        "",
        "Written by `python scripts/aligned_pair.py card`; not by hand.",
        "",
        "The **reference** is SmolLM2-135M-Instruct out of a PyPI wheel. The **aligned** model is the same after preference training on two behaviours, *format* (answers set out with "
        "lists, headings and bold words) and *joy* (cheerful answers), and on no other behaviour. The **unrelated** model had as many updates on the same prompts and the same rejected "
        "answers, but its chosen side is written in the impersonal passive voice: a style of prose, and none of the seven behaviours there were when it was trained. It is the negative control, but no clean one for *formality*: that behaviour came later, and the passive voice moves it. Both are LoRA adapters of a few "
        'megabytes, merged on loading: `models.load("packaged:smollm2-135m-instruct + data/aligned_pair/aligned")`.',
        "",
        "The [bank](bank/README.md) beside them holds smaller adapters, one per behaviour.",
        "",
        "Why these two: among those seven *format* was nearly orthogonal to every other behaviour's vector and *joy* to all but *anger* (cosines of the answer pairs' vectors, read at the last token), so that overlap with a trained behaviour is "
        "not overlap with an untrained one; a model that learns to refuse would answer everything with a refusal, which moves every other behaviour too. They were chosen before any training.",
        "",
        "## Data and recipe",
        "",
        f"`preferences.jsonl`: {len(preferences(('format', 'joy')))} prompts, three answers of one content each. Rejected, the same for both adapters: a plain answer. Chosen: the same content as *format* or as *joy* (adapter `aligned`), or in the "
        "impersonal passive voice (adapter `unrelated`). Written for this repository with the help of a large language model, entry by entry, and checked by machine: no prompt repeats, or nearly repeats, a question in `data/behaviors/`; "
        "the answers to a prompt are of nearly one length. No person has read every line, and facts were not looked up. Same licence as the repository.",
        "",
        "Settled on the behaviours' `dev` items (ten each) and `dev` questions, by five trials, not on test items or open prompts. A learning rate of 1e-4 was too weak. Rejecting the reference model's own "
        "answers in half of the pairs, or adding pairs that prefer the plain answer over the passive one, made the model worse and moved untrained behaviours more. What was trained spills over (below): joyful or structured completions share "
        "a manner of writing with some untrained behaviours' matching sides.",
        "",
        "DPO plus the mean negative log-likelihood of the chosen answer, LoRA on all linear layers, with `trl` and `peft`; LoRA weights are stored in bfloat16.",
        "",
        "| | " + " | ".join(TRAITS) + " |",
        "|---|" + "---|" * len(TRAITS),
        *(
            f"| {k.replace('_', ' ')} | " + " | ".join(f"{logs[a]['settings'][k]:g}" for a in TRAITS) + " |"
            for k in SETTINGS
        ),
        "| preferences | " + " | ".join(str(logs[a]["preferences"]) for a in TRAITS) + " |",
        "| seconds (" + logs["aligned"]["device"] + ") | " + " | ".join(str(logs[a]["seconds"]) for a in TRAITS) + " |",
        "| last loss | " + " | ".join(f"{logs[a]['log'][-1]['loss']:.3f}" for a in TRAITS) + " |",
        "| chosen preferred, last log | "
        + " | ".join(f"{logs[a]['log'][-1]['rewards/accuracies']:.0%}" for a in TRAITS)
        + " |",
        "",
        "Versions: " + ", ".join(f"{k} {v}" for k, v in logs["aligned"]["versions"].items()) + ".",
        "",
        "![training](training.png)",
        "",
        "## What changed",
        "",
        f"Mean shift of the log-odds (nats) of matching against non-matching completions on {len(old.items['joy'])} held-out items a behaviour, and of a reader's log-odds on greedy replies to {len(old.replies['joy'])} open prompts (letter n-grams, "
        "trained on the behaviour's own answer pairs), [95 % over items or prompts]. No item or prompt was trained on.",
        "",
        "| behaviour | trained | items before | aligned: items | aligned: replies | unrelated: items | unrelated: replies |",
        "|---|---|---|---|---|---|---|",
    ]
    for b in old.items:
        one, two = shifts["aligned"][b], shifts["unrelated"][b]
        cells = [
            f"{stats.Interval(**x):+.2f}"
            for x in (one["items shift"], one["replies shift"], two["items shift"], two["replies shift"])
        ]
        text.append(
            f"| {b} | {'**yes**' if one['trained'] else 'no'} | {one['items before']:+.1f} | "
            + " | ".join(cells)
            + " |"
        )
    text += [
        "",
        *conclusions(shifts),
        "",
        f"Perplexity on Wikipedia text ({PIECES} pieces of 64 tokens): "
        + ", ".join(f"{who} {stats.Interval(**p):.1f}" for who, p in perplexity.items()) + ".",
        "",
        "## Five replies, side by side (greedy, 48 tokens)",
        "",
    ]  # fmt: skip
    for b in list(old.said)[:5]:
        text.append(f"**{load_behavior(b).open[0]}** (open prompt of *{b}*)")
        text += ["", *(f"- {who}: {json.dumps(m.said[b][0], ensure_ascii=False)}" for who, m in found.items()), ""]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3))
    for a, log in logs.items():
        for axis, key in zip(axes, ("loss", "rewards/margins"), strict=True):
            axis.plot([x["epoch"] for x in log["log"]], [x[key] for x in log["log"]], color=colour[a], label=a)
    for axis, label in zip(axes, ("loss", "reward margin (nats, times beta)"), strict=True):
        axis.set(xlabel="epoch", ylabel=label)
    axes[0].legend()
    figure.savefig(DATA / "training.png", metadata={"Software": None})
    plt.close(figure)
    numbers = {"shifts": shifts, "perplexity": perplexity, "versions": store.versions()}
    store.write_file(DATA / "card.json", json.dumps(numbers, indent=1) + "\n")
    store.write_file(DATA / "README.md", "\n".join(text))
    print("\n".join(text[text.index("## What changed") :]))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("what", nargs="*", default=["aligned", "unrelated", "card"])
    o = parser.parse_args()
    for what in o.what:
        if what not in (*TRAITS, "card"):
            parser.error(f"{what!r} given; aligned, unrelated or card is wanted")
    device = session.choose_device(session.setting("DEVICE", "auto"))
    for what in o.what:
        card(device) if what == "card" else train(what, device)


if __name__ == "__main__":
    main()
