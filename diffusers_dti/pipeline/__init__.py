"""A concept in a pipeline.

`text_encoders.py` finds a pipeline's text encoders, `tokenizer.py` and `vocabulary.py` change them, and `loading.py` loads,
unloads and saves concepts by these. `mixin.py` turns that into methods of every pipeline. `prompt_check.py` and
`inspection.py` only read; `offload.py` handles offloaded weights, and `protocols.py` says what is expected of pipelines and
tokenizers. Of the other folders only `concept/` is imported.
"""

from ..notices import notice_dropped

# The class of modular pipelines is needed to give them the methods. To import it, diffusers before 0.40 says that they are
# experimental, also to those who never use one.
with notice_dropped("diffusers.modular_pipelines", "Modular Diffusers is currently an experimental feature"):
    from diffusers import ModularPipeline as ModularPipeline
