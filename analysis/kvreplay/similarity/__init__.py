"""How alike tokens are: cosines of a trace's keys (after and before RoPE) and values, per layer and KV head.

python -m kvreplay.similarity TRACE --out DIR
"""
