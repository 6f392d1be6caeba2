"""What the question `batch-size` asks for and what it makes of it."""
