"""A concept in a pipeline.

`text_encoders.py` finds a pipeline's text encoders, `tokenizer.py` and `vocabulary.py` change them, and `loading.py` loads,
unloads and saves concepts by these. `mixin.py` turns that into methods of every pipeline. `prompt_check.py` and
`inspection.py` only read; `offload.py` handles offloaded weights, and `protocols.py` says what is expected of pipelines and
tokenizers. Of the other folders only `concept/` is imported.
"""
