"""Usual mistakes of lesson 4, planted: see test_hints.py."""
SLOW = {"l2", "c14", "s8", "s9", "c16c", "b1", "b2"}
PER_PROMPT = """return True

    def step(self):
        self.evict()
        self.admit()
        for s in self.running:
            self.runner.prefill([s], self.prefill_budget)
        self.deliver(*self.runner.decode([s for s in self.running if s.status.name == "RUNNING"
                                          and s.position >= len(s.prompt_tokens)]))
"""
DEAF = """return True

    def evict(self):
        self.running = [s for s in self.running if s.finish_reason in (None, "abort")]
"""
SAME_SLOT = """return True

    def admit(self):
        for slot in range(self.max_batch):
            self.take(slot)
"""
MISTAKES = [
    ("04", "c14", "c07", ("slot=i)", "slot=0)"), "Does each row write and read its own slot",
     SLOW - {"c14"}),
    ("04", "c14", "c11", ("return torch.ones_like(super().select(slots, positions, self.max_len))",
                          "return super().select(slots, positions, span)"),
     "NoMask was not noticed", SLOW - {"c14"}),
    ("04", "s4", "c16", ("return True",
                         'return all(s.status.name == "FINISHED" for s in self.running)'),
     "May the batch change while somebody still runs?", SLOW),
    ("04", "s4", "c16", ("return True", "return len(self.running) < self.max_batch"),
     "May the batch change while it is full", SLOW),
    ("04", "s4", "c16", ("return True", "return True\n\n    def evict(self):\n        pass"),
     "Does evict take out who has finished?", SLOW),
    ("04", "s4", "c16", ("return True", SAME_SLOT),
     "two in one slot", SLOW),
    ("04", "s6", "c16", ("return True", DEAF), "Does evict know?", SLOW),
    ("04", "b5", "c16", ("return True", PER_PROMPT), "not for each", SLOW),
    ("04", "c24", "c20", ("for tokens, count in requests:", "for tokens, count in requests[::-1]:"),
     "request 0", SLOW - {"s8"}),
    ("04", "s6", "c16", ("return True", "return bool(self.waiting)"), "stop() never ends", SLOW),
]
