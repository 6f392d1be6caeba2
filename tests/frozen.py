"""Imported last by the server that processes are forked from: what it has imported is garbage for no collection.

Otherwise each process would walk through a million objects, and copy every page that they are on, at its first one.
"""

import gc

gc.collect()
gc.freeze()
