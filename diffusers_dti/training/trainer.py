"""`DTITrainer`: from a few photos to a token, on any family, by any method."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from diffusers.utils import logging
from PIL import Image

from ..concept import hub
from ..concept.inversion import DirectionalInversion
from ..concept.methods import METHODS
from ..data.images import ImageInput, Photo, load_photos
from ..families import find_family
from ..pipeline import loading, vocabulary
from ..pipeline.offload import offload_disabled
from ..pipeline.text_encoders import TextEncoder, find_text_encoders, rescale
from ..pipeline.word_rows import word_rows
from . import checkpoint, validation
from .adapter import Adapter
from .config import DTIConfig
from .distributed import processes
from .frozen import frozen, gradient_checkpointing
from .initializer import contextual_rows
from .loop import Loop
from .samples import MAX_ZEROS, OBJECT_TEMPLATES, STYLE_TEMPLATES, TrainingSamples, make_crops
from .trainable import TrainableConcept

logger = logging.get_logger(__name__)

# what does not change the result, and so may differ where a run goes on, and is no part of a concept's metadata
BESIDE_THE_POINT = (
    "output_dir", "checkpointing_steps", "checkpoints_total_limit", "resume_from_checkpoint", "validation_prompt",
    "validation_steps", "report_to", "gradient_checkpointing",
)  # fmt: skip

Images = ImageInput | Sequence[ImageInput] | Any


class DTITrainer:
    """Learns concepts in the text encoders of a pipeline.

    Args:
        pipe: a pipeline of a supported family, on the device and in the dtype to train with.
        config: settings; `overrides` replace single ones.

    Raises:
        ValueError: for settings that cannot be, or a pipeline of no supported family.

    After `fit`, also after an interruption, `history` is what the log file gets, a dict every 10 steps; `validation_images`
    are the pictures on the way, by step; `inversion` is the result, `inversions` those of several tokens; `adapter` is what
    was trained together with them, after a whole run active in the pipeline until `pipe.unload_lora_weights()`.

    Under `accelerate launch` every process calls `fit`, with a pipeline on its own device; the first one writes.
    """

    def __init__(self, pipe: Any, config: DTIConfig | None = None, **overrides: Any):
        self.pipe = pipe
        self.family = find_family(pipe)
        self._given = replace(config or DTIConfig(), **overrides)
        self.config = self._given.resolved(self.family)
        if self.config.adapter is not None:
            Adapter.check(pipe, self._denoiser)
        if self.config.validation_prompt:
            validation.check(pipe)
        if self.config.resolution % (side := self.family.resolution_step):
            raise ValueError(
                f"This pipeline needs a resolution that is a multiple of {side}, got {self.config.resolution}: "
                f"{max(self.config.resolution // side, 1) * side} would do."
            )
        self.history: list[dict[str, float]] = []
        self.validation_images: dict[int, list[Image.Image]] = {}
        self.inversions: dict[str, DirectionalInversion] = {}
        self.adapter: Adapter | None = None

    @property
    def inversion(self) -> DirectionalInversion | None:
        """The learned concept; the first one of several, None before `fit`."""
        return next(iter(self.inversions.values()), None)

    def fit(
        self,
        images: Images | Mapping[str, Images],
        captions: Sequence[str | None] | None = None,
        masks: Sequence[ImageInput | None] | None = None,
        callback_on_step_end: Callable[["DTITrainer", int], None] | None = None,
    ) -> DirectionalInversion | dict[str, DirectionalInversion]:
        """Train on photos, and leave the pipeline ready to use the token and otherwise as it was.

        Args:
            images: 3 to 6 photos: a folder, a list of files or pictures, or a `datasets.Dataset`. A mapping from placeholder
                to photos trains several tokens at once, each on its own photos; `initializer_token` may be a mapping too.
            captions: a text for each photo with "{}" for the placeholder; None for templates. By default `.txt` files beside
                the photos, or the data set's column.
            masks: a picture for each photo, white where the subject is: the loss counts there alone. By default a photo's
                own transparency.
            callback_on_step_end: called after every step with the trainer and the number of steps done.

        Returns:
            The learned concept, or a dict of them by placeholder; loaded in the pipeline, and saved in `output_dir`.

        Raises:
            ValueError, OSError: for photos, captions or a placeholder that cannot be used; nothing has changed then.
        """
        if isinstance(images, Mapping):
            if captions is not None or masks is not None:
                raise ValueError("With several tokens captions are `.txt` files or a column, and masks are the photos' own.")
            self._check_words(images)
            photos = {word: load_photos(own) for word, own in images.items()}
        else:
            photos = {self._placeholder(): load_photos(images, captions, masks)}
        if self.config.adapter is not None:
            Adapter.check(self.pipe, self._denoiser)
        initial = {word: self._initial(word) for word in photos}
        adapter, loaded = None, []
        try:
            for word, concept in initial.items():
                loading.inject(self.pipe, concept, self.config.pooling, reuse_existing=False)
                loaded.append(word)
            with (
                frozen(self.pipe),
                gradient_checkpointing(self.family.present_denoisers().values(), self.config.gradient_checkpointing),
            ):
                concepts = [self._trainable(initial[word], photos[word]) for word in photos]
                if self.config.adapter is not None:
                    name = "-".join(photos)
                    adapter = Adapter(
                        self.pipe, self._denoiser, self.config.adapter, self.config.adapter_rank, name, self.config.seed
                    )
                on_step = None if callback_on_step_end is None else lambda step: callback_on_step_end(self, step)
                loop = Loop(self.family, self.config, concepts, adapter, on_step)
                self.history, self.validation_images = loop.log.history, loop.log.images
                self.inversions, self.adapter = loop.inversions, adapter
                try:
                    loop.run()
                finally:
                    if adapter is not None:
                        adapter.keep()
                        adapter.train(False)
                for concept in concepts:
                    for encoder in self._encoders().values():
                        vocabulary.set_rows(encoder, self.inversions[concept.placeholder_token])
        except BaseException:
            loading.unload_directional_inversion(self.pipe, loaded)
            if adapter is not None:
                adapter.remove()
            raise
        if self.config.output_dir is not None and processes().is_main_process:
            self.save_pretrained(self.config.output_dir)
        return dict(self.inversions) if isinstance(images, Mapping) else self.inversion

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write what was learned: a concept into the folder, several into a folder each; and beside them the adapter, as
        `pytorch_lora_weights.safetensors`, which stock `load_lora_weights` reads."""
        if self.adapter is not None:  # first, so that a folder with the concept in it is whole
            self.adapter.save(save_directory)
        checkpoint.save_concepts(save_directory, list(self.inversions.values()))

    def plot(self, path: str | Path) -> None:
        """Draw loss, angle and norm over the steps. Needs matplotlib (`diffusers-dti[plot]`)."""
        validation.plot(self.history, path)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Push the learned concept and its adapter, by default with the last validation pictures as samples.

        Arguments, result and errors are those of `DirectionalInversion.push_to_hub`.
        """
        if len(self.inversions) != 1:
            raise ValueError("There is no one concept to push: call `fit` first, and push several concepts one by one.")
        if self.validation_images and kwargs.get("images") is None:
            given = self.config.validation_prompt
            prompts = [p.replace("{}", *self.inversions) for p in ([given] if isinstance(given, str) else given)]
            kwargs["images"] = list(zip(prompts, self.validation_images[max(self.validation_images)]))
        angle = self.history[-1]["angle"] if self.history else None
        return hub.push(self.inversion, repo_id, adapter=self.adapter, angle=angle, **kwargs)

    # -------------------------------------------------------------------------------------------------------- the start
    def _encoders(self) -> dict[str, TextEncoder]:
        return find_text_encoders(self.pipe)

    def _placeholder(self) -> str:
        missing = [n for n in ("placeholder_token", "initializer_token") if getattr(self._given, n) is None]
        if missing:
            logger.warning(
                f"No {' or '.join(missing)} given. A name of your own is how prompts call the concept, and a word for what the "
                'photos show, such as "dog", gives training a start that is near its end.'
            )
        return self.config.placeholder_token or "<concept>"

    def _check_words(self, images: Mapping[str, Images]) -> None:
        """Whether a mapping's keys are the placeholders that the settings are for."""
        given = self.config.initializer_token
        others = sorted(given.keys() - images.keys()) if isinstance(given, Mapping) else []
        if not images or others or self.config.placeholder_token is not None:
            raise ValueError(
                "A mapping is from placeholders to photos: it needs one or more of them, and neither `placeholder_token` nor "
                f"initializers for other words ({', '.join(others) or 'none here'}). Of a data set's splits, give one."
            )

    def _initializer(self, word: str) -> str | DirectionalInversion:
        given = self.config.initializer_token
        return (given.get(word) if isinstance(given, Mapping) else given) or self.config.learnable_property

    @property
    def _denoiser(self) -> str:
        """The model that an adapter is trained in."""
        present = list(self.family.present_denoisers())
        if len(present) > 1:
            raise ValueError(f"An adapter is trained in one model, and {type(self.pipe).__name__} has {' and '.join(present)}.")
        return present[0]

    def _initial(self, word: str) -> DirectionalInversion:
        """The initializer's directions, at the scale that the method starts from."""
        c, encoders = self.config, self._encoders()
        if METHODS[c.method].contextual_start:
            with frozen(self.pipe):
                rows = contextual_rows(encoders, self._initializer(word), c.num_vectors)
        else:
            rows = word_rows(encoders, self._initializer(word), c.num_vectors)
        initial = DirectionalInversion.from_embeddings(word, rows, self.metadata(word))
        if c.raw or c.token_scale == "initializer":
            return initial
        with ExitStack() as stack:
            for encoder in encoders.values():
                stack.enter_context(offload_disabled(encoder.model))
            scaled = rescale(encoders, initial, c.token_scale)
        return replace(scaled, metadata=initial.metadata)

    def _settings(self, placeholder_token: str) -> dict[str, Any]:
        """What decides the result, as JSON values."""
        c, initializer = self.config, self._initializer(placeholder_token)
        if isinstance(initializer, DirectionalInversion):
            initializer = initializer.placeholder_token
        own = {"placeholder_token": placeholder_token, "initializer_token": initializer}
        settings = {k: v for k, v in asdict(replace(c, initializer_token=None)).items() if k not in BESIDE_THE_POINT}
        return json.loads(json.dumps(settings | own))

    def metadata(self, word: str) -> dict[str, Any]:
        """What a concept's files will say of it."""
        c, settings = self.config, self._settings(word)
        base = self.pipe.config.get("_name_or_path") or ""
        return {
            "initializer": settings["initializer_token"],
            "base_model": Path(base).name if os.path.isdir(base) else base,  # a local path is nobody else's business
            "family": self.family.name,
            "method": c.method,
            "scale_rule": "learned" if c.raw or c.train_magnitude else c.token_scale,
            "pooling": c.pooling,
            "training": settings,
            "versions": {p: version(p) for p in ("diffusers-dti", "diffusers", "transformers", "torch")},
        }

    def _trainable(self, initial: DirectionalInversion, photos: Sequence[Photo]) -> TrainableConcept:
        c, family = self.config, self.family
        templates = c.templates or (STYLE_TEMPLATES if c.learnable_property == "style" else OBJECT_TEMPLATES)
        captions = [photo.caption for photo in photos]
        self._check_prompts(initial.placeholder_token, [*templates, *filter(None, captions)])
        crops = make_crops(photos, c.resolution, c.crops_per_image, c.seed, c.random_flip)
        samples = TrainingSamples(
            crops,
            family.encode_images(logging.tqdm([x.pixels for x in crops], desc="Encoding photos", leave=False)),
            templates,
            captions,
            initial.placeholder_token,
            family.scheduler.config.num_train_timesteps,
            c.seed,
            c.zero_pad,
        )
        return TrainableConcept.start(initial, samples, self._encoders(), c.raw, c.train_magnitude)

    def _check_prompts(self, word: str, prompts: Sequence[str]) -> None:
        """Whether the whole token fits into the tokenizer's window in each prompt: else it would learn nothing."""
        for encoder in self._encoders().values():
            own, tokenizer = set(encoder.token_ids(word)), encoder.tokenizer
            length = min(self.family.text_length, tokenizer.model_max_length) - (MAX_ZEROS if self.config.zero_pad else 0)
            for prompt in prompts:
                ids = tokenizer(prompt.replace("{}", word), truncation=True, max_length=length).input_ids
                if not own <= set(ids):
                    raise ValueError(
                        f"In {prompt!r} the placeholder comes after {length} tokens, where the prompt is "
                        "cut: shorten it, or put the placeholder further in front."
                    )
