"""Studies: what is found out about runs that are there, or by many of them."""
