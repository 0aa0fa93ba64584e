"""The requests that every arm gets: seeded, mixed in length, and in the same order each time."""
import math
import random
import re
from dataclasses import dataclass
from functools import cache, partial
from itertools import count, islice

# Sixteen output lengths in tokens. Half are short and a quarter long: a batch that waits for its
# longest member wastes most of its slots on such a mix, one that admits on every step does not.
MIXED = [8, 10, 12, 14, 16, 18, 20, 24, 36, 44, 52, 64, 104, 112, 120, 128]
LENGTHS = {"mixed": MIXED, "short": [16], "short-mixed": [2, 4, 4, 8, 8, 16, 32, 64]}
NAMES = [*LENGTHS, "chat", "chat-turns", "long-prompt", "fixed:INxOUT"]
TURNS = 6  # of a conversation of chat-turns
TOKENS_A_WORD = 1.3  # of these sentences, with the vocabularies in use

ASKS = [
    "Explain {topic} to {reader}.", "Write a short note about {topic} for {reader}.",
    "What should {reader} know about {topic}?", "Compare {topic} with {other} for {reader}.",
    "Give {reader} three tips on {topic}.", "Tell {reader} a short story about {topic}.",
    "Help me plan a lesson about {topic} for {reader}.", "Why does {topic} matter to {reader}?",
    "Draft an e-mail that invites {reader} to a talk on {topic}.",
]
TOPICS = [
    "the water cycle", "baking bread at home", "how vaccines work", "the history of the bicycle",
    "growing tomatoes on a balcony", "the night sky in winter", "learning to play the guitar",
    "saving money every month", "how bridges carry weight", "why the sea is salty",
    "training for a first long run", "the life of honey bees", "repairing an old chair",
    "how computers store numbers", "travelling by train through mountains", "keeping a diary",
    "the rules of chess", "how volcanoes erupt", "cooking soup for twelve people",
    "writing clear instructions", "sleeping better", "the invention of paper", "bird migration",
    "choosing a second-hand camera",
]
READERS = [
    "a curious ten year old", "my grandmother", "a new colleague", "a busy parent",
    "a class of beginners", "a friend who hates jargon", "someone who has never tried it",
    "the readers of a village newspaper", "a sceptical engineer", "a group of volunteers",
]
DETAILS = [
    "I have {n} minutes, so start with what matters.",
    "Please keep it friendly and use one example from everyday life.",
    "There will be {n} people in the room, and most are tired.",
    "Avoid technical words, or say what they mean.",
    "We tried this {n} years ago and it went badly, so be honest.",
    "End with one question that makes people think.",
    "It will be read aloud, so keep sentences short.",
    "The last version had {n} pages and nobody finished it.",
]


@dataclass(frozen=True)
class Request:
    """One request of a workload: which one, what it asks, how many tokens it wants back."""

    index: int
    prompt: str | list  # text, or token ids where the length must be exact
    max_tokens: int
    system: str = ""  # the system prompt; with one, it is a turn of a conversation
    turn: int = 0  # which one: from the second on, all earlier turns are sent again before it


def workload(name="mixed", requests=64, seed=0):
    """The first `requests` requests of the stream: list[Request]."""
    return list(islice(stream(name, seed), requests))


def stream(name="mixed", seed=0):
    """Requests without end; request i depends on (name, seed, i) alone."""
    make = maker(name)
    return (make(seed, i) for i in count())


def conversations(requests):
    """Yield the requests as lists: the turns of one conversation, or a single request."""
    turns = []
    for request in requests:
        if turns and request.turn == 0:
            yield turns
            turns = []
        turns.append(request)
    if turns:
        yield turns


def maker(name):
    """(seed, index) -> Request. Raises ValueError for a name that there is not.

    mixed, short, short-mixed: questions of 16 to 64 tokens, see LENGTHS. chat: see chat_lengths.
    chat-turns: conversations, see chat_turn. long-prompt: mixed, and every 16th prompt has about
    2,000 tokens. fixed:128x64: prompts of exactly 128 token ids, 64 out.
    """
    if name in LENGTHS:
        return partial(question, name)
    if fixed := re.fullmatch(r"fixed:([1-9]\d*)x([1-9]\d*)", name):
        return partial(exact, *map(int, fixed.groups()))
    if name == "chat":
        return chat
    if name == "chat-turns":
        return chat_turn
    if name == "long-prompt":
        return long_prompt
    raise ValueError(f"No workload {name!r}; there are {', '.join(NAMES)}.")


def question(name, seed, index):
    return Request(index, prompt(seed, index), output_length(name, seed, index))


def chat(seed, index):
    rng = random.Random(f"chat {seed} {index}")
    prompt_tokens, answer_tokens = chat_lengths(rng)
    words = round(prompt_tokens / TOKENS_A_WORD)
    return Request(index, essay(seed, index, words), answer_tokens)


