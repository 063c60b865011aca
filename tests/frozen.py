"""What was imported until here is here to stay: the garbage collector need not look at its million objects again.

Imported last by the server that tests' processes are forked from; `join` ends with a collection in each of them.
"""

import gc

gc.collect()
gc.freeze()
