"""Usual mistakes of lesson 2, planted: see test_hints.py."""
SLOW = {"c20", "c21", "m2", "m3", "m4", "m6", "c25"}  # what the check does not need
MISTAKES = [
    ("02", "l1", "c25b", ("length + params.max_tokens > max_len", "length > max_len"),
     "count max_tokens", SLOW),
    ("02", "q2", "c09", (" or sent < len(self.generated_tokens):", ":"),
     "is all sent first?", {"c11"}),
    ("02", "q2", "c09", ("enumerate(self.generated_tokens[sent:], sent + 1)",
                         "enumerate(self.generated_tokens[sent:], 1)"),
     "does `sent` count all that was read", {"c11"}),
    ("02", "q2", "c09", ("len(self.generated_tokens) == self.params.max_tokens",
                         "len(self.generated_tokens) > self.params.max_tokens"),
     "max_tokens=3 gave", {"c11"}),
    ("02", "q4", "c13", ("self.waiting.popleft()", "self.waiting.pop()"),
     "first come, first served", set()),
    ("02", "q4", "c13", ("self.waiting.remove(sequence)", "pass"), "still waits", set()),
    ("02", "q4", "c13", ("len(self.waiting) >= self.max_waiting",
                         "len(self.waiting) > self.max_waiting"), "one too many", set()),
    ("02", "c23", "c19", ("for s in sequences", "for s in sorted(sequences, key="
                          "lambda s: len(s.prompt_tokens))"), "received others' tokens", SLOW),
    ("02", "m6", "m4", ("s.token_times[-1] - s.arrival_time",
                        "s.token_times[-1] - s.admission_time"),
     "waiting included", set()),
    ("02", "q6", "c15", ("(\n                self.deliver([sequence], [token]) or sequence.status "
                         "is Status.FINISHED))",
                         "self.deliver([sequence], [token]))"),
     "the model went on for a client", SLOW),
    ("02", "q2", "c09", ("            self.news.clear()\n", ""), "the stream spins", {"c11"}),
    ("02", "q2", "c09", ("[sent:], sent + 1)", "[sent:], sent)"), "the stream never ended",
     {"c11"}),
    ("02", "q4c", "c13", ("Sequence(list(prompt_tokens), params))\n            self.lock.notify()",
                          "Sequence(list(prompt_tokens), params))"),
     "submit must notify the lock", set()),
    ("02", "q4c", "c13", ("self.loop.call_soon_threadsafe(lambda: [s.news.set() for s in "
                          "sequences])", "[s.news.set() for s in sequences]"),
     "go through call_soon_threadsafe", set()),
    ("02", "q4c", "c13", ("self.loop.call_soon_threadsafe(lambda: [s.news.set() for s in "
                          "sequences])", "pass"), "the stream never ended", set()),
    ("02", "q5", "c15", ("        self.running.clear()", ""), "must empty self.running", SLOW),
]
