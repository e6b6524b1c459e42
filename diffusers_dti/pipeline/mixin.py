"""Give every diffusers pipeline the methods that load, unload and save concepts."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from inspect import getattr_static
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from diffusers.loaders import TextualInversionLoaderMixin

from ..concept.inversion import DirectionalInversion
from . import loading
from .listing import directional_inversions
from .locks import hold_directional_inversions
from .protocols import Source, SourceByPlaceholder
from .state import Pooling
from .text_encoders import ScaleRule

if TYPE_CHECKING:
    from diffusers.loaders import TextualInversionLoaderMixin as _Base  # its methods are there, by `_StockMethod`
else:
    _Base = object


class DirectionalTextualInversionMixin(_Base):
    """Load, unload and save concepts. Every diffusers pipeline has these methods once `diffusers_dti` is imported.

    It also brings diffusers' `load_textual_inversion` and `unload_textual_inversion`, which pipelines such as SANA's lack.
    """

    @overload
    def load_directional_inversion(
        self, source: SourceByPlaceholder, token: None = None, token_scale: ScaleRule | float | None = None,
        pooling: Pooling | None = None, hf_token: str | bool | None = None, replace: bool = False, **kwargs: Any,
    ) -> dict[str, DirectionalInversion]: ...  # fmt: skip

    @overload
    def load_directional_inversion(
        self, source: Source, token: str | Sequence[str] | None = None, token_scale: ScaleRule | float | None = None,
        pooling: Pooling | None = None, hf_token: str | bool | None = None, replace: bool = False, **kwargs: Any,
    ) -> DirectionalInversion: ...  # fmt: skip

    @overload
    def load_directional_inversion(
        self, source: Sequence[Source], token: Sequence[str] | None = None, token_scale: ScaleRule | float | None = None,
        pooling: Pooling | None = None, hf_token: str | bool | None = None, replace: bool = False, **kwargs: Any,
    ) -> list[DirectionalInversion]: ...  # fmt: skip

    def load_directional_inversion(
        self,
        source: Source | Sequence[Source] | SourceByPlaceholder,
        token: str | Sequence[str] | None = None,
        token_scale: ScaleRule | float | None = None,
        pooling: Pooling | None = None,
        hf_token: str | bool | None = None,
        replace: bool = False,
        **kwargs: Any,
    ) -> DirectionalInversion | list[DirectionalInversion] | dict[str, DirectionalInversion]:
        """Load a learned concept into every text encoder of the pipeline, for use in prompts; or several at once.

        Either all of it is loaded, or the pipeline stays as it was, also if loading is interrupted.

        Args:
            source: where the concept is: a Hub id ("user/dti-dog"), a folder, a file, a state dict, or a
                `DirectionalInversion`. Files may be ours or those of diffusers' scripts, A1111, ComfyUI, kohya,
                OneTrainer and InvokeAI. A state dict is what such a file holds, such as `{"<dog>": rows}`, or has the rows of
                each component, `{"text_encoder": rows, "text_encoder_2": rows}`, and then needs a `token`. A list of sources,
                or a mapping from placeholders to sources, loads several concepts, in little more time than one.
            token: the placeholder to use in prompts, such as "<dog>", or a list of them for a list of concepts; the files' own
                by default.
            token_scale: the norm of the embeddings: "mean", "min" or "max" of the encoder's vocabulary, or a number. By
                default the stored norm. "mean" repairs the inflated embeddings of classic textual inversion.
            pooling: "eos" pools CLIP's text vector at the end of the prompt; "legacy" pools at the placeholder, as transformers
                does with SDXL's configuration. By default as the concept was trained, or "eos" if its file does not say.
            hf_token: the Hub's access token; by default the one of `hf auth login`.
            replace: unload the concept that is loaded under the same placeholder, if there is one, in the same change.
            kwargs: how to find and read the files:
                `weight_name`, the one file to read instead of all `learned_embeds*.safetensors`;
                `subfolder`, the folder within the repository or folder;
                `allow_pickle`, True to read `.pt` and `.bin` files too, for their tensors alone: code in them is never run
                (needs torch 2.10);
                `revision`, the branch, tag or commit of the repository;
                `cache_dir`, `local_files_only`, `force_download` and the other arguments of `hf_hub_download`.

        Returns:
            The concept as it was loaded, with its placeholder and scale. It holds the parts for this pipeline's encoders. For a
            list, a list of them; for a mapping, a dict by placeholder.

        Raises:
            ValueError: if a concept does not fit the pipeline, a placeholder is taken, or a setting is not one of the choices.
            TypeError: if there is no such argument.
            OSError: if there is nothing at the source, or the Hub cannot be reached.
            RuntimeError: if a concept would be replaced while an encoder is being trained, also in a training callback.

        Example:

            ```py
            >>> import diffusers_dti
            >>> from diffusers import DiffusionPipeline

            >>> pipe = DiffusionPipeline.from_pretrained("stabilityai/stable-diffusion-xl-base-1.0").to("cuda")
            >>> dog = pipe.load_directional_inversion("user/dti-dog")
            >>> image = pipe("a <dog> on the beach").images[0]
            ```

            An old textual inversion under another name, at the norm of an ordinary word:

            ```py
            >>> cat = pipe.load_directional_inversion("user/dti-cat", token="<felix>", token_scale="mean")
            ```

            Several at once:

            ```py
            >>> rex, tom = pipe.load_directional_inversion(["user/dti-dog", "user/dti-cat"], token=["<rex>", "<tom>"])
            >>> both = pipe.load_directional_inversion({"<one>": "user/dti-dog", "<other>": tom})
            ```
        """
        return loading.load_directional_inversion(self, source, token, token_scale, pooling, hf_token, replace, **kwargs)

    def unload_directional_inversion(self, token: str | list[str] | None = None) -> None:
        """Unload concepts, as if only the others had ever been loaded.

        Args:
            token: a placeholder or several; all of `directional_inversions` by default.

        Raises:
            ValueError: if a placeholder is not loaded; nothing is unloaded then.
            RuntimeError: while an encoder is being trained, also in a training callback.

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
        """Save a loaded concept, in files that diffusers' own `load_textual_inversion` reads too.

        Args:
            save_directory: the folder for its files, one for each text encoder.
            token: the placeholder of the concept, needed if several are loaded.

        Raises:
            ValueError: if it is not clear which concept is meant.

        Example:

            ```py
            >>> import os

            >>> dog = pipe.load_directional_inversion("user/dti-dog")
            >>> pipe.save_directional_inversion("out/dog")
            >>> sorted(os.listdir("out/dog"))
            ['learned_embeds.safetensors', 'learned_embeds_2.safetensors']
            ```
        """
        loading.save_directional_inversion(self, save_directory, token)

    def hold_directional_inversions(self) -> AbstractContextManager[None]:
        """Keep other threads from loading and unloading concepts within a `with` block.

        Unloading a concept renumbers the tokens of later ones. A prompt that another thread has tokenized, but not yet encoded,
        would then get the rows of other words. So a server with several threads encodes its prompts in such a block, and
        generates outside of it. The same thread can load and unload within the block.

        Returns:
            The block's context manager. Pipelines that share the text encoders are held as well.

        Raises:
            ValueError: if the pipeline has no text encoder with a tokenizer of its own.

        Example:

            ```py
            >>> dog = pipe.load_directional_inversion("user/dti-dog")
            >>> with pipe.hold_directional_inversions():
            ...     embeds = pipe.encode_prompt("a <dog> on the beach")
            ```
        """
        return hold_directional_inversions(self)

    @property
    def directional_inversions(self) -> dict[str, DirectionalInversion]:
        """The concepts by placeholder, in order of loading, also those that the pipeline was saved with.

        Of those, concepts of several vectors work in prompts once they are loaded again, from here or from their files.

        Example:

            ```py
            >>> dog = pipe.load_directional_inversion("user/dti-dog")
            >>> list(pipe.directional_inversions)
            ['<dog>']
            ```
        """
        return directional_inversions(self)


class _StockMethod:
    """A method of diffusers' `TextualInversionLoaderMixin`, by its name, for pipelines that lack it."""

    # The mixin does not derive from that class: no pipeline class could then name it before `DiffusionPipeline` in its bases.

    def __init__(self, name: str):
        self.name = name

    def __get__(self, instance: Any, owner: type) -> Any:
        # A class that comes later in the order has its own, which this does not hide.
        own = getattr(super(DirectionalTextualInversionMixin, owner if instance is None else instance), self.name, None)
        return own or getattr_static(TextualInversionLoaderMixin, self.name).__get__(instance, owner)


for _name in vars(TextualInversionLoaderMixin):
    if not _name.startswith("__"):
        setattr(DirectionalTextualInversionMixin, _name, _StockMethod(_name))
