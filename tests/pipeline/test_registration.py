"""`register`: the methods on classes of pipelines."""

import diffusers
import pytest
from diffusers import DiffusionPipeline, ModularPipeline
from diffusers.loaders import TextualInversionLoaderMixin

from diffusers_dti import DirectionalTextualInversionMixin, register


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
    assert issubclass(Later, DirectionalTextualInversionMixin) and isinstance(Mine(), DirectionalTextualInversionMixin)
    assert Later.save_directional_inversion is DirectionalTextualInversionMixin.save_directional_inversion
    assert Later().load_textual_inversion() == "mine" and not issubclass(Base, DirectionalTextualInversionMixin)


def test_a_class_can_name_diffusers_loader_before_the_pipeline():
    """Defined before registering and after it, where a pipeline that derives from the loader could not be ordered."""

    class Root:
        pass

    class Base(Root):
        pass

    class Before(TextualInversionLoaderMixin, Base):
        pass

    register(Base)

    class After(TextualInversionLoaderMixin, Base):
        pass

    class OfDiffusers(TextualInversionLoaderMixin, DiffusionPipeline):
        pass

    class OfSana(TextualInversionLoaderMixin, diffusers.SanaPipeline):
        pass

    for cls in (Before, After, OfDiffusers, OfSana):
        assert issubclass(cls, DirectionalTextualInversionMixin) and cls.__mro__[1] is TextualInversionLoaderMixin
        assert cls.load_textual_inversion is TextualInversionLoaderMixin.load_textual_inversion


def test_every_pipeline_has_diffusers_loader():
    """Those that lack it, too, with all that it calls. Stock methods of other classes come first, as without this package."""

    class Root:
        pass

    class Base(Root):
        pass

    class Theirs(TextualInversionLoaderMixin):
        def load_textual_inversion(self):
            return "theirs"

        @staticmethod
        def _extend_tokens_and_embeddings():
            return "theirs, too"

    register(Base)

    class Lacking(Base):
        pass

    class Having(Base, Theirs):
        pass

    for cls in (Lacking, diffusers.SanaPipeline, ModularPipeline):
        assert not issubclass(cls, TextualInversionLoaderMixin)
        for name in vars(TextualInversionLoaderMixin):
            if not name.startswith("__"):
                assert getattr(cls, name) is getattr(TextualInversionLoaderMixin, name), name
    lacking, having = Lacking(), Having()
    assert lacking.unload_textual_inversion.__self__ is lacking
    assert lacking._extend_tokens_and_embeddings is TextualInversionLoaderMixin._extend_tokens_and_embeddings
    assert having.load_textual_inversion() == "theirs" and having._extend_tokens_and_embeddings() == "theirs, too"
    assert having.unload_textual_inversion.__func__ is TextualInversionLoaderMixin.unload_textual_inversion
