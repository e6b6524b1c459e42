"""`DTITrainer`: from a few photos to a concept, on any family, by any method."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, overload

from PIL import Image

from ..concept import publish
from ..concept.inversion import DirectionalInversion
from ..data.images import Photo
from ..families import find_family
from ..pipeline import vocabulary
from ..pipeline.exchange import inject, making_way
from ..pipeline.locks import training
from ..pipeline.protocols import Pipeline
from ..pipeline.text_encoders import find_text_encoders
from . import checkpoint, validation
from .adapter import Adapter, check_adapter, component_of
from .config import DTIConfig
from .crops import check_resolution
from .distributed import processes
from .frozen import at_work, frozen, gradient_checkpointing
from .gradients import gradients_enabled
from .loop import Loop
from .metadata import concept_metadata
from .output import save_or_warn, writing
from .photos import Captions, Images, Masks, photos_by_placeholder
from .samples import prepare_all_samples
from .settings import override
from .starts import choose_starts, make_concepts
from .trainable import TrainableConcept

Callback = Callable[["DTITrainer", int], object]


class DTITrainer:
    """Learn concepts in the text encoders of a pipeline.

    Under `accelerate launch` every process calls `fit`, with a pipeline on its own device; the first process writes.

    Args:
        pipe: a pipeline of a supported family, on the device and in the dtype to train with.
        config: the settings.
        overrides: single settings, which replace those of `config`.

    Attributes:
        config: the settings with all defaults filled in.
        history: after `fit`, also an interrupted one, the entries of the log: a dict every 10 steps.
        validation_images, inversions: the validation images by step, and the learned concepts by placeholder.
        adapter: the adapter trained with them. After a complete run it is active until `pipe.unload_lora_weights()`.

    Raises:
        ValueError: if settings contradict each other or do not fit the pipeline, or the pipeline's family is not supported.

    Example:

        ```py
        >>> from diffusers import DiffusionPipeline
        >>> from diffusers_dti import DTITrainer

        >>> pipe = DiffusionPipeline.from_pretrained("stabilityai/stable-diffusion-xl-base-1.0").to("cuda")
        >>> trainer = DTITrainer(pipe, placeholder_token="<dog>", initializer_token="dog")
        >>> dog = trainer.fit("photos/dog")
        >>> image = pipe("a <dog> on the beach").images[0]
        >>> trainer.save_pretrained("out/dog")
        >>> trainer.plot("out/dog/curves.png")
        >>> commit = trainer.push_to_hub("user/dti-dog", private=True)
        ```
    """

    def __init__(self, pipe: Pipeline, config: DTIConfig | None = None, **overrides: Any):
        self.pipe = pipe
        self.family = find_family(pipe)
        self.config = self._given_config = override(config or DTIConfig(), overrides).resolve(self.family)
        if self.config.adapter is not None:
            check_adapter(self.family)
        if self.config.validation_prompt:
            validation.check(self.family)
        check_resolution(self.config.resolution, self.family.resolution_step)
        self.history: list[dict[str, float]] = []
        self.validation_images: dict[int, list[Image.Image]] = {}
        self.inversions: dict[str, DirectionalInversion] = {}
        self.adapter: Adapter | None = None

    @property
    def inversion(self) -> DirectionalInversion | None:
        """The learned concept, or the first one of several; None before `fit`."""
        return next(iter(self.inversions.values()), None)

    @overload
    def fit(
        self,
        images: Mapping[str, Images],
        captions: None = None,
        masks: None = None,
        callback_on_step_end: Callback | None = None,
    ) -> dict[str, DirectionalInversion]: ...

    @overload
    def fit(
        self,
        images: Images,
        captions: Captions | None = None,
        masks: Masks | None = None,
        callback_on_step_end: Callback | None = None,
    ) -> DirectionalInversion: ...

    def fit(
        self,
        images: Images | Mapping[str, Images],
        captions: Captions | None = None,
        masks: Masks | None = None,
        callback_on_step_end: Callback | None = None,
    ) -> DirectionalInversion | dict[str, DirectionalInversion]:
        """Train on photos. Afterwards the pipeline can use the concept, and is otherwise as it was.

        If a placeholder is that of a loaded concept, as in a cell that runs again, what is learned replaces that concept. If
        training fails or is interrupted, the pipeline is as it was before, with that concept.

        Args:
            images: 3 to 6 photos: a folder, a list of files or images, or a `datasets.Dataset`. A mapping from placeholder to
                photos trains several concepts at once, each on its own photos; `initializer_token` may be a mapping as well.
            captions: a text for each photo with the placeholder or "{}", or None to use templates. By default the `.txt` files
                next to the photos, or the data set's column.
            masks: an image for each photo, white where the subject is: the loss counts only there. By default the files beside
                the photos (`0-masklabel.png`), or their own transparency.
            callback_on_step_end: a function to call after every step, with the trainer and the number of steps done.

        Returns:
            The learned concept, or for a mapping a dict of them by placeholder. They are loaded in the pipeline, and saved in
            `output_dir` if there is one.

        Raises:
            ValueError: if photos, captions, masks or a placeholder cannot be used, gradients cannot pass a model, or a
                checkpoint is from another run.
            OSError: if a file cannot be read, or `output_dir` not be written to, or another run writes there.
            RuntimeError: if an encoder is being trained already.
            FloatingPointError: if no gradient is finite in 20 steps in a row, or in all; nothing is learned then.

        Example:

            ```py
            >>> from diffusers_dti import DTITrainer

            >>> trainer = DTITrainer(pipe, placeholder_token="<rex>", initializer_token="dog", output_dir="out/rex")
            >>> rex = trainer.fit("photos/dog")
            >>> rex.placeholder_token, rex.num_vectors
            ('<rex>', 1)

            >>> # several concepts at once
            >>> trainer = DTITrainer(pipe, initializer_token={"<cat>": "cat", "<toy>": "toy"})
            >>> both = trainer.fit({"<cat>": "photos/dog", "<toy>": "photos/dog"})
            ```
        """
        photos = photos_by_placeholder(self.config, images, captions, masks)
        self.family.forget()
        if self.config.adapter:
            check_adapter(self.family)
        folder = self.config.output_dir if processes().is_main_process else None
        with gradients_enabled(self.family), writing(folder), training(e.model for e in find_text_encoders(self.pipe).values()):
            with making_way(self.pipe, photos):
                self._train(photos, callback_on_step_end)
            save_or_warn(self.save_pretrained, folder)
        return dict(self.inversions) if isinstance(images, Mapping) else next(iter(self.inversions.values()))

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Save what was learned, with its adapter as `pytorch_lora_weights.safetensors`, which stock `load_lora_weights` reads.

        Args:
            save_directory: the folder for one concept. Several concepts get a folder each inside, named after their
                placeholders.

        Raises:
            ValueError: before `fit`.
            OSError: if the files cannot be written.
        """
        if not self.inversions:
            raise ValueError("Nothing has been learned yet: call `fit` first.")
        if self.adapter is not None:  # first, so that a folder with a concept in it is complete
            self.adapter.save(save_directory)
        checkpoint.save_concepts(save_directory, list(self.inversions.values()))

    def plot(self, path: str | Path) -> None:
        """Plot loss, angle and norm over the steps. Needs matplotlib (`diffusers-dti[plot]`).

        Args:
            path: the image file to write.

        Raises:
            ImportError: if matplotlib is not installed.
        """
        validation.plot(self.history, path)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Push the learned concept and its adapter, by default with the last validation images as samples.

        Args:
            repo_id: the repository, such as "user/dti-dog".
            kwargs: the arguments of `DirectionalInversion.push_to_hub`.

        Returns:
            The address of the commit.

        Raises:
            ValueError: before `fit`, or if several concepts were trained.
            OSError: if the Hub cannot be reached or refuses the push.
        """
        if len(self.inversions) != 1:
            raise ValueError("Exactly one concept can be pushed: call `fit` first, and push several concepts one by one.")
        ((placeholder, concept),) = self.inversions.items()
        if (given := self.config.validation_prompt) and self.validation_images and kwargs.get("images") is None:
            prompts = [prompt.replace("{}", placeholder) for prompt in validation.as_list(given)]
            kwargs["images"] = list(zip(prompts, self.validation_images[max(self.validation_images)]))
        angle = self.history[-1]["angle"] if self.history else None
        return publish.push(concept, repo_id, adapter=self.adapter, angle=angle, **kwargs)

    def metadata(self, placeholder: str) -> dict[str, Any]:
        """Return the metadata that the files of a concept will have."""
        return concept_metadata(self.family, self.config, placeholder)

    def _train(self, photos: dict[str, list[Photo]], callback: Callback | None) -> None:
        """Load the concepts, train them, and write their rows. If anything fails, remove the adapter."""
        self.config, starts = choose_starts(self.family, self._given_config, photos)
        c = self.config
        adapter: Adapter | None = None
        try:
            inject(self.pipe, [(own[0], c.pooling) for own in starts.values()], reuse_existing=False)
            with frozen(self.family):
                samples = prepare_all_samples(self.family, c, photos)
                with at_work(self.family), gradient_checkpointing(self.family, c):
                    concepts = make_concepts(self.family, c, starts, samples)
                    if c.adapter is not None:
                        name, component = "-".join(starts), component_of(self.family)
                        adapter = Adapter(self.pipe, component, c.adapter, c.adapter_rank, name, c.seed)
                    self._make_loop(concepts, adapter, callback).run()
                    vocabulary.set_rows(find_text_encoders(self.pipe).values(), list(self.inversions.values()))
        except BaseException:
            if adapter is not None:
                adapter.remove()
            raise

    def _make_loop(self, concepts: list[TrainableConcept], adapter: Adapter | None, callback: Callback | None) -> Loop:
        """Make the loop, whose results are the trainer's from now on: it may be interrupted."""
        loop = Loop(self.family, self.config, concepts, adapter, callback and (lambda step: callback(self, step)))
        self.history, self.validation_images = loop.log.history, loop.log.images
        self.inversions, self.adapter = loop.inversions, adapter
        return loop
