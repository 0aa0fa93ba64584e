"""Usual mistakes of lesson 6, planted: see test_hints.py."""
SLOW = {"f3", "f14", "f15", "c24c", "g1", "c24e", "g3", "g4", "g6", "h2", "e11b", "e13b", "e12b"}
MISTAKES = [
    ("06", "f1", "c07", ('if text.endswith("\\ufffd"):', "if False:"),
     "half a character went out", set()),
    ("06", "f1", "c07", ("cut = len(text) - max(starts, default=0)", "cut = len(text)"),
     "the beginning of a stop string", set()),
    ("06", "f1", "c07", ('text + ("" if self.stopped else self.held), ""', 'text, ""'),
     "lost at the end", set()),
    ("06", "f6", "c10", ("n: Literal[1] = 1", "n: int = 1"), "ignored in silence", {"f3"}),
    ("06", "f6", "c10", ("items() if value is not None}", "items()}"), "null was refused", {"f3"}),
    ("06", "f10", "c12", ('PromptTooLong: (400, "context_length_exceeded", None), '
                          "ValueError: (400, None, None),",
                          "ValueError: (400, None, None), "
                          'PromptTooLong: (400, "context_length_exceeded", None),'),
     "put the special class first", SLOW),
    ("06", "f11", "c14", ("if len(prompt) != 1:", "if not prompt:"),
     "['two', 'prompts'] should be a 400", SLOW),
    ("06", "c24", "c20", ("RequestValidationError: invalid, ", ""),
     "hand RequestValidationError to `invalid`", SLOW),
    ("06", "f15", "c15", ("        engine.abort(sequence)\n        app.state", "        app.state"),
     "the server wrote on to the end", SLOW - {"f14", "f15"}),
    ("06", "c24e", "c20", (".labels(error.status_code).inc()", ".labels(error.status_code)"),
     "/metrics knows of 0 refusals", SLOW - {"c24c", "g1", "c24e"}),
    ("06", "h5", "c12", ("if key and not hmac", "if key and given and not hmac"),
     "a header that is missing is a wrong key too", SLOW),
    ("06", "h5", "c19", ('@protected.get("/metrics")', '@router.get("/metrics")'),
     "/metrics is open", SLOW),
    ("06", "h7", "c28", ('default="127.0.0.1"', 'default="0.0.0.0"'),
     "serve this machine only", SLOW | {"h4", "h5"}),
]
