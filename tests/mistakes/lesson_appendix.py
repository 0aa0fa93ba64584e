"""Usual mistakes of the appendix, planted: see test_hints.py."""
SLOW = {"a2", "a3", "e1b", "c19"}
MISTAKES = [
    ("appendix", "b4", "b3", ("recorded.add_(1)", "recorded = recorded + 1"),
     "write in place", set()),
    ("appendix", "c09", "c07", ("x.pow(2).mean(-1,", "x.pow(2).mean(0,"),
     "is the mean taken over the last dimension", SLOW),
    ("appendix", "c09", "c07", ("gate, up = ", "up, gate = "),
     "is it the first half that goes through silu", SLOW),
    ("appendix", "c09", "c07", ("[-second, first]", "[second, -first]"),
     "the second one gets the minus", SLOW),
    ("appendix", "c12", "c11", ("            p.data = view\n", "            view\n"),
     "should be a view of the joined one", SLOW),
    ("appendix", "p1", "c16", ("self.graphs[min(ks)]", "self.graphs[max(ks)]"),
     "the smallest that is large enough", SLOW),
    ("appendix", "c21", "c16", ("self.base.norm.weight, self.eps)[0]",
                                "self.base.norm.weight, self.eps)[1]"),
     "the written-out pass was refused", SLOW),
    ("appendix", "c21", "c16", ("k, v = self.cache.update(k, v, layer)",
                                "self.cache.update(k, v, layer)"),
     "the written-out pass was refused", SLOW),
]
