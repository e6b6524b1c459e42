"""The study's smaller questions. Each function answers one in a world, and returns the header and the rows of a table."""

import statistics
from collections.abc import Callable, Iterator, Sequence

import effects
import measure
import scenes
from captions import NOUNS
from diffusers import DiffusionPipeline
from gates import open_world, world_of
from mixtures import measure_mixture, straight
from PIL import Image
from rows import FINAL, NEW, TI_INFLATED

from diffusers_dti import DirectionalInversion, DTITrainer
from diffusers_dti.evaluation.summary import Record, summarize

Table = list[list[str]]
PHOTOS_SEEDS, HELD = 2, 1  # seeds, and photos that are not trained on
POINTS = (0.25, 0.5, 0.75)
PAIRS = ((0, 3), (1, 4), (2, 5))  # of test subjects


def effects_of_length(world: str) -> Table:
    """Measure what a long row does inside the encoders."""
    table = [["encoder", "effect", *(f"{m} x mean norm" for m in effects.MULTIPLES)]]
    for component, by_multiple in effects.measure(world, list(NOUNS)[:24]).items():
        for i, effect in enumerate(effects.EFFECTS):
            table.append([component, effect, *(f"{by_multiple[m][i]:.1f}°" for m in effects.MULTIPLES)])
    return table


def loss_on(pipe: DiffusionPipeline, photos: Sequence[Image.Image], start: str | DirectionalInversion) -> float:
    """Return the held-out loss of rows on photos: that of a step that moves nothing."""
    trainer = DTITrainer(
        pipe, placeholder_token=measure.TOKEN, initializer_token=start, resolution=photos[0].width, max_train_steps=1,
        learning_rate=0.0, heldout_loss_steps=1,
    )  # fmt: skip
    trainer.fit(photos)
    pipe.unload_directional_inversion(measure.TOKEN)
    return trainer.history[-1]["heldout_loss"]


def held_photo(world: str) -> Table:
    """Measure how much of the loss that training saves on its photos is saved on a photo that it did not see."""
    pipe, found = open_world(world), list[Record]()
    for bundle in scenes.TEST_SUBJECTS:
        for seed in range(PHOTOS_SEEDS):
            photos = scenes.photos(bundle, pixels=world_of(pipe).pixels, seed=seed)
            seen, held = photos[:-HELD], photos[-HELD:]
            trainer = DTITrainer(
                pipe,
                placeholder_token=measure.TOKEN,
                initializer_token=bundle.shape,
                resolution=photos[0].width,
                seed=seed,
                **NEW,
            )
            trainer.fit(seen)
            pipe.unload_directional_inversion(measure.TOKEN)
            assert trainer.inversion is not None
            scores = {}
            for name, part in (("photos trained on", seen), ("photo held out", held)):
                scores[f"{name}, word"] = loss_on(pipe, part, bundle.shape)
                scores[f"{name}, learned"] = loss_on(pipe, part, trainer.inversion)
            found.append({"run": "", "subject": bundle.words(), "prompt": "", "seed": seed, "scores": scores})
    (summary,) = summarize(found).values()
    cells = [f"{e['mean']:.4f} [{e['low']:.4f}, {e['high']:.4f}]" for e in summary["mean"].values()]
    return [["", "loss of the word", "loss when learned"], ["photos trained on", *cells[:2]], ["photo held out", *cells[2:]]]


def mixtures(world: str) -> Table:
    """Mix pairs of concepts on the sphere and on the straight line: of DTI, and of a TI that is as long as in real models."""
    pipe = open_world(world)
    ti = {"method": "ti", "learning_rate": TI_INFLATED[world], "max_train_steps": FINAL[world]}
    table = [["method", "way", "t", "of the nearer subject", "of neither", "of the prompt", "norm"]]
    for method, settings in (("DTI", NEW), ("TI, as long as in real models", ti)):
        learned = {}
        for number in sorted({n for pair in PAIRS for n in pair}):
            *_, learned[number] = measure.learn(pipe, scenes.TEST_SUBJECTS[number], 0, **settings)
        for way, mix in _ways():
            for t in POINTS:
                figures = []
                for a, b in PAIRS:
                    first, second = scenes.TEST_SUBJECTS[a], scenes.TEST_SUBJECTS[b]
                    figures.append(measure_mixture(pipe, mix(learned[a], learned[b], t), first, second).figures)
                mean = {key: statistics.mean(f[key] for f in figures) for key in figures[0]}
                nearer = f"{max(mean['a'], mean['b']):.3f}"
                table.append(
                    [method, way, f"{t}", nearer, f"{mean['neither']:.3f}", f"{mean['scene']:.3f}", f"{mean['norm']:.2f}"]
                )
    return table


def _ways() -> Iterator[tuple[str, Callable[..., DirectionalInversion]]]:
    yield "sphere", lambda a, b, t: a.slerp(b, t)
    yield "straight line", straight


ASIDES: dict[str, Callable[[str], Table]] = {"effects": effects_of_length, "photo": held_photo, "mixtures": mixtures}
