"""Model families: one declarative entry each. To add one, see docs/architecture.md."""

from __future__ import annotations

import difflib

from .errors import CallError
from .family_kinds import (
    FC,
    FC1_FC2,
    FC_IN_OUT,
    FEED_FORWARD,
    FOUR_H,
    FUSED,
    IN_TURN,
    INNER,
    LINEARS,
    MLP_BLOCK,
    MLP_FC1_FC2,
    NO_SHARED,
    NORM_INSIDE,
    ONE_MATRIX,
    ROUTED_SIZES,
    SIZE,
    UP_DOWN,
    W1_W3_W2,
    gpt,
    granite,
    mixture,
    pictures,
    states,
    zamba,
)
from .family_spec import GATED, FamilySpec, Ffn, Mixture
from .unsupported import why_unsupported

FAMILIES = {
    spec.model_type: spec
    for spec in (
        mixture(
            "afmoe", "Afmoe", "Trinity", ("moe_intermediate_size", "num_shared_experts"),
            "mlp.shared_experts",
        ),
        FamilySpec("apertus", "Apertus", "Apertus", UP_DOWN),
        FamilySpec("arcee", "Arcee", "AFM-4.5B", UP_DOWN),
        mixture(
            "aria_text", "AriaText", "Aria, text only",
            ("intermediate_size", "moe_num_shared_experts"), "mlp.shared_experts", transposed=True,
            packed=(("mlp.experts.fc1.weight", "mlp.experts.fc2.weight"),),
        ),
        mixture("axk1", "AXK1", "A.X K1", ROUTED_SIZES, "mlp.shared_experts"),
        mixture("axk2", "AXK2", "A.X K2", ROUTED_SIZES, "mlp.shared_experts"),
        pictures("aya_vision", "AyaVision", "Aya Vision", older=INNER),
        mixture(
            "bailing_hybrid", "BailingHybrid", "Ling 2.5, Ring 2.5",
            ("moe_intermediate_size", "num_shared_experts"), "mlp.shared_experts",
        ),
        FamilySpec("bamba", "Bamba", "Bamba", FEED_FORWARD),
        FamilySpec("biogpt", "BioGpt", "BioGPT", FC1_FC2, base="biogpt"),
        FamilySpec("bitnet", "BitNet", "BitNet b1.58", refused={"experts": NORM_INSIDE}),
        FamilySpec(
            "bloom", "Bloom", "BLOOM, BLOOMZ", FOUR_H, base="transformer", blocks="h",
            layer_keys=("n_layer", "num_hidden_layers"), size_keys=(),
            width_keys=("n_embed", "hidden_size"),
        ),
        gpt("codegen", "CodeGen", "CodeGen", FC_IN_OUT),
        FamilySpec("cohere", "Cohere", "Command R, Aya"),
        FamilySpec("cohere2", "Cohere2", "Command R7B, Command A"),
        mixture("cohere2_moe", "Cohere2Moe", "Command, mixtures", SIZE),
        FamilySpec("cwm", "Cwm", "Code World Model"),
        FamilySpec(
            "dbrx", "Dbrx", "DBRX", base="transformer", blocks="blocks",
            layer_keys=("n_layers", "num_hidden_layers"),
            mixture=Mixture("ffn", ("ffn_config.ffn_hidden_size",), GATED, ()),
            refused={"experts": ONE_MATRIX, "fusion": NO_SHARED},
        ),
        mixture(
            "deepseek_v2", "DeepseekV2", "DeepSeek-V2", ROUTED_SIZES, "mlp.shared_experts"
        ),
        mixture(
            "deepseek_v3", "DeepseekV3", "DeepSeek-V3, DeepSeek-R1, Moonlight", ROUTED_SIZES,
            "mlp.shared_experts",
        ),
        mixture(
            "deepseek_v32", "DeepseekV32", "DeepSeek-V3.2", ROUTED_SIZES, "mlp.shared_experts"
        ),
        FamilySpec("diffllama", "DiffLlama", "DiffLlama"),
        FamilySpec("doge", "Doge", "Doge, dense"),
        mixture("dots1", "Dots1", "dots.llm1", ROUTED_SIZES, "mlp.shared_experts"),
        FamilySpec("ernie4_5", "Ernie4_5", "ERNIE 4.5, dense"),
        mixture(
            "ernie4_5_moe", "Ernie4_5_Moe", "ERNIE 4.5",
            ("moe_intermediate_size", "moe_num_shared_experts"), "mlp.shared_experts",
        ),
        FamilySpec("exaone4", "Exaone4", "EXAONE 4"),
        mixture(
            "exaone_moe", "ExaoneMoe", "K-EXAONE", ("moe_intermediate_size", "num_shared_experts"),
            "mlp.shared_experts",
        ),
        FamilySpec(
            "falcon", "Falcon", "Falcon", FOUR_H, base="transformer", blocks="h",
            layer_keys=("num_hidden_layers", "n_layer"), size_keys=("ffn_hidden_size",),
            width_keys=("hidden_size",),
        ),
        FamilySpec("falcon_h1", "FalconH1", "Falcon-H1", FEED_FORWARD),
        states("falcon_mamba", "FalconMamba", "Falcon Mamba"),
        mixture("flex_olmo", "FlexOlmo", "FlexOlmo", SIZE),
        FamilySpec("gemma", "Gemma", "Gemma"),
        FamilySpec("gemma2", "Gemma2", "Gemma 2"),
        pictures("gemma3", "Gemma3", "Gemma 3", older=INNER),
        FamilySpec(
            "gemma3_text", "Gemma3Text", "Gemma 3, text only", causal_lm="Gemma3ForCausalLM"
        ),
        FamilySpec(
            "gemma4_text", "Gemma4Text", "Gemma 4, text only", causal_lm="Gemma4ForCausalLM"
        ),
        FamilySpec(
            "gemma4_unified_text", "Gemma4UnifiedText", "Gemma 4 unified, text only",
            causal_lm="Gemma4UnifiedForCausalLM",
        ),
        FamilySpec("glm", "Glm", "GLM-4 9B, GLM-Edge", FUSED),
        FamilySpec("glm4", "Glm4", "GLM-4-0414, GLM-Z1", FUSED),
        mixture("glm4_moe", "Glm4Moe", "GLM-4.5, GLM-4.6", ROUTED_SIZES, "mlp.shared_experts"),
        mixture(
            "glm4_moe_lite", "Glm4MoeLite", "GLM-4.7-Flash", ROUTED_SIZES, "mlp.shared_experts"
        ),
        mixture("glm_moe_dsa", "GlmMoeDsa", "GLM-5", ROUTED_SIZES, "mlp.shared_experts"),
        gpt(
            "gpt2", "GPT2", "GPT-2, Cerebras-GPT",
            Ffn(("mlp.c_fc",), "mlp.c_proj", transposed=True), "GPT2LMHeadModel",
        ),
        gpt("gpt_bigcode", "GPTBigCode", "StarCoder, SantaCoder", FC),
        FamilySpec(
            "gpt_neo", "GPTNeo", "GPT-Neo", FC, base="transformer", blocks="h",
            layer_keys=("num_layers", "num_hidden_layers"), width_keys=("hidden_size",),
        ),
        FamilySpec("gpt_neox", "GPTNeoX", "GPT-NeoX, Pythia", FOUR_H, base="gpt_neox"),
        FamilySpec(
            "gpt_neox_japanese", "GPTNeoXJapanese", "GPT-NeoX Japanese", FOUR_H,
            base="gpt_neox_japanese", size_keys=(),
        ),
        mixture("gpt_oss", "GptOss", "gpt-oss", SIZE, interleaved=True),
        gpt("gptj", "GPTJ", "GPT-J", FC_IN_OUT),
        FamilySpec("granite", "Granite", "Granite 3"),
        FamilySpec("granite_swa", "GraniteSWA", "Granite with sliding windows"),
        mixture(
            "granitemoe", "GraniteMoe", "Granite 3 MoE", SIZE, block="block_sparse_moe",
            packed=(LINEARS,),
        ),
        mixture(
            "granitemoe_swa", "GraniteMoeSWA", "Granite MoE with sliding windows", SIZE,
            block="block_sparse_moe", packed=(LINEARS,),
        ),
        granite("granitemoehybrid", "GraniteMoeHybrid", "Granite 4"),
        granite("granitemoeshared", "GraniteMoeShared", "Granite MoE with a shared FFN"),
        FamilySpec("helium", "Helium", "Helium"),
        FamilySpec("hunyuan_v1_dense", "HunYuanDenseV1", "Hunyuan dense"),
        mixture(
            "hunyuan_v1_moe", "HunYuanMoEV1", "Hunyuan-A13B", SIZE, "mlp.shared_mlp"
        ),
        mixture(
            "hy_v3", "HYV3", "Hy3", ("moe_intermediate_size", "num_shared_experts"),
            "mlp.shared_experts", names=(("shared_experts", "shared_mlp"),),
        ),
        mixture(
            "hy_v4", "HYV4", "Hy4", ROUTED_SIZES, "mlp.shared_experts",
            names=(("gate_proj", "linear_gate"),),
        ),
        FamilySpec("hyperclovax", "HyperCLOVAX", "HyperCLOVA X SEED"),
        pictures("idefics3", "Idefics3", "Idefics 3", stack="text_model"),
        pictures("internvl", "InternVL", "InternVL 3", older=INNER),
        FamilySpec("jais2", "Jais2", "Jais 2", UP_DOWN),
        mixture("jamba", "Jamba", "Jamba", SIZE, block="feed_forward", ffn=FEED_FORWARD),
        mixture(
            "jetmoe", "JetMoe", "JetMoE", SIZE,
            packed=(("mlp.input_linear.weight", "mlp.output_linear.weight"),),
        ),
        mixture(
            "kimi_linear", "KimiLinear", "Kimi Linear",
            ("moe_intermediate_size", "num_shared_experts"), "mlp.shared_experts", stored="mlp",
            names=(("mlp", "block_sparse_moe"),),
        ),
        mixture(
            "kolibri1", "Kolibri1", "Kolibri", ("shared_expert_intermediate_size",),
            "mlp.shared_experts",
        ),
        mixture(
            "laguna", "Laguna", "Laguna", ("shared_expert_intermediate_size",),
            "mlp.shared_experts", names=(("shared_experts", "shared_expert"),),
        ),
        FamilySpec("lfm2", "Lfm2", "LFM2", W1_W3_W2, size_keys=()),
        mixture(
            "lfm2_moe", "Lfm2Moe", "LFM2-8B-A1B", ("moe_intermediate_size",),
            block="feed_forward", stored="feed_forward", ffn=W1_W3_W2,
        ),
        FamilySpec("lfm3", "Lfm3", "LFM3", W1_W3_W2, size_keys=()),
        FamilySpec("llama", "Llama", "Llama 1 to 3.3, TinyLlama, Yi, SmolLM2"),
        mixture(
            "llama4_text", "Llama4Text", "Llama 4, text only", SIZE, "feed_forward.shared_expert",
            block="feed_forward", transposed=True, ffn=FEED_FORWARD, causal_lm="Llama4ForCausalLM",
        ),
        pictures("llava", "Llava", "LLaVA 1.5, Pixtral", older=INNER),
        pictures("llava_next", "LlavaNext", "LLaVA-NeXT", older=INNER),
        states("mamba", "Mamba", "Mamba"),
        states("mamba2", "Mamba2", "Mamba 2, Codestral Mamba"),
        mixture("mellum", "Mellum", "Mellum, mixtures", ("moe_intermediate_size",)),
        mixture("mimo_v2_flash", "MiMoV2Flash", "MiMo-V2-Flash", ("moe_intermediate_size",)),
        FamilySpec("minicpm3", "MiniCPM3", "MiniCPM3"),
        mixture("minimax_m2", "MiniMaxM2", "MiniMax-M2", SIZE, stored="block_sparse_moe"),
        FamilySpec("ministral", "Ministral", "Ministral", fixable_tokenizer=True),
        FamilySpec("ministral3", "Ministral3", "Ministral 3, text only"),
        FamilySpec("mistral", "Mistral", "Mistral", fixable_tokenizer=True),
        pictures("mistral3", "Mistral3", "Mistral Small 3.1", older=INNER),
        mixture("mixtral", "Mixtral", "Mixtral", SIZE, stored="block_sparse_moe"),
        FamilySpec(
            "modernbert-decoder", "ModernBertDecoder", "ModernBERT decoder, Ettin",
            Ffn(("mlp.Wi",), "mlp.Wo", fused=True),
        ),
        FamilySpec(
            "mpt", "Mpt", "MPT", Ffn(("ffn.up_proj",), "ffn.down_proj"), base="transformer",
            blocks="blocks", layer_keys=("n_layers",), size_keys=(), width_keys=("d_model",),
        ),
        FamilySpec("nanochat", "NanoChat", "nanochat", MLP_FC1_FC2),
        FamilySpec("nemotron", "Nemotron", "Nemotron-4, Minitron", UP_DOWN),
        FamilySpec(
            "nemotron_h", "NemotronH", "Nemotron-H, Nemotron 3", Ffn(("mixer",), "mixer"),
            layer_keys=("num_hidden_layers", "layers_block_type"), older=("backbone.layers",),
            entrances=("mixer.in_proj", "mixer.q_proj", "mixer.up_proj", "mixer.gate"),
            refused={"experts": IN_TURN, "fusion": IN_TURN},
        ),
        FamilySpec("olmo", "Olmo", "OLMo"),
        FamilySpec("olmo2", "Olmo2", "OLMo 2"),
        FamilySpec("olmo3", "Olmo3", "OLMo 3"),
        FamilySpec("olmo_hybrid", "OlmoHybrid", "OLMo Hybrid"),
        mixture("olmoe", "Olmoe", "OLMoE", SIZE),
        FamilySpec("opt", "OPT", "OPT", FC1_FC2, stack="decoder", size_keys=("ffn_dim",)),
        FamilySpec("persimmon", "Persimmon", "Persimmon", FOUR_H),
        FamilySpec("phi", "Phi", "Phi-1, Phi-1.5, Phi-2", MLP_FC1_FC2),
        FamilySpec("phi3", "Phi3", "Phi-3, Phi-3.5 mini, Phi-4", FUSED),
        mixture("phimoe", "Phimoe", "Phi-3.5-MoE", SIZE, stored="block_sparse_moe"),
        FamilySpec("qwen2", "Qwen2", "Qwen1.5, Qwen2, Qwen2.5, QwQ"),
        pictures("qwen2_5_vl", "Qwen2_5_VL", "Qwen2.5-VL", older="model.layers"),
        mixture(
            "qwen2_moe", "Qwen2Moe", "Qwen1.5-MoE, Qwen2-57B-A14B",
            ("shared_expert_intermediate_size",), "mlp.shared_expert",
        ),
        pictures("qwen2_vl", "Qwen2VL", "Qwen2-VL", older="model.layers"),
        FamilySpec("qwen3", "Qwen3", "Qwen3"),
        mixture(
            "qwen3_5_moe_text", "Qwen3_5MoeText", "Qwen3.5 MoE, text only",
            ("shared_expert_intermediate_size",), "mlp.shared_expert",
            causal_lm="Qwen3_5MoeForCausalLM",
        ),
        FamilySpec(
            "qwen3_5_text", "Qwen3_5Text", "Qwen3.5, text only", causal_lm="Qwen3_5ForCausalLM"
        ),
        mixture(
            "qwen3_moe", "Qwen3Moe", "Qwen3-30B-A3B, Qwen3-235B-A22B", ("moe_intermediate_size",)
        ),
        mixture(
            "qwen3_next", "Qwen3Next", "Qwen3-Next", ("shared_expert_intermediate_size",),
            "mlp.shared_expert",
        ),
        pictures("qwen3_vl", "Qwen3VL", "Qwen3-VL"),
        FamilySpec("recurrent_gemma", "RecurrentGemma", "RecurrentGemma", MLP_BLOCK, size_keys=()),
        FamilySpec("seed_oss", "SeedOss", "Seed-OSS"),
        FamilySpec("smollm3", "SmolLM3", "SmolLM3"),
        pictures("smolvlm", "SmolVLM", "SmolVLM, SmolVLM2", stack="text_model"),
        mixture("solar_open", "SolarOpen", "Solar Open", ROUTED_SIZES, "mlp.shared_experts"),
        FamilySpec("stablelm", "StableLm", "StableLM"),
        FamilySpec("starcoder2", "Starcoder2", "StarCoder2", FC),
        FamilySpec("vaultgemma", "VaultGemma", "VaultGemma"),
        FamilySpec(
            "xglm", "XGLM", "XGLM", FC1_FC2, layer_keys=("num_layers",), size_keys=("ffn_dim",)
        ),
        FamilySpec("youtu", "Youtu", "Youtu-LLM"),
        zamba("zamba", "Zamba", "Zamba"),
        zamba("zamba2", "Zamba2", "Zamba2"),
        mixture("zaya", "Zaya", "ZAYA1", ("moe_intermediate_size",)),
    )
}  # fmt: skip


