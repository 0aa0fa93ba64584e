"""Llamas with made-up weights, for tests and for measuring speed: nothing to download."""
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SHAPES = {
    "tiny": dict(vocab_size=512, hidden_size=64, intermediate_size=192, num_hidden_layers=2,
                 num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048),
    "llama-3.2-1b": dict(vocab_size=128256, hidden_size=2048, intermediate_size=8192,
                         num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8,
                         head_dim=64, max_position_embeddings=131072, rms_norm_eps=1e-5,
                         tie_word_embeddings=True),
}


def random_llama(shape, device, dtype):
    """A Llama with seeded random weights, scaled so that greedy decoding needs the whole context."""
    config = LlamaConfig(**SHAPES[shape], eos_token_id=511, bos_token_id=None)
    with torch.device(device):
        model = LlamaForCausalLM._from_config(config, dtype=dtype)
    generator = torch.Generator(device).manual_seed(0)
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            std = 0.3 if "embed" in name else 2 / weight.shape[1] ** 0.5
            weight.data.normal_(0, std, generator=generator)
    return model, byte_tokenizer(config.vocab_size)


def byte_tokenizer(vocab_size):
    """A tokenizer without a download: all bytes, common letter pairs, <|end|> = 511, fillers."""
    letters = "etaoinshrdlucmfw"
    pairs = [(a, b) for a in letters for b in letters][:-1]
    words = sorted(pre_tokenizers.ByteLevel.alphabet()) + [a + b for a, b in pairs] + ["<|end|>"]
    words += [f"Ġw{i}" for i in range(len(words), vocab_size)]
    ids = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(ids, pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: "
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>",
                                   chat_template=template)
