"""Helpers for the notebooks: a language model and what it reads, contrastive activation addition, SAEs, pairs of models, reports.

Modules stand in rows and import only from rows above their own, or to their left:

    row 0   stats  entries  session  store                                  numbers; JSON that people bring; .env, profiles; the disk
    row 1   lm.hooks  lm.tokens  lm.text  lm.reading  lm.files  lm.models  lm.scoring  lm.replies   a language model, in one room
    row 2   directions  topk  decompose  projections  matching  alignment  overlap        tensors in, tensors out
    row 3   behaviors  claims  figures  activations  saes                   what studies are made of
    row 4   caa  steer  splice  patching  harvest  train  budget  diff  latents           what a notebook calls
    row 5   progress  report                                                papermill and HTML; the only one that knows notebooks

Nothing is imported here: a notebook writes `from helpers.caa import extract`, so a reader sees where a name lives. Three
modules run a model, and no others: lm.reading, lm.scoring and lm.replies.
"""
