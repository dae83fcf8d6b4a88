"""What an export holds is the model: transformers loads it with its stock classes and computes the same logits."""

import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
from flax import nnx

from gemma4_jax import sizes
from gemma4_jax.data.assemble import assemble
from gemma4_jax.data.document import Document, Image, Text
from gemma4_jax.data.encode import Encoder
from gemma4_jax.data.pack import RowShape
from gemma4_jax.hf.save import export_state
from gemma4_jax.tokenizer import Tokenizer
from tests.hf import samples

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
reference = pytest.importorskip("tests.hf.reference")

MAX_SOFT_TOKENS = 70

# float32 on the CPU; the largest measured difference is 1.2e-6 of the largest logit.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def config():
    return sizes.quickstart()


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.load("bundled")


@pytest.fixture(scope="module")
def model(config):
    return samples.model(config, samples.lively_weights(config))


@pytest.fixture(scope="module")
def export(config, tokenizer, model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "out"
    export_state(nnx.state(model), config, folder, tokenizer=tokenizer, max_soft_tokens=MAX_SOFT_TOKENS)
    return folder


@pytest.fixture(scope="module")
def theirs(export):
    model, info = transformers.Gemma4ForConditionalGeneration.from_pretrained(
        export, dtype="float32", attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values()), info
    return model


def assert_close(given, expected):
    assert np.abs(given - expected).max() <= TOLERANCE * np.abs(expected).max()


def test_same_logits(config, model, theirs):
    documents = samples.all_documents(config)
    rows = samples.batch([[document] for document in documents], config)
    given = np.asarray(samples.logits(model, jax.tree.map(jnp.asarray, rows)))
    for row, document in zip(given, documents, strict=True):
        (expected,) = reference.logits(theirs, [document], config)
        assert_close(row[: len(expected)], expected)


SEGMENTS = ("read: ", (37, 90), "4071\n", "and: ", (64, 20), "33 é\n")
"""Text, and images by height and width."""


def test_same_logits_from_files_to_logits(config, tokenizer, model, export, theirs):
    """Text and pictures through our data pipeline, and through the exported tokenizer and image processor."""
    rng = np.random.default_rng(3)
    parts = [
        rng.integers(0, 256, (*part, 3)).astype(np.uint8) if isinstance(part, tuple) else part for part in SEGMENTS
    ]

    document = Document(tuple(Text(part) if isinstance(part, str) else Image(part) for part in parts), "sample")
    example = Encoder(tokenizer, config.vision, MAX_SOFT_TOKENS)(document).read()
    patches = sum(len(image.patches) for image in example.images)
    shape = RowShape(len(example.tokens), len(example.images), patches, config.vision.patch_dim)
    rows = jax.tree.map(jnp.asarray, assemble([[example]], shape, config.tokens))
    given = np.asarray(samples.logits(model, rows))[0]

    their_tokenizer = transformers.AutoTokenizer.from_pretrained(export)
    their_images = transformers.AutoImageProcessor.from_pretrained(export)
    pictures = [PIL.Image.fromarray(part) for part in parts if not isinstance(part, str)]
    images = their_images(pictures, return_tensors="pt")
    counts = iter(images.pop("num_soft_tokens_per_image").tolist())
    ids = [their_tokenizer.bos_token_id]
    for part in parts:
        image = their_tokenizer.boi_token, their_tokenizer.image_token, their_tokenizer.eoi_token
        text = part if isinstance(part, str) else image[0] + image[1] * next(counts) + image[2]
        ids += their_tokenizer(text, add_special_tokens=False).input_ids
    ids.append(their_tokenizer.eos_token_id)
    assert ids == example.tokens.tolist()
    tokens = torch.tensor([ids])
    kinds = (tokens == their_tokenizer.image_token_id).long()
    with torch.no_grad():
        expected = theirs(input_ids=tokens, mm_token_type_ids=kinds, **images, use_cache=False).logits[0].numpy()
    assert_close(given, expected)


def test_the_tokenizer_agrees(tokenizer, export):
    theirs = transformers.AutoTokenizer.from_pretrained(export)
    assert type(theirs).__name__ == "GemmaTokenizer"
    for text in ("read: 4071\n", "def f(x):\n    return x ** 2  # é漢\U0001f600\n", "  two  spaces", ""):
        assert theirs(text, add_special_tokens=False).input_ids == tokenizer.encode(text)
        assert theirs(text).input_ids == [theirs.bos_token_id, *tokenizer.encode(text)]
    for role, token in (("image", theirs.image_token_id), ("pad", theirs.pad_token_id), ("eos", theirs.eos_token_id)):
        assert token == getattr(tokenizer.tokens, role)


def test_the_processor_loads(export):
    if importlib.util.find_spec("torchvision") is None:
        # Without torchvision transformers has no video processor, and so no whole processor for any Gemma 4.
        with pytest.raises(ImportError, match=r"[Tt]orchvision"):
            transformers.AutoProcessor.from_pretrained(export)
        feature_extractor = transformers.AutoFeatureExtractor.from_pretrained(export)
        assert type(feature_extractor).__name__ == "Gemma4AudioFeatureExtractor"
        return
    processor = transformers.AutoProcessor.from_pretrained(export)
    picture = PIL.Image.fromarray(np.zeros((30, 70, 3), np.uint8))
    inputs = processor(text="<|image|>read: 4071", images=[picture], return_tensors="pt")
    assert inputs["pixel_values"].shape[1:] == (MAX_SOFT_TOKENS * 4, 48)


def test_the_feature_extractor_is_all_that_the_reference_saves(export):
    """Some readers have no defaults for it."""
    given = json.loads((export / "processor_config.json").read_text())["feature_extractor"]
    expected = transformers.Gemma4AudioFeatureExtractor().to_dict()
    assert given == json.loads(json.dumps(expected, default=lambda array: array.tolist()))


def test_it_generates(theirs, config):
    tokens = torch.tensor([[2, 300, 400]])
    out = theirs.generate(tokens, max_new_tokens=3, do_sample=False)
    assert out.shape[1] <= 6
    assert int(out.max()) < config.text.vocab_size
