import pytest

from diffusers_dti import DTIConfig
from diffusers_dti.families import sdxl


def test_the_family_fills_what_is_not_said():
    config = DTIConfig(train_batch_size=2).resolved(sdxl)
    assert (config.resolution, config.max_train_steps, config.kappa) == (768, 400, 1e-4)
    assert config.train_batch_size == 2 and config.learning_rate == 0.01
    assert DTIConfig(method="ti").resolved(sdxl).learning_rate == 0.005


def test_the_effective_rate_is_the_authors():
    assert DTIConfig().resolved(sdxl).effective_learning_rate == pytest.approx(0.04)
    assert DTIConfig(gradient_accumulation_steps=2).resolved(sdxl).effective_learning_rate == pytest.approx(0.08)
    assert DTIConfig(scale_lr=False).resolved(sdxl).effective_learning_rate == 0.01


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "lora"}, "method must be one of dti, ti, got 'lora'"),
        ({"pooling": "mean"}, "pooling must be"),
        ({"mixed_precision": "fp8"}, "mixed_precision must be"),
        ({"max_train_steps": 0}, "max_train_steps must be at least 1, got 0"),
        ({"resolution": -1}, "resolution must be at least 1"),
        ({"checkpointing_steps": 10}, "output_dir"),
        ({"templates": ["a photo"]}, "Every template"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        DTIConfig(**settings)