def chat_turn(seed, index):
    """Conversations of TURNS turns over one system prompt of about 1,000 tokens, the same for all.

    A turn asks with 16 to 64 tokens for an answer of 16 to 96.
    """
    rng = random.Random(f"chat-turns {seed} {index}")
    return Request(index, prompt(seed, index), rng.randint(16, 96), system_prompt(seed),
                   turn=index % TURNS)


@cache
def system_prompt(seed):
    role = "You are a helpful assistant. These are examples of what people ask you. "
    return role + essay(seed, -1, round(1000 / TOKENS_A_WORD))


def chat_lengths(rng):
    """(prompt tokens, answer tokens), log-normal as in public chat traces: medians 120 and 150."""
    prompt_tokens = log_normal(rng, 120, 0.9, 8, 1000)
    answer_tokens = log_normal(rng, 150, 0.6, 8, 500)
    return prompt_tokens, answer_tokens


def long_prompt(seed, index):
    asked = question("mixed", seed, index)
    if index % 16 != 5:
        return asked
    return Request(index, essay(seed, index, 1500), asked.max_tokens)


def exact(tokens_in, tokens_out, seed, index):
    """Ids from 100 to 499 are words or parts of words in every usual vocabulary."""
    rng = random.Random(f"fixed {seed} {index}")
    return Request(index, [rng.randrange(100, 500) for _ in range(tokens_in)], tokens_out)


def log_normal(rng, median, sigma, low, high):
    """A whole number that scatters around the median, from `low` to `high`."""
    drawn = rng.lognormvariate(math.log(median), sigma)
    return int(min(high, max(low, drawn)))


def essay(seed, index, words):
    """A question that goes on until it has so many words."""
    rng = random.Random(f"essay {seed} {index}")
    text = prompt(seed, index)
    while len(text.split()) < words:
        ask = rng.choice(ASKS).format(topic=rng.choice(TOPICS), other=rng.choice(TOPICS),
                                      reader=rng.choice(READERS))
        text += " " + ask + " " + rng.choice(DETAILS).format(n=rng.randrange(3, 60))
    return " ".join(text.split()[:words])


def arrivals(rate, seed=0):
    """Poisson arrivals without end: seconds from the beginning, `rate` a second on average."""
    rng = random.Random(f"arrivals {seed}")
    now = 0.0
    while True:
        now += rng.expovariate(rate)
        yield now


def output_length(name, seed, index):
    """Output length of request `index`, in tokens.

    Every block of requests has the same lengths in an order of its own, so that the sum hardly
    depends on the seed.
    """
    block, place = divmod(index, len(LENGTHS[name]))
    lengths = list(LENGTHS[name])
    random.Random(f"lengths {name} {seed} {block}").shuffle(lengths)
    return lengths[place]


def prompt(seed, index):
    """A question with none, one or two sentences of detail: 16 to 64 tokens of plain English."""
    rng = random.Random(f"prompt {seed} {index}")
    topic, other = rng.sample(TOPICS, 2)
    ask = rng.choice(ASKS).format(topic=topic, other=other, reader=rng.choice(READERS))
    # The opening numbers the request: no two prompts are equal, however long the stream.
    opening = f"Hello, here is question {index + 1}."
    details = rng.sample(DETAILS, rng.randrange(3))
    return " ".join([opening, ask, *details]).format(n=rng.randrange(3, 60))


@dataclass(frozen=True)
class TokenRequest:
    """One request of a workload without text: its prompt as token ids, how many it wants back."""

    prompt_tokens: list
    max_tokens: int


def vocabulary(model):
    """Token ids below this number exist in every tokenizer of the models we measure with."""
    return {"random:tiny": 511, "smollm2": 49_000}.get(model, 128_000)


def token_workload(name, requests, seed=0, longest=256, vocab=128_000):
    """Seeded requests of token ids below `vocab`, for engines without HTTP: list[TokenRequest].

    uniform: prompts and outputs of 16 to `longest` tokens. chat: see chat_lengths, and every 32nd
    prompt has 2,000 to 4,000 tokens.
    """
    rng = random.Random(seed)

    def uniform(_):
        prompt = [rng.randrange(vocab) for _ in range(rng.randint(16, longest))]
        return TokenRequest(prompt, rng.randint(16, longest))

    def chat(i):
        length, wanted = chat_lengths(rng)
        if i % 32 == 31:
            length = rng.randint(2000, 4000)
        return TokenRequest([rng.randrange(vocab) for _ in range(length)], wanted)

    kinds = {"uniform": uniform, "chat": chat}
    if name not in kinds:
        raise ValueError(f"No token workload {name!r}; there are {', '.join(kinds)}.")
    return [kinds[name](i) for i in range(requests)]
