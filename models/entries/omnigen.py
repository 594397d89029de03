"""OmniGen: one sequence of text ids, images among them, time and noise; causal except within images."""
# fmt: off

from __future__ import annotations

from ..specs import Entry, Integers, Normal, Values

TEXT, IMAGE, TOKENS = 16, range(5, 9), 16 + 1 + 256  # an input image stands at positions 5 to 8 of sample 0


def _sees(pad: int, query: int, key: int) -> float:
    """Whether `query` attends to `key` after `pad` positions of left padding (padding itself sees everything)."""
    generated = query > TEXT
    return float(query < pad or (key >= pad and (generated or key <= query)) or (not pad and {query, key} <= {*IMAGE}))


ENTRIES = {
    "omnigen": Entry(
        cls="OmniGenTransformer2DModel",
        tiny=dict(in_channels=4, patch_size=2, hidden_size=64, num_attention_heads=4, num_key_value_heads=4,
                  intermediate_size=96, num_layers=3, pad_token_id=2, vocab_size=64, pos_embed_max_size=24,
                  time_step_dim=32, max_position_embeddings=8192,
                  rope_scaling=dict(short_factor=[1.0 + 0.1 * i for i in range(8)],
                                    long_factor=[1.0 + i for i in range(8)])),
        tiny_inputs=dict(
            hidden_states=Normal((2, 4, 32, 32)), timestep=Values([0.75, 0.25], "float32"),
            input_ids=Integers((2, TEXT), 64), input_img_latents=[Normal((1, 4, 4, 4))],
            input_image_sizes={0: [[IMAGE.start, IMAGE.stop]]},
            attention_mask=Values([[[_sees(pad, i, j) for j in range(TOKENS)] for i in range(TOKENS)]
                                   for pad in (0, 5)], "float32"),
            position_ids=Values([[0] * pad + [*range(TOKENS - pad)] for pad in (0, 5)], "int64"),
            return_dict=False),
    ),
}
