"""Writes tokenizer.json, the small tokenizer shipped in this package.

    python data/bundled/make_tokenizer.py

It is trained on the sources of the running Python's standard library, so another Python version gives another file.
Normalizer, pre-tokenizer, model and decoder are those of Gemma's own tokenizer: a space is written U+2581, and a
character outside the vocabulary falls back to its UTF-8 bytes. Ids: special tokens 0-13, bytes 14-269, then
characters and merges. The one text that does not read back as it was is U+2581 itself, which becomes a space.
"""

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from gemma4_jax.data.sources.python_source import standard_library_files

VOCAB_SIZE = 1024
SPECIAL_TOKENS = (
    "<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<|turn>", "<turn|>", "<|image>", "<|image|>", "<image|>",
    "<|audio>", "<|audio|>", "<audio|>", "<|video|>",
)  # fmt: skip
BYTE_TOKENS = tuple(f"<0x{byte:02X}>" for byte in range(256))

# No token crosses one of these pieces: every digit stands alone, a word may carry the space before it, and a line
# break may carry the indentation behind it.
PIECES = r"[0-9]|\n+▁*|▁?[A-Za-z_]+|▁+|[^A-Za-z_0-9\n▁]+"


def learned_tokens() -> tuple[list[str], list[tuple[str, str]]]:
    """Characters and merges of the corpus: (tokens in order of id, merges in order of rank)."""
    corpus_tokenizer = Tokenizer(models.BPE())
    corpus_tokenizer.normalizer = normalizers.Replace(" ", "▁")
    corpus_tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(PIECES), "isolated")
    ascii_characters = ["\t", "\n", "▁", *map(chr, range(33, 127))]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(SPECIAL_TOKENS) - len(BYTE_TOKENS), initial_alphabet=ascii_characters,
        limit_alphabet=len(ascii_characters), max_token_length=16, show_progress=False,
    )  # fmt: skip
    texts = (path.read_text("utf-8") for path in standard_library_files())
    corpus_tokenizer.train_from_iterator((text for text in texts if text.isascii()), trainer)
    # Only its JSON form shows the merges.
    model = json.loads(corpus_tokenizer.to_str())["model"]
    return sorted(model["vocab"], key=model["vocab"].__getitem__), [tuple(merge) for merge in model["merges"]]


def main() -> None:
    """Trains the tokenizer and writes the file."""
    tokens, merges = learned_tokens()
    vocab = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *BYTE_TOKENS, *tokens))}
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", vocab["<bos>"])]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.save(str(Path(__file__).with_name("tokenizer.json")))


if __name__ == "__main__":
    main()
