"""jaxtyping's decorator, quick enough for functions that tracing calls thousands of times.

Its import hook decorates every function with what binds arguments and remembers sizes, which only
functions of arrays need: of others beartype checks the annotations alone. And it decorates what a
function defines at each call of that function, which took half of the time of tracing: pyrefly
alone checks those annotations.
"""

import functools
import inspect
import typing

import jaxtyping
from beartype.roar import BeartypeCallHintViolation

_jaxtyped = jaxtyping.jaxtyped


def quick_jaxtyped(fn=None, *, typechecker):
    """As `jaxtyping.jaxtyped`, for the import hook."""
    if fn is None:
        return functools.partial(quick_jaxtyped, typechecker=typechecker)
    if inspect.isfunction(fn) and ("<locals>" in fn.__qualname__ or not fn.__annotations__):
        return fn
    if not inspect.isfunction(fn) or any(map(_has_arrays, fn.__annotations__.values())):
        return _jaxtyped(fn, typechecker=typechecker)
    checked = typechecker(fn)

    @functools.wraps(fn)
    def call(*args, **kwargs):
        try:
            return (fn if jaxtyping.config.jaxtyping_disable else checked)(*args, **kwargs)
        except BeartypeCallHintViolation as error:  # as jaxtyping does: a TypeError
            raise jaxtyping.TypeCheckError(str(error)) from None

    return call


def _has_arrays(annotation) -> bool:
    if inspect.isclass(annotation) and issubclass(annotation, jaxtyping.AbstractArray):
        return True
    return any(map(_has_arrays, typing.get_args(annotation)))
