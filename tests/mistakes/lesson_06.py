"""Usual mistakes of lesson 6, planted: see test_hints.py."""
SLOW = {"f3", "f14", "f15", "w4", "w6", "w6b", "w7", "c24c", "g1", "c24e", "g3", "g4", "g6", "h2",
        "e11b", "e13b", "e12b", "h7"}
MISTAKES = [
    ("06", "f10", "c12", ('PromptTooLong, 400, "context_length_exceeded", None), '
                          "(ValueError, 400, None, None),",
                          "ValueError, 400, None, None), "
                          '(PromptTooLong, 400, "context_length_exceeded", None),'),
     "put the special class first", SLOW),
    ("06", "c24", "c20", (", exception_handlers=HANDLERS", ""),
     "give the app its exception_handlers", SLOW),
    ("06", "f15", "c15", ("        engine.abort(sequence)\n        app.state", "        app.state"),
     "the server wrote on to the end", SLOW - {"f14", "f15"}),
    ("06", "h5", "c12", ("if key and not hmac", "if key and given and not hmac"),
     "a header that is missing is a wrong key too", SLOW),
    ("06", "h5", "c19", ("protected.include_router(monitor.private)",
                         "router.include_router(monitor.private)"),
     "/metrics is open", SLOW),
]
