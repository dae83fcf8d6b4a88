"""The four official sizes, and small models that switch every part on.

Pure Python: importing this module does not import jax.
"""

from gemma4_jax.config import AudioConfig, Gemma4Config, SpecialTokens, TextConfig, VisionConfig

_SMALL_VISION_TOWER = VisionConfig(
    embed_dim=768, mlp_dim=3072, num_layers=16, num_heads=12, head_dim=64, uses_clipped_linears=True
)
_LARGE_VISION_TOWER = VisionConfig(
    embed_dim=1152, mlp_dim=4304, num_layers=27, num_heads=16, head_dim=72, standardizes=True
)


def e2b() -> Gemma4Config:
    """Gemma 4 E2B: 5,104,297,504 parameters, text, images and audio."""
    text = TextConfig(
        vocab_size=262144, embed_dim=1536, mlp_dim=6144, num_layers=35, attention_period=5,
        num_heads=8, num_kv_heads=1, num_global_kv_heads=1, head_dim=256, global_head_dim=512, sliding_window=512,
        num_kv_shared_layers=20, uses_double_wide_mlp=True, per_layer_embed_dim=256,
    )  # fmt: skip
    return Gemma4Config(text, _SMALL_VISION_TOWER, AudioConfig())


def e4b() -> Gemma4Config:
    """Gemma 4 E4B: 7,941,100,832 parameters, text, images and audio."""
    text = TextConfig(
        vocab_size=262144, embed_dim=2560, mlp_dim=10240, num_layers=42, attention_period=6,
        num_heads=8, num_kv_heads=2, num_global_kv_heads=2, head_dim=256, global_head_dim=512, sliding_window=512,
        num_kv_shared_layers=18, per_layer_embed_dim=256,
    )  # fmt: skip
    return Gemma4Config(text, _SMALL_VISION_TOWER, AudioConfig())


def a4b_26b() -> Gemma4Config:
    """Gemma 4 26B-A4B: 25,805,933,872 parameters, 8 of 128 experts per token, text and images."""
    text = TextConfig(
        vocab_size=262144, embed_dim=2816, mlp_dim=2112, num_layers=30, attention_period=6,
        num_heads=16, num_kv_heads=8, num_global_kv_heads=2, head_dim=256, global_head_dim=512, sliding_window=1024,
        uses_k_eq_v=True, num_experts=128, num_experts_per_token=8, expert_dim=704,
        image_blocks_bidirectional=True, max_positions=262144,
    )  # fmt: skip
    return Gemma4Config(text, _LARGE_VISION_TOWER)


def dense_31b() -> Gemma4Config:
    """Gemma 4 31B: 31,273,086,512 parameters, text and images."""
    text = TextConfig(
        vocab_size=262144, embed_dim=5376, mlp_dim=21504, num_layers=60, attention_period=6,
        num_heads=32, num_kv_heads=16, num_global_kv_heads=4, head_dim=256, global_head_dim=512, sliding_window=1024,
        uses_k_eq_v=True, image_blocks_bidirectional=True, max_positions=262144,
    )  # fmt: skip
    return Gemma4Config(text, _LARGE_VISION_TOWER)


BUNDLED_TOKENS = SpecialTokens(begin_image=7, image=8, end_image=9, begin_audio=10, audio=11, end_audio=12, video=13)
"""Roles of the special tokens of the small tokenizer shipped in this package."""


def quickstart() -> Gemma4Config:
    """A Gemma 4 of 701,552 parameters with every architectural part switched on, for a CPU."""
    text = TextConfig(
        vocab_size=1024, embed_dim=64, mlp_dim=128, num_layers=4, attention_period=2,
        num_heads=4, num_kv_heads=2, num_global_kv_heads=1, head_dim=16, global_head_dim=32, sliding_window=80,
        uses_k_eq_v=True, num_kv_shared_layers=2, uses_double_wide_mlp=True, per_layer_embed_dim=16,
        num_experts=4, num_experts_per_token=2, expert_dim=64,
        image_blocks_bidirectional=True, max_positions=2048,
    )  # fmt: skip
    vision = VisionConfig(
        embed_dim=64, mlp_dim=128, num_layers=2, num_heads=2, head_dim=32, patch_size=4, pooling_size=2,
        num_positions=512, uses_clipped_linears=True, standardizes=True,
    )  # fmt: skip
    return Gemma4Config(text, vision, tokens=BUNDLED_TOKENS)


def tiny() -> Gemma4Config:
    """The quickstart's model as narrow as it goes: for tests, whose time goes into compiling."""
    text = TextConfig(
        vocab_size=1024, embed_dim=32, mlp_dim=32, num_layers=4, attention_period=2,
        num_heads=4, num_kv_heads=2, num_global_kv_heads=1, head_dim=8, global_head_dim=16, sliding_window=80,
        uses_k_eq_v=True, num_kv_shared_layers=2, uses_double_wide_mlp=True, per_layer_embed_dim=8,
        num_experts=4, num_experts_per_token=2, expert_dim=16,
        image_blocks_bidirectional=True, max_positions=2048,
    )  # fmt: skip
    vision = VisionConfig(
        embed_dim=32, mlp_dim=128, num_layers=1, num_heads=2, head_dim=16, patch_size=4, pooling_size=2,
        num_positions=140, uses_clipped_linears=True, standardizes=True,
    )  # fmt: skip
    return Gemma4Config(text, vision, tokens=BUNDLED_TOKENS)


def small() -> Gemma4Config:
    """A Gemma 4 of 446,236,448 parameters, 291,594,272 active, every part switched on, for one accelerator.

    It has the released models' vocabulary, window and images, and so reads what they read.
    """
    text = TextConfig(
        vocab_size=262144, embed_dim=512, mlp_dim=1024, num_layers=12, attention_period=6,
        num_heads=8, num_kv_heads=4, num_global_kv_heads=2, head_dim=64, global_head_dim=128, sliding_window=512,
        uses_k_eq_v=True, num_kv_shared_layers=6, uses_double_wide_mlp=True, per_layer_embed_dim=32,
        num_experts=16, num_experts_per_token=2, expert_dim=512,
        image_blocks_bidirectional=True,
    )  # fmt: skip
    vision = VisionConfig(
        embed_dim=384, mlp_dim=1536, num_layers=6, num_heads=6, head_dim=64, uses_clipped_linears=True,
        standardizes=True,
    )  # fmt: skip
    return Gemma4Config(text, vision)


SIZES = {
    "e2b": e2b,
    "e4b": e4b,
    "26b_a4b": a4b_26b,
    "31b": dense_31b,
    "small": small,
    "quickstart": quickstart,
    "tiny": tiny,
}
"""Every preset by the name that run configs use."""
