"""What a run will need, before a GPU is rented: memory, traffic, time, money and goodput."""
