"""`DirectionalInversion`: a concept that travels: to and from files, and the Hub."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import formats, hub
from .concept import Concept
from .source import describe_source, read_stored

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True, eq=False)
class DirectionalInversion(Concept):
    """A learned concept, apart from any pipeline: directions and scales, one set for each text encoder.

    See `Concept` for its fields.
    """

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write `learned_embeds.safetensors` (and `_2`, `_3`), which stock `load_textual_inversion` reads as well.

        They replace the folder's earlier concept as a whole.
        """
        headers = {c: {**self.metadata, "component": c, "scale": m.tolist()} for c, m in self.scales.items()}
        formats.write(Path(save_directory), self.placeholder_token, self.embeddings, headers)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        images: hub.SampleImages | None = None,
        license: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        subfolder: str | None = None,
        revision: str | None = None,
        commit_message: str | None = None,
        create_pr: bool = False,
    ) -> str:
        """Create the repository if need be, and commit the concept's files, samples and a model card, in one commit.

        Its earlier concept, with samples and card, is replaced as a whole.

        Args:
            repo_id: "user/name".
            images: samples, pictures or pairs of a prompt and a picture.
            license: for the card, as the Hub names it, "apache-2.0"; by default the card names none.
            private: of a repository that is created; by default as the account is set up.
            token: the Hub's access token; by default the one of `hf auth login`.
            subfolder: folder in the repository, where several concepts share one.
            revision: a branch, created if need be.
            create_pr: open a pull request instead of changing the branch.

        Returns:
            The commit's address, a `huggingface_hub.CommitInfo`, which has `pr_url` and `pr_revision` as well.

        Raises:
            OSError: where the Hub refuses, or the connection breaks, saying what helps.
        """
        return hub.push(
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

        Files may be ours or those of diffusers' scripts, A1111, ComfyUI, kohya, OneTrainer and InvokeAI: docs/formats.md.

        Args:
            source: where from. With `learned_embeds.safetensors` the files of further encoders beside it are read as well. A
                state dict is what such a file holds, or `{"text_encoder": rows, "text_encoder_2": rows}` together with
                `placeholder_token`.
            placeholder_token: replaces the file's, or says which concept of a file with several is meant.
            weight_name: the one file to read, instead of all `learned_embeds*.safetensors`.
            subfolder: folder within the repository or folder.
            allow_pickle: read pickles (`.pt`, `.bin`) as well, for their tensors alone: code in them is never run.
            hub_kwargs: of `huggingface_hub.hf_hub_download`: `token`, `revision`, `cache_dir`, `local_files_only`, ...

        Raises:
            OSError: where there is no such file. ValueError: where what is there is no concept.
        """
        read = read_stored(source, placeholder_token, weight_name, subfolder, allow_pickle, **hub_kwargs)
        if read.placeholder is None:
            raise ValueError(
                f"{describe_source(source)} names no placeholder: give one with `token` (`placeholder_token`, `--placeholder`)."
            )
        concept = cls.from_embeddings(read.placeholder, read.rows, read.metadata)
        # a stored scale gives the direction back to the last digit; the norm of the product would round once more
        directions = {c: e / read.scales[c][:, None] for c, e in read.rows.items() if c in read.scales}
        return replace(concept, directions=concept.directions | directions, scales=concept.scales | read.scales)
