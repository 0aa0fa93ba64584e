"""Text as it comes is the text of the whole: for every kind of tokenizer, whatever the tokens."""
import asyncio
import codecs
import os

import pytest
from conftest import added_text, by_hand, prompt
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from cbserver.http import text as http_text
from cbserver.http.answers import pieces_of
from cbserver.http.text import (
    Detokenizer,
    StopString,
    characters,
    decoder_of,
    prompt_tokens,
)
from cbserver.model.random_llama import byte_tokenizer
from cbserver.model.sampling import SamplingParams
from cbserver.scheduler import ContinuousEngine

WORDS = ["a", "e", "i", "o", "time", "upon", "once", "the", ".", ",", "'s", "京", "é"]


def byte_level():
    return byte_tokenizer(512)


def sentencepiece(decoder=None):
    """Llama 2's and Mistral's kind: ▁ for a space, a token for each byte, one space stripped."""
    words = ["<unk>", "<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)], "▁"]
    words += [prefix + word for word in WORDS for prefix in ("▁", "")]
    tokenizer = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, [], byte_fallback=True))
    tokenizer.decoder = decoder or decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
        decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def metaspace():
    return sentencepiece(decoders.Metaspace())


def wordpiece():
    words = ["[UNK]", "[CLS]", "[SEP]", *WORDS, *[f"##{word}" for word in WORDS]]
    tokenizer = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s+"), "removed")
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]",
                                   cls_token="[CLS]", sep_token="[SEP]")


TOKENIZERS = {make.__name__: make() for make in (byte_level, sentencepiece, metaspace, wordpiece)}
kinds = pytest.mark.parametrize("kind", TOKENIZERS)
byte_rows = st.lists(st.integers(3, 258), max_size=40)  # of sentencepiece: bytes alone


def streamed(tokenizer, answer, prompt=()):
    detokenizer = Detokenizer(tokenizer, prompt=prompt)
    parts = [detokenizer.push(token) for token in answer]
    return [*parts, detokenizer.finish()]


def whole(tokenizer, answer, prompt=()):
    """What the answer adds to the prompt's tail, if both are decoded as one."""
    decoder = decoder_of(tokenizer)
    tail = [token for token in prompt[-32:] if token not in decoder.skipped]
    before = decoder.text(tail)
    text = decoder.text(tail + list(answer))
    if before.endswith("\ufffd"):  # the answer may complete this character
        before = os.path.commonprefix([before, text])
    return text[len(before):]


@kinds
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_pieces_add_up_to_what_the_whole_decodes_to(kind, data):
    tokenizer = TOKENIZERS[kind]
    tokens = st.integers(0, len(tokenizer) - 1)
    prompt = data.draw(st.lists(tokens, max_size=50))
    answer = data.draw(st.lists(tokens, max_size=70) | byte_rows.filter(
        lambda row: all(token < len(tokenizer) for token in row)))
    assert "".join(streamed(tokenizer, answer, prompt)) == whole(tokenizer, answer, prompt)


@kinds
@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_what_is_out_is_never_taken_back(kind, data):
    tokenizer = TOKENIZERS[kind]
    answer = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=40))
    parts = streamed(tokenizer, answer)
    text = whole(tokenizer, answer)
    for count in range(len(parts)):
        assert text.startswith("".join(parts[:count]))


def ids(tokenizer, *words):
    return [tokenizer.convert_tokens_to_ids(word) for word in words]


@pytest.mark.parametrize("kind", ["sentencepiece", "metaspace"])
def test_a_completion_begins_with_its_space_and_keeps_it_after_a_special_token(kind):
    tokenizer = TOKENIZERS[kind]
    prompt = ids(tokenizer, "<s>", "▁once", "▁upon", "▁a")
    parts = streamed(tokenizer, ids(tokenizer, "▁time", "</s>", "▁the"), prompt)
    assert "".join(parts) == " time the"


def test_one_wrong_byte_spoils_its_row_and_nothing_is_out_before_that_is_known():
    tokenizer = TOKENIZERS["sentencepiece"]
    noodles = [f"<0x{byte:02X}>" for byte in "🍜".encode()]
    assert streamed(tokenizer, ids(tokenizer, *noodles, "▁the"))[-2:] == ["🍜 the", ""]
    assert "🍜" not in "".join(streamed(tokenizer, ids(tokenizer, *noodles, "<0xFF>", "▁the")))


# A prompt that is echoed: its text and the answer's are one.

letters = st.text(st.sampled_from("ab ✓é京🌶🍜👩‍🍳\ufffd"), min_size=1, max_size=12)
ones = st.lists(letters | st.sampled_from(["Look: 🌶", "<|end|>"]), max_size=4).map("".join)


