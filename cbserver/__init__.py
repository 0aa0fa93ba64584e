"""A continuous-batching inference server, built lesson by lesson."""
import importlib

__version__ = "0.2.0"

# Names are looked up when they are asked for: a load generator that needs cbserver.metrics does not
# wait for torch, and a lesson's module that is broken while you edit it leaves the others alone.
WHERE = {"load_model": ".model.load", "SamplingParams": ".model.sampling",
         "ContinuousEngine": ".scheduler", "create_app": ".server"}
__all__ = [*WHERE]


def __getattr__(name):
    if name not in WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has "
                             f"{', '.join(WHERE)}, and modules to import")
    return getattr(importlib.import_module(WHERE[name], __name__), name)


def __dir__():
    return [*globals(), *WHERE]
