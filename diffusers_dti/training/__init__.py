"""From photos to a concept.

`trainer.py` has `DTITrainer`, `config.py` its settings, and `loop.py` the training loop. The loop reads samples, steps the
optimizers of `optim.py`, and writes logs, checkpoints and validation images. `trainable.py` holds what is trained,
`adapter.py` the adapter that may be trained with it, and `frozen.py` the pipeline around both. Any folder but `evaluation/`
and `cli/` may be imported.
"""
