"""What a line of a streamed answer says, whichever server sent it; the one place that knows."""
import json
from dataclasses import dataclass

DONE = b"[DONE]"  # the data of the last event
LARGEST = 10**9  # tokens that one answer can have; beyond it a count is a mistake


class StreamFailed(Exception):
    """The server answered 200 and then did not keep its word; the message says how."""


@dataclass
class Event:
    """One event of a stream: what it adds to the answer, and the server's own counts."""

    texts: list[str]  # one for each token that came; a token's text may be empty
    prompt_tokens: int | None = None  # None: the event does not say
    completion_tokens: int | None = None


def data_of(line):
    """The data of one line, as bytes; b"" for comments, blank lines and heartbeats."""
    name, _, value = line.partition(b":")
    return value.strip() if name == b"data" else b""


def read_event(data):
    """The Event in this data (bytes). Raises StreamFailed, which names what is wrong with it."""
    try:
        event = json.loads(data)
    except (ValueError, RecursionError):
        raise StreamFailed("an event is no JSON")
    expect(isinstance(event, dict), "an event is no JSON object")
    if event.get("error"):
        raise StreamFailed(f"error event: {error_message(event)}")
    choices = event.get("choices", [])
    expect(isinstance(choices, list), "an event's choices are no list")
    texts = [token_text(choice) for choice in choices]
    return Event([text for text in texts if text is not None], *usage_of(event))


def token_text(choice):
    """The text that a choice brings, which may be empty; None where it brings no token."""
    expect(isinstance(choice, dict), "an event's choice is no object")
    if "delta" not in choice:
        return text_in(choice, "text") or ""
    delta = choice["delta"] or {}
    expect(isinstance(delta, dict), "an event's delta is no object")
    # A chat's first event often brings a role and no token.
    return (text_in(delta, "content") or text_in(delta, "reasoning_content")
            or text_in(delta, "reasoning") or None)


def text_in(found, name):
    """A field that holds text, or None."""
    text = found.get(name)
    expect(text is None or isinstance(text, str), f"an event's {name} is no text")
    return text


def usage_of(event):
    """(prompt tokens, completion tokens) as the server counted them; None where it does not say."""
    usage = event.get("usage")
    if not usage:
        return None, None
    expect(isinstance(usage, dict), "an event's usage is no object")
    return count_in(usage, "prompt_tokens"), count_in(usage, "completion_tokens")


def count_in(usage, name):
    count = usage.get(name)
    expect(type(count) is int and 0 <= count <= LARGEST, f"an event's usage has no {name}")
    return count


def expect(holds, what):
    if not holds:
        raise StreamFailed(what)


def error_message(data):
    """The message of an OpenAI error object, or of one that is like it."""
    error = data.get("error", data) if isinstance(data, dict) else data
    message = error.get("message", error) if isinstance(error, dict) else error
    return str(message)
