"""The optimizer: Newton-Schulz, Muon on flat ZeRO-1 shards, schedules; layout and plan are pure Python."""
