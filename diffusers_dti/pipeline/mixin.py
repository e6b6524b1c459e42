"""The methods that every diffusers pipeline gets, and the `register` that gives them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers.loaders import TextualInversionLoaderMixin

from ..concept.inversion import DirectionalInversion
from . import loading
from .text_encoders import Pooling


class DirectionalTextualInversionMixin(TextualInversionLoaderMixin):  # type: ignore[misc]  # diffusers has no types
    """Load, unload and save directional inversions."""

    def load_directional_inversion(
        self,
        source: str | Path | Mapping[str, Any] | DirectionalInversion,
        token: str | None = None,
        token_scale: str | float | None = None,
        pooling: Pooling | None = None,
        hf_token: str | bool | None = None,
        **kwargs: Any,
    ) -> DirectionalInversion:
        """Load a learned concept into every text encoder of the pipeline, for use in prompts.

        Either the whole concept is loaded, or the pipeline stays as it was.

        Args:
            source: where the concept is: a Hub id ("user/dti-dog"), a folder, a file, a state dict, or a
                `DirectionalInversion`. Files may be ours or those of diffusers' scripts, A1111, ComfyUI, kohya,
                OneTrainer and InvokeAI.
            token: the placeholder to use in prompts, such as "<dog>"; the file's own by default.
            token_scale: the norm of the embeddings: "mean", "min" or "max" of the encoder's vocabulary, or a number; as
                stored by default. "mean" repairs the inflated embeddings of classic textual inversion.
            pooling: "eos" pools CLIP's text vector at the end of the prompt; "legacy" pools at the placeholder, as transformers
                does with SDXL's configuration. As the concept was trained by default, otherwise "eos".
            hf_token: the Hub's access token; by default the one of `hf auth login`.
            kwargs: `weight_name`, `allow_pickle`, and the arguments of `huggingface_hub.hf_hub_download`: `subfolder`,
                `revision`, `cache_dir`, `local_files_only`, and so on.

        Returns:
            The concept as it was loaded, at the scale it was loaded with.

        Raises:
            ValueError: if the concept does not fit the pipeline, or the placeholder is taken.
            OSError: if there is nothing at the source, or the Hub cannot be reached.

        Example:

            ```py
            >>> import diffusers_dti
            >>> import torch
            >>> from diffusers import DiffusionPipeline

            >>> pipe = DiffusionPipeline.from_pretrained("stabilityai/stable-diffusion-xl-base-1.0").to("cuda")
            >>> dog = pipe.load_directional_inversion("user/dti-dog")
            >>> image = pipe("a <dog> on the beach").images[0]
            ```

            An old textual inversion under another name, at the norm of an ordinary word:

            ```py
            >>> cat = pipe.load_directional_inversion("user/dti-cat", token="<felix>", token_scale="mean")
            ```
        """
        return loading.load_directional_inversion(self, source, token, token_scale, pooling, hf_token, **kwargs)

    def unload_directional_inversion(self, token: str | list[str] | None = None) -> None:
        """Unload concepts, as if only the others had ever been loaded.

        Args:
            token: a placeholder or several; all that are loaded by default.

        Raises:
            ValueError: if a placeholder is not loaded; nothing is unloaded then.

        Example:

            ```py
            >>> dog = pipe.load_directional_inversion("user/dti-dog")
            >>> pipe.unload_directional_inversion("<dog>")
            >>> pipe.directional_inversions
            {}
            ```
        """
        loading.unload_directional_inversion(self, token)

    def save_directional_inversion(self, save_directory: str | Path, token: str | None = None) -> None:
        """Save a loaded concept, in files that stock `load_textual_inversion` reads as well.

        Args:
            save_directory: the folder for its files, one for each text encoder.
            token: the placeholder of the concept, needed if several are loaded.

        Raises:
            ValueError: if it is not clear which concept is meant.

        Example:

            ```py
            >>> dog = pipe.load_directional_inversion("user/dti-dog")
            >>> pipe.save_directional_inversion("out/dog")
            ```
        """
        loading.save_directional_inversion(self, save_directory, token)

    @property
    def directional_inversions(self) -> dict[str, DirectionalInversion]:
        """The loaded concepts by placeholder, in order of loading.

        Example:

            ```py
            >>> dog = pipe.load_directional_inversion("user/dti-dog")
            >>> list(pipe.directional_inversions)
            ['<dog>']
            ```
        """
        return loading.directional_inversions(self)


def register(pipeline_class: type) -> None:
    """Give a pipeline class the mixin's methods, and so all its subclasses, including later ones. Twice is the same as once.

    Args:
        pipeline_class: the class; diffusers' two base classes are registered when `diffusers_dti` is imported.

    Raises:
        TypeError: if the class already has an unrelated attribute under one of the names.

    Example:

        ```py
        >>> import diffusers_dti
        >>> from diffusers import DiffusionPipeline

        >>> class MyPipeline(DiffusionPipeline):
        ...     pass
        >>> diffusers_dti.register(MyPipeline)  # already has them, through its base class
        ```
    """
    mixin = DirectionalTextualInversionMixin
    if issubclass(pipeline_class, mixin):
        return
    names = [n for n in vars(mixin) if not n.startswith("_")]
    taken = [n for n in names if hasattr(pipeline_class, n)]
    if taken:
        raise TypeError(f"{pipeline_class.__name__} already has its own {', '.join(taken)}, which is not overwritten.")
    # A base class, not `setattr` of each method: `isinstance` and `help` then tell where the methods come from, and a
    # pipeline that defines one of its own keeps it. Last, so that nothing of the pipeline's is ever hidden.
    pipeline_class.__bases__ += (mixin,)
