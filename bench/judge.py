"""A judge that is not ours: lm-evaluation-harness, through the server and on its own model.

`bench.clients` runs it (`make test-clients`). The tasks, in tests/data/judge, are small and need no
network: multiple choice, perplexity, and answers written out.
"""
import os

from bench.results import ROOT

TASKS = ROOT / "tests" / "data" / "judge"
NAMES = ["cbserver_choice", "cbserver_perplexity", "cbserver_generate"]
AT_ONCE = 16
DIGITS = 5


def lm_eval(url, model, key):
    """Both must give the same accuracy, perplexity and answers. model: SmolLM2's folder.

    Through the server twice: requests of one prompt, 16 at a time, and lists of 8 prompts.
    """
    os.environ["OPENAI_API_KEY"] = key
    remote = {"base_url": f"{url}/v1/completions", "model": "smollm2", "tokenizer": model,
              "tokenizer_backend": "huggingface", "tokenized_requests": True, "max_length": 1024,
              "num_concurrent": AT_ONCE, "max_retries": 1}
    own = harness("hf", {"pretrained": model, "dtype": "float32", "max_length": 1023})
    by_one = harness("local-completions", remote)
    by_lists = harness("local-completions", remote, batch_size=8)
    for served in (by_one, by_lists):
        assert served == own, f"through the server {served}, on its own {own}"
    return {"at once": AT_ONCE, **own, "generations": f"{len(own['generations'])} the same"}


def harness(kind, arguments, batch_size=1):
    """What the harness finds with a model of this kind."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    os.chdir(ROOT)  # the tasks name their data from here
    tasks = TaskManager(include_path=str(TASKS), include_defaults=False)
    found = simple_evaluate(kind, model_args=arguments, tasks=NAMES, task_manager=tasks,
                            device="cpu", batch_size=batch_size, bootstrap_iters=0)
    choice, perplexity, _ = (found["results"][name] for name in NAMES)
    generated = found["samples"]["cbserver_generate"]
    return {"accuracy": choice["acc,none"], "normalized accuracy": choice["acc_norm,none"],
            "word perplexity": digits(perplexity["word_perplexity,none"]),
            "byte perplexity": digits(perplexity["byte_perplexity,none"]),
            "generations": [sample["resps"] for sample in generated]}


def digits(number):
    """To five digits."""
    return float(f"{number:.{DIGITS}g}")
