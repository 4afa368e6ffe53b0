"""Parameter shapes of well-known models."""


def _gpt2(vocabulary=50257, context=1024, width=768, layers=12) -> dict:
    """Shapes, as tuples, of GPT-2 (Radford et al. 2019): 124,439,808 parameters, output tied to the embedding."""
    norm = {"scale": (width,), "bias": (width,)}
    dense = lambda n, m: {"kernel": (n, m), "bias": (m,)}
    layer = {
        "ln_1": norm,
        "attn": {"c_attn": dense(width, 3 * width), "c_proj": dense(width, width)},
        "ln_2": norm,
        "mlp": {"c_fc": dense(width, 4 * width), "c_proj": dense(4 * width, width)},
    }
    return {"wte": (vocabulary, width), "wpe": (context, width), "h": [layer] * layers, "ln_f": norm}


def _llama(width, layers, hidden, keys, vocabulary=32000) -> dict:
    """Shapes, as tuples, of a Llama (Touvron et al. 2023); ``keys`` is the width of the keys, and of the values."""
    layer = {
        "attention": {"wq": (width, width), "wk": (width, keys), "wv": (width, keys), "wo": (width, width)},
        "feed_forward": {"w1": (width, hidden), "w2": (hidden, width), "w3": (width, hidden)},
        "attention_norm": (width,),
        "ffn_norm": (width,),
    }
    return {
        "tok_embeddings": (vocabulary, width),
        "layers": [layer] * layers,
        "norm": (width,),
        "output": (width, vocabulary),
    }


MODELS = {
    "gpt2": _gpt2,
    "llama-7b": lambda: _llama(4096, 32, 11008, 4096),
    "llama-70b": lambda: _llama(8192, 80, 28672, 1024),
}
