import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_dti.data.images import Photo, load_photos
from diffusers_dti.training import samples as samples_module
from diffusers_dti.training.crops import Crop, make_crops
from diffusers_dti.training.samples import OBJECT_TEMPLATES, STYLE_TEMPLATES, TrainingSamples


def samples(photos=3, crops_of=lambda n: 1, templates=("a {}", "the {}"), captions=None, seed=0, masks=None, **more):
    masks, captions = masks or [None] * photos, captions or [None] * photos
    crops = [Crop(n, torch.zeros(3, 8, 8), masks[n], (8, 8 + n), (0, i)) for n in range(photos) for i in range(crops_of(n))]
    posteriors = [(torch.full((1, 2, 4, 4), float(i)), torch.full((1, 2, 4, 4), 0.5)) for i in range(len(crops))]
    return TrainingSamples(crops, posteriors, templates, captions, "<dog>", 1000, seed, **more)


def test_a_sample_depends_on_its_number_alone():
    one, other = samples(), samples()
    whole = one.batch(0, 12, torch.device("cpu"))
    for first, size in ((0, 1), (5, 4), (11, 1)):  # whatever came before, in batches of any size
        part = other.batch(first, size, torch.device("cpu"))
        for name in ("latents", "noise", "timesteps"):
            assert torch.equal(getattr(part, name), getattr(whole, name)[first : first + size])
        assert part.prompts == whole.prompts[first : first + size]
    assert not torch.equal(whole.noise, samples(seed=1).batch(0, 12, torch.device("cpu")).noise)


def test_numbers_of_zero_tokens_follow_the_authors(monkeypatch):
    """floor(clip(Exp(scale 2), 0, 15)), against its probabilities; none unless asked for, and the rest stays as it is."""
    drawn = torch.tensor(samples(zero_pad=True).batch(0, 3000, torch.device("cpu")).zero_pads)
    for count in range(4):
        probability = np.exp(-count / 2) - np.exp(-(count + 1) / 2)
        assert (drawn == count).float().mean().item() == pytest.approx(probability, abs=0.03)
    assert drawn.max() <= 15 and drawn.float().mean().item() == pytest.approx(1 / (np.exp(0.5) - 1), abs=0.1)
    assert samples_module.MAX_ZEROS == 15
    monkeypatch.setattr(samples_module, "MAX_ZEROS", 2)
    assert max(samples(zero_pad=True).batch(0, 400, torch.device("cpu")).zero_pads) == 2
    plain, padded = (samples(zero_pad=z).batch(0, 5, torch.device("cpu")) for z in (False, True))
    assert plain.zero_pads == [0] * 5 and torch.equal(plain.noise, padded.noise) and plain.prompts == padded.prompts


def test_the_global_random_state_is_left_alone():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    samples().batch(0, 4, torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), state)


def test_every_round_shows_every_photo_once():
    made = samples(photos=5)
    for round_ in range(4):
        batch = made.batch(round_ * 5, 5, torch.device("cpu"))  # batches do not end with the photos (T14)
        assert sorted(w for _, w in batch.original_sizes) == [8, 9, 10, 11, 12]


def orders(seed, rounds=8, photos=6):
    widths = [w for _, w in samples(photos=photos, seed=seed).batch(0, rounds * photos, torch.device("cpu")).original_sizes]
    return [tuple(widths[i : i + photos]) for i in range(0, len(widths), photos)]


def test_rounds_differ_in_their_order():
    assert len(set(orders(0))) == 8 and orders(0) == orders(0)
    assert not set(orders(0)) & set(orders(1))  # 16 of 720 orders


