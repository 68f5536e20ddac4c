"""Helpers for the notebooks: a language model and what it reads, steering vectors, SAEs, pairs of models, reports.

Four rooms on a ground floor. A module imports only from rows above its own, or to its left:

    row 0   stats  entries  profiles  session  store  pages                               ground floor: no models
    row 1   lm.hooks  lm.tokens  lm.text  lm.reading  lm.files  lm.models  lm.scoring  lm.downstream  lm.replies   a language model
    row 2   steering.directions  steering.averaging  steering.behaviors  steering.caa  steering.propensity  steering.preference  steering.concepts   vectors that steer it
    row 3   sae.topk  sae.decompose  sae.projections  sae.activations  sae.saes  sae.evaluation  sae.splice  sae.conversations  sae.latents  sae.labels  sae.evidence  sae.published  sae.explanations  sae.harvest  sae.train  sae.downstream  sae.families   dictionaries
    row 4   pair.matching  pair.alignment  pair.rankings  pair.crosscoder  pair.overlap  pair.patching  pair.mixtures  pair.bank  pair.budget  pair.diff   two models
    row 5   nulls  claims  figures  comparisons  study  later  features  steering.methods  steering.narrow  steering.checks   what a notebook calls
    row 6   progress  render  report                                                              papermill and HTML; the only ones that know notebooks

Nothing is imported here: a notebook writes `from helpers.steering import caa`, so a reader sees where a name lives. Three
modules run a model, and no others: lm.reading, lm.scoring and lm.replies.
"""
