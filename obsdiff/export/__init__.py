"""Stage two: masks made physical, graphs, and the proof that they compute the same.

Callable: see obsdiff.export.stage.export.
"""

from obsdiff.callable import make_callable

make_callable(__name__, "export")
