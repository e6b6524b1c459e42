"""Train many subjects at a time: each run is as it would be alone, and only the models are called for all of them at once."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from ..concept.inversion import DirectionalInversion
from ..data.images import Photo
from ..pipeline import vocabulary
from ..pipeline.exchange import inject, making_way, withdraw
from ..pipeline.listing import directional_inversions
from ..pipeline.locks import training
from ..pipeline.text_encoders import find_text_encoders
from .distributed import alone
from .frozen import at_work, frozen, gradient_checkpointing
from .gradients import gradients_enabled
from .joint_step import take_together
from .loop import Loop
from .output import save_or_warn, uninterrupted, writing
from .photos import Captions, Images, photos_by_placeholder
from .samples import TrainingSamples, prepare_all_samples
from .starts import choose_starts, make_concepts
from .trainer import DTITrainer

# All other settings are a run's own. These belong to the call of the models, or to the models themselves.
SHARED = (
    "resolution", "gradient_accumulation_steps", "mixed_precision", "pooling", "gradient_checkpointing",
    "gradient_checkpointing_interval",
)  # fmt: skip


def fit_together(
    trainers: Sequence[DTITrainer], images: Sequence[Images], captions: Sequence[Captions | None] | None = None
) -> list[DirectionalInversion | Exception]:
    """Train several trainers of one pipeline, each as its own `fit` would, with one call of the models for a step of all.

    Every run has its own samples, optimizer, checks, log, checkpoints and `output_dir`. It learns what it learns alone, but for
    the rounding of another batch size, which SGD carries on. An error in one run ends only that run. Under `accelerate launch`
    every process trains its own trainers.

    Args:
        trainers: at least one, each with its own placeholder.
        images: the photos of each trainer, see `DTITrainer.fit`.
        captions: the captions of each trainer, or None.

    Returns:
        For each trainer the concept, which is loaded, or the error that ended its run.

    Raises:
        ValueError: if these runs cannot share the calls of the models, before anything is trained.
        RuntimeError: if an encoder is being trained already, or the models fail, as for want of memory: every run leaves a
            checkpoint, and the pipeline is as it was.
    """
    check_together(trainers)
    pipe, encoders = trainers[0].pipe, find_text_encoders(trainers[0].pipe)
    runs = [Run(*given) for given in zip(trainers, images, captions or [None] * len(trainers), strict=True)]
    models = [encoder.model for encoder in encoders.values()]
    with alone(), gradients_enabled(trainers[0].family), writing(None), training(models), ExitStack() as folders:
        with making_way(pipe, [run.placeholder for run in runs]):
            _train(runs, folders)
            for run in unbroken(runs):
                with run.kept_apart():
                    vocabulary.set_rows(encoders.values(), list(run.trainer.inversions.values()))
            withdraw(pipe, [run.placeholder for run in runs if run.error is not None])
        for run in unbroken(runs):
            save_or_warn(run.trainer.save_pretrained, run.trainer.config.output_dir)
    return [run.error or run.trainer.inversions[run.placeholder] for run in runs]


def check_together(trainers: Sequence[DTITrainer]) -> None:
    """Check that several trainers can share the calls of the models.

    Raises:
        ValueError: if they cannot, naming what is in the way.
    """
    first, words = trainers[0], [placeholder_of(trainer) for trainer in trainers]
    for trainer in trainers:
        if trainer.pipe is not first.pipe:
            raise ValueError("Subjects of one batch are trained in one pipeline, and these trainers have several.")
        if trainer.config.adapter is not None:
            raise ValueError(
                "An adapter changes the denoiser, which the subjects of a batch share: each would be trained on the others' "
                "photos. Train them one by one (subjects_per_batch 1), or without an adapter."
            )
        if trainer.config.report_to is not None:
            raise ValueError("A tracker follows one run: leave out report_to, or train one by one (subjects_per_batch 1).")
        differing = [name for name in SHARED if getattr(trainer.config, name) != getattr(first.config, name)]
        if differing:
            raise ValueError(f"Subjects of one batch have the same {', '.join(differing)}: train others in another batch.")
    if len(set(words)) < len(words):
        raise ValueError(f"Each subject of a batch needs a placeholder of its own, got {', '.join(words)}.")
    if loaded := [word for word in words if word in directional_inversions(first.pipe)]:
        raise ValueError(f"{', '.join(loaded)} is loaded already: unload it first, or choose another placeholder.")


def placeholder_of(trainer: DTITrainer) -> str:
    """Return the placeholder of a trainer's only concept."""
    return trainer.config.placeholder_token or "<concept>"


