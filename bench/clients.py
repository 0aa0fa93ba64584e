"""Run clients that we do not write against the server, unmodified, and a judge.

    make test-clients        # in a virtual environment of their own
"""
import asyncio
import datetime
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

from bench import judge
from bench.results import DATA, ROOT, hardware, versions, write_json
from load.process import ServerProcess

KEY = "sesame"
NODE_OPENAI = "7.59.0"
REQUESTS = 32
TOKENS = 24
WHY = ("The planted server's first token has no text: load.run counts it, as the server does; "
       "guidellm's first token is the first with text, one gap of 20 ms later. Beside our server "
       "guidellm takes its CPU seconds from the cores that the model runs on.")


def langchain(url, folder):
    """ChatOpenAI: whole, streamed, several at once, asynchronous."""
    from langchain_openai import ChatOpenAI

    chat = ChatOpenAI(base_url=f"{url}/v1", api_key=KEY, model="smollm2", temperature=0,
                      max_tokens=TOKENS, max_retries=0, stream_usage=True)
    question = "Name three primary colours."
    whole = chat.invoke(question)
    parts = list(chat.stream(question))
    assert "".join(part.content for part in parts) == whole.content != ""
    assert whole.usage_metadata["output_tokens"] <= TOKENS
    assert sum(part.usage_metadata["output_tokens"] for part in parts if part.usage_metadata) \
        == whole.usage_metadata["output_tokens"]
    answers = chat.batch([question] * 4)
    assert {answer.content for answer in answers} == {whole.content}
    assert asyncio.run(chat.ainvoke(question)).content == whole.content
    return {"answer": whole.content, "usage": whole.usage_metadata}


def lm_eval(url, folder):
    """lm-evaluation-harness finds the same through the server as on its own model."""
    return judge.lm_eval(url, model_folder(), KEY)


def litellm(url, folder):
    """litellm: whole, streamed, several answers, log-probabilities, a list of prompts."""
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # or it asks the network for prices
    import litellm as client

    where = {"model": "openai/smollm2", "api_base": f"{url}/v1", "api_key": KEY,
             "temperature": 0, "max_tokens": TOKENS}
    messages = [{"role": "user", "content": "Name three primary colours."}]
    whole = client.completion(messages=messages, n=2, logprobs=True, top_logprobs=2, **where)
    first, second = whole.choices
    assert first.message.content == second.message.content != ""
    tokens = first.logprobs.content
    assert len(tokens) <= TOKENS and len(tokens[0].top_logprobs) == 2
    parts = client.completion(messages=messages, stream=True, **where)
    text = "".join(part.choices[0].delta.content or "" for part in parts)
    assert text == first.message.content
    asynchronous = asyncio.run(client.acompletion(messages=messages, **where))
    assert asynchronous.choices[0].message.content == text
    where["model"] = "text-completion-openai/smollm2"
    several = client.text_completion(prompt=["One, two,", "Red, green,"], **where)
    assert len(several.choices) == 2
    return {"answer": text, "usage": whole.usage.model_dump()}


def openai_node(url, folder):
    """The official package for Node.js: chats whole and streamed, several answers, a refusal."""
    script = Path(folder) / "openai_node.mjs"
    shutil.copy(ROOT / "bench" / "openai_node.mjs", script)
    run(["npm", "install", "--silent", "--prefix", folder, f"openai@{NODE_OPENAI}"])
    return json.loads(run(["node", str(script), url, KEY]))


def guidance(url, folder):
    """guidance: text with holes, in a chat; its `select` and grammars need constrained decoding."""
    import guidance as client

    model = client.models.OpenAI("smollm2", base_url=f"{url}/v1", api_key=KEY, echo=False)
    with client.user():
        model += "Name three primary colours."
    with client.assistant():
        model += client.gen("answer", max_tokens=TOKENS, temperature=0)
    assert model["answer"]
    return {"answer": model["answer"]}


def guidellm(url, folder):
    """guidellm's benchmark: 8 streams, synthetic prompts, no request may fail."""
    metrics = run_guidellm(url, folder, REQUESTS, TOKENS)
    mean = {name: round(metrics[name]["successful"]["mean"], 1) for name in
            ("output_tokens_per_second", "time_to_first_token_ms", "inter_token_latency_ms")}
    return {"requests": metrics["request_totals"], **mean}


def run_guidellm(url, folder, requests, tokens, path="/v1/chat/completions"):
    """The metrics of one run: 8 streams, prompts of 32 tokens, answers of exactly `tokens`."""
    out = Path(folder) / "guidellm.json"
    run([tool("guidellm"), "run", "--backend",
         f"kind=openai_http,target={url},api_key={KEY},request_format={path}",
         "--profile", "kind=concurrent,streams=8",
         "--constraint", f"kind=max_requests,count={requests}",
         "--data", f"kind=synthetic_text,prompt_tokens=32,output_tokens={tokens}",
         "--tokenizer", f"kind=huggingface_auto,model={model_folder()}",
         "--output", f"kind=json,path={out}", "--disable-console-interactive"])
    metrics = json.loads(out.read_text(encoding="utf-8"))["benchmarks"][0]["metrics"]
    totals = metrics["request_totals"]
    assert totals["successful"] == requests and totals["errored"] == 0, totals
    assert metrics["output_token_count"]["successful"]["mean"] == tokens
    return metrics


def agreement(url, folder):
    """The same load by guidellm and by load.run, in turn: do their figures agree within 5 %?

    Against a server of planted delays, which no client can slow, and against ours, with which a
    client shares the cores.
    """
    with ServerProcess([sys.argv[1], str(ROOT / "tests" / "test_load.py")],
                       f"{folder}/planted.log") as planted:
        return {"load": "8 users, 96 requests, 32 tokens in, 64 out; in turn, mean of 2 runs each",
                "why they differ": WHY,
                "planted delays": side_by_side(planted.url, folder),
                "cbserver": side_by_side(url, folder)}


