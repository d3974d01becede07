"""How a small checkpoint of each audio family is made: its special tokens, its config of given sizes, its processor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hark.data.torchaudio_compat import torchaudio  # noqa: F401  (must precede transformers)
from hark.models.families import TOO_RECENT

# Special tokens by the names that the processors ask a tokenizer for.
OMNI = {
    "audio_token": "<|AUDIO|>", "audio_bos_token": "<|audio_bos|>", "audio_eos_token": "<|audio_eos|>",
    "image_token": "<|IMAGE|>", "video_token": "<|VIDEO|>",
    "vision_bos_token": "<|vision_bos|>", "vision_eos_token": "<|vision_eos|>",
}  # fmt: skip
OMNI_3 = OMNI | {
    "audio_token": "<|audio_pad|>", "audio_bos_token": "<|audio_start|>", "audio_eos_token": "<|audio_end|>",
    "image_token": "<|image_pad|>", "video_token": "<|video_pad|>",
    "vision_bos_token": "<|vision_start|>", "vision_eos_token": "<|vision_end|>",
}  # fmt: skip
MISTRAL = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]


@dataclass(frozen=True)
class Sizes:
    """Widths and layers of the decoder and of the tower, and the most tokens: little text gives fewer."""

    vocabulary: int = 768
    hidden: int = 192
    layers: int = 4
    tower_hidden: int = 128
    tower_layers: int = 2

    def text(self, kind: str, vocabulary: int, **more: Any) -> dict[str, Any]:
        """The decoder's config: Qwen2's layout with two query heads for each key head."""
        heads = self.hidden // 32
        sizes = dict(
            model_type=kind, vocab_size=vocabulary, hidden_size=self.hidden, intermediate_size=2 * self.hidden,
            num_hidden_layers=self.layers, num_attention_heads=heads, num_key_value_heads=max(heads // 2, 1),
            max_position_embeddings=4096, initializer_range=self.hidden**-0.5 / 2,
        )  # fmt: skip
        return sizes | more

    def whisper(self, kind: str, **more: Any) -> dict[str, Any]:
        """The config of a tower by the names of Whisper's encoder."""
        sizes = dict(
            model_type=kind, num_mel_bins=80, d_model=self.tower_hidden, encoder_layers=self.tower_layers,
            encoder_attention_heads=self.tower_hidden // 32, encoder_ffn_dim=3 * self.tower_hidden,
            initializer_range=self.tower_hidden**-0.5 / 2,
        )  # fmt: skip
        return sizes | more

    def encoder(self, kind: str, **more: Any) -> dict[str, Any]:
        """The config of a tower by the names of newer families."""
        sizes = dict(
            model_type=kind, num_mel_bins=80, hidden_size=self.tower_hidden, num_hidden_layers=self.tower_layers,
            num_attention_heads=self.tower_hidden // 32, intermediate_size=4 * self.tower_hidden,
            initializer_range=self.tower_hidden**-0.5 / 2,
        )  # fmt: skip
        return sizes | more


@dataclass(frozen=True)
class Family:
    """How a family's checkpoint is made.

    audio: what its chat template writes for a clip, with one placeholder. tokens: its special tokens; by name if the
    processor asks the tokenizer for them by name. config: (tokenizer, sizes) to the config. model: the name of its
    class in transformers. processor: (tokenizer, template, mel bins) to the processor.
    """

    audio: str
    tokens: dict[str, str] | list[str]
    config: Callable[[Any, Sizes], Any]
    model: str
    processor: Callable[[Any, str, int], Any]


def _id(tokenizer: Any, token: str) -> int:
    return tokenizer.convert_tokens_to_ids(token)


def _whisper(kind: str, **more: Any) -> Callable[[Any, str, int], Any]:
    """A processor of Whisper's extractor and a tokenizer."""

    def make(tokenizer: Any, template: str, bins: int) -> Any:
        import transformers

        extractor = transformers.WhisperFeatureExtractor(feature_size=bins)
        return getattr(transformers, kind)(extractor, tokenizer, chat_template=template, **more)

    return make


