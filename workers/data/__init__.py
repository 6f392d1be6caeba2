"""The corpus, its token shards, and the order in which samples are read."""
