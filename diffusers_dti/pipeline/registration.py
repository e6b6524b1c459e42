"""Register the methods on pipeline classes."""

from diffusers.loaders import TextualInversionLoaderMixin

from .mixin import DirectionalTextualInversionMixin


def register(pipeline_class: type) -> None:
    """Give a pipeline class and all its subclasses, including later ones, the mixin's methods.

    Registering a class again changes nothing.

    Args:
        pipeline_class: the class. Diffusers' two base classes are registered when `diffusers_dti` is imported, so this is only
            for a class that derives from neither.

    Raises:
        TypeError: if the class already has an unrelated attribute under one of the names.

    Example:

        ```py
        >>> import diffusers_dti

        >>> class Base:
        ...     pass

        >>> class MyPipeline(Base):
        ...     pass

        >>> diffusers_dti.register(MyPipeline)
        >>> hasattr(MyPipeline(), "load_directional_inversion")
        True
        ```
    """
    mixin = DirectionalTextualInversionMixin
    if issubclass(pipeline_class, mixin):
        return
    names = [n for n in vars(mixin) if not n.startswith("_") and not hasattr(TextualInversionLoaderMixin, n)]
    taken = [n for n in names if hasattr(pipeline_class, n)]
    if taken:
        raise TypeError(f"{pipeline_class.__name__} already has its own {', '.join(taken)}, which is not overwritten.")
    # Not `setattr` of each method: with a base class, `isinstance` and `help` show where the methods come from. It comes last,
    # so that it hides nothing of the pipeline's own.
    pipeline_class.__bases__ += (mixin,)
