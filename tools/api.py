"""Fill in docs/api.md's tables: every field that clients may send, from the server's own schema."""
import json

from bench import figures
from bench.results import ROOT
from cbserver.http.schema import ELSEWHERE, ChatRequest, CompletionRequest


def rows(model):
    """A table row for each field of a request model."""
    schema = model.model_json_schema()
    for name, field in schema["properties"].items():
        if name in ELSEWHERE:
            continue
        parts = [p for p in field.get("anyOf", [field]) if p.get("type") != "null"] or [field]
        supported = not all(fixed(part) for part in parts)
        kinds = " or ".join(kind(part, schema) for part in parts)
        default = json.dumps(field.get("default"))
        default = "required" if name in schema["required"] else f"`{default}`"
        says = field.get("description", "") if supported else "not supported"
        yield f"| `{name}` | {kinds if supported else 'only the default'} | {default} | {says} |"


def fixed(part):
    """Whether a field takes one value alone."""
    return ("const" in part or "enum" in part or part.get("type") == "null"
            or 0 in (part.get("maxItems"), part.get("maxProperties"))
            or part.get("minimum", "none") == part.get("maximum")
            or any(fixed(part[inner]) for inner in ("items", "additionalProperties")
                   if isinstance(part.get(inner), dict)))


def kind(part, schema):
    """`integer, from 1`; `list of integer`; …"""
    if "$ref" in part:
        return kind(schema["$defs"][part["$ref"].split("/")[-1]], schema)
    text = part.get("type", "")
    if text == "array":
        text = "list of "
    if "properties" in part:
        text = "object of "
    if "items" in part:
        text += kind(part["items"], schema)
    if "properties" in part:
        text += ", ".join(f"`{name}`" for name in part["properties"])
    for key, words in (("minimum", "from"), ("exclusiveMinimum", "over"), ("maximum", "to"),
                       ("exclusiveMaximum", "under"), ("maxItems", "at most"),
                       ("maxLength", "of at most")):
        if key in part:
            text += f", {words} {part[key]:,}"
    return text


PACKAGES = {"langchain": "[LangChain](https://python.langchain.com), `ChatOpenAI`",
            "litellm": "[litellm](https://github.com/BerriAI/litellm)",
            "openai_node": "[openai for Node.js](https://github.com/openai/openai-node)",
            "guidance": "[guidance](https://github.com/guidance-ai/guidance)",
            "lm_eval": "[lm-evaluation-harness](https://github.com/EleutherAI/lm-evaluation-harness)",
            "guidellm": "[guidellm](https://github.com/vllm-project/guidellm)",
            "vllm": "[`vllm bench serve`](https://docs.vllm.ai)"}


def clients():
    """A table of what `make test-clients` found."""
    found = figures.load("clients")["clients"]
    lines = ["| client | version | what was done | works |", "| --- | --- | --- | --- |"]
    for name, title in PACKAGES.items():
        result = found.get(name, "not installed")
        if result == "not installed":
            lines.append(f"| {title} | – | nothing: it was not installed | – |")
        else:
            lines.append(f"| {title} | {result['version']} | {result['did']} | yes |")
    return "\n".join(lines)


def filled(page):
    """docs/api.md's text with its tables as they are now."""
    for name, model in (("completions", CompletionRequest), ("chat", ChatRequest)):
        table = ["| field | takes | default | |", "| --- | --- | --- | --- |", *rows(model)]
        page = figures.filled(page, name, "\n".join(table))
    page = figures.filled(page, "clients", clients())
    names = ", ".join(f"`{name}`" for name in ELSEWHERE)
    return figures.filled(page, "elsewhere", f"{names}.")


if __name__ == "__main__":
    page = ROOT / "docs" / "api.md"
    page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
    print(page.name)
