"""What runs in one GPU process: models, data, the engine, the step loop and the checkpoint format."""