def side_by_side(url, folder):
    """{client: figures}, and by how many % load.run's differ from guidellm's."""
    runs = {"guidellm": [], "load.run": []}
    clients = {"guidellm": by_guidellm, "load.run": by_load_run}
    for who in ("guidellm", "load.run", "load.run", "guidellm"):
        before = children_cpu()
        measured = clients[who](url, folder)
        runs[who].append(measured | {"client_cpu_s": children_cpu() - before})
    found = {who: means(mine) for who, mine in runs.items()}
    ours = found["load.run"]
    theirs = found["guidellm"]
    found["load.run against guidellm, %"] = {
        name: round(100 * (ours[name] / theirs[name] - 1), 1)
        for name in theirs if name != "client_cpu_s"}
    return found


def means(runs):
    """The mean of each figure over the runs."""
    return {name: round(sum(run[name] for run in runs) / len(runs), 2) for name in runs[0]}


def children_cpu():
    """CPU seconds of all processes that ended: those of a client, start-up included."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def by_guidellm(url, folder):
    """Its medians under our names: what it calls inter-token latency is one value a request."""
    found = run_guidellm(url, folder, 96, 64, "/v1/completions")

    def of(name, statistic="median"):
        return found[name]["successful"][statistic]

    return {"ttft_ms": of("time_to_first_token_ms"), "tpot_ms": of("inter_token_latency_ms"),
            "e2e_ms": 1e3 * of("request_latency"),
            "tokens_per_s": of("output_tokens_per_second", "mean")}


def by_load_run(url, folder):
    command = [sys.argv[1], "-m", "load.run", "--host", url, "--users", "8", "--spawn-rate", "100",
               "--workload", "fixed:32x64", "--requests", "96", "--out", folder, "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600,
                          env=os.environ | {"CBSERVER_API_KEY": KEY})
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    figures = {name: summary[name]["p50"] for name in ("ttft_ms", "tpot_ms", "e2e_ms")}
    return figures | {"tokens_per_s": summary["tokens_per_s"]}


def vllm(url, folder):
    """vLLM's own load generator."""
    run([tool("vllm"), "bench", "serve", "--backend", "openai", "--base-url", url, "--model",
         "smollm2", "--tokenizer", model_folder(), "--dataset-name", "random",
         "--random-input-len", "32", "--random-output-len", str(TOKENS), "--ignore-eos",
         "--num-prompts", str(REQUESTS), "--save-result", "--result-dir", folder,
         "--result-filename", "vllm.json"], OPENAI_API_KEY=KEY)
    result = json.loads((Path(folder) / "vllm.json").read_text(encoding="utf-8"))
    assert result["completed"] == REQUESTS and result["total_output_tokens"] == REQUESTS * TOKENS
    return {key: result[key] for key in ("completed", "output_throughput", "mean_ttft_ms",
                                         "mean_itl_ms")}


def tool(name):
    """The command of this environment, or one on the path; None: it is not installed."""
    beside = Path(sys.executable).with_name(name)
    return str(beside) if beside.exists() else shutil.which(name)


def run(command, **env):
    done = subprocess.run(command, capture_output=True, text=True, timeout=600,
                          env=os.environ | {"HF_HUB_OFFLINE": "1"} | env)
    assert done.returncode == 0, done.stderr[-2000:] + done.stdout[-2000:]
    return done.stdout


def model_folder():
    """SmolLM2's tokenizer as a folder, for tools that count tokens themselves."""
    code = "from cbserver.model.load import embedded_smollm2; print(embedded_smollm2())"
    done = subprocess.run([sys.argv[1], "-c", code], cwd=ROOT, capture_output=True, text=True,
                          check=True)
    return done.stdout.strip().splitlines()[-1]


# What each client needs; what cannot be had is skipped with a word, and never counts as passed.
CLIENTS = {langchain: "langchain-openai", litellm: "litellm", openai_node: "npm",
           guidance: "guidance", lm_eval: "lm-eval", guidellm: "guidellm", agreement: "guidellm",
           vllm: "vllm"}


def version(package):
    """The version of what a client needs; None if it is not here."""
    if package == "npm":
        return NODE_OPENAI if shutil.which("npm") else None
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def main():
    """sys.argv: the Python that has the course's packages, which runs the server; names of clients.

    Without names all of them.
    """
    result = {"clients": {}}
    if (DATA / "clients.json").exists():
        result = json.loads((DATA / "clients.json").read_text(encoding="utf-8"))
    result |= {"hardware": hardware(), "command": "make test-clients",
               "date": datetime.date.today().isoformat(),
               "versions": versions(*CLIENTS.values())}
    with tempfile.TemporaryDirectory() as folder, ServerProcess(
            [sys.argv[1], "-m", "cbserver", "--model", "smollm2", "--max-len", "1024",
             "--api-key", KEY], f"{folder}/server.log") as server:
        for client, package in CLIENTS.items():
            name = client.__name__
            if sys.argv[2:] and name not in sys.argv[2:]:
                continue
            if version(package) is None:
                print(f"{name}: skipped, {package} is not installed here", flush=True)
                result["clients"][name] = "not installed"
                continue
            print(f"{name}: ", end="", flush=True)
            did = client.__doc__.split("\n")[0].split(": ")[-1]
            result["clients"][name] = {"version": version(package), "did": did,
                                       **client(server.url, folder)}
            print(result["clients"][name], flush=True)
    write_json(result, DATA / "clients.json")
    print("figures/data/clients.json")


if __name__ == "__main__":
    main()
