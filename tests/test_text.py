"""Text as it comes is the text of the whole: for every kind of tokenizer, whatever the tokens."""
import asyncio

import pytest
from conftest import added_text, by_hand, prompt
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from cbserver.http.answers import pieces_of
from cbserver.http.text import Detokenizer, decoder_of
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
    return decoder.text(tail + list(answer))[len(decoder.text(tail)):]


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
