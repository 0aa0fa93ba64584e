"""Usual mistakes of lesson 6, planted: see test_hints.py."""
SLOW = {"q2", "f14", "f15", "c24c", "g1", "c24e",
        "e11b", "e13b", "e12b", "h7"}
MISTAKES = [
    ("06", "c24", "c20", (", exception_handlers=HANDLERS", ""),
     "give the app its exception_handlers", SLOW),
    ("06", "f15", "c15", ("        engine.abort(sequence)\n        app.state", "        app.state"),
     "the server wrote on to the end", SLOW - {"f14", "f15"}),
    ("06", "h5", "c12", ("if kind.lower() != \"bearer\" or not same", "if sent and not same"),
     "a header that is missing is a wrong key too", SLOW),
    ("06", "h5", "c12", ('OPEN = {"/",', 'OPEN = {"/", "/metrics",'),
     "/metrics is open", SLOW),
]
# In what a learner writes: (turn, cell of its stub, cell of its check, (old, new), hint).
TURNS = [
    ("submit", "y1a", "y1b", ("for kind, status, code, headers in REFUSALS",
                              "for kind, status, code, headers in REFUSALS[1:]"),
     "take the first row that fits"),
    ("submit", "y1a", "y1b", ("named, code, headers", "named, code"), "when to come back"),
    ("submit", "y1a", "y1b", ("field if status == 400 else None", "field"), "only a 400 names"),
    ("submit", "y1a", "y1b", ("(ValueError, QueueFull, EngineStopped)", "ValueError"),
     "it raised QueueFull"),
    ("stream", "y2a", "y2b", ("        if include_usage:\n            yield",
                              "        yield"), "for those who ask"),
    ("stream", "y2a", "y2b", ("        yield event(error.detail)\n", "        pass\n"),
     "becomes an event"),
    ("stream", "y2a", "y2b", ("    yield DONE\n", ""), "clients wait for DONE"),
    ("attended", "y3a", "y3b", ("        engine.abort(sequence)\n", ""), "gives the slot back"),
    ("attended", "y3a", "y3b", ("        deadline.cancel()\n", ""), "cancel the deadline"),
    ("attended", "y3a", "y3b", ("    finally:\n", "    except ZeroDivisionError:\n        pass\n"
                                "    else:\n"), "use try … finally"),
    ("attended", "y3a", "y3b", ('engine.abort, sequence, "timeout"', "print"),
     "its deadline passed"),
]
