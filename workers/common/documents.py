"""What whoever packs documents and whoever masks them agree on, without importing each other."""

NOBODY = -1
"""In the place of a document's number: what fills a sequence up. It is no document's, and nothing is counted of it."""
