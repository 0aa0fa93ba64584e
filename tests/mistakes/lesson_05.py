"""Usual mistakes of lesson 5, planted: see test_hints.py."""
MISTAKES = [
    ("05", "c15", "c13", ("return self.token_times[0] - self.start",
                          "return self.token_times[1] - self.token_times[0]"),
     "TTFT runs from sent to first token", set()),
    ("05", "c15", "c13", ("sum(r.completion_tokens for r in done)\n    if",
                          "sum(len(r.itl) for r in done)\n    if"),
     "8 tokens in 8 s", set()),
    ("05", "c15", "c13", ('"failures": len(records) - len(done)', '"failures": 0'),
     "a failed request counts as a failure", set()),
    ("05", "c15", "c13", ("len(self.token_times)) - 1\n", "len(self.token_times))\n"),
     "differs from the hand-made numbers", set()),
    ("05", "c16c", "c16e", ("by_line = first_bytes(lambda response: response.readline())",
                            "by_line = first_bytes(lambda response: response.read(1024))"),
     "is something buffering", set()),
    ("05", "d13", "d09", ("statistics.fmean(r.e2e for r in log)",
                          "statistics.fmean(r.ttft for r in log)"),
     "E2E does not run from sent to last token", {"d06", "d07"}),
]
