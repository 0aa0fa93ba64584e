"""How a token is chosen from logits: what a client may ask for, and a draw for each row."""
import math
import random
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class SamplingParams:
    """What a client asks for. temperature 0 is greedy; top_p 1, top_k 0, min_p 0 leave all tokens in.

    min_tokens: before so many, only max_tokens ends an answer. logprobs: the log-probability of
    each token, and of so many likeliest; None: of none. echo: those of the prompt's tokens, too.
    Applied where there is text, not in the engine: stop (texts that end an answer), stop_token_ids
    (tokens that do), echo (the prompt's text comes first), prompt_only (nothing comes after it: an
    engine makes one token at least, which is dropped), call_format (in which a model calls tools).
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    min_p: float = 0.0
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    echo: bool = False
    prompt_only: bool = False
    call_format: str | None = None

    @property
    def greedy(self):
        """Below 1e-5 dividing by the temperature would overflow; the likeliest token wins anyway."""
        return self.temperature < 1e-5


def generate_options(params):
    """What transformers' `generate()` takes for a SamplingParams."""
    options = {"max_new_tokens": params.max_tokens, "min_new_tokens": params.min_tokens,
               "do_sample": not params.greedy}
    if not params.greedy:
        options["temperature"] = float(params.temperature)
        options["top_p"] = params.top_p
        options["top_k"] = params.top_k
        options["min_p"] = params.min_p
    if params.ignore_eos:
        options["eos_token_id"] = None
    return options


def sample(logits, sequences, eos=()):
    """One token id a row, [rows], on the logits' device: nothing here waits for it.

    logits: [rows, vocabulary], a row for each sequence; a greedy one gets the likeliest token. eos:
    the ids that end an answer, which none may that is short of its min_tokens. A draw depends on
    the sequence's seed and position alone, whatever else is in the batch.
    """
    logits = without_ends(logits, sequences, eos)
    likeliest = logits.argmax(-1)  # [rows]
    params = [s.params for s in sequences]
    if all(p.greedy for p in params):
        return likeliest
    device = logits.device
    greedy = upload([p.greedy for p in params], device)  # [rows], as all that follow
    temperature = upload([1.0 if p.greedy else p.temperature for p in params], device)
    logits = logits / temperature[:, None]  # float32
    if any(p.top_k or p.top_p < 1 or p.min_p for p in params):
        logits = keep_likeliest(logits, params)
    seed = upload([seed_of(p) for p in params], device)
    position = upload([s.position for s in sequences], device)
    # The largest of logit + Gumbel noise is a draw from softmax(logits): Gumbel, 1954.
    noise = gumbel(seed, position, logits.shape[-1])
    drawn = (logits + noise).argmax(-1)
    return torch.where(greedy, likeliest, drawn)


def without_ends(logits, sequences, eos):
    """Logits with -inf for what would end a sequence before its min_tokens."""
    rows = []
    columns = []
    for row, sequence in enumerate(sequences):
        ends = [token for token in forbidden(sequence, eos) if token < logits.shape[-1]]
        rows += [row] * len(ends)
        columns += ends
    if not rows:
        return logits
    logits = logits.clone()
    logits[upload(rows, logits.device), upload(columns, logits.device)] = float("-inf")
    return logits


def forbidden(sequence, eos):
    """Ids of the tokens that may not come next, since they would end the answer too early."""
    params = sequence.params
    made = sequence.position - len(sequence.prompt_tokens)
    if made >= params.min_tokens:
        return []
    return [*params.stop_token_ids, *(() if params.ignore_eos else eos)]


def seed_of(params):
    """63 bits: the request's own seed, or new ones for each token."""
    return random.getrandbits(63) if params.seed is None else params.seed % 2**63


def keep_likeliest(logits, params):
    """Logits [rows, vocabulary] with -inf for what a row's top_k, top_p or min_p leaves out."""
    vocabulary = logits.shape[-1]
    # Chances may add up to slightly more than 1: a top_p of 1 must not cut even then.
    top_p = upload([p.top_p if p.top_p < 1 else math.inf for p in params], logits.device)
    top_k = upload([min(p.top_k, vocabulary) or vocabulary for p in params], logits.device)
    min_p = upload([p.min_p for p in params], logits.device)
    chances, order = logits.softmax(-1).sort(descending=True)
    rank = torch.arange(vocabulary, device=logits.device)
    # What comes before a token, not the token itself, decides: the one that crosses top_p stays,
    # and so does the likeliest, even where a tiny top_p is 0 in float32.
    mass_before = chances.cumsum(-1) - chances
    drop = (mass_before >= top_p[:, None]) | (rank >= top_k[:, None])  # likeliest first
    drop |= chances < min_p[:, None] * chances[:, :1]
    drop &= rank > 0
    drop = drop.scatter(-1, order, drop)  # in the order of the vocabulary
    return logits.masked_fill(drop, float("-inf"))


def gumbel(seed, position, count):
    """Gumbel noise [rows, count]; each number depends on (seed, position, column) alone.

    seed, position: int64 [rows]. Counter-based (splitmix64), so there is no state to keep, and a
    row draws the same on every device and in every batch.
    """
    row = scramble(scramble(seed) + position)
    column = torch.arange(count, device=seed.device)
    bits = scramble((row[:, None] + column) * -0x61C8864680B583EB)
    uniform = ((bits >> 41 & 0x7FFFFF).float() + 0.5) / 2**23  # of (0, 1), its ends left out
    return -(-uniform.log()).log()


def scramble(x):
    """splitmix64's mixing of 64 bits. int64 has a sign: the masks keep it out of what is shifted."""
    x = (x ^ (x >> 30 & 2**34 - 1)) * -0x40A7B892E31B1A47
    x = (x ^ (x >> 27 & 2**37 - 1)) * -0x6B2FB644ECCEEE15
    return x ^ (x >> 31 & 2**33 - 1)


def resample(tokens, logits, sequences, eos):
    """Where one wants more than the likeliest token, choose all of theirs anew.

    tokens: [slots], changed in place. logits: [slots or fewer, vocabulary].
    """
    if any(s.params.min_tokens or not s.params.greedy for s in sequences):
        rows = upload([s.slot for s in sequences], tokens.device)
        tokens[rows] = sample(logits[rows], sequences, eos)


def upload(numbers, device):
    """A list of numbers as a tensor on the device, without waiting for it."""
    tensor = torch.tensor(numbers)
    if device.type != "cuda":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)