def _qwen2_audio(tokenizer: Any, sizes: Sizes) -> Any:
    from transformers import Qwen2AudioConfig

    return Qwen2AudioConfig(
        audio_config=sizes.whisper("qwen2_audio_encoder"),
        text_config=sizes.text("qwen2", len(tokenizer)),
        audio_token_index=_id(tokenizer, "<|AUDIO|>"),
    )


def _omni_parts(tokenizer: Any, tokens: dict[str, str]) -> dict[str, Any]:
    names = {
        "audio_token_id": "audio_token", "image_token_id": "image_token", "video_token_id": "video_token",
        "audio_start_token_id": "audio_bos_token", "audio_end_token_id": "audio_eos_token",
    }  # fmt: skip
    vision = {"vision_start_token_id": "vision_bos_token", "vision_end_token_id": "vision_eos_token"}
    return {name: _id(tokenizer, tokens[token]) for name, token in (names | vision).items()}


def _qwen2_5_omni(tokenizer: Any, sizes: Sizes) -> Any:
    from transformers import Qwen2_5OmniThinkerConfig

    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]}
    return Qwen2_5OmniThinkerConfig(
        audio_config=sizes.whisper("qwen2_5_omni_audio_encoder", output_dim=sizes.hidden),
        text_config=sizes.text("qwen2_5_omni_text", len(tokenizer), rope_parameters=rope, tie_word_embeddings=False),
        vision_config=dict(
            depth=1, hidden_size=32, intermediate_size=32, num_heads=2, out_hidden_size=sizes.hidden,
            fullatt_block_indexes=[0],
        ),
        **_omni_parts(tokenizer, OMNI),
    )  # fmt: skip


def _qwen3_omni_moe(tokenizer: Any, sizes: Sizes) -> Any:
    from transformers import Qwen3OmniMoeThinkerConfig

    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6], "mrope_interleaved": True}
    experts = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=sizes.hidden, head_dim=32)
    return Qwen3OmniMoeThinkerConfig(
        audio_config=sizes.whisper(
            "qwen3_omni_moe_audio_encoder", output_dim=sizes.hidden, downsample_hidden_size=16
        ),
        text_config=sizes.text("qwen3_omni_moe_text", len(tokenizer), rope_parameters=rope, **experts),
        vision_config=dict(
            depth=1, hidden_size=32, intermediate_size=32, num_heads=2, out_hidden_size=sizes.hidden,
            deepstack_visual_indexes=[0], num_position_embeddings=16,
        ),
        **_omni_parts(tokenizer, OMNI_3),
    )  # fmt: skip


def _omni_processor(tokenizer: Any, template: str, bins: int) -> Any:
    """The audio half of the Omni processors: the other half needs torchvision."""
    return _whisper("Qwen2AudioProcessor", audio_token=tokenizer.audio_token)(tokenizer, template, bins)


def _qwen3_asr(tokenizer: Any, sizes: Sizes) -> Any:
    from transformers import Qwen3ASRConfig

    return Qwen3ASRConfig(
        audio_config=sizes.whisper("qwen3_asr_encoder", output_dim=sizes.hidden, downsample_hidden_size=16),
        text_config=sizes.text("qwen3", len(tokenizer), head_dim=32, tie_word_embeddings=True),
        audio_token_id=_id(tokenizer, "<|audio_pad|>"),
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=[tokenizer.eos_token_id],
    )


def _qwen3_asr_processor(tokenizer: Any, template: str, bins: int) -> Any:
    from transformers import Qwen3ASRFeatureExtractor, Qwen3ASRProcessor

    return Qwen3ASRProcessor(Qwen3ASRFeatureExtractor(feature_size=bins), tokenizer, chat_template=template)


