"""The context loss against its formula, with the pipeline's own states for the prompts, also for those with the class noun."""

import pytest
import torch
from tiny_modern import encode
from tiny_pipelines import fresh_copy
from torch.nn.functional import cosine_similarity

from diffusers_dti import DTITrainer
from diffusers_dti.evaluation import prompts as evaluation
from diffusers_dti.pipeline.text_encoders import find_text_encoders
from diffusers_dti.training import trainer as trainer_module
from diffusers_dti.training.context import OBJECT_PROMPTS, STYLE_PROMPTS
from diffusers_dti.training.seeds import seeded_generator

SETTINGS = {"placeholder_token": "<dog>", "initializer_token": "dog", "resolution": 32, "train_batch_size": 2}
# The second is untidy: SANA lower-cases it, and Wan removes the spaces. CLIP's tokenizers do both themselves.
PROMPTS = ["a {} near the beach", " My {} in a  red and blue Tower ", "a painting of a {}", "the {} on a robot"]


@pytest.fixture
def loop_of(photos, monkeypatch):
    """Return a function that trains, and calls another one after each step: with the loop, its trainer and the step."""
    loops, original = [], trainer_module.Loop

    def loop(*args):
        loops.append(original(*args))
        return loops[-1]

    monkeypatch.setattr(trainer_module, "Loop", loop)

    def train(pipe, look=None, images=photos, **settings):
        trainer = DTITrainer(pipe, **SETTINGS | {"max_train_steps": 2} | settings)
        learned = trainer.fit(images, callback_on_step_end=look and (lambda t, step: look(loops[-1], t, step)))
        pipe.unload_directional_inversion()
        return learned

    return train


def own_states(pipe, prompt):
    """Return what the pipeline's own `encode_prompt` makes of a prompt, (tokens, d) float64."""
    settings = {"do_classifier_free_guidance": False, "device": "cpu"}
    if "Wan" not in type(pipe).__name__ and "Sana" not in type(pipe).__name__:
        settings["num_images_per_prompt"] = 1
    return pipe.encode_prompt(prompt, **settings)[0][0].double()


def written_distance(pipe, prompt):
    """Write the formula out: 1 - cos, mean over the tokens that are not the placeholder's, mean over the encoders."""
    with torch.no_grad():
        now, noun = (own_states(pipe, prompt.replace("{}", word)) for word in ("<dog>", "dog"))
    tidy = {"SanaPipeline": prompt.lower().strip(), "WanPipeline": " ".join(prompt.split())}.get(type(pipe).__name__, prompt)
    distances, first = [], 0
    for encoder in find_text_encoders(pipe).values():
        ids = encoder.tokenizer(tidy.replace("{}", "<dog>")).input_ids
        (placeholder,) = encoder.tokenizer.convert_tokens_to_ids(["<dog>"])
        assert ids.count(placeholder) == 1 and len(ids) == len(encoder.tokenizer(tidy.replace("{}", "dog")).input_ids)
        terms = []
        for i, id in enumerate(ids):
            if id != placeholder:
                a, b = now[i, first : first + encoder.width], noun[i, first : first + encoder.width]
                terms.append(1 - (a @ b) / (a.norm() * b.norm()))
        distances.append(sum(terms) / len(terms))
        first += encoder.width
    assert first == now.shape[-1]
    return (sum(distances) / len(distances)).item()


@pytest.mark.parametrize("method", ["ti", "dti", "crossinit"])
def test_the_loss_is_the_formula(pipe, loop_of, method):
    """Mean over the drawn prompts; it is added to the family's loss. CrossInit does not start from the noun's row."""
    seen = []

    def look(loop, trainer, step):
        (concept,) = loop.concepts
        written = [written_distance(pipe, prompt) for prompt in PROMPTS]
        drawn = [int(torch.randint(4, (), generator=seeded_generator(42, k, 5))) for k in (6, 7)]
        expected = sum(written[number] for number in drawn) / 2
        with torch.no_grad():
            context = loop.stepper.context_losses["<dog>"](6, 2).item()
            batch = concept.samples.batch(6, 2, torch.device("cpu"))
            plain = loop.family.loss(batch, loop.family.encode_prompts(batch.prompts, batch.zero_pads))
            pull = loop.config.reg_lambda * concept.distance_to_start()
            total = loop.stepper._loss(concept, 6)
        assert context == pytest.approx(expected, rel=1e-3, abs=2e-7) and expected > 1e-5
        assert total.item() == pytest.approx((plain + pull).item() + 0.5 * expected, rel=1e-5)
        assert len(set(written)) == 4 and 0.5 * expected > 1e-4 * total.item()
        seen.append(step)

    loop_of(pipe, look, method=method, learning_rate=0.3, context_lambda=0.5, context_prompts=PROMPTS)
    assert seen == [1, 2]


