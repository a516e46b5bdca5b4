"""Imported last by the process that ranks are forked from: what it has imported stays as it is.

So the ranks' collector does not touch, and thereby copy, what they share with it; and the process
ends at once, instead of looking through all of it for 2 to 3 s while training starts and whoever
called the command waits for its output to end.
"""

import gc

gc.freeze()
