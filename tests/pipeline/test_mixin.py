"""The methods on every pipeline, and `register`."""

import diffusers
import pytest
from diffusers import DiffusionPipeline, ModularPipeline
from diffusers.loaders import TextualInversionLoaderMixin

from diffusers_dti import DirectionalTextualInversionMixin, register


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


def test_register_is_idempotent_and_overwrites_nobody():
    mro = DiffusionPipeline.__mro__
    register(DiffusionPipeline)
    assert DiffusionPipeline.__mro__ == mro

    class Base:
        pass

    class Theirs(Base):
        def load_directional_inversion(self):
            return "theirs"

    with pytest.raises(TypeError, match="has its own load_directional_inversion"):
        register(Theirs)
    assert Theirs().load_directional_inversion() == "theirs"


def test_a_registered_class_has_the_methods_and_keeps_its_own():
    class Base:
        pass

    class Mine(Base):
        def load_textual_inversion(self):
            return "mine"

    class Later(Mine):
        pass

    register(Mine)
    assert issubclass(Later, DirectionalTextualInversionMixin) and isinstance(Mine(), TextualInversionLoaderMixin)
    assert Later.save_directional_inversion is DirectionalTextualInversionMixin.save_directional_inversion
    assert Later().load_textual_inversion() == "mine" and not issubclass(Base, DirectionalTextualInversionMixin)