def find_family(config: dict, architectures: list[str]) -> FamilySpec:
    """The family of a config. Raises CallError for one that is not in the table."""
    model_type = config["model_type"]
    if model_type.startswith("pace_"):
        raise CallError(
            "the source is a PaceLLM already",
            "convert its base model instead (base_model in its model card)",
        )
    spec = FAMILIES.get(model_type)
    if spec is None:
        raise _unknown(config)
    if model_type == "mistral" and "layer_types" in config:
        raise CallError(
            "the source's config.json says mistral and has layer_types: transformers loads such a "
            "model as a ministral",
            "write ministral and MinistralForCausalLM there, or take layer_types out",
        )
    if architectures and spec.causal_lm_class not in architectures:
        raise CallError(
            f"the source is a {architectures[0]}, not a causal language model",
            f"give a checkpoint of {spec.causal_lm_class}",
        )
    return spec


def _unknown(config: dict) -> CallError:
    model_type = config["model_type"]
    known = why_unsupported(config, FAMILIES)
    if known:
        return CallError(f"{model_type} {known[0]}", known[1])
    close = difflib.get_close_matches(model_type, FAMILIES, n=1)
    meant = f"did you mean {close[0]}? " if close else ""
    return CallError(
        f"model family {model_type!r} is not supported",
        f"{meant}`pace families` lists those that are",
    )