def echoed(tokenizer, prompt, answer, stop=()):
    """(prompt's text, answer's text, where each token's begins) with echo."""
    detokenizer = Detokenizer(tokenizer)
    text, begins = detokenizer.echo(prompt)
    detokenizer.watch(stop)
    parts = []
    for token in answer:
        begins.append(detokenizer.length)
        parts.append(detokenizer.push(token))
        if detokenizer.stopped:
            break
    return text, "".join([*parts, detokenizer.finish()]), begins


@settings(max_examples=200, deadline=None)
@given(text=ones, data=st.data())
def test_a_text_cut_anywhere_into_prompt_and_answer_is_whole_again(text, data):
    tokenizer = TOKENIZERS["byte_level"]
    tokens = tokenizer(text)["input_ids"]
    cut = data.draw(st.integers(0, len(tokens)))
    prompt, answer = tokens[:cut], [t for t in tokens[cut:] if t != 511]
    before, after, begins = echoed(tokenizer, prompt, answer)
    said = tokenizer.decode([*prompt, *answer])
    assert before + after == said
    assert "".join(streamed(tokenizer, answer, prompt)) == whole(tokenizer, answer, prompt)
    assert begins == sorted(begins) and len(begins) == len(prompt) + len(answer)
    for token, begin in zip([*prompt, *answer], begins):
        alone = tokenizer.decode([token])
        assert said[begin:].startswith(alone) or "\ufffd" in alone


# Without the byte 0xED: Python's decoder waits behind it for half of a surrogate pair, which is no
# character.
ED = byte_level()("\ud000")["input_ids"][0]
no_halves = st.lists(st.integers(0, 510).filter(lambda token: token != ED), max_size=60)


@settings(max_examples=200, deadline=None)
@given(no_halves, no_halves)
def test_a_tokens_text_begins_where_the_whole_characters_before_it_end(prompt, answer):
    tokenizer = TOKENIZERS["byte_level"]
    letters = {letter: byte for byte, letter in bytes_to_unicode().items()}
    utf8 = codecs.getincrementaldecoder("utf-8")("replace")
    want = []
    length = 0
    for name in tokenizer.convert_ids_to_tokens([*prompt, *answer]):
        want.append(length)
        length += len(utf8.decode(bytes(letters[letter] for letter in name)))
    assert echoed(tokenizer, prompt, answer)[2] == want


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
@pytest.mark.parametrize("missing", [1, 2, 3, 4])
def test_a_character_that_the_prompt_begins_belongs_to_the_answer_that_ends_it(kind, missing):
    tokenizer = TOKENIZERS[kind]
    tokens = tokenizer("aa: 🌶")["input_ids"]  # all but "a" is bytes, a row of 6
    prompt, answer = tokens[:-missing], tokens[-missing:]
    assert "".join(streamed(tokenizer, answer, prompt)) == "🌶"
    assert "".join(echoed(tokenizer, prompt, answer)[:2]) == "aa: 🌶"
    other = ids(tokenizer, "a")  # where it is never whole, an echo shows so
    assert "".join(streamed(tokenizer, other, prompt)) == "a"
    assert "".join(echoed(tokenizer, prompt, other)[:2]) == tokenizer.decode([*prompt, *other])


def test_a_replacement_sign_in_a_prompt_is_the_prompts():
    tokenizer = TOKENIZERS["byte_level"]
    assert "".join(streamed(tokenizer, tokenizer(" is it")["input_ids"],
                            tokenizer("This \ufffd")["input_ids"])) == " is it"


def test_half_a_surrogate_pair_is_a_replacement_sign_and_a_whole_one_a_character():
    assert characters("\ud83d a\ud83d\ude42b\ude42\ud83d") == "\ufffd a🙂b\ufffd\ufffd"


def test_an_echo_is_the_prompt_as_it_was_sent():
    sent = "<|end|>user\nHi<|end|>\n"
    plain = byte_tokenizer(512)
    beginning = byte_tokenizer(512)
    beginning.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|end|> $A", special_tokens=[("<|end|>", 511)])
    for tokenizer, added in ((plain, 0), (beginning, 1)):
        prompt = tokenizer(sent)["input_ids"]
        assert prompt.count(511) == 2 + added
        text, answer, begins = echoed(tokenizer, prompt, ids(tokenizer, "a"))
        assert (text, answer) == (sent, "a")
        assert begins[:added + 2] == [0] * (added + 1) + [len("<|end|>")]
        assert begins[-1] == len(sent)


def test_where_a_tokens_text_begins_does_not_depend_on_stop_strings_that_hold_it_back():
    tokenizer = TOKENIZERS["byte_level"]
    prompt = tokenizer("One ")["input_ids"]
    answer = tokenizer("two END three")["input_ids"]
    text, kept, begins = echoed(tokenizer, prompt, answer, stop=("END", " three and more"))
    assert text + kept == "One two "
    assert begins == echoed(tokenizer, prompt, answer)[2][:len(begins)]


