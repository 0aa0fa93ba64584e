"""A continuous-batching inference server, built lesson by lesson."""
import importlib
import os
import sys

__version__ = "0.2.0"

# torch's threads on a CPU spin for 300,000 rounds when they wait for each other. Beside other busy
# processes they may so wait for a thread that the spinning keeps from running. torch reads this when
# it is loaded, so it is set here, before. On macOS and Windows torch has another OpenMP.
if sys.platform == "linux" and not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = "20000"

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
