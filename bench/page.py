"""Pictures of the live page under load, for the README: figures/live-*.png.

    python -m bench.page
"""
import contextlib
import os
import tempfile
import threading
import time
from pathlib import Path

from bench.browser import Browser
from bench.results import ROOT
from load import client
from load.process import ServerProcess, python_module
from load.workload import token_workload, vocabulary

USERS = 24
SLOTS = 12
VIEWS = {"light": (1180, 640, False), "dark": (1180, 640, True), "narrow": (360, 740, False)}


def ask(url, requests):
    with contextlib.suppress(OSError):  # the server ends before they have asked all
        client.run(url, requests, USERS)


def pictures(engine, model, folder):
    """Load a server until its batch has turned over, then take its page in every view."""
    requests = token_workload("uniform", 400, 3, 160, vocabulary(model))
    command = python_module("cbserver", "--engine", engine, "--model", model,
                            "--max-batch", SLOTS, "--max-len", 512)
    with ServerProcess(command, folder / "server.log") as server, Browser() as page:
        page.resize(*VIEWS["light"])
        page.open(f"{server.url}/")
        threading.Thread(target=ask, args=(server.url, requests), daemon=True).start()
        page.until("Number(document.querySelector('#waiting').textContent.split(' ')[0]) > 0")
        page.run("document.querySelector('#send').click()")
        begin = time.monotonic()
        page.until("document.querySelector('#answer').textContent.length > 200", 180)
        time.sleep(max(0, begin + 32 - time.monotonic()))  # the strip holds 30 seconds
        for view, size in VIEWS.items():
            page.resize(*size)
            time.sleep(0.5)
            if view == "light" or engine == "continuous":
                path = ROOT / "figures" / f"live-{engine}-{view}.png"
                page.picture(path)
                print(path.relative_to(ROOT), *page.problems, flush=True)


def main():
    with tempfile.TemporaryDirectory() as folder:
        for engine in ("continuous", "static"):
            pictures(engine, "smollm2", Path(folder))
    os._exit(0)  # the users are still asking


if __name__ == "__main__":
    main()