def test_no_two_draws_share_a_generator(monkeypatch):
    """A round's order, say, with the noise of the sample of the same number."""
    seeds, original = [], samples_module.seeded_generator
    monkeypatch.setattr(samples_module, "seeded_generator", lambda *numbers: seeds.append(numbers) or original(*numbers))
    made = samples(photos=3)
    for k in range(12):
        made.batch(k, 1, torch.device("cpu"))
    rounds, numbers = seeds[::2], seeds[1::2]  # each sample draws its round's order, and then its own
    assert len(set(rounds)) == 4 and len(set(numbers)) == 12 and not set(rounds) & set(numbers)
    states = {bytes(original(*n).get_state().numpy()) for n in seeds}
    assert len(states) == 16


def test_draws_have_the_right_distribution():
    made = samples(photos=1)
    batch = made.batch(0, 4000, torch.device("cpu"))
    assert batch.latents.mean().abs() < 0.01 and (batch.latents.std() - 0.5).abs() < 0.01  # mean 0, std .5
    assert batch.noise.mean().abs() < 0.01 and (batch.noise.std() - 1).abs() < 0.01
    assert abs(torch.corrcoef(torch.stack([batch.latents.flatten(), batch.noise.flatten()]))[0, 1]) < 0.01
    t = batch.timesteps.double()
    assert abs(t.mean() - 499.5) < 20 and t.min() < 5 and t.max() > 994
    assert 0.45 < batch.prompts.count("a <dog>") / 4000 < 0.55


def test_captions_go_with_their_photos():
    captions = ["a {} on grass", "my {}, asleep", None]  # the last has no caption of its own
    batch = samples(captions=captions).batch(0, 9, torch.device("cpu"))
    expected = {8: {"a <dog> on grass"}, 9: {"my <dog>, asleep"}, 10: {"a <dog>", "the <dog>"}}
    assert all(text in expected[w] for (_, w), text in zip(batch.original_sizes, batch.prompts))


def test_masks_become_weights_of_mean_one():
    mask = torch.zeros(1, 8, 8)
    mask[:, :, :2] = 1
    assert samples().batch(0, 3, torch.device("cpu")).weights is None
    batch = samples(masks=[mask, None, None]).batch(0, 3, torch.device("cpu"))
    for (_, width), weights in zip(batch.original_sizes, batch.weights):
        expected = torch.tensor([4.0, 0, 0, 0] if width == 8 else [1.0, 1, 1, 1]).expand(1, 4, 4)
        assert torch.equal(weights, expected)


def test_every_crop_of_a_photo_is_used():
    made = samples(photos=2, crops_of=lambda n: 4 if n else 1)
    batch = made.batch(0, 200, torch.device("cpu"))
    assert {c for (_, w), c in zip(batch.original_sizes, batch.crop_corners) if w == 9} == {(0, i) for i in range(4)}


def test_square_photos_have_one_crop_others_several():
    square, wide = Image.new("RGB", (40, 40), "red"), Image.effect_noise((60, 30), 90).convert("RGB")
    crops = make_crops([Photo(square), Photo(wide)], 16, 8, seed=0)
    assert [c.photo for c in crops] == [0] + [1] * 8
    assert crops[0].original_size == (40, 40) and crops[0].corner == (0, 0)
    assert torch.allclose(crops[0].pixels, torch.tensor([1.0, -1, -1])[:, None, None].expand(3, 16, 16))
    resized = torch.tensor(np.array(wide.resize((32, 16), Image.Resampling.BICUBIC))) / 127.5 - 1
    for crop in crops[1:]:
        top, left = crop.corner
        assert crop.original_size == (30, 60) and top == 0 and 0 <= left <= 16
        assert torch.allclose(crop.pixels, resized[:, left : left + 16].permute(2, 0, 1), atol=1e-6)
    assert len({c.corner for c in crops[1:]}) > 3


def test_crops_depend_on_the_seed_and_the_photos_number():
    photo = Photo(Image.new("RGB", (400, 16)))
    corners = {}
    for seed in (0, 1):
        for crop in make_crops([photo, photo], 16, 8, seed):
            corners.setdefault((seed, crop.photo), []).append(crop.corner)
    assert len(corners) == 4 == len({tuple(c) for c in corners.values()})
    again = [crop.corner for crop in make_crops([photo, photo], 16, 8, 1) if crop.photo == 1]
    assert again == corners[1, 1]


