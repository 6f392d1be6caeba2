"""`raymuon evaluate`: lm-eval's tasks over a checkpoint. Nothing else in raymuon knows lm-eval."""
