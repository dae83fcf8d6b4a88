import json
import pickle
import shutil
from random import Random

import numpy as np
import pytest
import tokenizers

from gemma4_jax import sizes
from gemma4_jax.errors import InputError
from gemma4_jax.tokenizer import ROLES, Tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.load("bundled")


TEXTS = [
    "",
    "read: 4071\n",
    "def f(self, x):\n    return 1234  # twelve\n\n\n",
    "  two leading spaces, two trailing  ",
    "tabs\tand\r\nreturns\x00\x7f",
    "héllo wörld 你好 🎉 \u00a0",
    "<eos><bos><|image|> <pad><0x41>",
]


@pytest.mark.parametrize("text", TEXTS)
def test_text_reads_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_any_characters_read_back(tokenizer):
    rng = np.random.default_rng(0)
    for _ in range(50):
        points = [int(point) for point in rng.integers(0, 0x3000, 40) if point != 0x2581]
        text = "".join(map(chr, points))
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_every_digit_is_one_token(tokenizer):
    assert [tokenizer.token(token_id) for token_id in tokenizer.encode("0123456789")] == list("0123456789")
    assert len(tokenizer.encode("x = 12345")) == len(tokenizer.encode("x = ")) + 5


def test_roles_are_those_of_the_quickstart_model(tokenizer):
    assert tokenizer.tokens == sizes.BUNDLED_TOKENS == sizes.quickstart().tokens
    assert tokenizer.vocab_size == sizes.quickstart().text.vocab_size


def test_names_of_special_tokens_in_text_are_only_text(tokenizer):
    special = set(vars(tokenizer.tokens).values())
    assert special.isdisjoint(tokenizer.encode("".join(ROLES.values())))


def test_half_a_character_is_no_text(tokenizer):
    for encode in (tokenizer.encode, lambda text: tokenizer.encode_with_ends(text, reads_special_tokens=True)):
        with pytest.raises(InputError, match="without lone surrogates"):
            encode("a\ud800")


def test_it_survives_the_way_to_a_worker_process(tokenizer):
    copy = pickle.loads(pickle.dumps(tokenizer))
    for text in TEXTS:
        assert copy.encode(text) == tokenizer.encode(text)


def test_a_folder_that_holds_it_will_do(tokenizer, tmp_path):
    shutil.copy(tokenizer.path, tmp_path / "tokenizer.json")
    assert Tokenizer.load(str(tmp_path)).encode("abc") == tokenizer.encode("abc")


@pytest.mark.parametrize("content", ["", "{}", "not json", '{"model": {"type": "BPE"}}'])
def test_a_file_that_is_no_tokenizer_is_refused(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(InputError, match=r"cannot be read as a tokenizer\.json"):
        Tokenizer.load(str(path))


def test_a_missing_file_is_refused():
    with pytest.raises(InputError, match="nowhere"):
        Tokenizer.load("/nowhere/tokenizer.json")


def test_a_tokenizer_without_the_special_tokens_is_refused(tokenizer, tmp_path):
    content = tokenizer.path.read_text("utf-8").replace("<|image|>", "<|picture|>")
    path = tmp_path / "tokenizer.json"
    path.write_text(content, "utf-8")
    with pytest.raises(InputError, match=r"lacks the special tokens <\|image\|>"):
        Tokenizer.load(str(path))


@pytest.mark.parametrize("tokenizer_class", ["PreTrainedTokenizerFast", "GemmaTokenizer"])
def test_transformers_gives_the_same_ids(tokenizer, tmp_path, tokenizer_class):
    transformers = pytest.importorskip("transformers")
    shutil.copy(tokenizer.path, tmp_path / "tokenizer.json")
    roles = {
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "mask_token": "<mask>",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": tokenizer_class, **roles}))
    theirs = getattr(transformers, tokenizer_class).from_pretrained(tmp_path)
    for text in TEXTS[:-1]:
        assert theirs.encode(text, add_special_tokens=False) == tokenizer.encode(text)
        assert theirs.encode(text) == [tokenizer.tokens.bos, *tokenizer.encode(text)]
    assert theirs.encode("<|image|>", add_special_tokens=False) == [tokenizer.tokens.image]


@pytest.mark.parametrize("normalizer", [None, tokenizers.normalizers.NFD()])
@pytest.mark.parametrize("reads_special_tokens", [False, True])
def test_where_tokens_end_is_where_the_library_says(tmp_path, normalizer, reads_special_tokens):
    """Also where the library is not asked: in texts of bytes, and of names of tokens."""
    library = tokenizers.Tokenizer.from_file(str(Tokenizer.load("bundled").path))
    if normalizer is not None:
        library.normalizer = tokenizers.normalizers.Sequence([normalizer, library.normalizer])
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer, library = Tokenizer(tmp_path / "tokenizer.json"), tokenizers.Tokenizer.from_str(library.to_str())
    library.encode_special_tokens = not reads_special_tokens
    random = Random(0)
    for _ in range(200):
        text = "".join(random.choices(["a", " b", "\n", "é", "漢", "🙂", "▁", "<eos>", "<0x41>", "\u0301"], k=20))
        ids, ends = tokenizer.encode_with_ends(text, reads_special_tokens=reads_special_tokens)
        expected = library.encode(text, add_special_tokens=False)
        assert ids == expected.ids
        assert ends == [stop for _, stop in expected.offsets]


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"normalizer": {"type": "Replace", "pattern": {"Regex": " "}, "content": "▁"}},
        {"normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁▁"}},
        {"pre_tokenizer": {"type": "Split", "pattern": {"String": "a"}, "behavior": "Isolated", "invert": False}},
        {"pre_tokenizer": {"type": "Split", "pattern": {"String": " "}, "behavior": "Removed", "invert": True}},
        {"token": {"content": "▁▁"}},
        {"token": {"content": "b a"}},
        {"token": {"content": "b a", "normalized": True}},
        {"token": {"content": "[END]", "lstrip": True}},
        {"token": {"content": "[END]", "rstrip": True}},
        {"token": {"content": "[END]", "single_word": True}},
    ],
)
@pytest.mark.parametrize("reads_special_tokens", [False, True])
def test_what_is_done_in_place_of_the_library(tmp_path, more, reads_special_tokens):
    """Blanks are replaced before the library sees them, where that is the same."""
    content = json.loads(Tokenizer.load("bundled").path.read_text("utf-8"))
    if "token" in more:
        new = content["added_tokens"][0] | {"id": len(content["model"]["vocab"]), "special": False} | more["token"]
        content["added_tokens"].append(new)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content | {name: step for name, step in more.items() if name != "token"}), "utf-8")
    tokenizer, library = Tokenizer(path), tokenizers.Tokenizer.from_file(str(path))
    library.encode_special_tokens = not reads_special_tokens
    random = Random(0)
    for _ in range(200):
        text = "".join(random.choices(["a", " b", " ", "  ", "\n", "é", "▁", "▁▁", "<eos>", "[END]", " a"], k=20))
        ids, ends = tokenizer.encode_with_ends(text, reads_special_tokens=reads_special_tokens)
        expected = library.encode(text, add_special_tokens=False)
        assert ids == expected.ids
        assert ends == [stop for _, stop in expected.offsets]