def _flamingo(kind: str) -> Callable[[Any, Sizes], Any]:
    def make(tokenizer: Any, sizes: Sizes) -> Any:
        import transformers

        ends = dict(
            audio_bos_token_id=_id(tokenizer, "<|sound_bos|>"), audio_eos_token_id=_id(tokenizer, "<|sound_eos|>")
        )
        return getattr(transformers, f"{kind}Config")(
            audio_config=sizes.encoder("audioflamingo3_encoder"),
            text_config=sizes.text("qwen2", len(tokenizer)),
            audio_token_id=_id(tokenizer, "<sound>"),
            **(ends if kind == "MusicFlamingo" else {}),
        )

    return make


def _voxtral(tokenizer: Any, sizes: Sizes) -> Any:
    from transformers import VoxtralConfig

    return VoxtralConfig(
        audio_config=sizes.encoder("voxtral_encoder"),
        text_config=sizes.text("llama", len(tokenizer), head_dim=32),
        audio_token_id=24,
    )


def _voxtral_processor(tokenizer: Any, template: str, bins: int) -> Any:
    from transformers import VoxtralProcessor, WhisperFeatureExtractor

    return VoxtralProcessor(WhisperFeatureExtractor(feature_size=bins), tokenizer)


def _granite_speech(tokenizer: Any, sizes: Sizes) -> Any:
    from transformers import GraniteSpeechConfig

    width = sizes.tower_hidden
    return GraniteSpeechConfig(
        encoder_config=dict(
            model_type="granite_speech_encoder", input_dim=160, num_layers=sizes.tower_layers, hidden_dim=width,
            num_heads=2, dim_head=width // 2, output_dim=12, context_size=20, max_pos_emb=64, conv_kernel_size=5,
            feedforward_mult=2,
        ),
        projector_config=dict(
            model_type="blip_2_qformer", hidden_size=width, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=2 * width, encoder_hidden_size=width, cross_attention_frequency=1,
        ),
        text_config=sizes.text(
            "granite", len(tokenizer), logits_scaling=2.0, embedding_multiplier=3.0, residual_multiplier=0.5,
            attention_multiplier=0.2, tie_word_embeddings=True,
        ),
        audio_token_index=_id(tokenizer, "<|audio|>"),
        has_lora_adapter=False,
    )  # fmt: skip


def _granite_speech_processor(tokenizer: Any, template: str, bins: int) -> Any:
    from transformers import GraniteSpeechFeatureExtractor, GraniteSpeechProcessor

    return GraniteSpeechProcessor(GraniteSpeechFeatureExtractor(n_mels=bins), tokenizer, chat_template=template)


def _glmasr(tokenizer: Any, sizes: Sizes) -> Any:
    from transformers import GlmAsrConfig

    return GlmAsrConfig(
        audio_config=sizes.encoder("glmasr_encoder"),
        text_config=sizes.text("llama", len(tokenizer), tie_word_embeddings=True),
        audio_token_id=_id(tokenizer, "<|pad|>"),
    )


def _gemma4(tokenizer: Any, sizes: Sizes) -> Any:
    from transformers import Gemma4Config

    kinds = ["sliding_attention" if n % 2 == 0 else "full_attention" for n in range(sizes.layers)]
    return Gemma4Config(
        audio_config=dict(
            model_type="gemma4_audio", hidden_size=sizes.tower_hidden, num_hidden_layers=sizes.tower_layers,
            num_attention_heads=2, subsampling_conv_channels=[128, 8], output_proj_dims=sizes.tower_hidden,
        ),
        text_config=sizes.text(
            "gemma4_text", len(tokenizer), head_dim=32, global_head_dim=32, sliding_window=24, layer_types=kinds,
            hidden_size_per_layer_input=16, vocab_size_per_layer_input=len(tokenizer), num_kv_shared_layers=0,
            final_logit_softcapping=30.0, tie_word_embeddings=True, pad_token_id=tokenizer.pad_token_id,
        ),
        audio_token_id=_id(tokenizer, "<|audio|>"),
        boa_token_id=_id(tokenizer, "<|audio>"),
        eoa_token_index=_id(tokenizer, "<audio|>"),
        image_token_id=_id(tokenizer, "<|image|>"),
        video_token_id=_id(tokenizer, "<|video|>"),
    )  # fmt: skip


