"""The checkpoint format: safetensors shards and a JSON manifest; no pickle, no torch, no world size."""