@kinds
def test_a_thousand_bytes_that_are_no_text_cost_ten_times_a_hundred(kind, monkeypatch):
    tokenizer = TOKENIZERS[kind]
    decoder = decoder_of(tokenizer)
    decoded = []
    text = decoder.text
    monkeypatch.setattr(decoder, "text", lambda tokens: decoded.append(len(tokens)) or text(tokens))
    wrong = {"byte_level": "ÿ", "wordpiece": "##é"}.get(kind, "<0xFF>")
    costs = []
    for count in (100, 1000):
        decoded.clear()
        streamed(tokenizer, ids(tokenizer, wrong) * count)
        costs.append(sum(decoded))
    assert costs[1] < 11 * costs[0]


def test_a_stop_string_that_is_a_special_token_stops():
    tokenizer = TOKENIZERS["sentencepiece"]
    detokenizer = Detokenizer(tokenizer, stop=("</s>",))
    out = [detokenizer.push(token) for token in ids(tokenizer, "▁once", "▁upon", "</s>")]
    assert "".join(out) == "once upon"
    assert detokenizer.stopped
    assert detokenizer.finish() == ""


class Counted(str):
    """A text that counts how often somebody looks at a letter or a part of it."""

    looks = 0

    def __getitem__(self, place):
        Counted.looks += 1
        return super().__getitem__(place)


@pytest.mark.parametrize("stop, said", [
    ("a" * 992 + "b", "a"), ("ab" * 496 + "c", "ab"),
    ("a" * 496 + "b" + "a" * 496, "a" * 496 + "c")])
def test_a_stop_string_that_almost_fits_costs_a_few_looks_a_letter(stop, said):
    """Of 64 such, a token once took 29 ms of the event loop."""
    tokenizer = TOKENIZERS["byte_level"]
    text = (said * 4000)[:4000]
    stops = tuple(Counted(stop + str(number)) for number in range(4))
    Counted.looks = 0
    detokenizer = Detokenizer(tokenizer, stop=stops)
    out = [detokenizer.push(token) for token in tokenizer(text)["input_ids"]]
    assert "".join(out) + detokenizer.finish() == text
    assert Counted.looks <= 5 * len(stops) * len(text)


@settings(max_examples=300, deadline=None)
@given(st.text("ab", min_size=1, max_size=8), st.text("abc", max_size=40), st.integers(1, 7))
def test_a_stop_string_is_found_where_it_first_ends(stop, text, size):
    search = StopString(stop)
    for begin in range(0, len(text), size):
        end = search.find(text[begin:begin + size])
        so_far = text[:begin + size]
        if end:
            assert text.index(stop) + len(stop) == begin + end
            return
        assert stop not in so_far
        fits = [count for count in range(len(stop)) if so_far.endswith(stop[:count])]
        assert search.matched == max(fits)


def test_the_text_of_the_token_that_ends_an_answer_never_shows_special_or_not(tiny, reference):
    async def read(engine, sequence):
        return "".join([piece.text async for piece in pieces_of(engine, sequence)])

    model, tokenizer = tiny
    tokens = reference(prompt(1, 9), 12)
    engine = by_hand(ContinuousEngine(model, tokenizer))
    engine.eos = {tokens[5]}  # an ordinary token
    sequence = engine.submit(prompt(1, 9), SamplingParams(12))
    while engine.waiting or engine.running:
        engine.step()
    assert sequence.finish_reason == "stop"
    kept = sequence.generated_tokens[:-1]
    assert asyncio.run(read(engine, sequence)) == added_text(tokenizer, prompt(1, 9), kept)


def test_a_vocabulary_is_not_looked_through_while_the_streams_wait(tiny, monkeypatch):
    made = []

    class Noted(http_text.Decoder):
        def __init__(self, tokenizer):
            with pytest.raises(RuntimeError, match="no running event loop"):
                asyncio.get_running_loop()
            made.append(tokenizer)
            super().__init__(tokenizer)

    async def read(engine, sequence):
        return "".join([piece.text async for piece in pieces_of(engine, sequence)])

    monkeypatch.setattr(http_text, "Decoder", Noted)
    engine = by_hand(ContinuousEngine(tiny[0], byte_tokenizer(512)))
    sequence = engine.submit(prompt(1, 9), SamplingParams(3))
    while engine.waiting or engine.running:
        engine.step()
    asyncio.run(asyncio.to_thread(prompt_tokens, engine.tokenizer, "a"))  # as the routes do it
    asyncio.run(read(engine, sequence))
    assert made == [engine.tokenizer]
