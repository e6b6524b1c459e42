"""Generating and scoring images of learned concepts, following the paper's protocol.

`prompts.py` has the prompts, `generation.py` generates their images, `metrics.py` scores them, and `store.py` keeps the
scores. `protocol.py` puts these together for runs and subjects, and `summary.py` turns scores into tables and figures.
`concept/`, `pipeline/`, `families/` and `data/` are imported, but not `training/`.
"""