@pytest.mark.parametrize("name", ["z_image", "lumina2"])
def test_prompts_in_a_template(modern, loop_of, name):
    """The template's tokens are context tokens too."""
    pipe, seen, prompt = fresh_copy(modern(name)), [], "a {} near the beach"
    pipe.system_prompt = "an old photo"  # Lumina 2's is longer, and distances then smaller

    def look(loop, trainer, step):
        with torch.no_grad():
            now, noun = (encode(pipe, [prompt.replace("{}", word)])[0].double() for word in ("<dog>", "dog"))
        ids = pipe.tokenizer(trainer.family.clean_prompt(prompt.replace("{}", "<dog>"))).input_ids
        placeholder = ids.index(pipe.tokenizer.convert_tokens_to_ids("<dog>"))
        assert len(ids) == len(now) == len(noun) and placeholder > 2
        distances = 1 - cosine_similarity(now, noun, dim=-1)
        expected = (distances.sum() - distances[placeholder]) / (len(ids) - 1)
        loss = loop.stepper.context_losses["<dog>"](0, 2)
        print(f"{name}: {loss.item():.3e}, written {expected.item():.3e}")
        assert loss.item() == pytest.approx(expected.item(), rel=1e-3) and expected > 1e-4
        rows = loop.concepts[0].rows["text_encoder"]
        rows.direction.grad = None
        loss.backward()
        assert rows.direction.grad.isfinite().all() and rows.direction.grad.any()
        seen.append(step)

    loop_of(pipe, look, learning_rate=0.3, context_lambda=0.5, context_prompts=[prompt], max_train_steps=1)
    assert seen == [1]


@pytest.mark.parametrize("name", ["sd3", "flux", "klein", "qwen_image"])
def test_families_without_a_state_for_each_token(modern, name):
    with pytest.raises(ValueError, match="no context loss.*one state for each token.*leave out `context_lambda`"):
        DTITrainer(modern(name), **SETTINGS, context_lambda=1.0)


@pytest.mark.parametrize("vectors", [1, 3])
def test_it_is_zero_at_the_class_noun(pipe, loop_of, vectors):
    """Classic inversion starts there. A direction at another norm does not."""
    seen = []

    def look(loop, trainer, step):
        assert loop.concepts[0].initial.num_vectors == vectors
        with torch.no_grad():
            seen.append(loop.stepper.context_losses["<dog>"](0, 8).item())

    settings = {"context_lambda": 1.0, "num_vectors": vectors, "learning_rate": 0.0, "max_train_steps": 1}
    loop_of(pipe, look, method="ti", context_prompts=PROMPTS, **settings)
    loop_of(pipe, look, method="ti", **settings)  # the built-in prompts
    loop_of(pipe, look, method="dti", token_scale=30.0, context_prompts=PROMPTS, **settings)
    assert abs(seen[0]) < 1e-6 and abs(seen[1]) < 1e-6 and seen[2] > 1e-4  # far above rounding


def test_several_concepts_each_have_their_own_noun(sdxl, loop_of, photos):
    seen = []

    def look(loop, trainer, step):
        for word in ("<dog>", "<cat>"):
            loss = loop.stepper.context_losses[word]
            assert loss.prompts == [prompt.replace("{}", word) for prompt in PROMPTS]
            seen.append(loss(0, 8).item())

    settings = {"placeholder_token": None, "initializer_token": {"<dog>": "dog", "<cat>": "cat"}, "learning_rate": 0.0}
    images = {"<dog>": photos, "<cat>": photos}
    loop_of(sdxl, look, images, method="ti", context_lambda=1.0, context_prompts=PROMPTS, max_train_steps=1, **settings)
    assert len(seen) == 2 and max(map(abs, seen)) < 1e-6


