"""Singular spectra of a model's projections and of a trace's keys and values.

python -m kvreplay.spectra weights MODEL --out DIR     # W_Q, W_K, W_V of safetensors or GGUF weights
python -m kvreplay.spectra trace TRACE --out DIR       # K after and before RoPE, and V, per layer and KV head
"""
