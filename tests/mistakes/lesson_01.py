"""Usual mistakes of lesson 1, planted: see test_hints.py."""
SLOW = {"c13", "c14", "r2", "r3", "c18a"}  # measurements and plots
MISTAKES = [
    ("01", "s2", "c16b", ("chances.cumsum(-1) - chances >= top_p", "chances.cumsum(-1) >= top_p"),
     "the token that crosses top_p", SLOW),
    ("01", "s2", "c16b", ("mix(mix(seed) + position)", "mix(mix(seed))"),
     "draws anew at each position", SLOW),
    ("01", "c25", "c19", ("if value.dim() == 1:\n"
                          "            self.stop = bool(self.on_token(value.item()))",
                          "for token in value.flatten().tolist():\n"
                          "            self.stop = bool(self.on_token(token))"),
     "is the prompt skipped?", SLOW),
    ("01", "g1", "c22", ("tokens.put(token) or closed.is_set()", "tokens.put(token)"),
     "a client that left after one token", SLOW),
    ("01", "l1", "c25b", ("length + params.max_tokens > max_len", "length > max_len"),
     "count max_tokens", SLOW),
    ("01", "k5", "c25e", ("c.num_key_value_heads", "c.num_attention_heads"),
     "key/value heads count, not query heads", SLOW | {"k3"}),
    ("01", "k5", "c25e", ("token = 2 * math.prod", "token = math.prod"),
     "keys and values, not", SLOW | {"k3"}),
    ("01", "c25i", "c25h", ("query.view(len(query), kv_heads, -1, query.shape[3])",
                            "query.view(len(query), -1, kv_heads, query.shape[3])"
                            ".transpose(1, 2)"),
     "is each group with its own key head?", SLOW | {"k2", "k3", "k5"}),
    ("01", "d1", "c25k", ("tokens[rows] = sample", "tokens[:len(rows)] = sample"),
     "Each draw goes to its own slot", SLOW | {"k2", "k3", "k5"}),
    ("01", "p1", "c27", ('SamplingParams(body["max_tokens"])', "SamplingParams()"),
     "is max_tokens passed on", SLOW | {"k2", "k3", "k5"}),
    ("01", "s2", "c16b", ("logits = logits / heat[:, None]  # float32", "pass"),
     "divide by the temperature", SLOW),
    ("01", "s2", "c16b", ("drop.scatter(-1, order, drop)", "drop"),
     "a token's chance, not its place", SLOW),
    ("01", "c25", "c22", ("tokens.put(None)", "pass"), "does run() put None last?", SLOW),
]
