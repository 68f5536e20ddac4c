"""Helpers for the notebooks: hooks, contrastive activation addition, steering, reports.

Modules stand in rows and import only from rows above their own, or to their left:

    row 0   hooks  directions  stats  topk  decompose  projections  matching  alignment  overlap   tensors in, tensors out: no disk, no environment, no plots
    row 1   session  store  assets  behaviors  prompts  claims  corpus   the outside world: .env, files, packaged data, text
    row 2   models  activations  saes                            a model or an SAE by hub name, folder or packaged name
    row 3   caa  steer  splice  patching  figures  harvest  train  budget  diff  latents   what a notebook calls
    row 4   report                                               papermill and HTML; the only one that knows notebooks

Nothing is imported here: a notebook writes `from helpers.caa import extract`, so a reader sees where a name lives.
"""
