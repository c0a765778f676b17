"""The families of pre-norm decoders with a gated feed-forward layer: Llama and its relatives.

They share one skeleton and differ in their biases and in their norms inside attention.
To add a family: docs/add_a_family.md.
"""

from typing import Any

from pcscale.families.axes import FFN, HEAD_DIM, KV_HEADS, Q_HEADS, RESIDUAL, VOCAB, Axis
from pcscale.families.spec import Condition, Family, Kind, Weight, is_tied


def _linear(name: str, out: Axis, in_: Axis, reads: str | None = None) -> Weight:
    return Weight(f"{name}.weight", Kind.LINEAR, (out, in_), reads=f"{reads}.weight" if reads else None)


def _norm(name: str, axis: Axis) -> Weight:
    return Weight(f"{name}.weight", Kind.NORM, (axis,))


def _bias(name: str, axis: Axis, when: Condition | None = None) -> Weight:
    return Weight(f"{name}.bias", Kind.BIAS, (axis,), when=when)


def _flag(key: str) -> Condition:
    return lambda config: bool(config.get(key, False))


_EMBEDDING = Weight("model.embed_tokens.weight", Kind.EMBEDDING, (VOCAB, RESIDUAL))
_HEAD = Weight(
    "lm_head.weight", Kind.HEAD, (VOCAB, RESIDUAL), reads="model.norm.weight", when=lambda config: not is_tied(config)
)
_LAYER = (
    _norm("input_layernorm", RESIDUAL),
    _linear("self_attn.q_proj", out=Q_HEADS, in_=RESIDUAL, reads="input_layernorm"),
    _linear("self_attn.k_proj", out=KV_HEADS, in_=RESIDUAL, reads="input_layernorm"),
    _linear("self_attn.v_proj", out=KV_HEADS, in_=RESIDUAL, reads="input_layernorm"),
    _linear("self_attn.o_proj", out=RESIDUAL, in_=Q_HEADS),
    _norm("post_attention_layernorm", RESIDUAL),
    _linear("mlp.gate_proj", out=FFN, in_=RESIDUAL, reads="post_attention_layernorm"),
    _linear("mlp.up_proj", out=FFN, in_=RESIDUAL, reads="post_attention_layernorm"),
    _linear("mlp.down_proj", out=RESIDUAL, in_=FFN),
)


def _qkv_biases(when: Condition | None) -> tuple[Weight, ...]:
    axes = {"q": Q_HEADS, "k": KV_HEADS, "v": KV_HEADS}
    return tuple(_bias(f"self_attn.{name}_proj", axis, when) for name, axis in axes.items())


_ATTENTION_BIAS = _flag("attention_bias")
_HEAD_NORMS = (_norm("self_attn.q_norm", HEAD_DIM), _norm("self_attn.k_norm", HEAD_DIM))
_OPTIONAL_ATTENTION_BIASES = (*_qkv_biases(_ATTENTION_BIAS), _bias("self_attn.o_proj", RESIDUAL, _ATTENTION_BIAS))
_OPTIONAL_MLP_BIASES = (
    _bias("mlp.gate_proj", FFN, _flag("mlp_bias")),
    _bias("mlp.up_proj", FFN, _flag("mlp_bias")),
    _bias("mlp.down_proj", RESIDUAL, _flag("mlp_bias")),
)


def _decoder(name: str, examples: str, extra: tuple[Weight, ...] = (), **fields: Any) -> Family:
    after = (_norm("model.norm", RESIDUAL), _HEAD)
    return Family(name, examples, "model.layers.{layer}.", (_EMBEDDING,), _LAYER + extra, after, **fields)


LLAMA = _decoder(
    "llama",
    "Llama 2 and 3, SmolLM2, TinyLlama",
    _OPTIONAL_ATTENTION_BIASES + _OPTIONAL_MLP_BIASES,
    # The config class refuses a hidden size that the head count does not divide, even with head_dim set.
    hidden_multiple=lambda config: config["num_attention_heads"],
)
MISTRAL = _decoder("mistral", "Mistral 7B", stated=("num_key_value_heads",))
QWEN2 = _decoder("qwen2", "Qwen2 and Qwen2.5", _qkv_biases(None), stated=("num_key_value_heads",))
QWEN3 = _decoder("qwen3", "Qwen3", _HEAD_NORMS + _OPTIONAL_ATTENTION_BIASES, stated=("num_key_value_heads", "head_dim"))
