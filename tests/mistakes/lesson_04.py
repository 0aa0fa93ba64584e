"""Usual mistakes of lesson 4, planted: see test_hints.py."""
SLOW = {"l2", "c14", "s8", "s9", "c16c", "b1", "b2", "m2"}
STATIC = """        if all(s.status is Status.FINISHED for s in self.running):
            self.evict()
            self.admit()
"""
PIECE_ENDS = """        while sequence.position < sequence.prefill_end:
            end = min(sequence.position + self.piece, sequence.prefill_end)
"""
MISTAKES = [
    ("04", "c14", "c07", ("slot=i)", "slot=0)"), "Does each row write and read its own slot",
     SLOW - {"c14"}),
    ("04", "c14", "c11", ("return torch.ones_like(super().select(slots, positions, self.max_len))",
                          "return super().select(slots, positions, span)"),
     "NoMask was not noticed", SLOW - {"c14"}),
    ("04", "s4", "c16", ("        self.evict()\n        self.admit()\n", STATIC),
     "Does the batch change while somebody still runs?", SLOW),
    ("04", "s4", "c16", ("        self.evict()\n", ""),
     "Does evict take out who has finished", SLOW),
    ("04", "s4", "c16", ("            if slot not in taken:\n", "            if not taken:\n"),
     "Does the batch change while somebody still runs?", SLOW),
    ("04", "s4", "c16", ("            if slot not in taken:\n                self.take(slot)",
                         "            self.take(slot)"), "two in one slot", SLOW),
    ("04", "s6", "c16", ("if s.status is Status.RUNNING]\n\n    def admit",
                         'if s.finish_reason in (None, "abort")]\n\n    def admit'),
     "Does evict know?", SLOW),
    ("04", "s6", "c16", ("        self.evict()\n", "        if self.waiting:\n"
                         "            self.evict()\n"), "stop() never ends", SLOW),
    ("04", "b5", "c16", ("            left -= self.prefill(sequence, left)\n",
                         "            self.prefill(sequence, left)\n"), "not for each", SLOW),
    ("04", "b5", "c16", ("            if end - begin > left:\n",
                         "            end = min(end, begin + left)\n"
                         "            if end == sequence.position:\n"),
     "it is never cut", SLOW),
    ("04", "b5", "c16", ("max(left, self.slots * self.piece)", "left"),
     "a piece of every slot", SLOW),
    ("04", "b5", "c16", (PIECE_ENDS, PIECE_ENDS.replace("sequence.prefill_end",
                                                        "len(sequence.prompt_tokens)")),
     "its last token, which the decode step reads", SLOW),
    ("04", "c24", "c20", ("for tokens, count in requests:", "for tokens, count in requests[::-1]:"),
     "request 0", SLOW - {"s8"}),
]
# In what a learner writes: (turn, cell of its stub, cell of its check, (old, new), hint).
TURNS = [
    ("ContinuousEngine.evict", "t1a", "t1b",
     ("s.status is Status.RUNNING", "s.finish_reason != \"stop\""),
     "a client has left"),
    ("ContinuousEngine.evict", "t1a", "t1b", (" if s.status is Status.RUNNING", ""),
     "a finished sequence still sits in its slot"),
    ("ContinuousEngine.evict", "t1a", "t1b", ("is Status.RUNNING", "is Status.FINISHED"),
     "nobody has to leave"),
    ("ContinuousEngine.admit", "t2a", "t2b",
     ("            if slot not in taken:\n                self.take(slot)",
      "            self.take(slot)"),
     "two in one slot"),
    ("ContinuousEngine.admit", "t2a", "t2b", ("range(self.slots)", "range(len(taken))"),
     "nobody has been admitted"),
    ("ContinuousEngine.admit", "t2a", "t2b", ("range(self.slots)", "reversed(range(self.slots))"),
     "in the order they came"),
    ("ContinuousEngine.prefill", "t3a", "t3b", ("end - begin > left",
                                                "end - sequence.position > left"),
     "and the budget is 40"),
    ("ContinuousEngine.prefill", "t3a", "t3b",
     ("sequence.position + self.piece", "sequence.position + min(self.piece, left)"),
     "no tokens"),
    ("ContinuousEngine.prefill", "t3a", "t3b",
     ("min(sequence.position + self.piece, sequence.prefill_end)", "sequence.prefill_end"),
     "tokens were read, not 100"),
    ("ContinuousEngine.prefill", "t3a", "t3b",
     ("sequence.position + self.piece", "sequence.position + self.prefill_budget"),
     "pieces of self.piece"),
    ("ContinuousEngine.prefill", "t3a", "t3b",
     ("return sequence.position - begin", "return sequence.position"),
     "return how many were read just now"),
    ("ContinuousEngine.prefill", "t3a", "t3b",
     (PIECE_ENDS, PIECE_ENDS.replace("sequence.prefill_end", "len(sequence.prompt_tokens)")),
     "needs no prefill"),
    ("ContinuousEngine.step", "t4a", "t4b", ("        self.prefill_prompts()\n", ""),
     "nothing was decoded"),
    ("ContinuousEngine.step", "t4a", "t4b", ("        self.evict()\n", ""), "who was not served"),
    ("ContinuousEngine.step", "t4a", "t4b",
     ("        self.deliver(self.runner.decode(self.decoding()))",
      "        self.runner.decode(self.decoding())"), "nobody got them"),
]
