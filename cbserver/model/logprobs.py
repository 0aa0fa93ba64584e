"""How likely the model found each token, before temperature and all that leaves tokens out."""
from typing import NamedTuple

from .sampling import upload

TOP = 20  # so many of the likeliest tokens are looked up, whoever asks for fewer
ROWS = 64  # of a prompt at once: their logits take ROWS x vocabulary floats


class TokenLogprob(NamedTuple):
    """Of a token: its log-probability, and [(id, log-probability)] of the likeliest, in order."""

    logprob: float
    top: list


class Logprobs:
    """What sequences of a pass asked for, on its way to the CPU: nobody has waited for it.

    found: tensors, as `look_up` returns them, with a row for each of these sequences.
    """

    def __init__(self, sequences, found):
        self.sequences = sequences
        self.found = [tensor.to("cpu", non_blocking=True) for tensor in found]

    def hand_out(self):
        """Append to each sequence's own list; the copy must have arrived."""
        for sequence, *found in zip(self.sequences, *(tensor.tolist() for tensor in self.found)):
            sequence.logprobs.append(token_logprob(sequence.params, *found))


NOTHING = Logprobs([], [])


def look_up(logits, tokens):
    """Log-probabilities of these tokens, [rows], and of the likeliest, with ids, [rows, TOP]."""
    logprobs = logits.float().log_softmax(-1)
    chosen = logprobs.gather(1, tokens[:, None])[:, 0]
    return chosen, *logprobs.topk(min(TOP, logprobs.shape[1]))


def token_logprob(params, logprob, values, ids):
    """A row of `look_up` as a TokenLogprob with as many as the request wants."""
    wanted = params.logprobs
    return TokenLogprob(logprob, list(zip(ids[:wanted], values[:wanted])))


def fetch_logprobs(sequences, rows, logits, tokens):
    """The Logprobs of the sequences that ask.

    rows: each sequence's row of logits [rows, vocabulary] and tokens [rows].
    """
    asking = [(s, row) for s, row in zip(sequences, rows) if s.params.logprobs is not None]
    if not asking:
        return NOTHING
    at = upload([row for _, row in asking], logits.device)
    return Logprobs([s for s, _ in asking], look_up(logits[at], tokens[at]))


def note_tokens(sequences, logits, tokens):
    """At once, what sequences ask about their new tokens. A row for each sequence."""
    fetch_logprobs(sequences, range(len(sequences)), logits, tokens).hand_out()


def note_prompt(sequence, hidden, head):
    """What a sequence that echoes its prompt asks about the tokens after each of this piece.

    hidden: [piece, hidden], from `sequence.position` on. head: makes logits of it. Nothing
    foretells a prompt's first token.
    """
    params = sequence.params
    if params.logprobs is None or not params.echo:
        return
    begin = sequence.position + 1
    following = sequence.prompt_tokens[begin:begin + len(hidden)]
    for start in range(0, len(following), ROWS):
        tokens = following[start:start + ROWS]
        logits = head(hidden[start:start + len(tokens)])  # [tokens, vocabulary]
        found = look_up(logits, upload(tokens, logits.device))
        for row in zip(*(each.tolist() for each in found)):
            sequence.logprobs.append(token_logprob(params, *row))
