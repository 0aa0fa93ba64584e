"""Pictures of the live page under load: figures/live-*.png, and live.gif for the README.

    python -m bench.page              # both; with --film or --stills one of them
"""
import argparse
import contextlib
import os
import tempfile
import threading
import time
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from bench.browser import Browser
from bench.results import ROOT
from load import client
from load.process import ServerProcess, python_module
from load.workload import token_workload, vocabulary

USERS = 24
SLOTS = 12
VIEWS = {"light": (1180, 640, False), "dark": (1180, 640, True), "narrow": (360, 740, False)}

FRAMES = 40
FRAME_S = 0.5  # between two frames, in the load and in the film
BATCH = (350, 60, 1180, 622)  # of the light view: the batch, without the prompt's box
HALF = (590, 399)  # pixels of one engine's half


def ask(url, requests):
    with contextlib.suppress(OSError):  # the server ends before they have asked all
        client.run(url, requests, USERS)


@contextlib.contextmanager
def loaded(engine, model, folder):
    """The page of a server of this engine, its load just begun."""
    requests = token_workload("uniform", 400, 3, 160, vocabulary(model))
    command = python_module("cbserver", "--engine", engine, "--model", model,
                            "--max-batch", SLOTS, "--max-len", 512)
    with ServerProcess(command, folder / "server.log") as server, Browser() as page:
        page.resize(*VIEWS["light"])
        page.open(f"{server.url}/")
        threading.Thread(target=ask, args=(server.url, requests), daemon=True).start()
        page.until("Number(document.querySelector('#waiting').textContent.split(' ')[0]) > 0")
        yield page


def pictures(engine, model, folder):
    """Load a server until its batch has turned over, then take its page in every view."""
    with loaded(engine, model, folder) as page:
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


def film(engine, model, folder):
    """The page as the load goes on, a picture every FRAME_S: list[Image]."""
    taken = []
    path = folder / "frame.png"
    with loaded(engine, model, folder) as page:
        begin = time.monotonic()
        for number in range(FRAMES):
            time.sleep(max(0, begin + number * FRAME_S - time.monotonic()))
            page.picture(path)
            picture = Image.open(path).convert("RGB")
            taken.append(picture.crop(BATCH).resize(HALF, Image.Resampling.LANCZOS))
        late = time.monotonic() - begin - (FRAMES - 1) * FRAME_S
        print(f"{engine}: {FRAMES} frames, the last {late:.1f} s late", flush=True)
    return taken


def side_by_side(left, right):
    """One frame: both halves, each with its engine's name above."""
    width, height = HALF
    frame = Image.new("RGB", (2 * width, height + 26), "white")
    draw = ImageDraw.Draw(frame)
    for number, (name, picture) in enumerate((("continuous", left), ("static", right))):
        draw.text((number * width + 12, 4), f"--engine {name}", "black",
                  ImageFont.load_default(size=16))
        frame.paste(picture, (number * width, 26))
    return frame.quantize(64, dither=Image.Dither.NONE)


def make_film(model, folder):
    halves = [film(engine, model, folder) for engine in ("continuous", "static")]
    first, *others = [side_by_side(*pair) for pair in zip(*halves)]
    path = ROOT / "figures" / "live.gif"
    first.save(path, save_all=True, append_images=others, duration=int(1000 * FRAME_S), loop=0,
               optimize=True)
    print(path.relative_to(ROOT), f"{path.stat().st_size / 1e6:.1f} MB", flush=True)


def main():
    parser = argparse.ArgumentParser(prog="python -m bench.page")
    parser.add_argument("--film", action="store_true", help="only live.gif")
    parser.add_argument("--stills", action="store_true", help="only live-*.png")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if not options.film:
            for engine in ("continuous", "static"):
                pictures(engine, "smollm2", Path(folder))
        if not options.stills:
            make_film("smollm2", Path(folder))
    os._exit(0)  # the users are still asking


if __name__ == "__main__":
    main()
