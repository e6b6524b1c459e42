"""A concept in a pipeline.

`text_encoders.py` finds a pipeline's text encoders, `tokenizer.py`, `table.py` and `vocabulary.py` change them, and
`exchange.py` takes concepts out and puts others in by these, in all encoders or in none. `state.py` has what loading records on
an encoder, `listing.py` says which concepts there are, and `loading.py` has the functions for users. `mixin.py`
turns these into methods of every pipeline, and `registration.py` puts them there. `prompt_check.py` and `inspection.py` only
read; `offload.py` handles offloaded weights, and `protocols.py` says what is expected of pipelines and tokenizers. Of the other
folders only `concept/` is imported.
"""

from ..notices import notice_dropped

# The class of modular pipelines is needed to give them the methods. To import it, diffusers before 0.40 says that they are
# experimental, also to those who never use one.
with notice_dropped("diffusers.modular_pipelines", "Modular Diffusers is currently an experimental feature"):
    from diffusers import ModularPipeline as ModularPipeline
