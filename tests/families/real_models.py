"""The sizes of three published models, written by hand from their config.json files."""

from pcscale.families.spec import Config

LLAMA_1B: Config = {
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128256,
    "tie_word_embeddings": True,
}
LLAMA_1B_UNTIED: Config = LLAMA_1B | {"tie_word_embeddings": False}
LLAMA_8B: Config = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}
SMOLLM2: Config = {
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
REAL = {"Llama-3.2-1B": LLAMA_1B, "Llama-3.1-8B": LLAMA_8B, "SmolLM2-135M": SMOLLM2}
