"""The Linear layers of one decoder layer, named once: what the model must have, and what is quantized and trained."""

LINEARS = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip
"""Names below ``thinker.model.layers.<number>``."""