@pytest.mark.parametrize("size", [(412, 721), (721, 412), (64, 96), (3000, 4000), (512, 512)])
def test_photos_are_resized_as_torchvision_does(size):
    """To int(resolution · long / short); 512 / 412 rounded first would lose a pixel of 896."""
    expected = tuple(512 if side == min(size) else int(512 * max(size) / min(size)) for side in size)
    assert Photo(Image.new("RGB", size)).resized(512).image.size == expected


def test_photos_that_are_resized_when_they_are_read_have_the_same_crops():
    """`load_photos` resizes them to save memory; `original_size` and the corners are still those of the files."""
    images = [Image.effect_noise(size, 90).convert("RGB") for size in ((61, 30), (16, 16), (9, 12))]
    images[0].putalpha(Image.effect_noise((61, 30), 90))
    crops = make_crops(load_photos(images), 16, 3, seed=5, random_flip=True)
    small = load_photos(images, resolution=16)
    assert [photo.original_size for photo in small] == [(61, 30), (16, 16), (9, 12)]
    assert all(min(photo.image.size) == 16 for photo in small)
    for crop, same in zip(crops, make_crops(small, 16, 3, seed=5, random_flip=True), strict=True):
        assert torch.equal(crop.pixels, same.pixels) and (crop.mask is None or torch.equal(crop.mask, same.mask))
        assert (crop.original_size, crop.corner) == (same.original_size, same.corner)


def test_mirrored_crops():
    photo = Photo(Image.effect_noise((16, 16), 90).convert("RGB"))
    straight, mirrored = make_crops([photo], 16, 8, seed=0, random_flip=True)
    assert torch.equal(mirrored.pixels, straight.pixels.flip(-1))


def test_crops_keep_to_the_mask():
    mask = Image.new("L", (64, 16))
    mask.paste(255, (0, 0, 20, 16))
    photo = Photo(Image.new("RGB", (64, 16)), None, mask)
    crops = make_crops([photo], 16, 16, seed=0)
    assert 0 < len(crops) < 16 and all(c.mask.any() and c.corner[1] < 20 for c in crops)
    with pytest.raises(ValueError, match="mask of photo 1 leaves nothing"):
        make_crops([Photo(photo.image, None, Image.new("L", (64, 16)))], 16, 16, seed=0)


def test_templates_have_one_place_each():
    for templates in (OBJECT_TEMPLATES, STYLE_TEMPLATES):
        assert len(set(templates)) == len(templates) and all(t.count("{}") == 1 for t in templates)


def test_stratified_noise_levels_are_evenly_spread_over_any_samples_in_a_row():
    stratified, uniform = (samples(stratified=s).batch(0, 400, torch.device("cpu")) for s in (True, False))

    def gaps(timesteps):
        ordered = timesteps.sort().values
        return torch.cat([ordered.diff(), ordered[:1] + 1000 - ordered[-1:]])  # around the circle

    for size in (2, 4, 8, 50):
        for first in range(0, 300, 7):
            own = gaps(stratified.timesteps[first : first + size])
            assert own.max() <= 2 * 1000 / size and own.min() >= 0.35 * 1000 / size - 1
    assert max(gaps(uniform.timesteps[i : i + 4]).max() for i in range(0, 396)) > 800
    # Nothing else changes, another seed has other levels, and all of them are in the range.
    assert torch.equal(stratified.noise, uniform.noise) and stratified.prompts == uniform.prompts
    assert stratified.timesteps[0] != samples(stratified=True, seed=1).batch(0, 1, torch.device("cpu")).timesteps[0]
    assert stratified.timesteps.min() >= 0 and stratified.timesteps.max() < 1000