@dataclass(frozen=True)
class _Parts:
    """The audio half of Gemma 4's processor: the other half needs torchvision."""

    extractor: Any
    tokenizer: Any

    def save_pretrained(self, directory: Any) -> None:
        self.extractor.save_pretrained(directory)
        self.tokenizer.save_pretrained(directory)


def _gemma4_processor(tokenizer: Any, template: str, bins: int) -> Any:
    from transformers import Gemma4AudioFeatureExtractor

    tokenizer.chat_template = template
    return _Parts(Gemma4AudioFeatureExtractor(), tokenizer)


FAMILIES: dict[str, Family] = {
    "qwen2_audio": Family(
        "<|audio_bos|><|AUDIO|><|audio_eos|>",
        {name: OMNI[name] for name in ("audio_token", "audio_bos_token", "audio_eos_token")},
        _qwen2_audio,
        "Qwen2AudioForConditionalGeneration",
        _whisper("Qwen2AudioProcessor"),
    ),
    "qwen2_5_omni": Family(
        "<|audio_bos|><|AUDIO|><|audio_eos|>",
        OMNI,
        _qwen2_5_omni,
        "Qwen2_5OmniThinkerForConditionalGeneration",
        _omni_processor,
    ),
    "qwen3_omni_moe": Family(
        "<|audio_start|><|audio_pad|><|audio_end|>",
        OMNI_3,
        _qwen3_omni_moe,
        "Qwen3OmniMoeThinkerForConditionalGeneration",
        _omni_processor,
    ),
    "qwen3_asr": Family(
        "<|audio_start|><|audio_pad|><|audio_end|>",
        {name: OMNI_3[name] for name in ("audio_token", "audio_bos_token", "audio_eos_token")},
        _qwen3_asr,
        "Qwen3ASRForConditionalGeneration",
        _qwen3_asr_processor,
    ),
    "audioflamingo3": Family(
        "<sound>",
        ["<sound>"],
        _flamingo("AudioFlamingo3"),
        "AudioFlamingo3ForConditionalGeneration",
        _whisper("AudioFlamingo3Processor"),
    ),
    "musicflamingo": Family(
        "<sound>",
        ["<sound>", "<|sound_bos|>", "<|sound_eos|>"],
        _flamingo("MusicFlamingo"),
        "MusicFlamingoForConditionalGeneration",
        _whisper("MusicFlamingoProcessor"),
    ),
    "voxtral": Family(
        "[BEGIN_AUDIO][AUDIO]",
        # The processor takes token 24 for the placeholder.
        [*MISTRAL, *(f"<SPECIAL_{n}>" for n in range(8, 24)), "[AUDIO]", "[BEGIN_AUDIO]"],
        _voxtral,
        "VoxtralForConditionalGeneration",
        _voxtral_processor,
    ),
    "granite_speech": Family(
        "<|audio|>",
        ["<|audio|>"],
        _granite_speech,
        "GraniteSpeechForConditionalGeneration",
        _granite_speech_processor,
    ),
    "gemma4": Family(
        "<|audio|>",
        ["<|audio|>", "<|audio>", "<audio|>", "<|image|>", "<|video|>"],
        _gemma4,
        "Gemma4ForConditionalGeneration",
        _gemma4_processor,
    ),
    "glmasr": Family(
        "<|begin_of_audio|><|pad|><|end_of_audio|>",
        ["<|pad|>", "<|begin_of_audio|>", "<|end_of_audio|>"],
        _glmasr,
        "GlmAsrForConditionalGeneration",
        _whisper("GlmAsrProcessor"),
    ),
}
FAMILIES = {name: family for name, family in FAMILIES.items() if name not in TOO_RECENT}
