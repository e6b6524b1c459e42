"""`DirectionalInversion`: a concept that travels to and from files and the Hub."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import formats, publish
from .concept import Concept
from .source import describe_source, errors_named, read_stored

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo
    from typing_extensions import Self


# Not a `huggingface_hub.ModelHubMixin`, although the method names are the same. Its `__new__` sets an attribute on the object,
# which a frozen dataclass refuses. Its config.json misses the fields of a dataclass and is not in other programs' repositories.
# Its `from_pretrained` takes neither a single file nor a state dict, and claims `token`.
@dataclass(frozen=True, eq=False, repr=False)
class DirectionalInversion(Concept):
    """A learned concept, apart from any pipeline: directions on the unit sphere and scales, one set for each text encoder.

    Objects are immutable. Methods such as `rescale` and `slerp` return new ones.

    Args:
        placeholder_token: the word that stands for the concept in prompts, such as "<dog>".
        directions: unit rows, (n, d) float32, by pipeline component ("text_encoder", "text_encoder_2", ...).
        scales: the norms of the embeddings, (n,) float32, positive, by component.
        metadata: JSON values: initializer, base model, scale rule, pooling, training settings, versions.

    Raises:
        ValueError: if directions are not finite unit rows, scales do not match them, or the placeholder is not a word.

    Example:

        ```py
        >>> from diffusers_dti import DirectionalInversion

        >>> dog = DirectionalInversion.from_pretrained("user/dti-dog")
        >>> dog.placeholder_token
        '<dog>'
        >>> list(dog.directions)
        ['text_encoder', 'text_encoder_2']
        >>> between = dog.slerp(DirectionalInversion.from_pretrained("user/dti-cat"), 0.5)
        >>> between.save_pretrained("out/between")
        ```
    """

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write `learned_embeds.safetensors` (and `_2`, `_3`), which stock `load_textual_inversion` reads as well.

        The files replace the folder's earlier concept as a whole. If writing fails, the earlier concept stays.

        Args:
            save_directory: the folder; created if needed.

        Raises:
            ValueError: if a component is none of "text_encoder", "text_encoder_2", "text_encoder_3" and "text_encoder_4".

        Example:

            ```py
            >>> from diffusers_dti import DirectionalInversion

            >>> dog = DirectionalInversion.from_pretrained("user/dti-dog")
            >>> dog.rescale(0.4).save_pretrained("out/dog")
            ```
        """
        formats.write_concept(save_directory, self)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        images: publish.SampleImages | None = None,
        license: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        subfolder: str | None = None,
        revision: str | None = None,
        commit_message: str | None = None,
        create_pr: bool = False,
    ) -> CommitInfo:
        """Push the concept's files, samples and a model card to the Hub, in one commit.

        The repository is created if needed. An earlier concept in the same place is replaced as a whole, with its samples and
        card. All other files stay.

        Args:
            repo_id: "user/name".
            images: samples: images, or pairs of a prompt and an image. Only their pixels are pushed.
            license: the Hub's name of the license, such as "apache-2.0"; by default the card names none.
            private: whether a new repository is private; by default the account's setting decides.
            token: the Hub's access token; by default the one of `hf auth login`.
            subfolder: a folder in the repository, for several concepts in one repository.
            revision: a branch; created if needed.
            commit_message: "Upload" and the placeholder by default.
            create_pr: open a pull request instead of changing the branch.

        Returns:
            The commit: a string with its address, whose `pr_url` and `pr_revision` describe the pull request, if any.

        Raises:
            TypeError: if a sample is not an image.
            OSError: if the Hub refuses or the connection fails; the message says what to do. Nothing has changed then, except
                that the repository or the branch may have been created.

        Example:

            ```py
            >>> from diffusers_dti import DirectionalInversion
            >>> from PIL import Image

            >>> dog = DirectionalInversion.from_pretrained("user/dti-dog")
            >>> samples = [("a <dog> on the beach", Image.new("RGB", (64, 64)))]
            >>> commit = dog.push_to_hub("user/dti-dog", images=samples, license="apache-2.0", private=True)
            ```
        """
        return publish.push(
            self, repo_id, images=images, license=license, private=private, token=token, subfolder=subfolder,
            revision=revision, commit_message=commit_message, create_pr=create_pr,
        )  # fmt: skip

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path | Mapping[str, Any],
        placeholder_token: str | None = None,
        weight_name: str | None = None,
        subfolder: str | None = None,
        allow_pickle: bool = False,
        **hub_kwargs: Any,
    ) -> Self:
        """Read a concept from a Hub id, a folder, a file, or a state dict.

        Files may be ours or those of diffusers' scripts, A1111, ComfyUI, kohya, OneTrainer and InvokeAI.

        Args:
            source: where the concept is. For the file `learned_embeds.safetensors`, the files of further encoders next to it
                are read as well. A state dict is what a file holds, or `{"text_encoder": rows, "text_encoder_2": rows}`
                together with `placeholder_token`.
            placeholder_token: replaces the placeholder in the file, or says which concept of a file with several to read.
            weight_name: the one file to read, instead of all `learned_embeds*.safetensors`.
            subfolder: a folder in the repository or folder.
            allow_pickle: read pickles (`.pt`, `.bin`) as well, for their tensors alone: code in them is never run. This needs
                torch 2.10.
            hub_kwargs: arguments of `huggingface_hub.hf_hub_download`: `token`, `revision`, `cache_dir`, `local_files_only`,
                and so on.

        Returns:
            The concept. Files of ours give back directions and scales as they were saved; other files hold embeddings, whose
            norms become the scales.

        Raises:
            OSError: if there are no files at the source, or the Hub cannot be reached.
            ValueError: if what is there is not a concept, or does not name a placeholder.

        Example:

            ```py
            >>> import torch
            >>> from diffusers_dti import DirectionalInversion

            >>> dog = DirectionalInversion.from_pretrained("user/dti-dog")
            >>> rex = DirectionalInversion.from_pretrained("user/dti-dog", "<rex>")
            >>> rex.placeholder_token
            '<rex>'
            ```

            Rows of your own:

            ```py
            >>> rows = {"text_encoder": torch.ones(2, 768), "text_encoder_2": torch.ones(2, 1280)}
            >>> own = DirectionalInversion.from_pretrained(rows, "<mine>")
            >>> own.num_vectors
            2
            ```
        """
        stored = read_stored(source, placeholder_token, weight_name, subfolder, allow_pickle, **hub_kwargs)
        if stored.placeholder is None:
            raise ValueError(
                f"{describe_source(source)} names no placeholder: give one with `token` (`placeholder_token`, `--placeholder`)."
            )
        with errors_named(source):
            concept = cls.from_embeddings(stored.placeholder, stored.rows, stored.metadata)
            # Dividing by the stored scale restores the direction to the last digit; the product's norm would be rounded again.
            directions = {c: rows / stored.scales[c][:, None] for c, rows in stored.rows.items() if c in stored.scales}
            return replace(concept, directions=concept.directions | directions, scales=concept.scales | stored.scales)
