"""The model family: loading, prompt, mel, packing, tower, decoder, decoding. Only here is transformers imported."""
