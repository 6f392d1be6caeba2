"""`raymuon doctor`: look at a cluster, its storage and its tracking before money is spent on them.

Probes observe (`node_probe`, `slot_probe`, `tracking_probe`), pure functions judge what they saw (`checks`, `places`),
and `examine` brings both together and leaves nothing behind.
"""
