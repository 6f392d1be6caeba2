"""What the question `scaling-law` asks for and what it makes of it."""
