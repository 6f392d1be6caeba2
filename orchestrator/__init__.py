"""The Ray driver: worker group, run log, tracking, and the policies between them."""