@pytest.mark.parametrize("method", ["ti", "dti"])
def test_the_gradient_reaches_the_rows_alone(pipe, loop_of, method):
    seen = []

    def look(loop, trainer, step):
        (concept,) = loop.concepts
        loop.stepper.context_losses["<dog>"](0, 4).backward()
        for rows in concept.rows.values():
            assert rows.direction.grad.abs().max() > 0 and rows.direction.grad.shape[0] == 2
            rows.direction.grad = None
        for component in pipe.components.values():
            if isinstance(component, torch.nn.Module):
                assert all(p.grad is None for p in component.parameters())
        seen.append(step)

    settings = {"num_vectors": 2, "learning_rate": 0.3, "max_train_steps": 1, "context_prompts": PROMPTS}
    loop_of(pipe, look, method=method, context_lambda=1.0, **settings)
    assert seen == [1]


@pytest.mark.parametrize("method", ["ti", "dti"])
def test_a_strong_weight_keeps_the_context(sdxl, loop_of, method):
    """The distance with all prompts after training, with the loss and (nearly) without."""
    distances = []

    def look(loop, trainer, step):
        if step == 30:
            distances.append(sum(written_distance(sdxl, prompt) for prompt in PROMPTS))

    for weight in (1e4, 1e-9):
        settings = {"context_lambda": weight, "context_prompts": PROMPTS, "max_train_steps": 30, "learning_rate": 0.02}
        loop_of(sdxl, look, method=method, **settings)
    assert distances[0] < 0.2 * distances[1]


@pytest.mark.parametrize("method", ["ti", "dti"])
def test_a_resumed_run_is_the_whole_run(sdxl, loop_of, tmp_path, method):
    settings = {"method": method, "num_vectors": 2, "gradient_accumulation_steps": 2, "max_train_steps": 4}
    settings |= {"context_lambda": 1.0, "lr_scheduler": "constant"}
    whole = loop_of(sdxl, **settings)
    assert whole.metadata["training"]["context_lambda"] == 1.0
    loop_of(sdxl, **settings | {"max_train_steps": 2}, output_dir=tmp_path, checkpointing_steps=2)
    torch.manual_seed(99)  # no global state plays a part
    again = loop_of(sdxl, **settings, output_dir=tmp_path, resume_from_checkpoint="latest")
    without = loop_of(sdxl, **settings | {"context_lambda": None})
    for component, rows in whole.embeddings.items():
        assert torch.equal(again.embeddings[component], rows) and not torch.equal(without.embeddings[component], rows)


def test_a_prompt_that_is_cut_off_before_the_placeholder_is_refused(sdxl, loop_of):
    with pytest.raises(ValueError, match="the placeholder comes after 24 tokens"):
        loop_of(sdxl, context_lambda=1.0, context_prompts=["a red dog " * 10 + "and a {}"])


def test_each_property_has_its_prompts(sdxl, loop_of):
    seen = []

    def look(loop, trainer, step):
        seen.append(loop.stepper.context_losses["<dog>"].prompts)

    for learned in ("object", "style"):
        loop_of(sdxl, look, context_lambda=1.0, learnable_property=learned, max_train_steps=1)
    assert seen == [[p.replace("{}", "<dog>") for p in prompts] for prompts in (OBJECT_PROMPTS, STYLE_PROMPTS)]


def test_built_in_prompts_are_not_those_of_the_evaluation():
    built_in = [*OBJECT_PROMPTS, *STYLE_PROMPTS]
    assert len(set(built_in)) == len(built_in) and all(prompt.count("{}") == 1 for prompt in built_in)
    assert not set(built_in) & {*evaluation.OBJECT_PROMPTS, *evaluation.LIVE_PROMPTS}
