"""Usual mistakes of lesson 1, planted: see test_hints.py."""
SLOW = {"c13", "c14"}  # measurements
MISTAKES = [
    ("01", "c25", "c19", ("if value.dim() == 1:\n"
                          "            self.stop = bool(self.on_token(value.item()))",
                          "for token in value.flatten().tolist():\n"
                          "            self.stop = bool(self.on_token(token))"),
     "is the prompt skipped?", SLOW),
    ("01", "g1", "c22", ("return closed.is_set()", "return False"),
     "a client that left after one token", SLOW),
    ("01", "p1", "c27", ('SamplingParams(body["max_tokens"], ', "SamplingParams("),
     "is max_tokens passed on", SLOW),
    ("01", "c25", "c22", ("tokens.put(None)", "pass"), "does run() put None last?", SLOW),
]
# In what a learner writes: (turn, cell of its stub, cell of its check, (old, new), hint).
COSTLY = SLOW
TURNS = [
    ("events", "y1a", "y1b", ('SamplingParams(body["max_tokens"], ', "SamplingParams("),
     "is max_tokens passed on"),
    ("events", "y1a", "y1b", (', ignore_eos=body.get("ignore_eos", False)', ""),
     "is ignore_eos passed on"),
    ("events", "y1a", "y1b", ('yield "data: [DONE]\\n\\n"', "return"), "the last event is"),
    ("events", "y1a", "y1b",
     ('lesson.event({"choices": [{"text": tokenizer.decode([token])}]})',
      "tokenizer.decode([token])"),
     "let lesson.event write it"),
    ("events", "y1a", "y1b", ("    async with in_turn:", "    if await in_turn.acquire():"),
     "leave the lock"),
]
