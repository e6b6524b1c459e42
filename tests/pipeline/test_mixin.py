"""The methods on every pipeline."""

import diffusers
from diffusers import DiffusionPipeline, ModularPipeline

from diffusers_dti import DirectionalTextualInversionMixin


def test_every_pipeline_class_speaks_dti():
    for base in (DiffusionPipeline, ModularPipeline):
        assert issubclass(base, DirectionalTextualInversionMixin)
    names = [n for n in dir(diffusers) if n.endswith("Pipeline")]
    assert len(names) > 200
    for name in ("StableDiffusionPipeline", "StableDiffusionXLInpaintPipeline", "SanaPipeline", "WanPipeline", "FluxPipeline"):
        cls = getattr(diffusers, name)
        assert cls.load_directional_inversion is DirectionalTextualInversionMixin.load_directional_inversion

    class Later(DiffusionPipeline):
        pass

    assert issubclass(Later, DirectionalTextualInversionMixin)
