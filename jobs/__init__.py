"""What a person starts: the command line, configs, training, checkpoints and benchmarks."""
