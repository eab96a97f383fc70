"""What a function or class takes."""

import inspect


def parameters(function):
    """Its parameters in order, with their defaults, or `...` for those without one."""
    return {
        name: ... if parameter.default is parameter.empty else parameter.default
        for name, parameter in inspect.signature(function).parameters.items()
    }
