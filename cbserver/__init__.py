"""A continuous-batching inference server, built lesson by lesson."""
import importlib

__version__ = "0.2.0"

# Names are looked up when they are asked for: a load generator that needs cbserver.metrics does not
# wait for torch, and a lesson's module that is broken while you edit it leaves the others alone.
WHERE = {"load_model": ".model.load", "SamplingParams": ".model.sampling",
         "ContinuousEngine": ".scheduler", "create_app": ".server"}


def __getattr__(name):
    if name not in WHERE:
        raise AttributeError(f"cbserver has no {name!r}; it has {', '.join(WHERE)}, and modules")
    return getattr(importlib.import_module(WHERE[name], __name__), name)


def __dir__():
    return [*globals(), *WHERE]
