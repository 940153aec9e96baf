"""Compute: models, tensors and ranks. Quantization-aware distillation of Qwen3-ASR."""