class Run:
    """The run of one trainer among others.

    Args:
        trainer, images, captions: see `fit_together`.

    Attributes:
        photos: the photos by placeholder.
        starts: what it may start from, by placeholder.
        samples: its samples, by placeholder.
        loop: its loop.
        error: what has ended it, or None.
    """

    photos: dict[str, list[Photo]]
    starts: dict[str, list[DirectionalInversion]]
    samples: dict[str, TrainingSamples]
    loop: Loop

    def __init__(self, trainer: DTITrainer, images: Images, captions: Captions | None):
        self.trainer, self.images, self.captions = trainer, images, captions
        self.placeholder = placeholder_of(trainer)
        self.error: Exception | None = None
        self.contexts = ExitStack()  # what ends with it

    @contextmanager
    def kept_apart(self) -> Iterator[None]:
        """Let an error in the block end this run, and no other."""
        try:
            yield
        except Exception as error:
            self.error = error
            self.contexts.__exit__(type(error), error, error.__traceback__)

    def begin(self, folders: ExitStack) -> None:
        """Read the photos, and load the concept as it starts."""
        trainer = self.trainer
        trainer.family.forget()
        _ = trainer.family.device  # read before the hooks that know it are gone, see `frozen`
        self.photos = photos_by_placeholder(trainer.config, self.images, self.captions, None)
        folders.enter_context(writing(trainer.config.output_dir))
        config, self.starts = choose_starts(trainer.family, trainer._given_config, self.photos)
        trainer.config = config
        concepts = [(own[0], config.pooling) for own in self.starts.values()]
        inject(trainer.pipe, concepts, reuse_existing=False)

    def encode(self) -> None:
        """Encode the photos."""
        self.samples = prepare_all_samples(self.trainer.family, self.trainer.config, self.photos)

    def prepare(self) -> None:
        """Make the loop."""
        trainer = self.trainer
        concepts = make_concepts(trainer.family, trainer.config, self.starts, self.samples)
        self.loop = trainer._make_loop(concepts, None, None)


def unbroken(runs: Sequence[Run]) -> list[Run]:
    """Return the runs without an error."""
    return [run for run in runs if run.error is None]


def _train(runs: Sequence[Run], folders: ExitStack) -> None:
    """Take all steps of all runs."""
    family, config = runs[0].trainer.family, runs[0].trainer.config
    for run in runs:
        with run.kept_apart():
            run.begin(folders)
    with frozen(family), ExitStack() as contexts:
        for run in unbroken(runs):
            with run.kept_apart():
                run.encode()
        contexts.enter_context(at_work(family))
        contexts.enter_context(gradient_checkpointing(family, config))
        for run in unbroken(runs):
            with run.kept_apart():
                run.prepare()
        for run in unbroken(runs):
            contexts.enter_context(run.contexts)
            run.contexts.enter_context(run.loop.running())
        while active := [run for run in unbroken(runs) if not run.loop.done]:
            with uninterrupted():
                losses = take_together([run.loop.stepper for run in active], [run.loop.step for run in active])
                for run, own in zip(active, losses):
                    run.loop.count(own)
            for run, own in zip(active, losses):
                with run.kept_apart():
                    run.loop.finish_step(own)
        for run in unbroken(runs):
            with run.kept_apart():
                run.contexts.close()
