"""The families of pre-norm decoders with a gated feed-forward layer: Llama and its relatives.

They share one skeleton and differ in their biases and in their norms inside attention.
To add a family: docs/add_a_family.md.
"""

from collections.abc import Callable

from pcscale.families.axes import FFN, HEAD_DIM, KV_HEADS, Q_HEADS, RESIDUAL, VOCAB, Axis
from pcscale.families.spec import Condition, Config, Family, Kind, WeightSpec, is_tied


def _linear(name: str, out: Axis, in_: Axis, reads: str | None = None) -> WeightSpec:
    return WeightSpec(f"{name}.weight", Kind.LINEAR, (out, in_), reads=reads)


def _norm(name: str, axis: Axis) -> WeightSpec:
    return WeightSpec(f"{name}.weight", Kind.NORM, (axis,))


def _bias(name: str, axis: Axis, when: Condition | None = None) -> WeightSpec:
    return WeightSpec(f"{name}.bias", Kind.BIAS, (axis,), when)


def _flag(key: str) -> Condition:
    return lambda config: bool(config.get(key, False))


def _untied(config: Config) -> bool:
    return not is_tied(config)


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


def _attention_biases(when: Condition | None, o_proj: Condition | None) -> tuple[WeightSpec, ...]:
    biases = (
        _bias("self_attn.q_proj", Q_HEADS, when),
        _bias("self_attn.k_proj", KV_HEADS, when),
        _bias("self_attn.v_proj", KV_HEADS, when),
    )
    return biases if o_proj is None else (*biases, _bias("self_attn.o_proj", RESIDUAL, o_proj))


_HEAD_NORMS = (_norm("self_attn.q_norm", HEAD_DIM), _norm("self_attn.k_norm", HEAD_DIM))

_MLP_BIASES = (
    _bias("mlp.gate_proj", FFN, _flag("mlp_bias")),
    _bias("mlp.up_proj", FFN, _flag("mlp_bias")),
    _bias("mlp.down_proj", RESIDUAL, _flag("mlp_bias")),
)

_BEFORE = (WeightSpec("model.embed_tokens.weight", Kind.EMBEDDING, (VOCAB, RESIDUAL)),)

_AFTER = (
    _norm("model.norm", RESIDUAL),
    WeightSpec("lm_head.weight", Kind.HEAD, (VOCAB, RESIDUAL), when=_untied, reads="model.norm"),
)


def _any_width(config: Config) -> int:
    return 1


def _heads(config: Config) -> int:
    return config["num_attention_heads"]


def _decoder(
    name: str,
    examples: str,
    extra: tuple[WeightSpec, ...] = (),
    hidden_multiple: Callable[[Config], int] = _any_width,
    stated: tuple[str, ...] = (),
) -> Family:
    return Family(
        name=name,
        examples=examples,
        model_types=(name,),
        layer_prefix="model.layers.{layer}.",
        before=_BEFORE,
        layer=_LAYER + extra,
        after=_AFTER,
        hidden_multiple=hidden_multiple,
        stated=stated,
    )


_ATTENTION_BIAS = _flag("attention_bias")

LLAMA = _decoder(
    "llama",
    "Llama 2 and 3, SmolLM2, TinyLlama",
    _attention_biases(_ATTENTION_BIAS, o_proj=_ATTENTION_BIAS) + _MLP_BIASES,
    # The config class refuses a hidden size that the head count does not divide, even with head_dim set.
    hidden_multiple=_heads,
)
MISTRAL = _decoder("mistral", "Mistral 7B", stated=("num_key_value_heads",))
QWEN2 = _decoder("qwen2", "Qwen2 and Qwen2.5", _attention_biases(None, o_proj=None), stated=("num_key_value_heads",))
QWEN3 = _decoder(
    "qwen3",
    "Qwen3",
    _HEAD_NORMS + _attention_biases(_ATTENTION_BIAS, o_proj=_ATTENTION_BIAS),
    stated=("num_key_value_heads", "head_dim"),
)
