"""`DTITrainer`: from a few photos to a token, on any family, by Directional or by classic textual inversion."""

import contextlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging
from PIL import Image

from . import checkpoint, families, loading, validation, vocabulary
from .config import DTIConfig
from .data import MAX_ZEROS, OBJECT_TEMPLATES, STYLE_TEMPLATES, Samples, make_crops
from .initializer import initializer_rows
from .inversion import DirectionalInversion
from .learner import Learner
from .offload import checkpointed, frozen, weights_at_hand
from .optim import RiemannianSGD
from .photos import ImageInput, Photo, load_photos
from .report import Report

logger = logging.get_logger(__name__)

LOG_EVERY = 10  # steps between two readings of loss and angle: each one waits for the device
# what does not change the result, and so may differ where a run goes on, and is no part of a concept's metadata
BESIDE_THE_POINT = (
    "output_dir", "checkpointing_steps", "resume_from_checkpoint", "validation_prompt", "validation_steps", "report_to",
    "gradient_checkpointing",
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
    are the pictures on the way, by step; `inversion` is the result, `inversions` those of several tokens.
    """

    def __init__(self, pipe: Any, config: DTIConfig | None = None, **overrides: Any):
        self.pipe = pipe
        self.family = families.find(pipe)
        self._given = replace(config or DTIConfig(), **overrides)
        self.config = self._given.resolved(self.family)
        self.family.training_scheduler(pipe)
        if self.config.validation_prompt:
            validation.check(pipe)
        if self.config.resolution % (side := self.family.resolution_step(pipe)):
            raise ValueError(
                f"This pipeline needs a resolution that is a multiple of {side}, got {self.config.resolution}: "
                f"{max(self.config.resolution // side, 1) * side} would do."
            )
        self.history: list[dict[str, float]] = []
        self.validation_images: dict[int, list[Image.Image]] = {}
        self.inversions: dict[str, DirectionalInversion] = {}

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
        raw = {word: initializer_rows(self._pairs(), self._initializer(word), self.config.num_vectors) for word in photos}
        initial = {word: self._initial(word, rows) for word, rows in raw.items()}
        loaded: list[str] = []
        try:
            for word, concept in initial.items():
                loading.place(self.pipe, concept, self.config.pooling, adopt=False)
                loaded.append(word)
            denoisers = [self.pipe.components[n] for n in self.family.DENOISERS if self.pipe.components.get(n) is not None]
            with frozen(self.pipe), checkpointed(denoisers, self.config.gradient_checkpointing):
                learners = [self._learner(initial[word], raw[word], photos[word]) for word in photos]
                self._train(learners, callback_on_step_end)
                for learner in learners:
                    for component, (_, encoder) in self._pairs().items():
                        vocabulary.set_rows(encoder, component, self.inversions[learner.initial.placeholder_token])
        except BaseException:
            loading.unload_directional_inversion(self.pipe, loaded)
            raise
        if self.config.output_dir is not None:
            checkpoint.save_concepts(self.config.output_dir, list(self.inversions.values()))
        return dict(self.inversions) if isinstance(images, Mapping) else self.inversion

    def plot(self, path: str | Path) -> None:
        """Draw loss, angle and norm over the steps. Needs matplotlib (`diffusers-dti[plot]`)."""
        validation.plot(self.history, path)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Push the learned concept, see `DirectionalInversion.push_to_hub`."""
        if len(self.inversions) != 1:
            raise ValueError("There is no one concept to push: call `fit` first, and push several concepts one by one.")
        return self.inversion.push_to_hub(repo_id, **kwargs)

    # -------------------------------------------------------------------------------------------------------- the start
    def _pairs(self) -> dict[str, loading.Pair]:
        return loading.text_pairs(self.pipe)

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

    def _initial(self, word: str, rows: dict[str, torch.Tensor]) -> DirectionalInversion:
        """The initializer's directions, at the scale that the method starts from."""
        initial = DirectionalInversion.from_embeddings(word, rows, self._metadata(word))
        if self.config.method == "ti":
            return initial
        pairs = self._pairs()
        with ExitStack() as stack:
            for _, encoder in pairs.values():
                stack.enter_context(weights_at_hand(encoder))
            return loading.rescale(pairs, initial, self.config.token_scale)

    def _metadata(self, word: str) -> dict[str, Any]:
        c, initializer = self.config, self._initializer(word)
        base = self.pipe.config.get("_name_or_path") or ""
        settings = {k: v for k, v in asdict(replace(c, initializer_token=None)).items() if k not in BESIDE_THE_POINT}
        if isinstance(initializer, DirectionalInversion):
            initializer = initializer.placeholder_token
        return {
            "initializer": initializer,
            "base_model": Path(base).name if os.path.isdir(base) else base,  # a local path is nobody else's business
            "family": self.family.NAME,
            "method": c.method,
            "scale_rule": "learned" if c.method == "ti" else c.token_scale,
            "pooling": c.pooling,
            "training": settings | {"placeholder_token": word, "initializer_token": initializer},
            "versions": {p: version(p) for p in ("diffusers-dti", "diffusers", "transformers", "torch")},
        }

    def _learner(self, initial: DirectionalInversion, raw: dict[str, torch.Tensor], photos: Sequence[Photo]) -> Learner:
        c, pipe, family = self.config, self.pipe, self.family
        templates = c.templates or (STYLE_TEMPLATES if c.learnable_property == "style" else OBJECT_TEMPLATES)
        captions = [photo.caption for photo in photos]
        self._check_prompts(initial.placeholder_token, [*templates, *filter(None, captions)])
        crops = make_crops(photos, c.resolution, c.crops_per_image, c.seed, c.random_flip)
        samples = Samples(
            crops,
            family.encode_images(pipe, logging.tqdm([x.pixels for x in crops], desc="Encoding photos", leave=False)),
            templates,
            captions,
            initial.placeholder_token,
            family.training_scheduler(pipe).config.num_train_timesteps,
            c.seed,
            c.zero_pad,
        )
        is_raw = c.method == "ti"
        return Learner.start(initial, raw if is_raw else initial.directions, samples, self._pairs(), is_raw)

    def _check_prompts(self, word: str, prompts: Sequence[str]) -> None:
        """Whether the whole token fits into the tokenizer's window in each prompt: else it would learn nothing."""
        for tokenizer, encoder in self._pairs().values():
            own = set(vocabulary.ledger_of(encoder).entries[word].ids)
            length = min(self.family.TEXT_LENGTH, tokenizer.model_max_length) - (MAX_ZEROS if self.config.zero_pad else 0)
            for prompt in prompts:
                ids = tokenizer(prompt.replace("{}", word), truncation=True, max_length=length).input_ids
                if not own <= set(ids):
                    raise ValueError(
                        f"In {prompt!r} the placeholder comes after {length} tokens, where the prompt is "
                        "cut: shorten it, or put the placeholder further in front."
                    )

    def _optimizer(self, learners: Sequence[Learner]) -> torch.optim.Optimizer:
        c = self.config
        if c.method == "ti":
            # diffusers' textual inversion scripts
            parameters = [r.direction for x in learners for r in x.rows.values()]
            return torch.optim.AdamW(parameters, lr=c.effective_learning_rate, weight_decay=1e-2)
        groups = [
            {"params": [r.direction], "prior": x.initial.directions[component].to(r.direction.device)}
            for x in learners
            for component, r in x.rows.items()
        ]
        return RiemannianSGD(groups, lr=c.effective_learning_rate, kappa=c.kappa, beta=c.beta)

    # --------------------------------------------------------------------------------------------------------- the loop
    def _train(self, learners: Sequence[Learner], callback: Callable[["DTITrainer", int], None] | None) -> None:
        c, pipe = self.config, self.pipe
        words = [x.initial.placeholder_token for x in learners]
        optimizer, scheduler = self._optimizer(learners), self.family.training_scheduler(pipe)
        settings: dict[str, Any] = {"tokens": words}  # in their order
        for word, learner in zip(words, learners):
            own = json.loads(json.dumps(learner.initial.metadata["training"])) | learner.digests()
            settings |= {f"{word} {k}": v for k, v in own.items() if k != "max_train_steps"}  # a run may be made longer
        step = 0
        if c.resume_from_checkpoint and (folder := checkpoint.find(c.output_dir, c.resume_from_checkpoint)):
            step = checkpoint.load(folder, learners, optimizer, settings)
            logger.info(f"Going on from {folder}.")
        report = Report(c, ", ".join(words), step, learners[0].initial.metadata["training"])
        self.history, self.validation_images, self.inversions = report.history, report.images, {}
        # float16 needs its losses scaled up; they are scaled back before the optimizer, which weighs them against the prior
        half = torch.float16 in {m.dtype for m in pipe.components.values() if isinstance(m, torch.nn.Module)}
        scaler = torch.amp.GradScaler(pipe.device.type, init_scale=2.0**14, enabled=half)
        totals, readings = torch.zeros(len(learners), device=pipe.device), 0
        with ExitStack() as stack:
            stack.callback(report.close)
            for learner in learners:
                stack.enter_context(learner.swapped_in(self._pairs()))
            try:
                while step < c.max_train_steps:
                    losses = self._accumulate(learners, step, scheduler, scaler)
                    scaler.unscale_(optimizer)
                    scaler.step(optimizer)
                    optimizer.zero_grad(set_to_none=True)
                    if half and _overflowed(scaler):
                        continue  # the same samples again, at half the scale: no step is lost
                    totals, readings, step = totals + losses, readings + 1, step + 1
                    report.bar.update()
                    if step % LOG_EVERY == 0 or step == c.max_train_steps:
                        means = dict(zip(words, (totals / readings).tolist()))
                        skipped = sum(int(s["skipped"].sum()) for s in optimizer.state.values() if "skipped" in s)
                        report.figures(step, means, {w: x.figures() for w, x in zip(words, learners)}, skipped)
                        totals, readings = torch.zeros_like(totals), 0
                    if c.validation_prompt and (step % c.validation_steps == 0 or step == c.max_train_steps):
                        prompts = [c.validation_prompt] if isinstance(c.validation_prompt, str) else c.validation_prompt
                        prompts = [p.replace("{}", word) for p in prompts for word in (words if "{}" in p else words[:1])]
                        with torch.no_grad():
                            report.pictures(step, validation.generate(pipe, self.family, prompts, c.resolution, c.seed))
                    if c.checkpointing_steps and step % c.checkpointing_steps == 0:
                        checkpoint.save(c.output_dir, step, learners, optimizer, settings)
                    if callback is not None:
                        callback(self, step)
                self.inversions = {w: x.current() for w, x in zip(words, learners)}
            except BaseException:  # an interruption too: what was trained is kept
                for word, learner in zip(words, learners):
                    with contextlib.suppress(ValueError):  # raw rows may have become infinite: not to hide the error
                        self.inversions[word] = learner.current()
                if len(self.inversions) == len(words) and c.output_dir is not None and step:
                    folder = checkpoint.save(c.output_dir, step, learners, optimizer, settings)
                    logger.warning(f'Stopped at step {step}; go on with resume_from_checkpoint="{folder.name}".')
                raise

    def _accumulate(self, learners: Sequence[Learner], step: int, scheduler: Any, scaler: torch.amp.GradScaler) -> torch.Tensor:
        """One step's gradients, averaged over accumulated batches; returns each concept's mean loss."""
        c, pipe, family = self.config, self.pipe, self.family
        autocast = contextlib.nullcontext()
        if c.mixed_precision == "bf16":
            autocast = torch.autocast(pipe.device.type, dtype=torch.bfloat16)
        losses = []
        for learner in learners:
            total = torch.zeros((), device=pipe.device)
            for micro in range(c.gradient_accumulation_steps):
                first = (step * c.gradient_accumulation_steps + micro) * c.train_batch_size
                batch = learner.samples.batch(first, c.train_batch_size, pipe.device)
                with autocast:
                    conditioning = family.encode_prompts(pipe, batch.prompts, batch.zero_pads)
                    loss = family.loss(pipe, scheduler, batch, conditioning)
                scaler.scale(loss / c.gradient_accumulation_steps).backward()
                total = total + loss.detach() / c.gradient_accumulation_steps
            losses.append(total)
        return torch.stack(losses)


def _overflowed(scaler: torch.amp.GradScaler) -> bool:
    """Update the scale and say whether the step was left out; below a scale of 1 it is not for overflow that it was."""
    before = scaler.get_scale()
    scaler.update()
    return 1 < before > scaler.get_scale()
