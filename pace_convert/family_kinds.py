"""What families share: shapes of FFNs, reasons why one can't have something, kinds of entries."""

from __future__ import annotations

from dataclasses import replace

from .family_spec import GATED, FamilySpec, Ffn, Mixture

FUSED = Ffn(("mlp.gate_up_proj",), "mlp.down_proj", fused=True)
UP_DOWN = Ffn(("mlp.up_proj",), "mlp.down_proj")
FC = Ffn(("mlp.c_fc",), "mlp.c_proj")
FEED_FORWARD = Ffn(("feed_forward.gate_proj", "feed_forward.up_proj"), "feed_forward.down_proj")
W1_W3_W2 = Ffn(("feed_forward.w1", "feed_forward.w3"), "feed_forward.w2")
MLP_BLOCK = Ffn(("mlp_block.gate_proj", "mlp_block.up_proj"), "mlp_block.down_proj")
NO_SHARED = "its tokens pass experts of their own, and no FFN sees all of them"
ONE_FFN = "its layers have no FFN of their own"
IN_TURN = "its layers are attention, states or FFN in turn, and not each has an FFN"
NORM_INSIDE = "a norm inside its FFNs weighs each neuron"
ONE_MATRIX = "the weights of its experts are one matrix"
NO_FFN = "its layers have no FFN"
SIZE = ("intermediate_size",)
ROUTED_SIZES = ("moe_intermediate_size", "n_shared_experts")
LINEARS = ("block_sparse_moe.input_linear.weight", "block_sparse_moe.output_linear.weight")
INNER = "language_model.model.layers"  # where many older multimodal checkpoints have the layers
FC1_FC2 = Ffn(("fc1",), "fc2")
MLP_FC1_FC2 = Ffn(("mlp.fc1",), "mlp.fc2")
FC_IN_OUT = Ffn(("mlp.fc_in",), "mlp.fc_out")
FOUR_H = Ffn(("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h")


def pictures(
    model_type: str, name: str, models: str, stack: str = "language_model", older: str = ""
) -> FamilySpec:
    """A text decoder beside a vision tower, which stays as it is."""
    return FamilySpec(
        model_type, name, models, stack=stack, text="text_config",
        older=(older,) if older else (),
    )  # fmt: skip


def mixture(
    model_type: str, name: str, models: str, sizes: tuple[str, ...], shared: str = "", *,
    block: str = "mlp", stored: str = "", packed: tuple[tuple[str, str], ...] = (),
    interleaved: bool = False, transposed: bool = False, ffn: Ffn = GATED, causal_lm: str = "",
    names: tuple[tuple[str, str], ...] = (),
) -> FamilySpec:  # fmt: skip
    """A mixture of experts. shared: path of the FFN that all tokens pass beside their experts.
    stored: checkpoints call the block so, and its experts' layers w1, w3 and w2. ffn: of layers
    that are no mixture. names: see `FamilySpec.stored`.
    """
    one = f"{stored or block}.experts.{{}}"
    mixture = Mixture(
        block,
        sizes,
        expert=Ffn((f"{one}.w1", f"{one}.w3"), f"{one}.w2") if stored else _gated(one),
        packed=(*packed, (f"{block}.experts.gate_up_proj", f"{block}.experts.down_proj")),
        shared=_gated(shared) if shared else None,
        stored=stored,
        interleaved=interleaved,
        transposed=transposed,
    )
    refused = {} if shared else {"fusion": NO_SHARED}
    return FamilySpec(
        model_type, name, models, ffn, causal_lm, mixture=mixture, stored=names, refused=refused
    )


def granite(model_type: str, name: str, models: str) -> FamilySpec:
    """Experts beside an FFN that all tokens pass; where there are none, that FFN alone."""
    shared = Ffn(("shared_mlp.input_linear",), "shared_mlp.output_linear", fused=True)
    plain = mixture(model_type, name, models, ("shared_intermediate_size",),
        block="block_sparse_moe", packed=(LINEARS,), ffn=shared)  # fmt: skip
    assert plain.mixture is not None
    return replace(
        plain, mixture=replace(plain.mixture, shared=shared), entrances=shared.inputs, refused={}
    )


def zamba(model_type: str, name: str, models: str) -> FamilySpec:
    """State-space layers, and one FFN that some of them share."""
    return FamilySpec(
        model_type, name, models, Ffn(("mamba.in_proj",), "mamba.out_proj"), size_keys=(),
        entrances=("mamba.in_proj", "mamba_decoder.mamba.in_proj"),
        refused={"experts": ONE_FFN, "fusion": ONE_FFN},
    )  # fmt: skip


def states(model_type: str, name: str, models: str) -> FamilySpec:
    """Layers that are a state-space mixer and nothing else."""
    return FamilySpec(
        model_type, name, models, Ffn(("mixer.in_proj",), "mixer.out_proj"), base="backbone",
        size_keys=(), entrances=("mixer.in_proj",), refused={"experts": NO_FFN, "fusion": NO_FFN},
    )  # fmt: skip


def _gated(path: str) -> Ffn:
    return Ffn((f"{path}.gate_proj", f"{path}.up_proj"), f"{path}.down_proj")


def gpt(model_type: str, name: str, models: str, ffn: Ffn, causal_lm: str = "") -> FamilySpec:
    """GPT-2 and what took over its names."""
    return FamilySpec(
        model_type, name, models, ffn, causal_lm, base="transformer", blocks="h",
        layer_keys=("n_layer", "num_hidden_layers"), size_keys=("n_inner",),
        width_keys=("n_embd", "hidden_size"),
    )  # fmt: skip
