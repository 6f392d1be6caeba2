"""How tokens tell the document that they are of: by its number, in what reads them and in what masks attention."""

NOBODY = -1
"""In the place of a document's number: what fills a sequence up."""
