"""More than one machine's worth: replicas of the unmodified app on Ray Serve."""
import os

import torch
from ray import serve

from . import process
from .cli import parse
from .server import create_app

VIEWERS = 8  # of each replica's live page: a viewer holds a request open


def app(settings):
    """{setting: value} -> what `serve run` deploys; raises ValueError for a flag there is not.

    serve run cbserver.on_ray:app replicas=2 model=smollm2 max_batch=16

    replicas: how many servers, each with a model of its own. max_replicas: more of them while
    requests in flight exceed a batch each. cpus, gpus: what a replica reserves (a GPU where there
    is one, else an equal share of the cores). Every other word is a flag of `python -m cbserver`
    (no_fast=true for one without a value); max_waiting is how many may wait before the replicas
    when all are full; a crowd much larger than that gets 503s.

    On a cluster: RAY_ADDRESS names it, this repository and its packages lie on every node, and
    gpus and cpus are said, since what this machine has may not be what the others have.
    """
    settings = {name.replace("-", "_"): str(value) for name, value in settings.items()}
    least = int(settings.pop("replicas", 1))
    most = int(settings.pop("max_replicas", least))
    if not 0 < least <= most:
        raise ValueError(f"replicas={least} max_replicas={most}: from 1 up, and no less")
    reserved = take_reserved(settings, most)
    options = parse_flags(settings)
    options.max_batch = options.max_batch or 16
    # One batch runs and one waits beside it, so that no slot is free while a request travels; the
    # others wait before the replicas, where whichever is free first can take them.
    ongoing = 2 * options.max_batch + VIEWERS
    # Ray counts a request as queued until it has found a replica for it, also while all are free:
    # a crowd that comes at once must fit in, or some of it would be refused for nothing.
    queued = options.max_waiting + most * ongoing
    options.max_waiting = max(ongoing, options.max_waiting)
    serve.start(http_options={"host": options.host, "port": options.port})

    def build():
        """In a replica's own process: its model, its engine, its app."""
        process.prepare()
        engine = process.load_engine(options)
        return create_app(engine, process.served_name(options, engine), options.api_key,
                          options.request_timeout, options.max_body, options.cors,
                          max_viewers=VIEWERS, receive_timeout=options.receive_timeout,
                          silence=options.silence)

    @serve.deployment(
        name="cbserver", ray_actor_options=reserved,
        autoscaling_config={"min_replicas": least, "max_replicas": most,
                            "target_ongoing_requests": options.max_batch},
        max_ongoing_requests=ongoing, max_queued_requests=queued,
        health_check_period_s=5, graceful_shutdown_timeout_s=options.drain_timeout)
    @serve.ingress(build)
    class Replica:
        def check_health(self):
            """Ray asks now and then, and replaces a replica that raises."""
            if not self.app.state.engine.thread.is_alive():
                raise RuntimeError("the engine has failed; see above")

    return Replica.bind()


def take_reserved(settings, replicas):
    """Take out of the settings what a replica reserves: cores and GPUs, as Ray wants them."""
    gpus = float(settings.pop("gpus", int(torch.cuda.is_available())))
    share = 1 if gpus else max(0.1, round(0.9 * os.cpu_count() / replicas, 1))
    cpus = float(settings.pop("cpus", share))
    return {"num_cpus": cpus, "num_gpus": gpus}


def parse_flags(settings):
    """The rest, as the command line takes it: a namespace."""
    flags = []
    for name, value in settings.items():
        flag = f"--{name.replace('_', '-')}"
        flags.append(flag if value == "true" else f"{flag}={value}")
    try:
        return parse(flags)
    except SystemExit:  # argparse has said which
        raise ValueError(f"a bad setting among {settings}; see python -m cbserver --help")
