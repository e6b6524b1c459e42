"""`DTITrainer`: from a few photos to a token, on any family, by Directional or by classic textual inversion."""

import contextlib
import json
import os
from collections.abc import Sequence
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
from .data import OBJECT_TEMPLATES, STYLE_TEMPLATES, Samples, make_crops
from .embedding import TrainableRows
from .inversion import DirectionalInversion
from .offload import frozen, weights_at_hand
from .optim import RiemannianSGD
from .photos import ImageInput, Photo, load_photos
from .sphere import angle, unit

logger = logging.get_logger(__name__)

LOG_EVERY = 10  # steps between two readings of loss and angle: each one waits for the device
LOG_NAME = "train_log.jsonl"


class DTITrainer:
    """Learns a concept in the text encoders of a pipeline.

    Args:
        pipe: a pipeline of a supported family, on the device and in the dtype to train with.
        config: settings; `overrides` replace single ones.

    Raises:
        ValueError: for settings that cannot be, or a pipeline of no supported family.

    `history` is what the log file gets, a dict every 10 steps; `validation_images` the pictures on the way, by step;
    `inversion` the result, also after an interruption.
    """

    def __init__(self, pipe: Any, config: DTIConfig | None = None, **overrides: Any):
        self.pipe = pipe
        self.family = families.find(pipe)
        config = replace(config or DTIConfig(), **overrides)
        missing = [n for n in ("placeholder_token", "initializer_token") if getattr(config, n) is None]
        if missing:
            logger.warning(
                f"No {' or '.join(missing)} given. A name of your own is how prompts call the concept, and a word for what the "
                'photos show, such as "dog", gives training a start that is near its end.'
            )
            initializer = config.initializer_token or config.learnable_property
            config = replace(config, placeholder_token=config.placeholder_token or "<concept>", initializer_token=initializer)
        self.config = config.resolved(self.family)
        if self.config.resolution % pipe.vae_scale_factor:
            raise ValueError(
                f"This pipeline's VAE needs a resolution that is a multiple of {pipe.vae_scale_factor}, got "
                f"{self.config.resolution}: {self.config.resolution // pipe.vae_scale_factor * pipe.vae_scale_factor} would do."
            )
        self.history: list[dict[str, float]] = []
        self.validation_images: dict[int, list[Image.Image]] = {}
        self.inversion: DirectionalInversion | None = None

    def fit(
        self,
        images: ImageInput | Sequence[ImageInput] | Any,
        captions: Sequence[str | None] | None = None,
        masks: Sequence[ImageInput | None] | None = None,
    ) -> DirectionalInversion:
        """Train on photos, and leave the pipeline ready to use the token and otherwise as it was.

        Args:
            images: 3 to 6 photos: a folder, a list of files or pictures, or a `datasets.Dataset`.
            captions: a text for each photo with "{}" for the placeholder; None for templates. By default `.txt` files beside
                the photos, or the data set's column.
            masks: a picture for each photo, white where the subject is: the loss counts there alone. By default a photo's
                own transparency.

        Returns:
            The learned concept; it is loaded in the pipeline, and saved in `output_dir` if there is one.

        Raises:
            ValueError, OSError: for photos, captions or a placeholder that cannot be used; nothing has changed then.
        """
        photos = load_photos(images, captions, masks)
        rows = self._initializer_rows()
        initial = self._initial(rows)
        loading.load_directional_inversion(self.pipe, initial, pooling=self.config.pooling)
        try:
            with frozen(self.pipe):
                start = rows if self.config.method == "ti" else initial.directions
                self.inversion = self._train(start, initial, photos)
                for component, pair in self._pairs().items():
                    vocabulary.set_rows(*pair, component, self.inversion)
        except BaseException:
            loading.unload_directional_inversion(self.pipe, initial.placeholder_token)
            raise
        if self.config.output_dir is not None:
            self.inversion.save_pretrained(self.config.output_dir)
        return self.inversion

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Push the learned concept, see `DirectionalInversion.push_to_hub`."""
        if self.inversion is None:
            raise ValueError("There is nothing to push yet: call `fit` first.")
        return self.inversion.push_to_hub(repo_id, **kwargs)

    # -------------------------------------------------------------------------------------------------------- the start
    def _pairs(self) -> dict[str, loading.Pair]:
        return loading.text_pairs(self.pipe)

    def _initializer_rows(self) -> dict[str, torch.Tensor]:
        """The initializer's own rows, (n, d) float32 per component."""
        c, rows = self.config, {}
        for component, (tokenizer, encoder) in self._pairs().items():
            ids = tokenizer(c.initializer_token, add_special_tokens=False).input_ids
            if not ids:
                raise ValueError(f"The initializer {c.initializer_token!r} is no text: give a word for what is on the photos.")
            ids = [ids[i % len(ids)] for i in range(c.num_vectors or len(ids))]
            with weights_at_hand(encoder):
                rows[component] = vocabulary.table(encoder).detach()[ids].float().cpu()
        return rows

    def _initial(self, rows: dict[str, torch.Tensor]) -> DirectionalInversion:
        """The initializer's directions, at the scale that the method starts from."""
        initial = DirectionalInversion.from_embeddings(self.config.placeholder_token, rows, self._metadata())
        if self.config.method == "ti":
            return initial
        pairs = self._pairs()
        with ExitStack() as stack:
            for _, encoder in pairs.values():
                stack.enter_context(weights_at_hand(encoder))
            return loading.rescale(pairs, initial, self.config.token_scale)

    def _metadata(self) -> dict[str, Any]:
        c = self.config
        base = self.pipe.config.get("_name_or_path") or ""
        settings = {
            k: v for k, v in asdict(c).items() if k not in ("output_dir", "resume_from_checkpoint", "checkpointing_steps")
        }
        return {
            "initializer": c.initializer_token,
            "base_model": Path(base).name if os.path.isdir(base) else base,  # a local path is nobody else's business
            "family": self.family.NAME,
            "method": c.method,
            "scale_rule": "learned" if c.method == "ti" else c.token_scale,
            "pooling": c.pooling,
            "training": settings,
            "versions": {p: version(p) for p in ("diffusers-dti", "diffusers", "transformers", "torch")},
        }

    def _optimizer(self, rows: dict[str, TrainableRows], initial: DirectionalInversion) -> torch.optim.Optimizer:
        c = self.config
        if c.method == "ti":
            # diffusers' textual inversion scripts
            return torch.optim.AdamW([r.direction for r in rows.values()], lr=c.effective_learning_rate, weight_decay=1e-2)
        groups = [{"params": [r.direction], "prior": initial.directions[component]} for component, r in rows.items()]
        return RiemannianSGD(groups, lr=c.effective_learning_rate, kappa=c.kappa, beta=c.beta)

    # --------------------------------------------------------------------------------------------------------- the loop
    def _train(
        self,
        start: dict[str, torch.Tensor],
        initial: DirectionalInversion,
        photos: Sequence[Photo],
    ) -> DirectionalInversion:
        """Train from `start`: directions, or the raw rows of classic textual inversion."""
        c, pipe, family = self.config, self.pipe, self.family
        scheduler = family.training_scheduler(pipe)
        templates = c.templates or (STYLE_TEMPLATES if c.learnable_property == "style" else OBJECT_TEMPLATES)
        crops = make_crops(photos, c.resolution, c.crops_per_image, c.seed, c.random_flip)
        samples = Samples(
            crops,
            family.encode_images(pipe, logging.tqdm([x.pixels for x in crops], desc="Encoding photos", leave=False)),
            templates,
            [photo.caption for photo in photos],
            initial.placeholder_token,
            scheduler.config.num_train_timesteps,
            c.seed,
        )
        rows = {}
        for component, (tokenizer, encoder) in self._pairs().items():
            ids = tokenizer.convert_tokens_to_ids(vocabulary.ledger_of(encoder).entries[initial.placeholder_token].names)
            scale = torch.ones(len(ids)) if c.method == "ti" else initial.scales[component]
            rows[component] = TrainableRows(ids, start[component], scale).to(encoder.device)
        optimizer = self._optimizer(rows, initial)
        settings = json.loads(json.dumps(initial.metadata["training"]))
        settings.pop("max_train_steps")  # a run may be made longer

        step = 0
        if c.resume_from_checkpoint and (folder := checkpoint.find(c.output_dir, c.resume_from_checkpoint)):
            step = checkpoint.load(folder, rows, optimizer, settings)
            logger.info(f"Going on from {folder}.")
        self._start_log(step)
        autocast = contextlib.nullcontext()
        if c.mixed_precision == "bf16":
            autocast = torch.autocast(pipe.device.type, dtype=torch.bfloat16)
        # float16 needs its losses scaled up; they are scaled back before the optimizer, which weighs them against the prior
        half = torch.float16 in {m.dtype for m in pipe.components.values() if isinstance(m, torch.nn.Module)}
        scaler = torch.amp.GradScaler(pipe.device.type, init_scale=2.0**14, enabled=half)
        total, readings = torch.zeros((), device=pipe.device), 0
        with ExitStack() as stack:
            for component, (_, encoder) in self._pairs().items():
                stack.enter_context(rows[component].swapped_in(encoder))
            bar = stack.enter_context(logging.tqdm(total=c.max_train_steps, initial=step, desc=initial.placeholder_token))
            try:
                while step < c.max_train_steps:
                    for micro in range(c.gradient_accumulation_steps):
                        first = (step * c.gradient_accumulation_steps + micro) * c.train_batch_size
                        batch = samples.batch(first, c.train_batch_size, pipe.device)
                        with autocast:
                            loss = family.loss(pipe, scheduler, batch, family.encode_prompts(pipe, batch.prompts))
                        scaler.scale(loss / c.gradient_accumulation_steps).backward()
                        total, readings = total + loss.detach(), readings + 1
                    scaler.unscale_(optimizer)
                    scaler.step(optimizer)
                    optimizer.zero_grad(set_to_none=True)
                    if half and _overflowed(scaler):
                        continue  # the same samples again, at half the scale: no step is lost
                    step += 1
                    bar.update()
                    if step % LOG_EVERY == 0 or step == c.max_train_steps:
                        figures = self._log(step, total.item() / readings, rows, initial, optimizer)
                        bar.set_postfix(loss=f"{figures['loss']:.4f}", angle=f"{figures['angle']:.1f}°")
                        total, readings = torch.zeros_like(total), 0
                    if c.validation_prompt and (step % c.validation_steps == 0 or step == c.max_train_steps):
                        self._validate(step, initial.placeholder_token)
                    if c.checkpointing_steps and step % c.checkpointing_steps == 0:
                        checkpoint.save(c.output_dir, step, self._current(rows, initial), rows, optimizer, settings)
            except BaseException:  # an interruption too: what was trained is kept
                self.inversion = self._current(rows, initial)
                if c.output_dir is not None and step:
                    folder = checkpoint.save(c.output_dir, step, self.inversion, rows, optimizer, settings)
                    logger.warning(f'Stopped at step {step}; go on with resume_from_checkpoint="latest" from {folder}.')
                raise
        return self._current(rows, initial)

    def _current(self, rows: dict[str, TrainableRows], initial: DirectionalInversion) -> DirectionalInversion:
        if self.config.method == "ti":
            raw = {component: r().detach() for component, r in rows.items()}
            return DirectionalInversion.from_embeddings(initial.placeholder_token, raw, initial.metadata)
        directions = {component: r.direction.detach().cpu().clone() for component, r in rows.items()}
        return replace(initial, directions=directions)

    def _log(
        self,
        step: int,
        loss: float,
        rows: dict[str, TrainableRows],
        initial: DirectionalInversion,
        optimizer: torch.optim.Optimizer,
    ) -> dict[str, float]:
        """Loss since the last reading, angle to the initializer (degrees) and norm, means over all vectors."""
        trained = {component: r().detach().cpu() for component, r in rows.items()}
        angles = torch.cat([angle(unit(e), initial.directions[component]) for component, e in trained.items()])
        norms = torch.cat([torch.linalg.vector_norm(e, dim=-1) for e in trained.values()])
        skipped = sum(int(s["skipped"].sum()) for s in optimizer.state.values() if "skipped" in s)
        figures = {"step": step, "loss": loss, "angle": angles.rad2deg().mean().item(), "norm": norms.mean().item()}
        if skipped:
            figures["skipped"] = skipped
            logger.warning(f"{skipped} row updates left out so far: their gradients were not finite.")
        self.history.append(figures)
        if self.config.output_dir is not None:
            with (Path(self.config.output_dir) / LOG_NAME).open("a") as file:
                file.write(json.dumps(figures) + "\n")
        return figures

    def _validate(self, step: int, placeholder: str) -> None:
        prompts = (
            [self.config.validation_prompt] if isinstance(self.config.validation_prompt, str) else self.config.validation_prompt
        )
        prompts = [p.replace("{}", placeholder) for p in prompts]
        self.validation_images[step] = validation.generate(self.pipe, prompts, self.config.seed)
        if self.config.output_dir is not None:
            validation.strip(self.validation_images).save(Path(self.config.output_dir) / "validation.png")

    def _start_log(self, step: int) -> None:
        """Keep what an earlier run logged up to the step that this one goes on from: nothing for a run from the start."""
        self.history, self.validation_images = [], {}
        if self.config.output_dir is None:
            return
        log = Path(self.config.output_dir) / LOG_NAME
        log.parent.mkdir(parents=True, exist_ok=True)
        if log.exists():
            self.history = [x for x in map(json.loads, log.read_text().splitlines()) if x["step"] <= step]
        log.write_text("".join(json.dumps(x) + "\n" for x in self.history))


def _overflowed(scaler: torch.amp.GradScaler) -> bool:
    """Update the scale and say whether the step was left out; below a scale of 1 it is not for overflow that it was."""
    before = scaler.get_scale()
    scaler.update()
    return 1 < before > scaler.get_scale()
