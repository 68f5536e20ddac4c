"""The recipe of the built-in pair: preference training (DPO) of LoRA adapters on the packaged model, and their card.

    make pair                                          both adapters and the card, from preferences.jsonl
    python data/aligned_pair/recipe.py aligned         one adapter
    python data/aligned_pair/recipe.py card            measure both and write README.md, card.json and training.png

Needs requirements-pair.txt (trl). The sum of a preference and a likelihood term, as in Pang et al. 2024 (arXiv:2404.19733):
DPO alone (Rafailov et al. 2023, arXiv:2305.18290) raises a difference of log-probabilities, not the chosen answer.
"""

import argparse
import json
import random
import shutil
import tempfile
import time
from importlib import metadata
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from helpers import models, session, store
from helpers.behaviors import DataError, _field, _objects

HERE = Path(__file__).resolve().parent
BASE = "packaged:smollm2-135m-instruct"
TRAITS = {"aligned": ("format", "joy"), "unrelated": ("passive",)}  # what the chosen side shows
SETTINGS = {
    "beta": 0.1,
    "likelihood_weight": 0.1,
    "learning_rate": 1e-4,
    "epochs": 2,
    "batch": 8,
    "rank": 8,
    "alpha": 16,
    "seed": 0,
}


def preferences(traits):
    """The prompt, chosen and rejected answer of every preference of `traits`; DataError names file, line and field."""
    rows = []
    for place, row in _objects(HERE / "preferences.jsonl"):
        one = {name: _field(place, row, name) for name in ("trait", "prompt", "chosen", "rejected")}
        if one["trait"] not in {t for traits in TRAITS.values() for t in traits}:
            raise DataError(f"{place}: trait {one['trait']!r} given; format, joy or passive is wanted")
        if one["trait"] in traits:
            rows.append(one)
    return rows


def train(name, device, out=None, **changed):
    """One adapter, trained and saved in bfloat16; its log beside it. Seeded: one device gives one adapter."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM
    from trl import DPOConfig, DPOTrainer

    how, out = {**SETTINGS, **changed}, out or HERE / name
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
    plain = models.plain(BASE)
    weights = AutoModelForCausalLM.from_pretrained(models.packaged_folder(BASE), dtype=torch.float32)
    with tempfile.TemporaryDirectory() as scratch:
        config = DPOConfig(
            output_dir=scratch, beta=how["beta"], loss_type=["sigmoid", "sft"],
            loss_weights=[1.0, how["likelihood_weight"]], learning_rate=how["learning_rate"],
            num_train_epochs=how["epochs"], per_device_train_batch_size=how["batch"], lr_scheduler_type="linear",
            warmup_steps=10, seed=how["seed"], data_seed=how["seed"], logging_steps=5, save_strategy="no",
            report_to="none", use_cpu=device == "cpu", bf16=True, precompute_ref_log_probs=True,
            gradient_checkpointing=False,
        )  # fmt: skip
        lora = LoraConfig(
            r=how["rank"], lora_alpha=how["alpha"], lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        began = time.perf_counter()
        torch.set_grad_enabled(True)
        trainer = DPOTrainer(weights, args=config, train_dataset=data, processing_class=plain.tokenizer, peft_config=lora)
        trainer.train()
        seconds = time.perf_counter() - began
        trainer.model.save_pretrained(scratch)
        tensors = {k: v.to(torch.bfloat16).contiguous() for k, v in load_file(f"{scratch}/adapter_model.safetensors").items()}
        adapter = json.loads(Path(f"{scratch}/adapter_config.json").read_text())
    adapter["base_model_name_or_path"] = BASE  # not the folder it was loaded from
    log = {
        "adapter": name,
        "traits": list(TRAITS[name]),
        "preferences": len(rows),
        "preferences sha256": store.file_digest(HERE / "preferences.jsonl"),
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
    print(f"{name}: {len(rows)} preferences, {seconds:.0f} s, {sum(t.numel() for t in tensors.values()) / 1e6:.1f} M parameters")
    return out


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
